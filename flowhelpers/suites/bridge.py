"""A language model from its files: TransformerLens's bridge, and the check of its hook points."""

import subprocess
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.core.versions import naming_untried
from flowhelpers.suites.hub import model_folder, naming
from flowhelpers.suites.model import (
    CACHE,
    Edit,
    Model,
    cache_prompt,
    few_tokens,
    hook_name,
    logits_of,
    run_model,
)

FAILS = "cannot be used here"


@naming_untried()
def load_model(
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Model:
    """Load a Hugging Face model, by folder or by name, and check its hook points."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder, given = model_folder(name, revision), {"revision": revision, "trust_remote_code": False}
    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"{name} holds an adapter, which is not applied: merge it with the model")
    with naming(name, FAILS), patch.object(logging, "_tqdm_active", False):  # no bar
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, **given
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    weights, about = loaded
    if missing := sorted(about["missing_keys"]):  # which transformers fills with random numbers
        raise ValueError(f"{name}: its files lack {len(missing)} weights, such as {missing[0]}")
    if rest := sorted(about["unexpected_keys"]):
        warnings.warn(f"{name}: {len(rest)} weights are not used, such as {rest[0]}", stacklevel=2)
    return bridged(name, folder, weights.to(device), tokenizer)


@torch.no_grad()
def bridged(name: str, folder: str, weights: Any, tokenizer: Any) -> Model:
    """The model around weights that are in memory, hook points checked; `folder` has its config.

    A ValueError says what fails of a model that TransformerLens or this package cannot take.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    with naming(f"{name} ({type(weights).__name__})", FAILS):
        ids = few_tokens(weights.get_input_embeddings().weight)
        plain = weights.eval()(ids, output_hidden_states=True)  # before parts are added to it
        # For multimodal models TransformerLens would pip install torchvision, and another torch.
        refuse = PermissionError("nothing is installed while a model loads")
        with warnings.catch_warnings(), patch.object(subprocess, "check_call", side_effect=refuse):
            warnings.simplefilter("ignore")
            bridge = TransformerBridge.boot_transformers(
                folder, hf_model=weights, tokenizer=deepcopy(tokenizer), device=weights.device
            )
            # Until compatibility mode is on, a hook on an alias, as hook_resid_post, never fires.
            bridge.enable_compatibility_mode(no_processing=True, disable_warnings=True)
        rope = getattr(weights.config.get_text_config(), "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # a longer text changes all that share its batch
            bridge.cfg.n_ctx = min(bridge.cfg.n_ctx, rope["original_max_position_embeddings"])
        for module in bridge.modules():
            own = isinstance(module, AttentionBridge) and type(module).forward
            if own and own is not AttentionBridge.forward:  # it leaves the work to transformers'
                module.register_forward_pre_hook(_hand_on_cache, with_kwargs=True)
        for parameter in bridge.parameters():
            parameter.requires_grad_(False)
        # TransformerLens names an EOS of its own where there is none: `tokenizer` is as given.
        model = Model(name, bridge, tokenizer, bridge.cfg.n_layers, bridge.cfg.d_model)
        check_sites(model, plain)
    return model


def _hand_on_cache(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A hook before TransformerLens's attention, which looks for the cache under `CACHE`."""
    return args, kwargs | ({CACHE: kwargs["cache"]} if "cache" in kwargs else {})


def check_sites(model: Model, own: Any = None) -> None:
    """Check on a few tokens that the sites are what they are called.

    Logits and each layer's stream are those of the model's `own` pass by transformers,
    R_{L-1} + A_L + M_L = R_L at every layer, a vector added at any site changes the logits, a zero
    vector does not, and a pass that goes on after a prefix gives what a whole one does; all up to
    1e-4 of the largest activation in float32, 3e-2 in half precision. A ValueError names the layer
    or site that fails.
    """
    is_half = model.bridge.W_E.dtype != torch.float32
    usual = 3e-2 if is_half else 1e-4

    def check(this: Tensor, that: Tensor, what: str, most: float = usual) -> None:
        off, size = (this.float() - that.float()).abs().max(), this.float().abs().max()
        if not off <= most * size:
            told = f"by {off / size:.2%} of its size (allowed {most:.2%})"
            raise ValueError(f"{model.name}: {what} {told}")

    ids = few_tokens(model.bridge.W_E)
    sites = model.sites()
    clean, read = run_model(model, ids, read=[Site(0, "pre"), *sites])
    assert clean is not None
    if own is not None:
        check(own.logits, clean, "its logits differ from those of transformers")
        for layer, stream in enumerate(own.hidden_states[1:-1]):  # after the last comes its norm
            what = f"the stream after layer {layer} differs from that of transformers"
            check(stream, read[Site(layer, "res")], what)
    before = read[Site(0, "pre")]
    for layer in range(model.layers):
        after = read[Site(layer, "res")]
        parts = before + read[Site(layer, "att")] + read[Site(layer, "mlp")]
        what = "the stream before plus attention plus MLP differs from the stream after"
        check(after, parts, f"at layer {layer} {what}")
        before = after
    _, prefix = cache_prompt(model, ids)
    rest, _ = run_model(model, ids[:, 4:].expand(2, -1), prefix=prefix.first(4))
    assert rest is not None
    check(clean[:, 4:], rest, "a pass after a prefix gives other logits than a whole one,")
    # A row of a larger batch may differ from the same row alone by rounding, as may any two passes
    # on a GPU.
    rounding = 1e-2 if is_half else 1e-5
    zero = logits_of(model, ids, [Edit(site, lambda stream: stream + 0.0) for site in sites])
    check(clean, zero, "adding a zero vector changed the logits", rounding if clean.is_cuda else 0)
    # One row of the batch for each site, so that one pass tells for all of them.
    pushes = []
    for row, site in enumerate(sites):
        push = read[site].new_zeros(len(sites), 1, model.d_model)
        push[row, 0, 0] = read[site].float().norm(dim=-1).mean()
        pushes.append(Edit(site, push.add))
    pushed = logits_of(model, ids.expand(len(sites), -1), pushes)
    for row, site in enumerate(sites):
        if (pushed[row] - clean[0]).abs().max() <= rounding * clean.abs().max():
            raise ValueError(
                f"{model.name}: a vector added at {site} left the logits as they were:"
                f" the hook {hook_name(model, site)} does not edit the stream"
            )
