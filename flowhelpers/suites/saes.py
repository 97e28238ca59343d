"""One SAE: its decoder in the residual basis, and its encoder.

The decoder comes first and by itself; the rest is read when something asks for it.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.core.features import FeatureId, Site
from flowhelpers.matching.cosine import unit_rows
from flowhelpers.suites.attention import AttentionOutput
from flowhelpers.suites.model import HOOKS
from flowhelpers.suites.sae_files import (
    SaeFiles,
    folder_files,
    load_sae,
    read_decoder,
    read_thresholds,
    release_files,
)

SMALLEST_THRESHOLD = 1e-6


@dataclass(frozen=True)
class Weights:
    """A JumpReLU SAE's weights, one row a feature: active where pre > threshold.

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
class SAE:
    """A sparse autoencoder at a site.

    Attributes:
        site: The site whose contribution to the stream it describes.
        decoder: Decoder rows in the residual basis, of any norm, in the type they are stored in,
            and memory-mapped where the file allows it; zero for the rows in `excluded`, so that
            they match nothing.
        norms: Norms of the decoder rows, in the scale of the activations.
        excluded: Indices of the rows that hold NaN or infinity or are all zero.
        source: Where it was loaded from.
        whole: sae-lens's SAE, which encodes; or what loads it, once something asks for it.
        input_site: Where it reads: its site, or the attention heads' outputs z before W_O, `12/z`.
        files: The files that it is read from.
        dtype: Type of the SAE's weights, where it is still to be loaded.
    """

    site: Site
    decoder: Float[Tensor, "features d_model"]
    norms: Float[Tensor, "features"]
    excluded: Int[Tensor, "bad"]
    source: str
    whole: Any = field(repr=False)
    input_site: Site
    files: SaeFiles | None = field(default=None, repr=False)
    dtype: str = "float32"

    @cached_property
    def lens_sae(self) -> Any:
        """sae-lens's SAE, loaded the first time that it is asked for; None if there is none."""
        if self.whole is None or isinstance(self.whole, torch.nn.Module):
            return self.whole
        return self.whole()

    @cached_property
    def fingerprint(self) -> str:
        """A digest of directions and weights, by which tables made from them are known."""
        digest = hashlib.blake2b(digest_size=16)
        if self._stored:
            digest.update(f"{self._stored.content} {self.dtype}".encode())
        elif self.lens_sae is not None:
            for tensor in self.lens_sae.state_dict().values():
                digest.update(_bytes(tensor))
        if (
            not self._stored or self.input_site != self.site
        ):  # what the model makes of it counts too
            digest.update(_bytes(self.decoder))
        return digest.hexdigest()

    @cached_property
    def thresholds(self) -> Float[Tensor, "features"] | None:
        """Each feature's threshold, in units of its activation; None if it has none."""
        if self._stored:
            return read_thresholds(self._stored, self.width)
        found = getattr(self.lens_sae, "threshold", None)
        return None if found is None else found.detach().float()

    @property
    def _stored(self) -> SaeFiles | None:
        # Its files, unless another SAE was put in their place.
        return None if isinstance(self.whole, torch.nn.Module) else self.files

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
        """The decoder's rows, each of unit norm in float32; made anew each time that it is asked.

        What compares many of them takes `decoder`, and normalises block by block.
        """
        return unit_rows(self.decoder)

    def direction(self, feature: FeatureId) -> Float[Tensor, "d_model"]:
        """The unit direction of one feature.

        Raises:
            ValueError: If the row was excluded.
        """
        if feature.index in self.excluded:
            raise ValueError(f"{feature} has no direction: its decoder row is zero or not finite")
        return unit_rows(self.decoder[feature.index][None])[0]

    @torch.no_grad()
    def encode(
        self, activations: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch features"]:
        """Feature activations; a feature is active where its value is above zero (CHOICES 4).

        They are such that a feature adds its activation times its decoder row, at every token: of
        an SAE that brings each token to variance 1 first, they are scaled back (CHOICES 43).

        Raises:
            ValueError: If there is no encoder.
        """
        if self.lens_sae is None:
            raise ValueError(
                f"the SAE for {self.site} has no encoder: its activations cannot be read"
            )
        x = activations.to(self.lens_sae.W_enc.dtype)
        codes = self.lens_sae.encode(x)
        return codes * x.std(dim=-1, keepdim=True) if self.normalises_tokens else codes

    @torch.no_grad()
    def decode(
        self,
        features: Float[Tensor, "*batch features"],
        at: Float[Tensor, "*batch d_model"] | None = None,
    ) -> Float[Tensor, "*batch d_model"]:
        """Activations rebuilt from feature activations.

        Args:
            features: Feature activations, as `encode` gives them.
            at: What they were read from; needed where the SAE normalises each token.

        Raises:
            ValueError: If it is needed and not given.
        """
        if not self.normalises_tokens:
            return self.lens_sae.decode(features)
        if at is None:
            raise ValueError(
                f"the SAE for {self.site} normalises each token: decode needs what was read"
            )
        at = at.to(self.lens_sae.W_enc.dtype)
        shift, scale = at.mean(dim=-1, keepdim=True), at.std(dim=-1, keepdim=True)
        return features @ self.lens_sae.W_dec + self.lens_sae.b_dec * scale + shift

    def decoder_rows(self, features: Int[Tensor, "n"]) -> Float[Tensor, "n d_in"]:
        """What features write for each unit of activation, at the site that is read, z included.

        Raises:
            ValueError: If there are no weights, or a row was excluded.
        """
        if self.lens_sae is None:
            raise ValueError(f"the SAE for {self.site} has no weights: it cannot write")
        if (bad := features[torch.isin(features, self.excluded.to(features.device))]).numel():
            self.direction(FeatureId(self.site.layer, self.site.module, int(bad[0])))
        return self.lens_sae.W_dec.detach()[features.to(self.lens_sae.W_dec.device)]

    def contribution(
        self, feature: FeatureId, activation: Float[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch d_model"]:
        """What one feature writes at these activations: `a · v`, in the scale of the stream.

        Raises:
            ValueError: If the SAE reads z: what it writes passes a norm on its way.
        """
        if self.input_site != self.site:
            raise ValueError(
                f"{feature} reads {self.input_site}: only the direction it writes is known"
            )
        size = activation[..., None].to(self.norms) * self.norms[feature.index]
        return size * self.direction(feature)

    def weights(self, folded: bool = False) -> Weights:
        """Its weights, one row a feature, in float32.

        Args:
            folded: Whether thresholds are folded in (SAE Match, eq. 4; CHOICES 16): W_enc/θ,
                b_enc/θ, W_dec·θ, with θ clamped away from 0. The output stays the same, and
                activations are in units of θ.

        Raises:
            ValueError: If there is no threshold to fold in.
        """
        lens_sae, threshold = self.lens_sae, self.thresholds
        if threshold is None and folded:
            raise ValueError(f"the SAE for {self.site} ({self.source}) has no thresholds to fold")
        encoder, bias, decoder = (
            w.detach().float() for w in (lens_sae.W_enc, lens_sae.b_enc, lens_sae.W_dec)
        )
        if lens_sae.cfg.apply_b_dec_to_input:
            bias = bias - lens_sae.b_dec.detach().float() @ encoder
        at = torch.zeros_like(bias) if threshold is None else threshold.to(bias)
        at = at.nan_to_num(0.0, 0.0, 0.0)  # as of the encoders that are not finite
        found = Weights(encoder.T, bias, decoder, at)
        if not folded:
            return found
        at = at.clamp(min=SMALLEST_THRESHOLD)
        return Weights(
            encoder.T / at[:, None], bias / at, decoder * at[:, None], torch.ones_like(at)
        )


def make_sae(
    site: Site, lens_sae: Any, d_model: int, source: str, output: AttentionOutput | None = None
) -> SAE:
    """Bring an SAE's decoder to the residual basis; note what is wrong with it.

    A decoder that writes at z, before W_O, is brought there by W_O and the gain of the norm after
    attention, where the model has one (CHOICES 30; this project's extension). What the norm divides
    by differs by token but is a positive number: the direction is exact.

    Args:
        site: The site.
        lens_sae: An SAE of sae-lens.
        d_model: Width of the model's stream, which the directions have to share.
        source: Where it came from, for messages.
        output: How the model brings z into the stream at this layer.

    Raises:
        ValueError: If the width is another, the hook is not the site's, or no row is usable.
    """
    reads = _hooked_site(site, lens_sae.cfg.metadata.hook_name, source)
    decoder = _in_stream(lens_sae.W_dec.detach(), site, reads, source, output)
    decoder, norms, bad = _usable(decoder.clone(), site, d_model, source, _silenced(lens_sae))
    if len(bad):
        _silence([lens_sae.W_dec, *_encoder_rows(lens_sae)], bad)
        _warn(bad, len(norms), site, source)
    return SAE(site, decoder, norms, bad, source, lens_sae, reads)


def _in_stream(
    decoder: Tensor, site: Site, reads: Site, source: str, output: AttentionOutput | None
) -> Tensor:
    if reads == site:
        return decoder
    if output is None:
        raise ValueError(
            f"the SAE for {site} ({source}) reads z, before W_O: it cannot be compared"
            " with the stream unless its model says how z gets there"
        )
    return output.to_residual(decoder)


def _usable(
    decoder: Tensor, site: Site, d_model: int, source: str, silenced: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    # The rows, with zeros in place of those that are of no use; their norms; and which those are.
    if decoder.shape[1] != d_model:
        raise ValueError(
            f"the SAE for {site} ({source}) has width {decoder.shape[1]}:"
            f" expected {d_model}, the width of its model"
        )
    norms = torch.linalg.vector_norm(decoder, dim=1, dtype=torch.float32)
    useless = ~torch.isfinite(norms) | (norms == 0)
    if silenced is not None:
        useless |= silenced
    bad = torch.nonzero(useless).flatten()
    if len(bad) == len(norms):
        raise ValueError(f"the SAE for {site} ({source}) has no decoder row that is usable")
    decoder = decoder.contiguous()
    decoder[bad] = norms[bad] = 0
    return decoder, norms, bad


def _warn(bad: Tensor, features: int, site: Site, source: str) -> None:
    warnings.warn(
        f"{len(bad)} of {features} decoder rows for {site} ({source}) are zero, or they or"
        f" their encoder are not finite; they are left out of matching: {_listed(bad)}",
        stacklevel=3,
    )


def _listed(rows: Tensor) -> str:
    return ", ".join(str(int(i)) for i in rows[:10]) + (", …" if len(rows) > 10 else "")


def _encoder_rows(lens_sae: Any) -> list[Tensor]:
    return [lens_sae.W_enc.T, lens_sae.b_enc[:, None], *_thresholds(lens_sae)]


def _silenced(lens_sae: Any) -> Tensor:
    return ~torch.stack([torch.isfinite(rows).all(dim=1) for rows in _encoder_rows(lens_sae)]).all(
        0
    )


@torch.no_grad()
def _silence(weights: Iterable[Tensor], bad: Tensor) -> None:
    # Without an encoder a feature is never active; without a decoder it writes nothing.
    for rows in weights:
        rows[bad] = 0


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data


def _thresholds(lens_sae: Any) -> list[Tensor]:
    return [lens_sae.threshold[:, None]] if hasattr(lens_sae, "threshold") else []


def _hooked_site(site: Site, hook: str | None, source: str) -> Site:
    expected = HOOKS[site.module].format(layer=site.layer)
    if hook in (None, "", expected):
        return site
    if site.module == "att" and hook == HOOKS["z"].format(layer=site.layer):
        return Site(site.layer, "z")
    raise ValueError(f"the SAE for {site} ({source}) was trained at {hook}: expected {expected}")


def read_sae(
    files: SaeFiles,
    load: Callable[[], Any],
    site: Site,
    d_model: int,
    device: str,
    dtype: str,
    output: Callable[[], AttentionOutput] | None = None,
) -> SAE:
    """Read the decoder alone; the SAE is loaded when something asks for it.

    Args:
        files: The SAE's files.
        load: Loads the SAE.
        site: The site.
        d_model: Width of the model's stream.
        device: Torch device of decoder and SAE.
        dtype: Type of the SAE's weights; the decoder is in the type it is stored in.
        output: Says how the model brings z into the stream; asked only if the SAE reads z.

    Raises:
        ValueError: As `make_sae` does, or if the file is truncated or corrupt.
    """
    reads = _hooked_site(site, files.hook, files.source)
    brings = output() if output is not None and reads != site else None
    try:
        decoder = read_decoder(files).to(device)
    except ValueError as error:
        raise _unreadable(files.source, site, error) from error
    decoder = _in_stream(decoder, site, reads, files.source, brings)
    decoder, norms, bad = _usable(decoder, site, d_model, files.source)
    if len(bad):
        _warn(bad, len(norms), site, files.source)

    def whole() -> Any:
        lens_sae = load()
        if reads != site:  # here the heads lie side by side already
            lens_sae.turn_off_forward_pass_hook_z_reshaping()
        deaf = torch.nonzero(_silenced(lens_sae)).flatten()
        deaf = deaf[~torch.isin(deaf, bad.to(deaf))]
        if len(deaf):
            warnings.warn(
                f"{len(deaf)} of {len(norms)} features at {site} ({files.source}) have an encoder"
                f" that is not finite; they are never active here: {_listed(deaf)}",
                stacklevel=3,
            )
            _silence(_encoder_rows(lens_sae), deaf)  # what they would write is known
        _silence([lens_sae.W_dec, *_encoder_rows(lens_sae)], bad.to(deaf))
        return lens_sae

    norms = norms / files.scale
    return SAE(site, decoder, norms, bad, files.source, whole, reads, files=files, dtype=dtype)


def load_folder(
    path: Path,
    site: Site,
    d_model: int,
    device: str,
    dtype: str,
    output: Callable[[], AttentionOutput] | None = None,
) -> SAE:
    """Load an SAE from a folder in sae-lens's format.

    Raises:
        FileNotFoundError: If the folder is no sae-lens folder.
        ValueError: If a file is truncated or corrupt, or the SAE does not fit; what only
            the encoder tells, once that is asked for.
    """
    from sae_lens import SAE
    from safetensors import SafetensorError

    def load() -> Any:
        try:
            return SAE.load_from_disk(path, device=device, dtype=dtype)
        except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _unreadable(path, site, error) from error

    try:
        files = folder_files(path, site)
    except ValueError as error:
        raise _unreadable(path, site, error) from error
    return read_sae(files, load, site, d_model, device, dtype, output)


def _unreadable(source: str | Path, site: Site, error: Exception) -> ValueError:
    return ValueError(
        f"the SAE for {site} in {source} cannot be read,"
        f" a file of it may be truncated or corrupt: {error}"
    )


def load_release(
    release: str,
    sae_id: str,
    site: Site,
    d_model: int,
    device: str,
    dtype: str,
    output: Callable[[], AttentionOutput] | None = None,
) -> SAE:
    """Load an SAE of a release that sae-lens knows, from the hub or its cache.

    Raises:
        ValueError: As `make_sae` does; if there is no such release or SAE.
        What `hub.fetch` raises.
    """
    files = release_files(release, sae_id)

    def load() -> Any:
        return load_sae(release, sae_id, device, dtype)

    if files is not None:
        return read_sae(files, load, site, d_model, device, dtype, output)
    lens_sae = load()
    reads_z = str(lens_sae.cfg.metadata.hook_name).endswith("hook_z")
    brings = output() if output is not None and reads_z else None
    return make_sae(site, lens_sae, d_model, f"{release}/{sae_id}", brings)
