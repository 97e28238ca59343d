"""Random models of thirty architectures: right by transformers' own hooks, or refused in words."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from flowhelpers.core.features import Site
from flowhelpers.interventions.generation import sample_tokens
from flowhelpers.suites.attention import attention_output
from flowhelpers.suites.bridge import load_model
from flowhelpers.suites.model import Edit, Model, cache_prompt, is_edited, logits_of, run_model

VOCABULARY, D, LAYERS, LAYER = 320, 32, 3, 1
BASE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA = BASE | {
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
HEADS = {"head_dim": 8}
ALL_HEADS = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
GPT = BASE | {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "gpt_neo": (
        "gpt_neo",
        BASE
        | {"hidden_size": D, "num_layers": LAYERS, "num_heads": 4, "intermediate_size": 48}
        | {"attention_types": [[["global"], LAYERS]], "max_position_embeddings": 128},
    ),
    "gpt_neox": ("gpt_neox", ALL_HEADS),
    "gpt_neox, one after another": ("gpt_neox", ALL_HEADS | {"use_parallel_residual": False}),
    "opt": ("opt", LLAMA | {"ffn_dim": 48, "word_embed_proj_dim": D}),
    "bloom": ("bloom", BASE | {"hidden_size": D, "n_layer": LAYERS, "n_head": 4}),
    "falcon": ("falcon", ALL_HEADS | {"alibi": False, "multi_query": True, "parallel_attn": True}),
    "falcon, alibi": (
        "falcon",
        ALL_HEADS | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "mpt": ("mpt", BASE | {"d_model": D, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 128}),
    "llama": ("llama", LLAMA),
    "mistral, sliding window": ("mistral", LLAMA | {"sliding_window": 6}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA | HEADS),
    "gemma": ("gemma", LLAMA | HEADS),
    "gemma2": ("gemma2", LLAMA | HEADS | {"sliding_window": 6}),
    "gemma3_text": ("gemma3_text", LLAMA | HEADS | {"sliding_window": 6}),
    "phi": ("phi", LLAMA),
    "phi3": ("phi3", LLAMA),
    "olmo": ("olmo", LLAMA),
    "olmo2": ("olmo2", LLAMA),
    "olmo3": ("olmo3", LLAMA),
    "stablelm": ("stablelm", LLAMA),
    "starcoder2": ("starcoder2", LLAMA),
    "cohere": ("cohere", LLAMA),
    "granite": ("granite", LLAMA | {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "glm4": ("glm4", LLAMA | HEADS),
    "exaone4": ("exaone4", LLAMA | {"sliding_window": 6}),
    "smollm3": ("smollm3", LLAMA),
    "gpt_oss": ("gpt_oss", LLAMA | {"head_dim": 16, "num_local_experts": 4}),
}
REFUSED = {
    "falcon, alibi": "has 0 tokens in its cache after a pass",
    "mpt": "has 0 tokens in its cache after a pass",
    "cohere": "its logits differ from those of transformers",
}
MLP = {"bloom": r"^mlp\.dense_4h_to_h$"}  # whose MLP adds to the stream by itself
OTHER_MLP = r"^(mlp|ffn|feed_forward|block_sparse_moe|fc2)$"
TO_STREAM = r"att.*\.(o_proj|out_proj|dense|c_proj)$"
Hook = Callable[..., Any]


def write_model(folder: Path, kind: str, config: dict[str, Any]) -> Any:
    """A random model whose gains are as spread as trained ones, with its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 1:
                weights.mul_(torch.exp(0.5 * torch.randn(weights.shape)))
                weights.add_(0.1 * torch.randn(weights.shape))
            else:
                weights.copy_(0.3 * torch.randn(weights.shape))
    model.save_pretrained(folder)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["rain fell on the seven hills"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def changed(change: Hook, module: nn.Module, inputs: Any, out: Any) -> Any:
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


class Plain:
    """A model of transformers, read and changed by plain hooks."""

    def __init__(self, model: Any) -> None:
        lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
        self.model, self.layers = model, next(lists)

    def part(self, layer: int, pattern: str) -> nn.Module:
        """The one part of a layer whose name fits."""
        found = [m for name, m in self.layers[layer].named_modules() if re.search(pattern, name)]
        assert len(found) == 1, pattern
        return found[0]

    @torch.no_grad()
    def run(self, ids: Tensor, **hooks: tuple[nn.Module, Hook]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the stream after each layer; hooks change the output, or `z_` the input."""
        after: list[Tensor] = []
        with ExitStack() as stack:
            for name, (module, change) in hooks.items():
                if name.startswith("z"):
                    handle = module.register_forward_pre_hook(lambda _, i, c=change: (c(i[0]),))
                else:
                    handle = module.register_forward_hook(partial(changed, change))
                stack.callback(handle.remove)
            for layer in self.layers:
                handle = layer.register_forward_hook(lambda _, __, out: after.append(first(out)))
                stack.callback(handle.remove)
            return self.model(ids).logits, after


def agree(found: Tensor | None, expected: Tensor) -> bool:
    assert found is not None
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


@pytest.fixture(scope="module", params=list(CASES))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plain model, and ours or the words in which it was refused."""
    folder = tmp_path_factory.mktemp("architecture")
    plain = Plain(write_model(folder, *CASES[request.param]))
    try:
        return request.param, plain, load_model(str(folder))
    except ValueError as error:
        return request.param, plain, f"{error}".replace(str(folder), "FOLDER")


def test_only_these_are_refused_and_each_in_words(both: Any):
    name, plain, found = both
    assert isinstance(found, str) == (name in REFUSED), found
    if isinstance(found, str):
        kind = type(plain.model).__name__
        assert found.startswith(f"FOLDER ({kind}) cannot be used here: ")
        assert REFUSED[name] in found


def test_what_is_not_refused_is_right(both: Any):
    name, plain, model = both
    if isinstance(model, str):
        return
    ids = torch.randint(2, 290, (2, 14), generator=torch.Generator().manual_seed(1))
    sites = [Site(i, "res") for i in range(LAYERS)] + [Site(LAYER, m) for m in ("mlp", "att")]
    assert not is_edited(model)
    logits, read = run_model(model, ids, sites)
    expected, after = plain.run(ids)
    assert agree(logits, expected)
    for layer, stream in enumerate(after):
        assert agree(read[Site(layer, "res")], stream), layer
    mlp = plain.part(LAYER, MLP.get(name, OTHER_MLP))
    without = plain.run(ids, mlp=(mlp, torch.zeros_like))[1]
    assert agree(read[Site(LAYER, "mlp")], after[LAYER] - without[LAYER])
    assert agree(read[Site(LAYER, "att")], without[LAYER] - after[LAYER - 1])

    push = torch.linspace(-1, 1, D)
    edited = logits_of(model, ids, [Edit(Site(LAYER, "res"), lambda x: x + push)])
    assert agree(edited, plain.run(ids, res=(plain.layers[LAYER], lambda x: x + push))[0])

    prefix = cache_prompt(model, ids[:1])[1]
    for cut in (1, 5, 9, 13):
        rest, _ = run_model(model, ids[:1, cut:].expand(3, -1), prefix=prefix.first(cut))
        assert agree(rest, expected[:1, cut:].expand(3, -1, -1)), cut
    check_z(plain, model, ids, (mlp, torch.zeros_like))

    start = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 1}
    expected = plain.model.generate(ids[:1, :4], **start)
    assert torch.equal(sample_tokens(model, ids[:1, :4], [0], 8, temperature=1e-4), expected)


def check_z(plain: Plain, model: Model, ids: Tensor, mlp: tuple[nn.Module, Hook]) -> None:
    seen: list[Tensor] = []
    to_stream = plain.part(LAYER, TO_STREAM)

    def keep(z: Tensor) -> Tensor:
        seen.append(z)
        return z

    plain.run(ids, z=(to_stream, keep))
    at_z = Site(LAYER, "z")
    assert agree(run_model(model, ids, [at_z])[1][at_z], seen[0].flatten(2))
    output = attention_output(model, LAYER)
    rows = torch.randn(5, len(output.weights), generator=torch.Generator().manual_seed(2))
    for row, found in zip(rows, output.to_residual(rows), strict=True):
        ends = [
            plain.run(
                ids, z=(to_stream, lambda z, v=sign * row: v.repeat(*z.shape[:2], 1)), mlp=mlp
            )[1]
            for sign in (1e3, -1e3)
        ]
        arrived = (ends[0][LAYER] - ends[1][LAYER])[0, -1]
        assert cosine_similarity(found, arrived, dim=0) > 0.9999
