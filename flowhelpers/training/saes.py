"""Train an SAE for every site of a model, all sites in one pass over the text.

BatchTopK SAEs of sae-lens, trained by its `MultiSAETrainer` and saved as the JumpReLU SAEs that
`sae_lens.SAE.load_from_disk` reads. Every site starts from random weights of its own: a likeness
between layers is then the model's doing and not the recipe's.
"""

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.suites.model import Model, hook_name, run_model

SPARE = 0.94  # share of a chunk's tokens that is used: the rest makes up for special tokens


class SAERecipe(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
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

    features: PositiveInt = 1024
    k: PositiveInt = 14
    tokens: PositiveInt = 3_000_000
    batch: PositiveInt = 640
    rows: PositiveInt = 32
    lr: PositiveFloat = 3e-3
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    warmup: int = Field(default=100, ge=0)
    decay: float = Field(default=0.3, ge=0, le=1)
    dead_after: PositiveInt = 100_000
    decoder_norm: PositiveFloat = 1.0
    seed: int = Field(default=0, ge=0)

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
        """Steps that one forward pass of the model feeds.

        Raises:
            ValueError: If it does not fill a single batch.
        """
        usable = int(SPARE * self.rows * (context - 1))
        if usable < self.batch:
            raise ValueError(
                f"{self.rows} rows of {context} tokens do not fill one batch of {self.batch}"
                f" tokens, but at most {usable}"
            )
        return usable // self.batch


def train_saes(
    recipe: SAERecipe,
    model: Model,
    rows: Integer[np.ndarray, "rows context"],
    folder: Path,
    sites: Sequence[Site],
    model_name: str,
    n_checkpoints: int = 20,
) -> Path:
    """Train an SAE at every site and save each as a sae-lens folder.

    Args:
        recipe: The numbers.
        model: The model; its device is used for the SAEs as well.
        rows: Token ids, one row of text each, in the order in which they are to be read.
        folder: Where checkpoints are kept; a second call goes on from the last one.
        sites: The sites.
        model_name: The model's name in the saved SAEs.
        n_checkpoints: Checkpoints in all, of which the last is kept.

    Returns:
        The folder `folder/saes` with one sae-lens folder for each site, `0-res` and so on.

    Raises:
        FloatingPointError: If a weight is not finite.
    """
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    final = folder / "saes"
    if final.exists():
        return final
    torch.set_flush_denormal(True)

    def keep_this_alone(checkpoint_path: Path | None) -> None:  # called when it is whole
        assert checkpoint_path is not None
        (checkpoint_path / "whole").touch()
        for path in checkpoint_path.parent.iterdir():
            if path != checkpoint_path:
                shutil.rmtree(path)

    config = trainer_config(recipe, str(model.device), n_checkpoints, folder / "checkpoints")
    saes = {
        f"{site.layer}-{site.module}": new_sae(recipe, model, site, model_name) for site in sites
    }
    trainer = MultiSAETrainer(
        cfg=config,
        saes=saes,
        hook_names={name: sae.cfg.metadata.hook_name for name, sae in saes.items()},
        data_provider=iter(()),
        save_checkpoint_fn=keep_this_alone,
    )
    for whole in folder.glob("checkpoints/*/whole"):
        trainer.load_checkpoint(whole.parent)
    done = trainer.n_training_samples
    trainer.n_training_steps = done // recipe.batch  # saved before the last step was counted
    for one in trainer.trainers.values():
        one.n_training_steps = trainer.n_training_steps
    trainer.checkpoint_thresholds = [t for t in trainer.checkpoint_thresholds if t >= done]
    read = trainer.n_training_steps + config.n_batches_for_norm_estimate if done else 0
    trainer.data_provider = batches(recipe, model, rows, sites, read)
    trainer.fit()
    part = folder / "saes.part"
    shutil.rmtree(part, ignore_errors=True)
    for name, sae in saes.items():
        if not all(weight.isfinite().all() for weight in sae.parameters()):
            raise FloatingPointError(f"the SAE at {name} has weights that are not finite")
        save_half(sae, part / name)
    os.replace(part, final)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return final


def batches(
    recipe: SAERecipe,
    model: Model,
    rows: Integer[np.ndarray, "rows context"],
    sites: Sequence[Site],
    start: int = 0,
) -> Iterator[dict[str, Float[Tensor, "batch d_model"]]]:
    """Activations by hook name, token by token in seeded order, from batch `start` on.

    BOS and other special tokens are left out. The text is read again from its start when it ends.
    """
    per_chunk = recipe.steps_per_chunk(rows.shape[1])
    special = torch.tensor(sorted(model.tokenizer.all_special_ids))
    last = max(site.layer for site in sites)

    def from_chunk(chunk: int) -> Iterator[dict[str, Tensor]]:
        while True:
            picked = np.arange(chunk * recipe.rows, (chunk + 1) * recipe.rows) % len(rows)
            ids = torch.from_numpy(np.asarray(rows[picked]).astype(np.int64))
            _, read = run_model(model, ids.to(model.device), read=sites, stop_after=last)
            usable = torch.nonzero(~torch.isin(ids.flatten(), special)).flatten()
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + chunk)
            order = usable[torch.randperm(len(usable), generator=generator)]
            needed = per_chunk * recipe.batch
            order = order.repeat(math.ceil(needed / len(order)))[:needed].to(model.device)
            flat = {hook_name(model, site): x.flatten(0, 1).float() for site, x in read.items()}
            for places in order.split(recipe.batch):
                yield {hook: x[places] for hook, x in flat.items()}
            chunk += 1

    return islice(from_chunk(start // per_chunk), start % per_chunk, None)


def new_sae(recipe: SAERecipe, model: Model, site: Site, model_name: str) -> Any:
    """An SAE with random weights of the site's own, whichever sites are trained beside it."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(recipe.seed * 1_000_003 + model.sites().index(site))
    hook = hook_name(model, site)
    config = BatchTopKTrainingSAEConfig(
        d_in=model.d_model,
        d_sae=recipe.features,
        k=recipe.k,
        device=str(model.device),
        dtype="float32",
        normalize_activations="expected_average_only_in",  # norms differ tenfold between sites
        decoder_init_norm=recipe.decoder_norm,
        metadata=SAEMetadata(model_name=model_name, hook_name=hook, prepend_bos=True),
    )
    return BatchTopKTrainingSAE(config)


def trainer_config(recipe: SAERecipe, device: str, n_checkpoints: int, folder: Path) -> Any:
    """The recipe in sae-lens's words."""
    from sae_lens.config import SAETrainerConfig

    return SAETrainerConfig(
        n_checkpoints=n_checkpoints,
        checkpoint_path=str(folder),
        total_training_samples=recipe.steps * recipe.batch,
        device=device,
        autocast=True,
        lr=recipe.lr,
        lr_end=0.0,
        lr_warm_up_steps=recipe.warmup,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        lr_decay_steps=int(recipe.decay * recipe.steps),
        train_batch_size_samples=recipe.batch,
        dead_feature_window=recipe.dead_after // recipe.batch,
        feature_sampling_window=1000,
        n_batches_for_norm_estimate=1,
    )


def save_half(sae: Any, folder: Path) -> None:
    """Save a trained SAE as a JumpReLU SAE in sae-lens's format, weights in half precision.

    Decoder rows get unit norm. sae-lens computes in the type that `cfg.json` names, float32.
    """
    path = Path(sae.save_inference_model(folder)[0])
    weights = {name: x.to(torch.float16).contiguous() for name, x in load_file(path).items()}
    save_file(weights, path)
