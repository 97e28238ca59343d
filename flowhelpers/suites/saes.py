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
from flowhelpers.suites.model import hook_names
from flowhelpers.suites.registry import check_is_sae
from flowhelpers.suites.sae_files import SaeFiles, read_decoder

SMALLEST_THRESHOLD = 1e-6
PROBES = 4  # features that are taken out on random inputs, to see what each of them adds
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
        lens_sae = self.loader
        if not isinstance(lens_sae, torch.nn.Module):
            lens_sae = self.loader()
            _fold_norms(lens_sae)
            _silence_unusable(lens_sae, self.excluded, f"{self.site} ({self.source})")
        _check_effects(self, lens_sae)
        return lens_sae

    @cached_property
    def fingerprint(self) -> str:
        """A digest of directions and weights, the key of tables that are made from them."""
        digest = hashlib.blake2b(digest_size=16)
        tensors = [self.decoder]
        if isinstance(self.loader, torch.nn.Module):  # it may have been put in the files' place
            tensors += self.loader.state_dict().values()
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
        x = activations.to(self.lens_sae.dtype)
        codes = self.lens_sae.encode(x)
        return codes * _scales(self.lens_sae, x).to(codes) if self.normalises_tokens else codes

    @torch.no_grad()
    def decode(
        self,
        features: Float[Tensor, "*batch features"],
        at: Float[Tensor, "*batch d_model"] | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction from feature activations, as `encode` gives them.

        `at` is what was read; an SAE that normalises each token needs it.
        """
        lens_sae = self.lens_sae
        if self.normalises_tokens:
            if at is None:
                raise ValueError(f"{self} normalises each token: decode needs `at`")
            at = at.to(lens_sae.dtype)
            features = features / _scales(lens_sae, at).clamp(min=torch.finfo(torch.float32).tiny)
        return _decoded(lens_sae, features.to(lens_sae.dtype), at)

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

    def check_encoder(self, folded: bool = False) -> None:
        """A ValueError if there is no encoder of a matrix and a bias, or no thresholds to fold."""
        kind = self.lens_sae.cfg.architecture()
        if folded and self.thresholds is None:
            norm = self.lens_sae.cfg.normalize_activations
            raise ValueError(
                f"{self} has no thresholds to fold (architecture {kind}, normalize_activations"
                f" {norm})"
            )
        parameters = dict(self.lens_sae.named_parameters())
        if lacking := {"W_enc", "b_enc"} - set(parameters):
            raise ValueError(
                f"{self}, of architecture {kind}, has no {' and no '.join(sorted(lacking))}: it can"
                " be matched by its decoder alone"
            )

    def weights(self, folded: bool = False) -> Weights:
        """Its weights in float32; a ValueError if its encoder is not W_enc and b_enc.

        Folded thresholds (SAE Match, eq. 4; CHOICES 16) give W_enc/θ, b_enc/θ and W_dec·θ, with θ
        clamped away from 0: the output stays the same, and activations are in units of θ.
        """
        self.check_encoder(folded)
        lens_sae, threshold = self.lens_sae, getattr(self.lens_sae, "threshold", None)
        encoder, bias, decoder = (
            w.detach().float() for w in (lens_sae.W_enc, lens_sae.b_enc, lens_sae.W_dec)
        )
        if lens_sae.cfg.apply_b_dec_to_input:
            bias = bias - lens_sae.b_dec.detach().float() @ encoder
        at = torch.zeros_like(bias) if threshold is None else threshold.detach().float()
        if not folded:
            return Weights(encoder.T, bias, decoder, at)
        at = at.clamp(min=SMALLEST_THRESHOLD)
        rows = at[:, None]
        return Weights(encoder.T / rows, bias / at, decoder * rows, torch.ones_like(at))


def make_sae(
    site: Site, lens_sae: Any, d_model: int, source: str, output: Output = lambda: None
) -> SAE:
    """The SAE around one of sae-lens that is in memory, as `read_sae` around files."""
    about = lens_sae.cfg.to_dict()
    check_is_sae(f"the SAE for {site} ({source})", {**about, **about["metadata"]})
    _fold_norms(lens_sae)
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
    scale = _norms(decoder).masked_fill(sae.norms == 0, 1.0) if files.unit_rows else files.scale
    return replace(sae, norms=sae.norms / scale, loader=load, files=files, dtype=dtype)


def _in_residual_basis(
    site: Site, decoder: Tensor, hook: str | None, d_model: int, source: str, output: Output
) -> SAE:
    """Brings decoder rows to the residual basis, and leaves out those that are of no use.

    Rows at z are carried by W_O and the gain of the norm after attention, where the model has one
    (CHOICES 30; this project's extension). What the norm divides by differs by token but is a
    positive number: the direction is exact.
    """
    what = f"the SAE for {site} ({source})"
    expected, input_site, to_stream = hook_names(site), site, None
    if hook not in (None, "", *expected):
        input_site = Site(site.layer, "z")
        if site.module != "att" or hook not in hook_names(input_site):
            raise ValueError(f"{what} was trained at {hook}: expected {expected[0]}")
        if (to_stream := output()) is None:
            raise ValueError(
                f"{what} reads z, before W_O: its model has to bring z into the stream"
            )
    width = len(to_stream.weights) if to_stream else d_model
    if decoder.ndim != 2 or decoder.shape[1] != width:
        shape = " × ".join(map(str, decoder.shape))
        raise ValueError(f"{what} has a decoder of {shape}: expected rows of {width}, as its model")
    decoder = to_stream.to_residual(decoder) if to_stream else decoder
    norms = _norms(decoder)
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


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)


def _fold_norms(lens_sae: Any) -> None:
    """Makes decoder rows of unit norm where sae-lens takes them for such; the SAE is the same."""
    if getattr(lens_sae.cfg, "rescale_acts_by_decoder_norm", False):
        lens_sae.fold_W_dec_norm()
        lens_sae.cfg.rescale_acts_by_decoder_norm = False


@torch.no_grad()
def _silence_unusable(lens_sae: Any, excluded: Tensor, what: str) -> None:
    """Features without a finite encoder are never active, those excluded write nothing either."""
    lens_sae.turn_off_forward_pass_hook_z_reshaping()  # the heads lie side by side already
    width = lens_sae.cfg.d_sae
    # Whatever there is besides the decoder, features lie along its last axis.
    encoder = [
        weights.movedim(-1, 0)
        for name, weights in lens_sae.named_parameters()
        if name not in ("W_dec", "b_dec") and weights.shape[-1] == width
    ]
    finite = [rows.isfinite().reshape(width, -1).all(dim=1) for rows in encoder]
    deaf = torch.nonzero(~torch.stack(finite).all(dim=0)).flatten() if finite else excluded[:0]
    excluded = excluded.to(lens_sae.W_dec.device)
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


@torch.no_grad()
def _scales(lens_sae: Any, at: Tensor) -> Tensor:
    """How much larger each token is than what sae-lens made of it, by its own way out."""
    lens_sae.run_time_activation_norm_fn_in(at)
    unit = torch.tensor([1.0, 0.0], device=at.device).view(2, *[1] * at.ndim)
    one, zero = lens_sae.run_time_activation_norm_fn_out(unit)
    return one - zero


@torch.no_grad()
def _check_effects(sae: SAE, lens_sae: Any) -> None:
    """A feature adds its activation times its row, by sae-lens's own decode, whatever its kind.

    On a few random inputs, each with one feature less: a ValueError says by how much it is not so.
    """
    kind, norm = lens_sae.cfg.architecture(), lens_sae.cfg.normalize_activations
    but = "; without activations it can be matched by its decoder"
    if norm == "expected_average_only_in":
        raise ValueError(
            f"{sae} was trained on inputs scaled to an average norm (normalize_activations: {norm}),"
            " by a factor that its files lack: fold it by sae-lens's"
            f" fold_activation_norm_scaling_factor(factor), and save it{but}"
        )
    generator = torch.Generator().manual_seed(0)
    usable = torch.nonzero(sae.norms > 0).flatten().cpu()
    some = usable[torch.randperm(len(usable), generator=generator)[:PROBES]]
    rows, row = lens_sae.W_dec[some].float(), torch.arange(len(some))
    at = torch.randn(len(some), lens_sae.cfg.d_in, generator=generator).to(lens_sae.b_dec)
    # As large as the bias, beside which anything smaller is lost to rounding.
    sizes = (lens_sae.b_dec.float().norm().clamp(min=1) / _norms(rows)).clamp(max=1e4)
    draws = 0.5 + torch.rand(len(some), len(some), generator=generator).to(sizes)
    codes = lens_sae.W_dec.new_zeros(len(some), sae.width)
    codes[:, some] = (draws * sizes).to(codes)
    without = codes.clone()
    without[row, some] = 0
    try:
        lens_sae.encode(at)
        added = _decoded(lens_sae, codes, at).float() - _decoded(lens_sae, without, at).float()
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{sae}, of architecture {kind}, cannot encode tokens one by one: {error}{but}"
        ) from error
    taken = (codes[row, some, None] * _scales(lens_sae, at)).float()
    given = [rows]
    if sae.files and sae.input_site == sae.site:  # what the file gave, too
        given.append((sae.norms[some, None] * unit_rows(sae.decoder[some])).to(rows))
    off = max(float(_norms(added - taken * each).max() / _norms(added).max()) for each in given)
    tolerance = 1e-4 if rows.dtype == lens_sae.dtype else 3e-2
    if not off <= tolerance:
        raise ValueError(
            f"{sae}, of architecture {kind} and normalize_activations {norm}: a feature does not"
            " add its activation times its decoder row, which by sae-lens's decode is off by"
            f" {off:.2%} (allowed {tolerance:.2%}){but}"
        )


def _decoded(lens_sae: Any, codes: Tensor, at: Tensor | None) -> Tensor:
    """What sae-lens makes of activations in its own units; it keeps of `at` what it needs."""
    lens_sae.run_time_activation_norm_fn_in(at)
    return lens_sae.decode(codes)
