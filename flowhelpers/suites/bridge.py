"""A language model from its files: TransformerLens's bridge, and the check of its hook points.

A model that passed `load_model` has been checked: at every layer what attention and the MLP add
makes up the step of the residual stream, and an edit at every site reaches the logits.
"""

import subprocess
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.core.versions import naming_untried
from flowhelpers.suites.hub import model_folder, replaced
from flowhelpers.suites.model import (
    CACHE,
    Activations,
    Edit,
    Model,
    cache_prompt,
    hook_name,
    logits_of,
    run_model,
)


@naming_untried()
def load_model(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Model:
    """Load a Hugging Face model, by folder or by name, and check its hook points."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components import AttentionBridge
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = model_folder(name, revision)
    with replaced(logging, "_tqdm_active", False):  # a bar would stand in every notebook
        weights: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, revision=revision, attn_implementation="eager"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    weights = weights.to(device).eval()
    # For multimodal models TransformerLens would pip install torchvision, and another torch.
    with warnings.catch_warnings(), replaced(subprocess, "check_call", _install_nothing):
        warnings.simplefilter("ignore")
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=weights, tokenizer=tokenizer, device=weights.device
        )
        # Until compatibility mode is on, a hook on an alias such as hook_resid_post never fires.
        bridge.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    for module in bridge.modules():
        own = isinstance(module, AttentionBridge) and type(module).forward
        if own and own is not AttentionBridge.forward:  # it leaves the work to transformers'
            module.register_forward_pre_hook(_hand_on_cache, with_kwargs=True)
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    model = Model(name, bridge, bridge.cfg.n_layers, bridge.cfg.d_model)
    check_sites(model)
    return model


def _install_nothing(command: Any, *_: Any, **__: Any) -> None:
    raise PermissionError(f"nothing is installed while a model loads: {command}")


def _hand_on_cache(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A hook before an attention of TransformerLens, which knows the cache by its first name."""
    return args, kwargs | ({CACHE: kwargs["cache"]} if "cache" in kwargs else {})


def check_sites(model: Model) -> None:
    """Check on a few tokens that the sites are what they are called.

    R_{L-1} + A_L + M_L = R_L at every layer, a vector added at any site changes the logits, a zero
    vector does not, and a pass that goes on after a prefix gives what a whole one does; all up to
    1e-4 of the largest activation in float32, 3e-2 in half precision. A ValueError names the layer
    or site that fails.
    """
    tolerance = 3e-2 if model.bridge.W_E.dtype != torch.float32 else 1e-4
    vocabulary = model.bridge.cfg.d_vocab
    ids = torch.arange(1, 9, device=model.device)[None] * (vocabulary // 10)
    sites = model.sites()
    clean, read = run_model(model, ids, read=[Site(0, "pre"), *sites])
    assert clean is not None
    before = read[Site(0, "pre")]
    for layer in range(model.layers):
        after = read[Site(layer, "res")].float()
        parts = before + read[Site(layer, "att")] + read[Site(layer, "mlp")]
        residue = (after - parts.float()).abs().max() / after.abs().max()
        if not residue <= tolerance:
            raise ValueError(
                f"{model.name}: at layer {layer} the stream before plus attention plus MLP differs"
                f" from the stream after by {residue:.2%} of its size (allowed {tolerance:.2%})"
            )
        before = read[Site(layer, "res")]
    _check_edits(model, ids, sites, clean, read)
    _, prefix = cache_prompt(model, ids)
    rest, _ = run_model(model, ids[:, 4:].expand(2, -1), prefix=prefix.first(4))
    assert rest is not None
    off = (rest - clean[:, 4:]).abs().max() / clean.abs().max()
    if not off <= tolerance:
        raise ValueError(
            f"{model.name}: a pass that goes on after a prefix gives other logits than a whole one,"
            f" by {off:.2%} of their size (allowed {tolerance:.2%})"
        )


def _check_edits(
    model: Model,
    ids: Int[Tensor, "1 position"],
    sites: list[Site],
    clean: Float[Tensor, "1 position vocabulary"],
    read: dict[Site, Activations],
) -> None:
    def push(row: int, site: Site) -> Edit:
        def change(activations: Activations) -> Activations:
            changed = activations.clone()
            changed[row, :, 0] += read[site].float().norm(dim=-1).mean()
            return changed

        return Edit(site, change)

    zero = logits_of(model, ids, [Edit(site, lambda stream: stream + 0.0) for site in sites])
    # One row of the batch for each site, so that one pass tells for all of them.
    pushes = [push(row, site) for row, site in enumerate(sites)]
    pushed = logits_of(model, ids.expand(len(sites), -1), pushes)
    # A row of a larger batch may differ from the same row alone by rounding, as may any two passes
    # on a GPU.
    rounding = (1e-2 if clean.dtype != torch.float32 else 1e-5) * clean.abs().max()
    if (zero - clean).abs().max() > (rounding if clean.is_cuda else 0):
        raise ValueError(f"{model.name}: adding a zero vector changed the logits")
    for row, site in enumerate(sites):
        if (pushed[row] - clean[0]).abs().max() <= rounding:
            raise ValueError(
                f"{model.name}: a vector added at {site} left the logits as they were:"
                f" the hook {hook_name(model, site)} does not edit the stream"
            )
