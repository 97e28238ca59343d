"""Train an SAE for each of some sites of a model, together as far as memory allows.

Every site starts from random weights of its own: a likeness between layers is then the model's
doing and not the recipe's.
"""

import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Integer
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.core.machine import free_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import Model, hook_name, run_model, special_ids
from flowhelpers.training.language_model import Rows, write_folder

PASS = 32  # rows in one forward pass
SPARE = 0.94  # share of a chunk's tokens that is used: the rest makes up for special tokens


class SAERecipe(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Every number that decides how the SAEs of a model are trained."""

    sites: list[str] = []  # of an exception, those that it is for
    architecture: Literal["batchtopk", "jumprelu"] = "batchtopk"
    features: PositiveInt = 1024
    k: PositiveInt = 14  # features active per token, on average over a batch
    # Of JumpReLU: the weight of its L0 loss as in Gemma Scope (paper 4.1). Unless given, the
    # loss is that of Gemma Scope 2, which leads to k active features.
    l0_coefficient: PositiveFloat | None = None
    tokens: PositiveInt = 3_000_000
    batch: PositiveInt = 640  # tokens in one step: many small steps settle decoders faster
    rows: PositiveInt = 32  # of text whose tokens are shuffled together
    lr: PositiveFloat = 3e-3  # of Adam, at its peak
    warmup: NonNegativeInt = 100
    decay: float = Field(default=0.3, ge=0, le=1)  # share of the steps, at the end
    dead_after: PositiveInt = 100_000  # silent tokens, after which comes the auxiliary loss
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _k_fits(self) -> "SAERecipe":
        if self.k > self.features:
            raise ValueError(f"k is {self.k}, more than the {self.features} features")
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps that `tokens` make."""
        return max(1, self.tokens // self.batch)

    def steps_per_chunk(self, context: int) -> int:
        """Steps that the tokens which are shuffled together feed."""
        return max(1, int(SPARE * self.rows * (context - 1)) // self.batch)

    def memory(self, d_model: int, context: int) -> int:
        """Bytes for training one SAE: weights, gradients, Adam's two moments, activations."""
        weights = self.features * (2 * d_model + 2) + d_model
        activations = self.rows * context * d_model + 2 * self.batch * self.features
        return 4 * (4 * weights + activations)

    def at_once(self, d_model: int, context: int, device: str) -> int:
        """How many sites fit in memory together; a MemoryError if not one does."""
        each, free = self.memory(d_model, context), free_memory(device)
        if each > free:
            raise MemoryError(
                f"to train one SAE of {self.features:,} features at width {d_model} takes"
                f" {each / 2**30:.1f} GiB on {device} (weights, gradients, Adam's two moments), and"
                f" {free / 2**30:.1f} GiB are free: a recipe with fewer features or rows takes less"
            )
        return free // each


def train_saes(
    recipe: SAERecipe,
    model: Model,
    rows: Rows | Integer[np.ndarray, "rows context"],
    folder: Path,
    sites: Sequence[Site],
    model_name: str,
    checkpoint_every: int = 200,
) -> None:
    """Train an SAE at every site and save each as a sae-lens folder: `folder/0-res` and so on.

    Sites that do not fit in memory together are trained part by part, each on the same text. A
    second call goes on from the last checkpoint in `folder`. `rows` are read in their order.
    Raises a FloatingPointError if a loss is not finite.
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    names = [f"{site.layer}-{site.module}" for site in sites]
    if all((folder / name).exists() for name in names):
        return
    count = recipe.at_once(model.d_model, rows.shape[1], str(model.device))
    if count < len(sites):  # each part reads the same text again
        for start in range(0, len(sites), count):
            some = sites[start : start + count]
            train_saes(recipe, model, rows, folder, some, model_name, checkpoint_every)
        return
    checkpoints = folder / f"{names[0]}.checkpoints"
    config = SAETrainerConfig(
        checkpoint_path=str(checkpoints),
        total_training_samples=recipe.steps * recipe.batch,
        device=str(model.device),
        autocast=True,
        lr=recipe.lr,
        lr_end=0.0,
        lr_warm_up_steps=recipe.warmup,
        adam_beta2=0.99,
        lr_decay_steps=int(recipe.decay * recipe.steps),
        train_batch_size_samples=recipe.batch,
        dead_feature_window=recipe.dead_after // recipe.batch,
        n_batches_for_norm_estimate=1,
    )
    saes = {n: new_sae(recipe, model, s, model_name) for n, s in zip(names, sites, strict=True)}
    hooks = {name: sae.cfg.metadata.hook_name for name, sae in saes.items()}
    trainer = MultiSAETrainer(config, saes, hooks, iter(()))
    for path in sorted(checkpoints.glob("*[0-9]"), key=lambda path: int(path.name))[-1:]:
        if all((path / name).exists() for name in names):  # memory may have parted others before
            trainer.load_checkpoint(path)
    done = trainer.n_training_steps
    # The first batch gives the norms alone.
    trainer.data_provider = batches(recipe, model, rows, sites, done and done + 1)
    step_together(trainer, range(done, recipe.steps), checkpoint_every)
    trainer.fit()  # no step is left: it folds the norms into the weights
    for name, sae in saes.items():
        write_folder(folder / name, partial(save_half, sae))
    shutil.rmtree(checkpoints, ignore_errors=True)


def step_together(trainer: Any, steps: range, checkpoint_every: int) -> None:
    """Step all SAEs of a `MultiSAETrainer` at once, where its own `fit` steps one after another.

    On a CPU a thread for each SAE is several times faster than many threads for each product.
    """
    threads = torch.get_num_threads() if trainer.cfg.device == "cpu" else 1
    checkpoints = Path(trainer.cfg.checkpoint_path)

    def step(name: str, x: Tensor) -> Tensor:
        loss = trainer.trainers[name].step(x).loss.detach()
        trainer.trainers[name].n_training_steps += 1
        return loss

    trainer._estimate_scaling_factors()
    with ThreadPoolExecutor(threads, initializer=use_one_thread) as pool:
        for number in progress(steps, "SAEs"):
            batch = next(trainer.data_provider)
            inputs = [batch[hook] for hook in trainer.hook_names.values()]
            losses = torch.stack(list(pool.map(step, trainer.hook_names, inputs)))
            if not losses.isfinite().all():
                named = dict(zip(trainer.hook_names, losses.tolist(), strict=True))
                raise FloatingPointError(f"a loss is not finite at step {number}: {named}")
            trainer.n_training_samples += len(inputs[0])
            if (number + 1) % checkpoint_every == 0:
                target = checkpoints / str(number + 1)
                write_folder(target, lambda part: trainer.save_checkpoint(part.name))
                for path in set(checkpoints.iterdir()) - {target}:
                    shutil.rmtree(path)


def use_one_thread() -> None:
    """Let torch use one thread in the calling one, and no denormal numbers, which are slow."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def batches(
    recipe: SAERecipe,
    model: Model,
    rows: Rows | Integer[np.ndarray, "rows context"],
    sites: Sequence[Site],
    start: int = 0,
) -> Iterator[dict[str, Float[Tensor, "batch d_model"]]]:
    """Activations by hook name, token by token in seeded order, from batch `start` on.

    BOS and other special tokens are left out. The text is read again from its start when it ends.
    """
    special = special_ids(model.tokenizer)
    per_chunk = recipe.steps_per_chunk(rows.shape[1])
    chunk, skipped = divmod(start, per_chunk)
    while True:
        picked = np.arange(chunk * recipe.rows, (chunk + 1) * recipe.rows) % len(rows)
        ids = torch.from_numpy(rows[picked].astype(np.int64))
        parts = ids.to(model.device).split(PASS)
        reads = [run_model(model, part, sites, stop_after=max(sites).layer)[1] for part in parts]
        usable = torch.nonzero(~torch.isin(ids.flatten(), special)).flatten()
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + chunk)
        order = usable[torch.randperm(len(usable), generator=generator)]
        order = torch.from_numpy(np.resize(order, per_chunk * recipe.batch)).to(model.device)
        flat = {
            hook_name(model, site): torch.cat([read[site].flatten(0, 1) for read in reads]).float()
            for site in sites
        }
        for places in order.split(recipe.batch)[skipped:]:
            yield {hook: x[places] for hook, x in flat.items()}
        chunk, skipped = chunk + 1, 0


def new_sae(recipe: SAERecipe, model: Model, site: Site, model_name: str) -> Any:
    """An SAE with random weights of the site's own, whichever sites are trained beside it."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(recipe.seed * 1_000_003 + model.sites().index(site))
    hook = hook_name(model, site)
    shared: dict[str, Any] = {
        "d_in": model.d_model,
        "d_sae": recipe.features,
        "device": str(model.device),
        "normalize_activations": "expected_average_only_in",  # norms differ tenfold between sites
        "decoder_init_norm": 1.0,
        "metadata": SAEMetadata(model_name=model_name, hook_name=hook, prepend_bos=True),
    }
    if recipe.architecture == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=recipe.k, **shared))
    config = JumpReLUTrainingSAEConfig(
        jumprelu_sparsity_loss_mode="step" if recipe.l0_coefficient else "quadratic",
        l0_coefficient=recipe.l0_coefficient or 1.0,
        target_l0=None if recipe.l0_coefficient else recipe.k,
        l0_warm_up_steps=recipe.steps // 10,
        **shared,
    )
    return JumpReLUTrainingSAE(config)


def save_half(sae: Any, folder: Path) -> None:
    """Save a trained SAE as a JumpReLU SAE in sae-lens's format, weights in half precision.

    Decoder rows get unit norm. sae-lens computes in the type that `cfg.json` names, float32.
    """
    if sae.cfg.architecture() == "jumprelu":  # of BatchTopK sae-lens does it by itself
        sae.fold_W_dec_norm()
    path = Path(sae.save_inference_model(folder)[0])
    weights = {name: x.to(torch.float16).contiguous() for name, x in load_file(path).items()}
    save_file(weights, path)
