"""Trained transcoders of a suite (paper 2.2): from what an MLP reads to what it writes.

A transcoder is no SAE: what it reads is not what it writes. Among the `saes` of a suite it is
refused.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.suites.lens_saes import check_scale
from flowhelpers.suites.model import HOOKS
from flowhelpers.suites.registry import SuiteRow, ids_by_l0
from flowhelpers.suites.sae_files import load_whole

if TYPE_CHECKING:
    from flowhelpers.suites.registry import Source

# Hook points where transcoders read, as TransformerLens and Hugging Face name them. Those of Gemma
# Scope read the stream that the norm before the MLP has divided by its size, without its gain, and
# those of Gemma Scope 2 behind the gain.
INPUTS = {
    HOOKS["normed"]: "normed",
    HOOKS["mlp_in"]: "mlp_in",
    "model.layers.{layer}.pre_feedforward_layernorm.output": "mlp_in",
}


@dataclass(frozen=True)
class Transcoder:
    """A transcoder of one layer's MLP: sae-lens's, with the sites that it reads and predicts."""

    lens_transcoder: Any
    source: Site
    target: Site

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """What the MLP adds to the stream, told from what is read at `source`."""
        return self.lens_transcoder(x.to(self.lens_transcoder.W_enc.dtype)).float()


def load_transcoder(row: SuiteRow, layer: int, d_model: int, device: str, dtype: str) -> Transcoder:
    """The transcoder of a layer; a ValueError if there is none, or it is of other places.

    The MLP's output is that behind Gemma's norm after it, as it comes into the stream.
    """
    target = Site(layer, "mlp")
    if target not in row.transcoders:
        there = ", ".join(str(site.layer) for site in row.transcoders) or "no layer"
        raise ValueError(f"suite {row.name} has no transcoder of layer {layer}: of {there} it has")
    source = the_one(row.transcoders[target])
    what = f"suite {row.name}: the transcoder of layer {layer} ({source})"
    lens_transcoder = load_whole(what, source, False, device, dtype)
    about = lens_transcoder.cfg
    if "transcoder" not in about.architecture():
        raise ValueError(f"{what} is an SAE ({about.architecture()}): expected a transcoder")
    check_scale(what, lens_transcoder)
    # sae-lens calls the input of Gemma Scope 2's `hook_mlp_in`, which is not what they were
    # trained on: Hugging Face's name for it counts where there is one.
    reads = about.metadata.hf_hook_name or about.metadata.hook_name
    inputs = {hook.format(layer=layer): module for hook, module in INPUTS.items()}
    if reads not in inputs:
        raise ValueError(f"{what} reads {reads}: expected {' or '.join(inputs)}")
    writes = about.metadata.hook_name_out
    if writes != (expected := HOOKS["mlp"].format(layer=layer)):
        raise ValueError(f"{what} predicts {writes}: expected {expected}")
    if (about.d_in, about.d_out) != (d_model, d_model):
        raise ValueError(f"{what} has widths {about.d_in} and {about.d_out}: expected {d_model}")
    return Transcoder(lens_transcoder, Site(layer, inputs[reads]), target)


def the_one(source: "Source") -> "Source":
    """The id of a release that has one transcoder a layer, whose mean L0 stands in its name."""
    if isinstance(source, str) or "{l0}" not in source["id"]:
        return source
    return {"release": source["release"], "id": min(ids_by_l0(**source))[1]}
