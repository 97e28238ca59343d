"""What has to be done to SAEs of sae-lens, and asked of them, whatever their kind."""

import warnings
from typing import Any

import torch
from torch import Tensor

from flowhelpers.suites.hub import naming

MATCH = "it can be matched, by its decoder alone"


def kind_of(lens_sae: Any) -> str:
    """Its architecture and the way that it normalises, in words."""
    cfg = lens_sae.cfg
    return f"architecture {cfg.architecture()}, normalize_activations {cfg.normalize_activations}"


def norms_of(rows: Tensor) -> Tensor:
    """The norms of rows, in float32."""
    rows = rows.float() if rows.dtype is torch.float64 else rows  # narrower ones as they are read
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)


def fold_norms(lens_sae: Any) -> None:
    """Makes decoder rows of unit norm where sae-lens takes them for such; the SAE is the same."""
    if getattr(lens_sae.cfg, "rescale_acts_by_decoder_norm", False):
        lens_sae.fold_W_dec_norm()
        lens_sae.cfg.rescale_acts_by_decoder_norm = False


def processing_of(lens_sae: Any) -> tuple[bool, bool]:
    """What TransformerLens did in training: centre the stream (GPT-2's res-jb), rid z of biases."""
    about, shape = lens_sae.cfg.metadata, lens_sae.cfg.reshape_activations
    given = about.model_from_pretrained_kwargs or {}
    at_z = any(part in f"{about.hook_name} {shape}" for part in (".attn.", "hook_z"))
    centred, folded = (bool(given.get(k)) for k in ("center_writing_weights", "fold_value_biases"))
    return centred and not at_z, folded and at_z


def take_means_off(lens_sae: Any) -> None:
    """Takes each token's mean off on the way in and gives it back on the way out."""
    way_in, mean = lens_sae.run_time_activation_norm_fn_in, {}
    way_out = lens_sae.run_time_activation_norm_fn_out

    def without_mean(x: Tensor) -> Tensor:
        mean["of"] = x.mean(dim=-1, keepdim=True)
        return way_in(x - mean["of"])

    lens_sae.run_time_activation_norm_fn_in = without_mean
    lens_sae.run_time_activation_norm_fn_out = lambda x: way_out(x) + mean["of"]
    lens_sae.cfg.normalize_activations += ", centred"


@torch.no_grad()
def silence(lens_sae: Any, excluded: Tensor, what: str) -> None:
    """Features without a finite encoder are never active, those excluded write nothing either."""
    fold_norms(lens_sae)
    lens_sae.turn_off_forward_pass_hook_z_reshaping()  # the heads lie side by side already
    silent, rows = lens_sae.W_dec.new_zeros(len(lens_sae.W_dec), dtype=torch.bool), []
    # Whatever there is besides the decoder, features lie along its last axis.
    for name, weights in lens_sae.named_parameters():
        if name not in ("W_dec", "b_dec") and weights.shape[-1] == len(silent):
            rows.append(weights.movedim(-1, 0))
            silent |= ~weights.isfinite().reshape(-1, len(silent)).all(dim=0)
    silent[excluded] = False
    if len(deaf := silent.nonzero().flatten()):
        told = "have an encoder that is not finite; they are never active here"
        warnings.warn(f"{len(deaf)} features at {what} {told}: {deaf[:10].tolist()}", stacklevel=4)
    silent[excluded] = True
    for each in rows:
        each[silent] = 0
    lens_sae.W_dec[excluded] = 0


def scales_of(lens_sae: Any, at: Tensor) -> Tensor:
    """How much larger each token is than what sae-lens makes of it, by its own way out; not 0."""
    lens_sae.run_time_activation_norm_fn_in(at)
    unit = torch.tensor([1.0, 0.0], device=at.device).view(2, *[1] * at.ndim)
    one, zero = lens_sae.run_time_activation_norm_fn_out(unit)
    return (one - zero).clamp(min=torch.finfo(torch.float32).tiny)


def decoded(lens_sae: Any, codes: Tensor, at: Tensor) -> Tensor:
    """What sae-lens makes of activations in units of the stream, where `at` was read."""
    codes = codes / scales_of(lens_sae, at)
    lens_sae.run_time_activation_norm_fn_in(at)  # its way out is that of the last token in
    return lens_sae.decode(codes.to(lens_sae.dtype))


def check_scale(what: str, lens_sae: Any) -> None:
    """A ValueError if inputs have to be scaled by a factor that is in no file."""
    field, fold = "normalize_activations", "fold_activation_norm_scaling_factor"
    if "expected_average_only_in" in (norm := getattr(lens_sae.cfg, field)):
        told = f"was trained on inputs times a factor that its files lack ({field}: {norm})"
        raise ValueError(f"{what} {told}: fold it by sae-lens's {fold}, and save it; {MATCH}")


@torch.no_grad()
def check_effects(what: str, lens_sae: Any, some: Tensor, stored: Tensor) -> None:
    """A ValueError unless a feature adds its activation times its row, by sae-lens's own decode.

    Each of some features is taken out once; `stored` are their rows as read from the file alone.
    """
    check_scale(what, lens_sae)
    what, rows = f"{what}, {kind_of(lens_sae)}", lens_sae.W_dec[some].float()
    at = torch.arange(len(some) * lens_sae.cfg.d_in).sin().view(len(some), -1).to(lens_sae.b_dec)
    # As large as the bias, beside which anything smaller is lost to rounding.
    size = (lens_sae.b_dec.float().norm().clamp(min=1) / norms_of(rows)).clamp(max=1e4)
    codes = lens_sae.W_dec.new_zeros(2, len(some), len(lens_sae.W_dec))
    codes[:, :, some] = size.to(codes)
    codes[1, torch.arange(len(some)), some] = 0
    with naming(f"{what} ({MATCH})", "cannot encode tokens one by one"):
        lens_sae.encode(at)
        added = torch.sub(*(decoded(lens_sae, each, at).float() for each in codes))
    wrong = [added - size[:, None] * each for each in (rows, stored.to(rows))]
    off = float(norms_of(torch.cat(wrong)).max() / norms_of(added).max())
    if not off <= (tolerance := 1e-4 if lens_sae.dtype is torch.float32 else 3e-2):
        told = "adds other than activation times decoder row: by sae-lens's decode that is off by"
        raise ValueError(f"{what}, {told} {off:.2%} (allowed {tolerance:.2%}); {MATCH}")
