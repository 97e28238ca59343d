"""One dictionary: its unit directions in the residual basis, and its encoder."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.features import FeatureId, Site


@dataclass(frozen=True)
class Dictionary:
    """A sparse autoencoder at a site.

    Attributes:
        site: Where it reads.
        directions: Decoder rows, each of unit norm in float32, `[features, d_model]`; zero for the
            rows in `excluded`, so that they match nothing.
        norms: Norms of the decoder rows before that.
        excluded: Indices of the rows that hold NaN or infinity or are all zero.
        source: Where it was loaded from.
        sae: sae-lens's SAE, which encodes.
    """

    site: Site
    directions: Float[Tensor, "features d_model"]
    norms: Float[Tensor, "features"]
    excluded: Int[Tensor, "bad"]
    source: str
    sae: Any = field(repr=False)

    @property
    def width(self) -> int:
        """Number of features."""
        return self.directions.shape[0]

    def direction(self, feature: FeatureId) -> Float[Tensor, "d_model"]:
        """The unit direction of one feature.

        Raises:
            ValueError: If the row was excluded.
        """
        if feature.index in self.excluded:
            raise ValueError(f"{feature} has no direction: its decoder row is zero or not finite")
        return self.directions[feature.index]

    @torch.no_grad()
    def encode(
        self, activations: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch features"]:
        """Feature activations; a feature is active where its value is above zero (CHOICES 4)."""
        return self.sae.encode(activations.to(self.sae.W_enc.dtype))

    @torch.no_grad()
    def decode(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch d_model"]:
        """Activations rebuilt from feature activations."""
        return self.sae.decode(features)

    def written(
        self, feature: FeatureId, activation: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What one feature writes at these activations: `a · v`, in the scale of the stream."""
        return activation[..., None] * self.norms[feature.index] * self.direction(feature)


def make_dictionary(site: Site, sae: Any, d_model: int, source: str) -> Dictionary:
    """Bring an SAE's decoder to unit directions and note what is wrong with it.

    Args:
        site: Where it reads.
        sae: An SAE of sae-lens.
        d_model: Width of the model's stream, which the dictionary has to share.
        source: Where it came from, for messages.

    Raises:
        ValueError: If the width is another, the hook is not the site's, or no row is usable.
    """
    weights = sae.W_dec.detach().float()
    if weights.shape[1] != d_model:
        raise ValueError(
            f"the dictionary for {site} ({source}) has width {weights.shape[1]}:"
            f" expected {d_model}, the width of its model"
        )
    _check_hook(site, sae.cfg.metadata.hook_name, source)
    norms = weights.norm(dim=1)
    bad = torch.nonzero(~torch.isfinite(norms) | (norms == 0)).flatten()
    if len(bad) == len(norms):
        raise ValueError(f"the dictionary for {site} ({source}) has no decoder row that is usable")
    directions = weights / norms[:, None]
    if len(bad):
        directions[bad] = 0
        listed = ", ".join(str(int(i)) for i in bad[:10]) + (", …" if len(bad) > 10 else "")
        warnings.warn(
            f"{len(bad)} of {len(norms)} decoder rows for {site} ({source}) are zero or not finite"
            f" and are left out of matching: {listed}",
            stacklevel=2,
        )
    return Dictionary(site, directions.contiguous(), norms, bad, source, sae)


def _check_hook(site: Site, hook: str | None, source: str) -> None:
    if hook is None:
        return
    endings = {
        "res": ("hook_resid_post",),
        "mlp": ("hook_mlp_out",),
        "att": ("hook_attn_out",),
    }[site.module]
    if not any(hook == f"blocks.{site.layer}.{ending}" for ending in endings):
        raise ValueError(
            f"the dictionary for {site} ({source}) was trained at {hook}:"
            f" expected blocks.{site.layer}.{endings[0]}"
        )


def load_folder(path: Path, site: Site, d_model: int, device: str, dtype: str) -> Dictionary:
    """Load a dictionary from a folder in sae-lens's format.

    Raises:
        FileNotFoundError: If the folder is no sae-lens folder.
        ValueError: If a file is truncated or corrupt, or the dictionary does not fit.
    """
    from sae_lens import SAE
    from safetensors import SafetensorError

    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {path} for {site}: expected a folder saved by sae-lens"
            )
    try:
        sae = SAE.load_from_disk(path, device=device, dtype=dtype)
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the dictionary for {site} in {path} cannot be read,"
            f" a file of it may be truncated or corrupt: {error}"
        ) from error
    return make_dictionary(site, sae, d_model, str(path))


def load_release(
    release: str, sae_id: str, site: Site, d_model: int, device: str, dtype: str
) -> Dictionary:
    """Load a dictionary of a release that sae-lens knows, from the hub or its cache."""
    from sae_lens import SAE

    sae = SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)
    return make_dictionary(site, sae, d_model, f"{release}/{sae_id}")
