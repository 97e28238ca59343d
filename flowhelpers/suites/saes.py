"""One SAE: its decoder in the residual basis, and its encoder once something asks for it."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.core.directions import unit_rows
from flowhelpers.core.features import FeatureId, Site
from flowhelpers.suites.attention import AttentionOutput
from flowhelpers.suites.model import HOOKS
from flowhelpers.suites.registry import refuse_transcoder
from flowhelpers.suites.sae_files import SaeFiles, read_decoder

SMALLEST_THRESHOLD = 1e-6
Output = Callable[[], AttentionOutput | None]  # how a model brings z into the stream


@dataclass(frozen=True)
class Weights:
    """Weights, one row a feature; `bias` is the encoder's, that of the input's bias included."""

    encoder: Float[Tensor, "features d_in"]
    bias: Float[Tensor, "features"]
    decoder: Float[Tensor, "features d_out"]
    threshold: Float[Tensor, "features"]


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder at a site.

    Attributes:
        site: The site whose contribution to the stream it describes.
        decoder: Decoder rows in the residual basis, of any norm, in their stored type, and
            memory-mapped where the file allows it; zero for `excluded` rows, which match nothing.
        norms: Norms of the decoder rows, in the scale of the activations.
        excluded: Indices of the rows that hold NaN or infinity or are all zero.
        loader: sae-lens's SAE, which encodes, or what loads it.
        input_site: Where it reads: its site, or the attention heads' outputs z before W_O, `12/z`.
        dtype: Type of the weights that are still to be loaded.
    """

    site: Site
    decoder: Float[Tensor, "features d_model"]
    norms: Float[Tensor, "features"]
    excluded: Int[Tensor, "bad"]
    source: str
    loader: Any = field(repr=False)
    input_site: Site
    files: SaeFiles | None = field(default=None, repr=False)
    dtype: str = "float32"

    @cached_property
    def lens_sae(self) -> Any:
        """sae-lens's SAE, loaded the first time that it is asked for."""
        if isinstance(self.loader, torch.nn.Module):
            return self.loader
        if self.loader is None:
            raise ValueError(f"the SAE for {self.site} has no weights, its directions are all")
        lens_sae = self.loader()
        _silence_unusable(lens_sae, self.excluded, f"{self.site} ({self.source})")
        return lens_sae

    @cached_property
    def fingerprint(self) -> str:
        """A digest of directions and weights, the key of tables that are made from them."""
        digest = hashlib.blake2b(digest_size=16)
        tensors = [self.decoder]
        if isinstance(self.loader, torch.nn.Module):  # it may have been put in the files' place
            tensors += self.lens_sae.state_dict().values()
        elif self.files:
            digest.update(f"{self.files.content} {self.dtype}".encode())
            tensors = tensors if self.input_site != self.site else []  # the model's W_O decides too
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def thresholds(self) -> Float[Tensor, "features"] | None:
        """Each feature's threshold, in units of its activation; None if it has none."""
        threshold = getattr(self.lens_sae, "threshold", None)
        return None if threshold is None else threshold.detach().float()

    @property
    def normalises_tokens(self) -> bool:
        """Whether what is read is first brought to mean 0 and variance 1, token by token."""
        return self.lens_sae.cfg.normalize_activations == "layer_norm"

    @property
    def width(self) -> int:
        """Number of features."""
        return self.decoder.shape[0]

    @property
    def directions(self) -> Float[Tensor, "features d_model"]:
        """The decoder directions: rows of unit norm in float32, computed at each call."""
        return unit_rows(self.decoder)

    def direction(self, feature: FeatureId) -> Float[Tensor, "d_model"]:
        """The decoder direction of one feature, of unit norm; a ValueError if it was excluded."""
        if feature.index in self.excluded:
            raise ValueError(f"{feature} has no direction: its decoder row is zero or not finite")
        return unit_rows(self.decoder[feature.index][None])[0]

    @torch.no_grad()
    def encode(
        self, activations: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch features"]:
        """Feature activations; a feature is active where its value is above zero (CHOICES 4).

        A feature adds its activation times its decoder row, at every token: activations of an SAE
        that brings each token to variance 1 first are scaled back (CHOICES 43).
        """
        x = activations.to(self.lens_sae.W_enc.dtype)
        codes = self.lens_sae.encode(x)
        return codes * x.std(dim=-1, keepdim=True) if self.normalises_tokens else codes

    @torch.no_grad()
    def decode(
        self,
        features: Float[Tensor, "*batch features"],
        at: Float[Tensor, "*batch d_model"] | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction from feature activations, as `encode` gives them.

        `at` is what was read; an SAE that normalises each token needs it.
        """
        if not self.normalises_tokens:
            return self.lens_sae.decode(features)
        if at is None:
            raise ValueError(f"the SAE for {self.site} normalises each token: decode needs `at`")
        at = at.to(self.lens_sae.W_enc.dtype)
        shift, scale = at.mean(dim=-1, keepdim=True), at.std(dim=-1, keepdim=True)
        return features @ self.lens_sae.W_dec + self.lens_sae.b_dec * scale + shift

    def decoder_rows(self, features: Int[Tensor, "n"]) -> Float[Tensor, "n d_in"]:
        """What features write for each unit of activation, at the input site, z included."""
        if (bad := features[torch.isin(features, self.excluded.to(features.device))]).numel():
            self.direction(FeatureId(self.site.layer, self.site.module, int(bad[0])))
        return self.lens_sae.W_dec.detach()[features.to(self.lens_sae.W_dec.device)]

    def contribution(
        self, feature: FeatureId, activation: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What one feature writes at these activations: `a · v`, in the scale of the stream."""
        if self.input_site != self.site:
            raise ValueError(f"{feature} reads {self.input_site}: only its direction is known")
        size = activation[..., None].to(self.norms) * self.norms[feature.index]
        return size * self.direction(feature)

    def weights(self, folded: bool = False) -> Weights:
        """Its weights in float32.

        Folded thresholds (SAE Match, eq. 4; CHOICES 16) give W_enc/θ, b_enc/θ and W_dec·θ, with θ
        clamped away from 0: the output stays the same, and activations are in units of θ.
        """
        lens_sae, threshold = self.lens_sae, self.thresholds
        if threshold is None and folded:
            raise ValueError(f"the SAE for {self.site} ({self.source}) has no thresholds to fold")
        encoder, bias, decoder = (
            w.detach().float() for w in (lens_sae.W_enc, lens_sae.b_enc, lens_sae.W_dec)
        )
        if lens_sae.cfg.apply_b_dec_to_input:
            bias = bias - lens_sae.b_dec.detach().float() @ encoder
        at = torch.zeros_like(bias) if threshold is None else threshold
        if not folded:
            return Weights(encoder.T, bias, decoder, at)
        at = at.clamp(min=SMALLEST_THRESHOLD)
        rows = at[:, None]
        return Weights(encoder.T / rows, bias / at, decoder * rows, torch.ones_like(at))


def make_sae(
    site: Site, lens_sae: Any, d_model: int, source: str, output: Output = lambda: None
) -> SAE:
    """The SAE around one of sae-lens that is in memory, as `read_sae` around files."""
    refuse_transcoder(f"the SAE for {site} ({source})", lens_sae.cfg.architecture())
    decoder = lens_sae.W_dec.detach().clone()
    hook = lens_sae.cfg.metadata.hook_name
    sae = _in_residual_basis(site, decoder, hook, d_model, source, output)
    _silence_unusable(lens_sae, sae.excluded, f"{site} ({source})")
    return replace(sae, loader=lens_sae)


def read_sae(
    site: Site,
    files: SaeFiles,
    load: Callable[[], Any],
    d_model: int,
    device: str,
    dtype: str,
    output: Output = lambda: None,
) -> SAE:
    """The SAE of files: its decoder alone, in the type it is stored in, and what loads the rest.

    `load` gives sae-lens's SAE in `dtype`; `output` says how the model brings z into the stream,
    and is asked only if the SAE reads z. A file that is corrupt, of another width or hook point, or
    without a usable row is a ValueError.
    """
    decoder = read_decoder(files).to(device)
    sae = _in_residual_basis(site, decoder, files.hook, d_model, files.source, output)
    return replace(sae, norms=sae.norms / files.scale, loader=load, files=files, dtype=dtype)


def _in_residual_basis(
    site: Site, decoder: Tensor, hook: str | None, d_model: int, source: str, output: Output
) -> SAE:
    """Brings decoder rows to the residual basis, and leaves out those that are of no use.

    Rows at z are carried by W_O and the gain of the norm after attention, where the model has one
    (CHOICES 30; this project's extension). What the norm divides by differs by token but is a
    positive number: the direction is exact.
    """
    what = f"the SAE for {site} ({source})"
    expected, input_site = HOOKS[site.module].format(layer=site.layer), site
    if hook not in (None, "", expected):
        if site.module != "att" or hook != HOOKS["z"].format(layer=site.layer):
            raise ValueError(f"{what} was trained at {hook}: expected {expected}")
        input_site = Site(site.layer, "z")
        if (to_stream := output()) is None:
            raise ValueError(
                f"{what} reads z, before W_O: its model has to bring z into the stream"
            )
        decoder = to_stream.to_residual(decoder)
    if decoder.shape[1] != d_model:
        raise ValueError(f"{what} has width {decoder.shape[1]}: expected {d_model}, as its model")
    norms = torch.linalg.vector_norm(decoder, dim=1, dtype=torch.float32)
    bad = torch.nonzero(~torch.isfinite(norms) | (norms == 0)).flatten()
    if len(bad) == len(norms):
        raise ValueError(f"{what} has no decoder row that is usable")
    if len(bad):
        warnings.warn(
            f"{len(bad)} of {len(norms)} decoder rows of {what} are zero or not finite; they are"
            f" left out of matching: {bad[:10].tolist()}",
            stacklevel=4,
        )
    decoder = decoder.contiguous()
    decoder[bad] = norms[bad] = 0
    return SAE(site, decoder, norms, bad, source, None, input_site)


@torch.no_grad()
def _silence_unusable(lens_sae: Any, excluded: Tensor, what: str) -> None:
    """Features without a finite encoder are never active, those excluded write nothing either."""
    lens_sae.turn_off_forward_pass_hook_z_reshaping()  # the heads lie side by side already
    encoder = [lens_sae.W_enc.T, lens_sae.b_enc[:, None]]
    encoder += [lens_sae.threshold[:, None]] if hasattr(lens_sae, "threshold") else []
    finite = torch.stack([rows.isfinite().all(dim=1) for rows in encoder]).all(dim=0)
    deaf = torch.nonzero(~finite).flatten()
    excluded = excluded.to(deaf)
    if len(alone := deaf[~torch.isin(deaf, excluded)]):
        warnings.warn(
            f"{len(alone)} features at {what} have an encoder that is not finite; they are never"
            f" active here: {alone[:10].tolist()}",
            stacklevel=4,
        )
    for rows in encoder:
        rows[deaf] = 0
        rows[excluded] = 0
    lens_sae.W_dec[excluded] = 0
