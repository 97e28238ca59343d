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
from flowhelpers.suites import lens_saes
from flowhelpers.suites.attention import AttentionOutput
from flowhelpers.suites.lens_saes import MATCH, kind_of, norms_of, scales_of
from flowhelpers.suites.registry import check_is_sae
from flowhelpers.suites.sae_files import SaeFiles, hook_names, hook_of, read_decoder

SMALLEST_THRESHOLD = 1e-6
PROBES = 4  # features whose effect on a reconstruction is looked at
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
        norms: Norms of what features write for each unit of activation: those of the decoder
            rows, or 1 where sae-lens divides by them.
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

    def __str__(self) -> str:
        return f"the SAE for {self.site} ({self.source})"

    @cached_property
    def lens_sae(self) -> Any:
        """sae-lens's SAE, loaded and checked the first time that it is asked for."""
        if self.loader is None:
            raise ValueError(f"the SAE for {self.site} has no weights, its directions are all")
        lens_sae, some = self.loader, torch.nonzero(self.norms).flatten()[:PROBES]
        if of_file := not hasattr(lens_sae, "W_dec"):
            lens_sae = self.loader()
            lens_saes.silence(lens_sae, self.excluded, f"{self.site} ({self.source})")
        rows = lens_sae.W_dec[some]
        if of_file and self.input_site == self.site:  # at z rows are others
            rows = self.norms[some, None] * unit_rows(self.decoder[some])
        lens_saes.check_effects(str(self), lens_sae, some, rows)
        return lens_sae

    @cached_property
    def fingerprint(self) -> str:
        """A digest of directions and weights, made once: the key of tables made from them."""
        digest = hashlib.blake2b(digest_size=16)
        tensors = [self.decoder]
        if hasattr(self.loader, "W_dec"):  # it may have been put in the files' place
            tensors += self.loader.state_dict().values()
            digest.update(str(self.loader.cfg.to_dict()).encode())
        elif self.files:
            digest.update(f"{self.files.content} {self.dtype}".encode())
            tensors = tensors if self.input_site != self.site else []  # the model's W_O decides too
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def thresholds(self) -> Float[Tensor, "features"] | None:
        """Each feature's threshold, in units of its activation.

        None if it has none, or if tokens are scaled each by itself, and with them thresholds.
        """
        threshold = None if self.normalises_tokens else getattr(self.lens_sae, "threshold", None)
        return None if threshold is None else threshold.detach().float()

    @property
    def normalises_tokens(self) -> bool:
        """Whether what is read is first scaled token by token, to a variance or a norm."""
        return self.lens_sae.cfg.normalize_activations != "none"

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
        that scales each token first are scaled back (CHOICES 43).
        """
        return self.encode_with_gradients(activations)

    def encode_with_gradients(
        self, activations: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch features"]:
        """As `encode`, by operations that gradients can be taken of."""
        x = activations.to(self.lens_sae.dtype)
        codes = self.lens_sae.encode(x)
        return codes * scales_of(self.lens_sae, x).to(codes) if self.normalises_tokens else codes

    @torch.no_grad()
    def decode(
        self,
        features: Float[Tensor, "*batch features"],
        at: Float[Tensor, "*batch d_model"] | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction from feature activations, as `encode` gives them.

        `at` is what was read; an SAE that normalises each token needs it.
        """
        if at is None and self.normalises_tokens:
            raise ValueError(f"{self} normalises each token: decode needs `at`")
        at = features if at is None else at
        return lens_saes.decoded(self.lens_sae, features, at.to(self.lens_sae.dtype))

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

    @property
    def lacking(self) -> list[str]:
        """What it has not of an encoder that is a matrix and a bias, as gated ones have not."""
        return [name for name in ("W_enc", "b_enc") if name not in self.lens_sae.state_dict()]

    def check_encoder(self, folded: bool = False) -> None:
        """A ValueError if there is no encoder of a matrix and a bias, or no thresholds to fold."""
        if lacking := ["thresholds to fold"] * (folded and self.thresholds is None) + self.lacking:
            told = f"has no {' and no '.join(lacking)}: {MATCH}"
            raise ValueError(f"{self} ({kind_of(self.lens_sae)}) {told}")

    def weights(self, folded: bool = False) -> Weights:
        """Its weights in float32; a ValueError if its encoder is not W_enc and b_enc.

        Folded thresholds (SAE Match, eq. 4; CHOICES 16) give W_enc/θ, b_enc/θ and W_dec·θ, with θ
        clamped away from 0: the output stays the same, and activations are in units of θ.
        """
        self.check_encoder(folded)
        lens_sae = self.lens_sae
        encoder, bias, decoder = (
            w.detach().float() for w in (lens_sae.W_enc, lens_sae.b_enc, lens_sae.W_dec)
        )
        if lens_sae.cfg.apply_b_dec_to_input:
            bias = bias - lens_sae.b_dec.detach().float() @ encoder
        at = getattr(lens_sae, "threshold", torch.zeros_like(bias)).detach().float()
        if not folded:
            return Weights(encoder.T, bias, decoder, at)
        at = at.clamp(min=SMALLEST_THRESHOLD)
        rows = at[:, None]
        return Weights(encoder.T / rows, bias / at, decoder * rows, torch.ones_like(at))


