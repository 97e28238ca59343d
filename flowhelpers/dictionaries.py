"""One dictionary: its unit directions in the residual basis, and its encoder."""

import hashlib
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.features import FeatureId, Site
from flowhelpers.model import HOOKS, AttentionOutput

SMALLEST_THRESHOLD = 1e-6


@dataclass(frozen=True)
class Weights:
    """A JumpReLU dictionary's weights, one row a feature: active where pre > threshold.

    Attributes:
        encoder: Encoder rows.
        bias: Encoder biases, a bias subtracted from the input included.
        decoder: Decoder rows.
        threshold: Thresholds; 1 once folded.
    """

    encoder: Float[Tensor, "features d_in"]
    bias: Float[Tensor, "features"]
    decoder: Float[Tensor, "features d_out"]
    threshold: Float[Tensor, "features"]


@dataclass(frozen=True)
class Dictionary:
    """A sparse autoencoder at a site.

    Attributes:
        site: The site whose contribution to the stream it describes.
        directions: Decoder rows in the residual basis, each of unit norm in float32,
            `[features, d_model]`; zero for the rows in `excluded`, so that they match nothing.
        norms: Norms of the decoder rows before that.
        excluded: Indices of the rows that hold NaN or infinity or are all zero.
        source: Where it was loaded from.
        sae: sae-lens's SAE, which encodes.
        reads: Where it reads: its site, or the attention heads' outputs z before W_O, `12/z`.
    """

    site: Site
    directions: Float[Tensor, "features d_model"]
    norms: Float[Tensor, "features"]
    excluded: Int[Tensor, "bad"]
    source: str
    sae: Any = field(repr=False)
    reads: Site

    @cached_property
    def fingerprint(self) -> str:
        """A digest of directions and weights, by which tables made from them are known."""
        digest = hashlib.blake2b(digest_size=16)
        weights = [] if self.sae is None else self.sae.state_dict().values()
        for tensor in (self.directions, *weights):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

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
        """Feature activations; a feature is active where its value is above zero (CHOICES 4).

        Raises:
            ValueError: If there is no encoder.
        """
        if self.sae is None:
            raise ValueError(
                f"the dictionary for {self.site} has no encoder: its activations cannot be read"
            )
        return self.sae.encode(activations.to(self.sae.W_enc.dtype))

    @torch.no_grad()
    def decode(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch d_model"]:
        """Activations rebuilt from feature activations."""
        return self.sae.decode(features)

    def rows(self, features: Int[Tensor, "n"]) -> Float[Tensor, "n d_in"]:
        """What features write for each unit of activation, at the site that is read, z included.

        Raises:
            ValueError: If there are no weights, or a row was excluded.
        """
        if self.sae is None:
            raise ValueError(f"the dictionary for {self.site} has no weights: it cannot write")
        if (bad := features[torch.isin(features, self.excluded.to(features.device))]).numel():
            self.direction(FeatureId(self.site.layer, self.site.module, int(bad[0])))
        return self.sae.W_dec.detach()[features.to(self.sae.W_dec.device)]

    def written(
        self, feature: FeatureId, activation: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What one feature writes at these activations: `a · v`, in the scale of the stream.

        Raises:
            ValueError: If the dictionary reads z: what it writes passes a norm on its way.
        """
        if self.reads != self.site:
            raise ValueError(f"{feature} reads {self.reads}: only the direction it writes is known")
        return activation[..., None] * self.norms[feature.index] * self.direction(feature)

    def weights(self, folded: bool = False) -> Weights:
        """Its weights, one row a feature, in float32.

        Args:
            folded: Whether thresholds are folded in (SAE Match, eq. 4; CHOICES 16): W_enc/θ,
                b_enc/θ, W_dec·θ, with θ clamped away from 0. The output stays the same, and
                activations are in units of θ.

        Raises:
            ValueError: If there is no threshold to fold in.
        """
        sae = self.sae
        threshold = getattr(sae, "threshold", None)
        if threshold is None and folded:
            raise ValueError(
                f"the dictionary for {self.site} ({self.source}) has no thresholds to fold"
            )
        encoder, bias, decoder = (w.detach().float() for w in (sae.W_enc, sae.b_enc, sae.W_dec))
        if sae.cfg.apply_b_dec_to_input:
            bias = bias - sae.b_dec.detach().float() @ encoder
        at = torch.zeros_like(bias) if threshold is None else threshold.detach().float()
        found = Weights(encoder.T, bias, decoder, at)
        if not folded:
            return found
        at = at.clamp(min=SMALLEST_THRESHOLD)
        return Weights(
            encoder.T / at[:, None], bias / at, decoder * at[:, None], torch.ones_like(at)
        )


def make_dictionary(
    site: Site, sae: Any, d_model: int, source: str, output: AttentionOutput | None = None
) -> Dictionary:
    """Bring an SAE's decoder to unit directions in the residual basis; note what is wrong with it.

    A decoder that writes at z, before W_O, is brought there by W_O and the gain of the norm after
    attention, where the model has one (CHOICES 30; this project's extension). What the norm divides
    by differs by token but is a positive number: the direction is exact.

    Args:
        site: The site.
        sae: An SAE of sae-lens.
        d_model: Width of the model's stream, which the directions have to share.
        source: Where it came from, for messages.
        output: How the model brings z into the stream at this layer.

    Raises:
        ValueError: If the width is another, the hook is not the site's, or no row is usable.
    """
    weights = sae.W_dec.detach().float()
    reads = _hooked_site(site, sae.cfg.metadata.hook_name, source)
    if reads != site:
        if output is None:
            raise ValueError(
                f"the dictionary for {site} ({source}) reads z, before W_O: it cannot be compared"
                " with the stream unless its model says how z gets there"
            )
        weights = output.in_stream(weights)
    if weights.shape[1] != d_model:
        raise ValueError(
            f"the dictionary for {site} ({source}) has width {weights.shape[1]}:"
            f" expected {d_model}, the width of its model"
        )
    norms = weights.norm(dim=1)
    encoder = [sae.W_enc.T, sae.b_enc[:, None], *_thresholds(sae)]
    finite = torch.stack([torch.isfinite(rows).all(dim=1) for rows in (weights, *encoder)]).all(0)
    bad = torch.nonzero(~finite | (norms == 0)).flatten()
    if len(bad) == len(norms):
        raise ValueError(f"the dictionary for {site} ({source}) has no decoder row that is usable")
    directions = weights / norms[:, None]
    if len(bad):
        directions[bad] = 0
        with torch.no_grad():  # never active, and nothing written
            for rows in (sae.W_dec, *encoder):
                rows[bad] = 0
        listed = ", ".join(str(int(i)) for i in bad[:10]) + (", …" if len(bad) > 10 else "")
        warnings.warn(
            f"{len(bad)} of {len(norms)} decoder rows for {site} ({source}) are zero, or they or"
            f" their encoder are not finite; they are left out of matching: {listed}",
            stacklevel=2,
        )
    return Dictionary(site, directions.contiguous(), norms, bad, source, sae, reads)


def _thresholds(sae: Any) -> list[Tensor]:
    return [sae.threshold[:, None]] if hasattr(sae, "threshold") else []


def _hooked_site(site: Site, hook: str | None, source: str) -> Site:
    expected = HOOKS[site.module].format(layer=site.layer)
    if hook in (None, expected):
        return site
    if site.module == "att" and hook == HOOKS["z"].format(layer=site.layer):
        return Site(site.layer, "z")
    raise ValueError(
        f"the dictionary for {site} ({source}) was trained at {hook}: expected {expected}"
    )


def load_folder(
    path: Path,
    site: Site,
    d_model: int,
    device: str,
    dtype: str,
    output: AttentionOutput | None = None,
) -> Dictionary:
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
    return make_dictionary(site, sae, d_model, str(path), output)


def load_release(
    release: str,
    sae_id: str,
    site: Site,
    d_model: int,
    device: str,
    dtype: str,
    output: AttentionOutput | None = None,
) -> Dictionary:
    """Load a dictionary of a release that sae-lens knows, from the hub or its cache."""
    from sae_lens import SAE

    sae = SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)
    return make_dictionary(site, sae, d_model, f"{release}/{sae_id}", output)
