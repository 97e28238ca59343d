"""A toy Gemma 3 and a suite on it whose directions, thresholds and matches are planted.

The stream has 32 coordinates. `R_0` has the first 16 as its directions. A residual feature of
layer 1 is 0.8 times its residual predecessor plus 0.6 times a module's; one of layer 2 is at 0.8
from its residual predecessor and at 0.96 from the same module's direction. Features of one layer
stand in another order than in the next, so that no index is right by accident.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from scipy.sparse import csr_matrix
from torch import Tensor
from transformers import Gemma3ForCausalLM

from flowhelpers.activations.sparse import FeatureActivations
from flowhelpers.core.features import Site
from flowhelpers.steering.plans import Plan, make_plan
from flowhelpers.suites import sae_files
from flowhelpers.suites.attention import attention_output
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Model
from flowhelpers.suites.registry import SuiteRow
from flowhelpers.suites.saes import SAE, make_sae, read_sae

LAYERS, D_MODEL, CONTEXT, VOCABULARY = 3, 32, 64, 320
RES, MODULE = 16, 8  # features of a residual SAE, and of a module's
HOOK_ENDS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "hook_attn_out"}
TEXTS = [
    "The cat sat on the mat.",
    "Rain fell on the 7 hills all day, and the rivers rose.",
    "def add(a, b):\n    return a + b",
    "Who goes there? Nobody.",
    "schön",
]


def _order(seed: int) -> list[int]:
    return torch.randperm(RES, generator=torch.Generator().manual_seed(seed)).tolist()


# The residual predecessor of each feature of layers 1 and 2, and the coordinate it descends from.
RES_FROM = {1: _order(1), 2: _order(2)}
COORDINATE = {
    0: list(range(RES)),
    1: RES_FROM[1],
    2: [RES_FROM[1][source] for source in RES_FROM[2]],
}


def planted_directions() -> dict[Site, Tensor]:
    """The directions of every site, of unit norm.

    The module predecessor of the feature that descends from coordinate c is feature c of the MLP
    if c < 8, else feature c − 8 of attention; it has none at the other module.
    """
    axes = torch.eye(D_MODEL)
    first, second = axes[:RES], axes[RES:]
    directions = {Site(0, "mlp"): axes[:MODULE], Site(0, "att"): axes[MODULE:RES]}
    for layer in (1, 2):
        directions[Site(layer, "mlp")] = axes[RES : RES + MODULE]
        directions[Site(layer, "att")] = axes[RES + MODULE :]
    directions[Site(0, "res")] = first
    directions[Site(1, "res")] = (0.8 * first + 0.6 * second)[COORDINATE[1]]
    directions[Site(2, "res")] = (0.28 * first + 0.96 * second)[COORDINATE[2]]
    return directions


def bare_sae(site: Site, directions: Tensor) -> SAE:
    """An SAE that can be matched, and no more."""
    none = torch.zeros(0, dtype=torch.long)
    return SAE(site, directions, torch.ones(len(directions)), none, "planted", None, site)


def bare_suite(directions: Mapping[Site, Tensor] | None = None, layers: int = LAYERS) -> Suite:
    """A suite that can be matched, without a model; by default with the planted directions."""
    directions = planted_directions() if directions is None else directions
    row = SuiteRow("bare", "none", {site: "planted" for site in directions}, parameters=0)
    model: Any = SimpleNamespace(layers=layers)
    return Suite(row, model, {s: bare_sae(s, v) for s, v in directions.items()})


RELATED = 40, 5  # features of a site, layers


def related_suite() -> Suite:
    """Random directions, some of which come from others; no attention at layer 2, no model."""
    (width, layers), generator = RELATED, torch.Generator().manual_seed(0)
    sites = [Site(at, m) for at in range(layers) for m in HOOK_ENDS if (at, m) != (2, "att")]
    rows = {site: torch.randn(width, 16, generator=generator) for site in sites}
    for layer in range(1, layers):
        rows[Site(layer, "res")][:10] += 4 * rows[Site(layer, "mlp")][5:15]
        rows[Site(layer, "res")][8:30] += 4 * rows[Site(layer - 1, "res")][:22]
    return bare_suite(rows, layers)


def planted_activations(codes: Mapping[Site, Sequence[Sequence[float]]]) -> FeatureActivations:
    """Activations from one row of feature activations for each token; eight tokens to a text."""
    import pandas as pd

    count = len(next(iter(codes.values())))
    tokens = pd.DataFrame(
        {
            "text": [row // 8 for row in range(count)],
            "position": [row % 8 + 1 for row in range(count)],
            "token": [100 + row for row in range(count)],
        }
    )
    return FeatureActivations(
        tokens, {site: csr_matrix(torch.tensor(rows).numpy()) for site, rows in codes.items()}
    )


def write_model(folder: Path, layers: int = LAYERS, seed: int = 0) -> Path:
    """A Gemma 3 of random seeded weights, norms included, with a tokenizer of its own."""
    from flowhelpers.training.language_model import ModelRecipe, new_model, train_tokenizer

    recipe = ModelRecipe(
        vocab_size=VOCABULARY,
        d_model=D_MODEL,
        layers=layers,
        heads=2,
        kv_heads=1,
        d_mlp=48,
        context=CONTEXT,
        seed=seed,
    )
    model = new_model(recipe)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.3 if parameter.ndim == 1 else 0.15
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 1 and "post_" in name:
                parameter.sub_(0.5)
    model.save_pretrained(folder)
    train_tokenizer(iter(TEXTS * 20), VOCABULARY).save_pretrained(folder)
    return folder


def read_by_hand(model: Gemma3ForCausalLM, ids: Tensor) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits and the activations at every site, by plain hooks on the Hugging Face model."""
    read: dict[Site, Tensor] = {}

    def keep(site: Site) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            read[site] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = []
    for i, layer in enumerate(model.model.layers):
        for module, at in (
            (layer, "res"),
            (layer.get_submodule("post_feedforward_layernorm"), "mlp"),
            (layer.get_submodule("post_attention_layernorm"), "att"),
        ):
            handles.append(module.register_forward_hook(keep(Site(i, at))))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return logits, read


