"""How attention's heads come into the stream: z, W_O, and the norm after it where there is one.

The MLP needs no such step: its hook point (`HOOKS` in model.py) lies behind Gemma's norm and gain.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flowhelpers.core.features import Site
from flowhelpers.core.files import read_json
from flowhelpers.suites.hub import fetch, read_tensors
from flowhelpers.suites.model import Edit, Model, few_tokens, run_model

PUT = 100.0  # far more than what biases add
SAME = 0.999  # a cosine; without a trained gain it is 0.7 to 0.9
GEMMAS = ("gemma2", "gemma3", "gemma3_text")  # a norm follows attention, and holds its gain less 1
PREFIXES = ("model.", "language_model.model.", "model.language_model.")


@dataclass(frozen=True)
class AttentionOutput:
    """How one layer brings z, the outputs of its attention heads, into the residual stream.

    `weights` is W_O, the heads' rows one below the other; `gain` that of the norm after attention,
    None where the model has none.
    """

    weights: Float[Tensor, "z d_model"]
    gain: Float[Tensor, "d_model"] | None

    def to_residual(self, rows: Float[Tensor, "rows z"]) -> Float[Tensor, "rows d_model"]:
        """Directions at z as directions of the stream; their norms are not kept."""
        in_stream = rows.float() @ self.weights.float().to(rows.device)
        return in_stream if self.gain is None else in_stream * self.gain.float().to(rows.device)


@torch.no_grad()
def attention_output(model: Model, layer: int) -> AttentionOutput:
    """W_O of a layer, and the gain of the norm that follows where there is one.

    Which norm follows is measured: a vector is put at z, and its opposite, and what arrives in the
    stream has to be the vector's product with W_O, as it is or times the gain of one of the block's
    norms. The gain is what a norm makes of ones. Its weights do not tell: of some architectures
    they hold the gain, of others the gain less 1. A ValueError if no norm of the block fits.
    """
    block = model.bridge.blocks[layer]
    weights = block.attn.W_O.flatten(0, 1)
    vector = PUT * torch.randn(len(weights), generator=torch.Generator().manual_seed(layer))
    ids, site = few_tokens(model.bridge.W_E).expand(2, -1), Site(layer, "att")
    put = torch.stack([vector, -vector])[:, None].repeat(1, ids.shape[1], 1).to(weights)
    _, read = run_model(model, ids, [site], [Edit(Site(layer, "z"), lambda z: put)], layer)
    arrived = (read[site][0, -1] - read[site][1, -1]).float()
    norms = (part for name, part in block.named_children() if name.startswith("ln"))
    fits = {}
    for gain in (None, *(norm(weights.new_ones(1, 1, model.d_model))[0, 0] for norm in norms)):
        way = AttentionOutput(weights, gain)
        fit = cosine_similarity(way.to_residual(put[0, :1]), arrived[None])
        fits[fit.nan_to_num().item()] = way
    if max(fits) <= SAME:
        told = f"{model.name}: at layer {layer} what is put at z does not reach the stream by W_O"
        raise ValueError(f"{told} and the gain of a norm: SAEs at z cannot be used there")
    return fits[max(fits)]


def stored_attention_output(
    name: str, layer: int, revision: str | None = None
) -> AttentionOutput | None:
    """The same from a model's files, of which only those two tensors are read or fetched.

    None for pickled models, or others than Gemma 2 and 3; a ValueError if the tensors are lacking.
    """
    folder = Path(name)
    path = folder / "config.json" if folder.is_dir() else fetch(name, "config.json", revision)
    is_pickled = folder.is_dir() and not any(folder.glob("*.safetensors"))
    if is_pickled or read_json(path).get("model_type") not in GEMMAS:
        return None
    ends = ("self_attn.o_proj.weight", "post_attention_layernorm.weight")
    names = [f"{prefix}layers.{layer}.{end}" for end in ends for prefix in PREFIXES]
    tensors = list(read_tensors(name, names, revision).items())
    found = {end: tensor for end in ends for key, tensor in tensors if key.endswith(end)}
    if len(found) < 2:
        raise ValueError(f"{name} has no tensor {names[0]} or no {names[3]}")
    weights, gain = (found[end].float() for end in ends)
    return AttentionOutput(weights.T, 1 + gain)