def make_sae(
    site: Site, lens_sae: Any, d_model: int, source: str, output: Output = lambda: None
) -> SAE:
    """The SAE around one of sae-lens that is in memory, as `read_sae` around files."""
    about = lens_sae.cfg.to_dict() | lens_sae.cfg.metadata.to_dict()
    check_is_sae(f"the SAE for {site} ({source})", about)
    lens_saes.fold_norms(lens_sae)
    decoder = lens_sae.W_dec.detach().clone()
    sae = _in_residual_basis(site, decoder, hook_of(about), d_model, source, output)
    lens_saes.silence(lens_sae, sae.excluded, f"{site} ({source})")
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
    scale = files.scale or norms_of(decoder).masked_fill(sae.norms == 0, 1.0)
    return replace(sae, norms=sae.norms / scale, loader=load, files=files, dtype=dtype)


def _in_residual_basis(
    site: Site, decoder: Tensor, hook: str, d_model: int, source: str, output: Output
) -> SAE:
    """Brings decoder rows to the residual basis, and leaves out those that are of no use.

    Rows at z are carried by W_O and the gain of the norm after attention, where the model has one
    (CHOICES 30; this project's extension). What the norm divides by differs by token but is a
    positive number: the direction is exact.
    """
    what = f"the SAE for {site} ({source})"
    expected, input_site, to_stream = hook_names(site), site, None
    if hook not in ("", f"blocks.{site.layer}.", *expected):
        input_site = Site(site.layer, "z")
        if site.module != "att" or hook not in hook_names(input_site):
            raise ValueError(f"{what} was trained at {hook}: expected {expected[0]}")
        if (to_stream := output()) is None:
            raise ValueError(f"{what} reads z, before W_O: its model has to bring z to the stream")
    width = len(to_stream.weights) if to_stream else d_model
    if decoder.ndim != 2 or decoder.shape[1] != width:
        found = " × ".join(map(str, decoder.shape[1:]))
        raise ValueError(f"{what} has width {found}: expected {width}, as its model")
    if not decoder.is_floating_point() or decoder.itemsize < 2:
        raise ValueError(f"{what} has a decoder in {decoder.dtype}: save it in 16 bits or more")
    decoder = to_stream.to_residual(decoder) if to_stream else decoder
    norms = norms_of(decoder)
    bad = torch.nonzero(~torch.isfinite(norms) | (norms == 0)).flatten()
    if len(bad) == len(norms):
        raise ValueError(f"{what} has no decoder row that is usable")
    if len(bad):
        told = f"{len(bad)} of {len(norms)} decoder rows of {what} are zero or not finite"
        warnings.warn(f"{told}; they are left out of matching: {bad[:10].tolist()}", stacklevel=4)
    decoder = decoder.contiguous()
    decoder[bad] = norms[bad] = 0
    return SAE(site, decoder, norms, bad, source, None, input_site)