def write_lens_sae(
    decoder: Tensor,
    site: Site = Site(0, "res"),
    threshold: Tensor | float = 0.0,
    encoder: Tensor | None = None,
    b_enc: Tensor | float = 0.0,
    b_dec: Tensor | float = 0.0,
    hook: str | None = None,
) -> Any:
    """A JumpReLU SAE of sae-lens with these weights; it reads along its decoder unless told."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    features, d_in = decoder.shape
    hook = hook or f"blocks.{site.layer}.{HOOK_ENDS[site.module]}"
    config = JumpReLUSAEConfig(d_in=d_in, d_sae=features, metadata=SAEMetadata(hook_name=hook))
    lens_sae = JumpReLUSAE(config)
    with torch.no_grad():
        lens_sae.W_dec.copy_(decoder)
        lens_sae.W_enc.copy_(decoder.T if encoder is None else encoder)
        for parameter, value in (
            (lens_sae.threshold, threshold),
            (lens_sae.b_enc, b_enc),
            (lens_sae.b_dec, b_dec),
        ):
            parameter.copy_(torch.as_tensor(value, dtype=torch.float32).expand_as(parameter))
    return lens_sae


def load_folder(folder: Path, site: Site, d_model: int = D_MODEL, dtype: str = "float32") -> SAE:
    """The SAE of a folder that sae-lens saved."""
    files = sae_files.find_files(str(folder))
    assert files is not None
    what = f"the SAE in {folder}"
    load = partial(sae_files.load_whole, what, str(folder), True, "cpu", dtype)
    return read_sae(site, files, load, d_model, "cpu", dtype)


def sae_at_z(model: Model, layer: int = 1) -> SAE:
    """An SAE that reads z; its decoder and encoder differ, and its norms are not 1."""
    site, output = Site(layer, "att"), attention_output(model, layer)
    generator = torch.Generator().manual_seed(0)
    lens_sae = write_lens_sae(
        torch.randn(6, len(output.weights), generator=generator),
        site,
        0.05,
        encoder=torch.randn(len(output.weights), 6, generator=generator),
        hook=f"blocks.{layer}.attn.hook_z",
    )
    return make_sae(site, lens_sae, D_MODEL, "planted", lambda: output)


def write_suite(folder: Path, lens_saes: Mapping[Site, Any], model: str = "model") -> Path:
    """A folder with `suite.yaml` and a sae-lens folder for each site."""
    folder.mkdir(parents=True, exist_ok=True)
    for site, lens_sae in lens_saes.items():
        lens_sae.save_model(folder / f"{site.layer}-{site.module}")
    row = {
        "model": model,
        "about": "planted",
        "saes": {str(site): f"{site.layer}-{site.module}" for site in lens_saes},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(row), encoding="utf-8")
    return folder


def planted_saes(read: Mapping[Site, Tensor]) -> dict[Site, Any]:
    """SAEs of the planted directions; each feature is active at about a fifth of the tokens read.

    Decoder rows have the norms 0.5, 1, 2, 0.5 … in turn.
    """
    lens_saes = {}
    for site, directions in planted_directions().items():
        activations = read[site].flatten(0, -2)
        b_dec = activations.mean(0)
        before = (activations - b_dec) @ directions.T
        threshold = before.quantile(0.8, dim=0).clamp(min=1e-3)
        norms = torch.tensor([0.5, 1.0, 2.0]).repeat(len(directions))[: len(directions), None]
        lens_saes[site] = write_lens_sae(
            directions * norms, site, threshold, encoder=directions.T, b_dec=b_dec
        )
    return lens_saes


def plans_that_break(suite: Suite) -> dict[str, Plan]:
    """A plan that is fine, and one by which the planted model's logits are no longer finite."""
    # Two features along the same coordinate, whose sum is more than a float32 can hold.
    pairs = [(COORDINATE[1][i], i) for i in range(RES)]
    below, above = next(pair for pair in pairs if pair[0] % 3 and pair[1] % 3)
    names = [f"0/res/{below}", f"1/res/{above}"]
    return {
        "fine": make_plan(suite, names, 1.0, unit="unit"),
        "far": make_plan(suite, names, 3e38, unit="unit"),
    }
