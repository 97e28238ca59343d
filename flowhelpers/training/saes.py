"""Train an SAE for every site of a model, all sites in one pass over the text.

Each SAE is a BatchTopK SAE of sae-lens, stepped by sae-lens's own `SAETrainer` and saved as
the JumpReLU SAE that `sae_lens.SAE.load_from_disk` reads. Every site starts from random weights of
its own: a likeness between layers is then the model's doing and not the recipe's.
"""

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from flowhelpers.core.features import Site
from flowhelpers.core.files import check_unchanged, write_json
from flowhelpers.suites.model import HOOKS, Model, run_model

SPARE = 0.94  # share of a chunk's tokens that is used: the rest makes up for special tokens


@dataclass(frozen=True)
class SAERecipe:
    """Every number that decides how the SAEs of a model are trained.

    Attributes:
        features: Features of each SAE.
        k: Features active per token, on average over a batch.
        tokens: Training tokens in all.
        batch: Tokens in one step: many small steps settle decoders faster than few large ones.
        rows: Rows of text in one forward pass of the model, whose tokens are then shuffled.
        lr: Learning rate of Adam at its peak.
        decay: Share of the steps, at the end, over which the learning rate falls to zero.
        dead_after: A feature silent for so many tokens gets the auxiliary loss.
        decoder_norm: Norm of the decoder rows before training.
    """

    features: int = 1024
    k: int = 14
    tokens: int = 3_000_000
    batch: int = 640
    rows: int = 32
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.99
    warmup: int = 100
    decay: float = 0.3
    dead_after: int = 100_000
    decoder_norm: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps that `tokens` make."""
        return max(1, self.tokens // self.batch)


def train_saes(
    recipe: SAERecipe,
    model: Model,
    rows: Integer[np.ndarray, "rows context"],
    folder: Path,
    sites: Sequence[Site] | None = None,
    checkpoint_every: float = 300.0,
    model_name: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Train an SAE at every site and save each as a sae-lens folder.

    Args:
        recipe: The numbers.
        model: The model; its device is used for the SAEs as well.
        rows: Token ids, one row of text each, in the order in which they are to be read.
        folder: Where checkpoints are kept; a second call goes on from the last one, with the same
            recipe, sites and origin alone.
        sites: The sites; by default all of the model's.
        checkpoint_every: Seconds between checkpoints.
        model_name: The model's name in the saved SAEs; by default what it was loaded from.
        origin: What decided model and rows, for the record.

    Returns:
        The folder `folder/SAEs` with one sae-lens folder for each site, `0-res` and so on.

    Raises:
        ValueError: If what is in `folder` was begun in another way.
    """
    final = folder / "saes"
    sites = list(sites or model.sites())
    record = check_begun(recipe, folder, sites, origin)
    if final.exists():
        return final
    torch.set_flush_denormal(True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recipe.json", record)
    trainers = {site: _trainer(recipe, model, site, model_name) for site in sites}
    done = _resume(trainers, folder)
    if not done:
        _set_scales(trainers, next(batches(recipe, model, rows, sites, chunk=0)))
    chunk_steps = steps_per_chunk(recipe, rows.shape[1])
    stream = batches(recipe, model, rows, sites, chunk=done // chunk_steps)
    saved_at = time.monotonic()
    bar = tqdm(range(done, recipe.steps), initial=done, total=recipe.steps, desc="saes")
    with _threads(model.device) as pool:
        for step in bar:
            batch = next(stream)
            losses = pool.map(_step, trainers.values(), [batch[site] for site in trainers])
            loss = sum(losses) / len(trainers)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss became {loss} at step {step}")
            if step % 20 == 0:
                dead = np.mean([float(t.dead_neurons.float().mean()) for t in trainers.values()])
                bar.set_postfix(mse=f"{loss:.2f}", dead=f"{dead:.1%}")
            at_boundary = (step + 1) % chunk_steps == 0
            if at_boundary and time.monotonic() - saved_at > checkpoint_every:
                _checkpoint(trainers, folder, step + 1)
                saved_at = time.monotonic()
    part = folder / "SAEs.part"
    shutil.rmtree(part, ignore_errors=True)
    for site, trainer in trainers.items():
        save_sae(trainer, part / f"{site.layer}-{site.module}")
    os.replace(part, final)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return final


def check_begun(
    recipe: SAERecipe,
    folder: Path,
    sites: Sequence[Site],
    origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of what decides SAEs; those begun in `folder` have to have the same.

    Raises:
        ValueError: If they have not.
    """
    record = {"sites": sorted(map(str, sites)), **asdict(recipe), "origin": dict(origin or {})}
    if (folder / "saes").exists() or any(folder.glob("checkpoint-*")):
        check_unchanged(folder / "recipe.json", record)
    return record


def steps_per_chunk(recipe: SAERecipe, context: int) -> int:
    """Steps that one forward pass of the model feeds."""
    steps = int(SPARE * recipe.rows * (context - 1)) // recipe.batch
    if steps < 1:
        raise ValueError(
            f"{recipe.rows} rows of {context} tokens do not fill one batch of {recipe.batch} tokens"
            f", but at most {int(SPARE * recipe.rows * (context - 1))}"
        )
    return steps


def batches(
    recipe: SAERecipe,
    model: Model,
    rows: Integer[np.ndarray, "rows context"],
    sites: Sequence[Site],
    chunk: int = 0,
) -> Iterator[dict[Site, Float[Tensor, "batch d_model"]]]:
    """Activations at all sites, token by token in seeded order, from a given chunk on.

    BOS and other special tokens are left out. The text is read again from its start when it ends.
    """
    special = torch.tensor(sorted(model.tokenizer.all_special_ids))
    last = max(site.layer for site in sites)
    while True:
        first = chunk * recipe.rows
        picked = np.arange(first, first + recipe.rows) % len(rows)
        ids = torch.from_numpy(np.asarray(rows[picked]).astype(np.int64))
        _, read = run_model(model, ids.to(model.device), read=sites, stop_after=last)
        usable = torch.nonzero(~torch.isin(ids.flatten(), special)).flatten()
        needed = steps_per_chunk(recipe, rows.shape[1]) * recipe.batch
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + chunk)
        order = usable[torch.randperm(len(usable), generator=generator)]
        order = order.repeat(math.ceil(needed / len(order)))[:needed].to(model.device)
        flat = {site: values.flatten(0, 1).float() for site, values in read.items()}
        for part in order.split(recipe.batch):
            yield {site: values[part] for site, values in flat.items()}
        chunk += 1


def _trainer(recipe: SAERecipe, model: Model, site: Site, model_name: str | None) -> Any:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    # Every site has random weights of its own, whichever sites are trained beside it.
    torch.manual_seed(recipe.seed * 1_000_003 + model.sites().index(site))
    lens_sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=model.d_model,
            d_sae=recipe.features,
            k=recipe.k,
            device=str(model.device),
            dtype="float32",
            normalize_activations="expected_average_only_in",
            decoder_init_norm=recipe.decoder_norm,
            metadata=SAEMetadata(
                model_name=model_name or model.name,
                hook_name=HOOKS[site.module].format(layer=site.layer),
                prepend_bos=True,
            ),
        )
    )
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=recipe.steps * recipe.batch,
        device=str(model.device),
        autocast=True,
        lr=recipe.lr,
        lr_end=0.0,
        lr_scheduler_name="constant",
        lr_warm_up_steps=recipe.warmup,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        lr_decay_steps=int(recipe.decay * recipe.steps),
        n_restart_cycles=1,
        train_batch_size_samples=recipe.batch,
        dead_feature_window=recipe.dead_after // recipe.batch,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=1,
    )
    return SAETrainer(cfg=config, sae=lens_sae, data_provider=iter(()))


def _threads(device: torch.device) -> ThreadPoolExecutor:
    # Small matrices: one thread for each SAE is faster than many threads for each product.
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    return ThreadPoolExecutor(workers, initializer=_one_thread if workers > 1 else None)


def _one_thread() -> None:
    torch.set_num_threads(1)  # of the calling thread alone
    torch.set_flush_denormal(True)


def _step(trainer: Any, batch: Tensor) -> float:
    loss = float(trainer.step(batch).losses["mse_loss"].detach())
    trainer.n_training_steps += 1
    if trainer.n_training_samples < trainer.cfg.total_training_samples:
        trainer.maybe_reset_sparsity()
    return loss


def _set_scales(trainers: dict[Site, Any], batch: dict[Site, Tensor]) -> None:
    # Norms differ tenfold between sites: each is brought to sqrt(d), and the scale folded in later.
    for site, trainer in trainers.items():
        norm = batch[site].norm(dim=-1).mean().item()
        trainer.activation_scaler.scaling_factor = math.sqrt(batch[site].shape[1]) / norm


def _checkpoint(trainers: dict[Site, Any], folder: Path, step: int) -> None:
    part = folder / "checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    for site, trainer in trainers.items():
        trainer.save_checkpoint(f"{site.layer}-{site.module}", base_path=part)
    old = list(folder.glob("checkpoint-*"))
    os.replace(part, folder / f"checkpoint-{step}")
    for path in old:
        shutil.rmtree(path)


def _resume(trainers: dict[Site, Any], folder: Path) -> int:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    if not checkpoints:
        return 0
    for site, trainer in trainers.items():
        path = checkpoints[-1] / f"{site.layer}-{site.module}"
        trainer.load_trainer_state(path)
        trainer.sae.load_weights_from_checkpoint(path)
    return int(checkpoints[-1].name.split("-")[1])


def save_sae(trainer: Any, folder: Path) -> None:
    """Save a trained SAE as a JumpReLU SAE in sae-lens's format, weights in half precision.

    Decoder rows get unit norm and the scale of the activations is folded in, so that the saved SAE
    reads activations as they are. sae-lens computes in the type that `cfg.json` names, float32.
    """
    from sae_lens.constants import SAE_WEIGHTS_FILENAME

    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.activation_scaler.scaling_factor = None
    trainer.set_final_sae_metadata()
    trainer.sae.save_inference_model(folder)
    weights = load_file(folder / SAE_WEIGHTS_FILENAME)
    save_file(
        {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()},
        folder / SAE_WEIGHTS_FILENAME,
    )
