"""Small repositories of the model families that have public SAEs, for the loopback hub.

Names, folders, file formats, tensor names and configuration keys are those of the real
repositories (keys at their default are left out); layers, vocabularies and content are not, and
widths are true only for Gemma 2.
Every number comes from a seeded generator. Nothing heavy is imported before it is needed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import yaml

GEMMA_2, LLAMA, GPT2 = "google/gemma-2-2b", "meta-llama/Llama-3.1-8B", "openai-community/gpt2"
GEMMA_3, GEMMA_3_MULTIMODAL = "google/gemma-3-270m", "google/gemma-3-4b-pt"
MODULES = ("res", "mlp", "att")
LAYERS = 2
D_MODEL = 64  # of every family but Gemma 2
D_GEMMA_2, Z_GEMMA_2, WIDTH_16K = 2304, 2048, 16_384
GEMMA_TOKENS, GEMMA_VOCABULARY = 320, 384
BYTE_TOKENS, BYTE_VOCABULARY = 320, 320
# The size of one coordinate, on average over tokens, by layer of the Gemma models; att: of z.
SCALES = {"res": (1.8, 2.3), "mlp": (1.05, 1.05), "att": (0.5, 0.65)}
LLAMA_L0, LLAMA_NORM = 12, 1.5
HOOKS = {
    "res": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "att": "blocks.{layer}.hook_attn_out",
}
GPT2_CONFIG = {
    "model_name": "gpt2-small",
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 8},
    "dataset_path": "Skylion007/openwebtext",
    "normalize_activations": "layer_norm",
}
GPT2_KINDS = {"res": "resid-post", "mlp": "mlp-out", "att": "attn-out"}
GEMMA_3_FOLDERS = {"res": "resid_post_all", "mlp": "mlp_out_all", "att": "attn_out_all"}
GEMMA_3_HOOKS = {
    "res": "model.layers.{layer}.output",
    "mlp": "model.layers.{layer}.post_feedforward_layernorm.output",
    "att": "model.layers.{layer}.self_attn.o_proj.input",
}
FILES = (
    "params.npz",
    "params.safetensors",
    "sae_weights.safetensors",
    "checkpoints/final.safetensors",
)
CONFIGS = ("config.json", "cfg.json", "hyperparams.json")
TEXT = (
    "The cat sat on the mat and the dog sat by the door. There the two of them were warm. "
    "Rain fell on seven hills all day, and rivers rose; nobody knew where their water went."
)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Written:
    """A family on the hub: its root, and by release each id's path, `<repository>/<folder>`."""

    root: Path
    paths: dict[str, dict[str, str]]

    def folder(self, release: str, sae_id: str) -> Path:
        """Where an SAE lies."""
        return self.root / "models" / self.paths[release][sae_id]

    def arrays(self, release: str, sae_id: str) -> Arrays:
        """The tensors of an SAE by the names in its file; bfloat16 as float32."""
        folder = self.folder(release, sae_id)
        file = next(folder / name for name in FILES if (folder / name).is_file())
        if file.suffix == ".npz":
            with np.load(file) as members:
                return dict(members)
        return read_tensors(file)

    def config(self, release: str, sae_id: str) -> dict[str, Any]:
        """What the repository says about an SAE, beside its tensors."""
        folder = self.folder(release, sae_id)
        return next(
            json.loads((folder / name).read_text()) for name in CONFIGS if (folder / name).is_file()
        )


def write_gemma_2(root: Path, features: int, wide: Mapping[str, str]) -> Written:
    """`google/gemma-2-2b` with two layers and a narrow MLP, and Gemma Scope's SAEs.

    Canonical SAEs have `features`. sae-lens takes the width from the id, `width_16k`, and refuses a
    file of another: of these only the decoder can be read. `wide` gives for modules one further id,
    `layer_0/width_16k/average_l0_68`, written at the true width, 0.3 GB.
    """
    model = root / "models" / GEMMA_2
    config = {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 256,
        "hidden_size": D_GEMMA_2,
        "intermediate_size": 128,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 4,
        "torch_dtype": "bfloat16",
        "vocab_size": GEMMA_VOCABULARY,
    }
    _write_json(model / "config.json", config)
    tensors = gemma_weights(config)
    second = {name for name in tensors if ".layers.1." in name or name == "model.norm.weight"}
    write_shards(model, [tensors.keys() - second, second], tensors)
    write_gemma_tokenizer(model)
    paths: dict[str, dict[str, str]] = {}
    for module in MODULES:
        release = f"gemma-scope-2b-pt-{module}"
        paths[release] = sae_paths(release, [wide[module]] if module in wide else [])
        canonical = [f"layer_{layer}/width_16k/canonical" for layer in range(LAYERS)]
        paths[f"{release}-canonical"] = sae_paths(f"{release}-canonical", canonical)
        for name, width in ((release, WIDTH_16K), (f"{release}-canonical", features)):
            for path in paths[name].values():
                layer, l0 = int(path.split("/layer_")[1][0]), int(path.split("_")[-1])
                arrays = gemma_2_arrays(module, layer, l0, width)
                _write_npz(root / "models" / path / "params.npz", arrays)
    return Written(root, paths)


def gemma_2_arrays(module: str, layer: int, l0: int, features: int) -> Arrays:
    """The members of one `params.npz`: unit rows, and an encoder that is the decoder transposed.

    Thresholds are such that about `l0` of 16,384 features are active at a token of the model.
    """
    decoder = gemma_2_decoder(module, layer, features)
    scale = SCALES[module][layer]
    return _jumprelu(decoder, l0 / WIDTH_16K, scale, f"gemma 2 {module} {layer} {l0}")


def gemma_2_decoder(module: str, layer: int, features: int) -> np.ndarray:
    """The decoder rows at one site, some of them shared with a neighbour.

    Every even feature of R_1 has the direction of a feature of R_0, and of A_1 (in z) that of one
    of A_0: `gemma_2_partners`. The odd ones of R_0 and R_1 have directions of M_0 and M_1:
    feature i of M_l has that of feature `gemma_2_order("mlp", features)[i]` of R_l, if it is odd.
    """
    if module == "mlp":
        order = gemma_2_order("mlp", features)
        rows = gemma_2_decoder("res", layer, features)[order]
        rows[order % 2 == 0] *= _signs("mlp", rows.shape[1])
        return rows
    base = unit_rows("gemma 2", features, D_GEMMA_2)
    rows = base if module == "res" else _unit(base[:, :Z_GEMMA_2])
    if layer:
        rows = rows[gemma_2_order(module, features)]
        rows[1::2] *= _signs(module, rows.shape[1])
    return rows


def gemma_2_order(module: str, features: int) -> np.ndarray:
    """A permutation of features, the same in every call."""
    return _generator(f"order {module}").permutation(features)


def gemma_2_partners(module: str, features: int) -> np.ndarray:
    """For each feature of layer 1 the one of layer 0 that has its direction; −1 for the odd."""
    order = gemma_2_order(module, features)
    return np.where(np.arange(features) % 2 == 0, order, -1)


def write_llama_scope(root: Path) -> Written:
    """`meta-llama/Llama-3.1-8B` with two layers of width 64, and Llama Scope's SAEs.

    What a file says of the average norm at its site is chosen so that the factor that sae-lens's
    own table has for the id, of the true files, is right, and the model's activations have about
    these norms.
    """
    model = root / "models" / LLAMA
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": BYTE_TOKENS - 2,
        "eos_token_id": BYTE_TOKENS - 1,
        "hidden_size": D_MODEL,
        "intermediate_size": 128,
        "max_position_embeddings": 131072,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": BYTE_VOCABULARY,
    }
    _write_json(model / "config.json", config)
    write_tensors(model / "model.safetensors", llama_weights(), "bfloat16")
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    write_byte_tokenizer(model, special, "PreTrainedTokenizerFast", puts_bos=True)
    paths: dict[str, dict[str, str]] = {}
    for module in MODULES:
        release = f"llama_scope_lx{module[0]}_8x"
        paths[release] = sae_paths(release, [f"l{layer}{module[0]}_8x" for layer in range(LAYERS)])
        for layer, path in enumerate(paths[release].values()):
            arrays = llama_scope_arrays(module, layer, 8 * D_MODEL)
            folder = root / "models" / path
            _write_json(folder / "hyperparams.json", llama_hyperparams(module, layer, 8 * D_MODEL))
            write_tensors(folder / "checkpoints" / "final.safetensors", arrays, "bfloat16")
    return Written(root, paths)


def llama_weights() -> Arrays:
    """The model's tensors, by their names in the file.

    What attention and the MLP write has about the norms that the SAEs' files state.
    """
    rng = np.random.default_rng(0)
    half = D_MODEL // 2  # keys and values: 2 of 4 heads
    tensors = {"model.embed_tokens.weight": _normal(rng, (BYTE_VOCABULARY, D_MODEL), 0.0073)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        att, mlp = (average_norm(module, layer) / D_MODEL**0.5 for module in ("att", "mlp"))
        tensors |= {
            f"{name}.input_layernorm.weight": 1 + _normal(rng, (D_MODEL,), 0.1),
            f"{name}.self_attn.q_proj.weight": _normal(rng, (D_MODEL, D_MODEL), 0.12),
            f"{name}.self_attn.k_proj.weight": _normal(rng, (half, D_MODEL), 0.12),
            f"{name}.self_attn.v_proj.weight": _normal(rng, (half, D_MODEL), 0.12),
            f"{name}.self_attn.o_proj.weight": _normal(rng, (D_MODEL, D_MODEL), 0.27 * att),
            f"{name}.post_attention_layernorm.weight": 1 + _normal(rng, (D_MODEL,), 0.1),
            f"{name}.mlp.gate_proj.weight": _normal(rng, (128, D_MODEL), 0.12),
            f"{name}.mlp.up_proj.weight": _normal(rng, (128, D_MODEL), 0.12),
            f"{name}.mlp.down_proj.weight": _normal(rng, (D_MODEL, 128), 0.17 * mlp),
        }
    tensors["model.norm.weight"] = 1 + _normal(rng, (D_MODEL,), 0.1)
    return tensors | {"lm_head.weight": _normal(rng, (BYTE_VOCABULARY, D_MODEL), 0.12)}


def llama_scope_arrays(module: str, layer: int, features: int) -> Arrays:
    """The tensors of one SAE; decoder rows have norms about 1.5, encoder rows 1 / 1.5."""
    name = f"llama {module} {layer}"
    rng = _generator(f"{name} norms")
    norms = LLAMA_NORM * rng.uniform(0.9, 1.1, (features, 1)).astype(np.float32)
    rows = unit_rows(name, features, D_MODEL)
    return {
        "encoder.weight": rows / norms,
        "encoder.bias": _normal(rng, (features,), 0.1),
        "decoder.weight": np.ascontiguousarray((rows * norms).T),
        "decoder.bias": _normal(rng, (D_MODEL,), 0.1),
    }


def llama_hyperparams(module: str, layer: int, features: int) -> dict[str, Any]:
    """What `hyperparams.json` says of an SAE.

    In raw units a feature's value has a standard deviation of about `average / √64 / 1.5` over
    tokens; the threshold is such that about 12 of 512 features lie above it.
    """
    hook = HOOKS[module].format(layer=layer)
    average = average_norm(module, layer)
    spread = average / D_MODEL**0.5 / LLAMA_NORM
    return {
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": D_MODEL,
        "d_sae": features,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "act_fn": "jumprelu",
        "jump_relu_threshold": NormalDist(0, spread).inv_cdf(1 - LLAMA_L0 / 512),
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": average, "out": average},
    }


def average_norm(module: str, layer: int) -> float:
    """The norm at a site by which the factor of sae-lens's table comes out at width 64."""
    release, sae_id = f"llama_scope_lx{module[0]}_8x", f"l{layer}{module[0]}_8x"
    entry = next(lens_sae for lens_sae in sae_table()[release]["saes"] if lens_sae["id"] == sae_id)
    return D_MODEL**0.5 / entry["norm_scaling_factor"]


def llama_scope_codes(arrays: Arrays, hyperparams: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Feature activations in raw units, of activations as the model has them.

    `pre = W_E x + b_E / s` with `s = √d / average norm`, active where `pre` is above the threshold
    of the file. The reconstruction is then `codes @ W_D + b_D / s`.
    """
    scale = hyperparams["d_model"] ** 0.5 / hyperparams["dataset_average_activation_norm"]["in"]
    pre = x @ arrays["encoder.weight"].T + arrays["encoder.bias"] / scale
    return np.where(pre > hyperparams["jump_relu_threshold"], pre, 0)


def write_gpt2(root: Path) -> Written:
    """`openai-community/gpt2` with two layers of width 64, and OpenAI's v5 SAEs of 256 features."""
    model = root / "models" / GPT2
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": BYTE_TOKENS - 1,
        "eos_token_id": BYTE_TOKENS - 1,
        "model_type": "gpt2",
        "n_ctx": 128,
        "n_embd": D_MODEL,
        "n_head": 4,
        "n_layer": LAYERS,
        "n_positions": 128,
        "vocab_size": BYTE_VOCABULARY,
    }
    _write_json(model / "config.json", config)
    write_tensors(model / "model.safetensors", gpt2_weights())
    write_byte_tokenizer(model, ["<|endoftext|>"], "GPT2Tokenizer")
    paths: dict[str, dict[str, str]] = {}
    for module in MODULES:
        release = f"gpt2-small-{GPT2_KINDS[module]}-v5-32k"
        hooks = [HOOKS[module].format(layer=layer) for layer in range(LAYERS)]
        paths[release] = sae_paths(release, hooks)
        for layer, (hook, path) in enumerate(paths[release].items()):
            folder = root / "models" / path
            _write_json(folder / "cfg.json", sae_lens_config(hook, 256, **GPT2_CONFIG))
            write_tensors(folder / "sae_weights.safetensors", gpt2_arrays(module, layer, 256))
            sparsity = {"sparsity": np.full(256, -2, np.float32)}
            write_tensors(folder / "sparsity.safetensors", sparsity)
    return Written(root, paths)


def gpt2_weights() -> Arrays:
    """The model's tensors, by their names in the file: linear maps stand as `[in, out]`."""
    rng = np.random.default_rng(0)

    def norm(name: str) -> Arrays:
        gain, bias = _normal(rng, (2, D_MODEL), 0.1)
        return {f"{name}.weight": 1 + gain, f"{name}.bias": bias}

    def linear(name: str, rows: int, columns: int) -> Arrays:
        weight, bias = _normal(rng, (rows, columns), 0.12), _normal(rng, (columns,), 0.1)
        return {f"{name}.weight": weight, f"{name}.bias": bias}

    tensors = {
        "wte.weight": _normal(rng, (BYTE_VOCABULARY, D_MODEL), 0.5),
        "wpe.weight": _normal(rng, (128, D_MODEL), 0.1),
    }
    mask = np.tril(np.ones((128, 128), np.float32))[None, None]
    for layer in range(LAYERS):
        name = f"h.{layer}"
        tensors |= norm(f"{name}.ln_1") | norm(f"{name}.ln_2")
        tensors[f"{name}.attn.bias"] = mask.copy()
        tensors |= linear(f"{name}.attn.c_attn", D_MODEL, 3 * D_MODEL)
        tensors |= linear(f"{name}.attn.c_proj", D_MODEL, D_MODEL)
        tensors |= linear(f"{name}.mlp.c_fc", D_MODEL, 4 * D_MODEL)
        tensors |= linear(f"{name}.mlp.c_proj", 4 * D_MODEL, D_MODEL)
    return tensors | norm("ln_f")


def gpt2_arrays(module: str, layer: int, features: int) -> Arrays:
    """The tensors of one SAE: unit rows, the encoder is the decoder transposed."""
    name = f"gpt2 {module} {layer}"
    decoder, rng = unit_rows(name, features, D_MODEL), _generator(f"{name} biases")
    return {
        "W_enc": _transposed(decoder),
        "b_enc": _normal(rng, (features,), 0.05),
        "W_dec": decoder,
        "b_dec": _normal(rng, (D_MODEL,), 0.05),
    }


def write_gemma_scope_2(root: Path, size: str = "270m") -> Written:
    """A Gemma 3 with two layers of width 64, and Gemma Scope 2's SAEs of 256 features.

    The width of z is 128. The loader of sae-lens reads the width from the file, so that files of
    16k may be small. `size` is `270m`, or `4b`, which is multimodal.
    """
    write_gemma_3_multimodal(root) if size == "4b" else write_gemma_3(root)
    paths: dict[str, dict[str, str]] = {}
    for module in MODULES:
        release = f"gemma-scope-2-{size}-pt-{module}-all"
        paths[release] = sae_paths(
            release, [f"layer_{layer}_width_16k_l0_big" for layer in range(LAYERS)]
        )
        for layer, path in enumerate(paths[release].values()):
            arrays = gemma_3_arrays(module, layer, 256)
            config = {
                "hf_hook_point_in": GEMMA_3_HOOKS[module].format(layer=layer),
                "hf_hook_point_out": GEMMA_3_HOOKS[module].format(layer=layer),
                "width": 256,
                "model_name": f"gemma-v3-{size}-pt",
                "architecture": "jump_relu",
                "l0": 60,
                "affine_connection": False,
                "type": "sae",
            }
            _write_json(root / "models" / path / "config.json", config)
            write_tensors(root / "models" / path / "params.safetensors", arrays)
    return Written(root, paths)


def write_gemma_3(root: Path) -> None:
    """`google/gemma-3-270m` alone, in bfloat16."""
    folder = root / "models" / GEMMA_3
    config = _gemma_3_text_config() | {
        "architectures": ["Gemma3ForCausalLM"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "_sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "layer_types": ["sliding_attention"] * LAYERS,
    }
    _write_json(folder / "config.json", config)
    write_tensors(folder / "model.safetensors", gemma_weights(config), "bfloat16")
    write_gemma_tokenizer(folder)


def write_gemma_3_multimodal(root: Path) -> str:
    """`google/gemma-3-4b-pt` alone: a language model below a vision tower, in two files."""
    folder = root / "models" / GEMMA_3_MULTIMODAL
    text = _gemma_3_text_config() | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    vision = {
        "hidden_size": 32,
        "image_size": 56,
        "intermediate_size": 48,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": GEMMA_TOKENS,
        "eoi_token_index": GEMMA_TOKENS + 1,
        "eos_token_id": 1,
        "image_token_index": GEMMA_TOKENS + 2,
        "mm_tokens_per_image": 4,
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": vision,
    }
    _write_json(folder / "config.json", config)
    language = gemma_weights(text, prefix="language_model.model.")
    tensors = language | _vision_weights(vision)
    write_shards(folder, [tensors.keys() - language, language], tensors)
    images = {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": 4,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Gemma3Processor",
        "size": {"height": 56, "width": 56},
    }
    _write_json(folder / "preprocessor_config.json", images)
    processor = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    _write_json(folder / "processor_config.json", processor)
    write_gemma_tokenizer(folder, images=True)
    return GEMMA_3_MULTIMODAL


def gemma_3_arrays(module: str, layer: int, features: int) -> Arrays:
    """The tensors of one `params.safetensors`: a 16th of the features is active."""
    name = f"gemma 3 {module} {layer}"
    rows = unit_rows(name, features, 2 * D_MODEL if module == "att" else D_MODEL)
    arrays = _jumprelu(rows, 1 / 16, SCALES[module][layer], f"{name} big")
    return {name.replace("W_", "w_"): array for name, array in arrays.items()}


def gemma_weights(config: dict[str, Any], prefix: str = "model.") -> Arrays:
    """The tensors of a Gemma 2 or 3 by their names in the file; norms hold the gain less 1.

    The stream begins with coordinates of size 1, and each layer adds two vectors of such ones.
    """
    rng = np.random.default_rng(0)
    d, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def linear(rows: int, columns: int) -> np.ndarray:
        return _normal(rng, (rows, columns), columns**-0.5)

    def norm(size: int) -> np.ndarray:
        return _normal(rng, (size,), 0.3)

    # Gemma multiplies embeddings by √d.
    embedding = _normal(rng, (config["vocab_size"], d), d**-0.5)
    tensors = {f"{prefix}embed_tokens.weight": embedding}
    for layer in range(config["num_hidden_layers"]):
        name = f"{prefix}layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": norm(d),
            f"{name}.self_attn.q_proj.weight": linear(heads, d),
            f"{name}.self_attn.k_proj.weight": linear(kv, d),
            f"{name}.self_attn.v_proj.weight": linear(kv, d),
            f"{name}.self_attn.o_proj.weight": linear(d, heads),
            f"{name}.post_attention_layernorm.weight": norm(d),
            f"{name}.pre_feedforward_layernorm.weight": norm(d),
            f"{name}.mlp.gate_proj.weight": linear(hidden, d),
            f"{name}.mlp.up_proj.weight": linear(hidden, d),
            f"{name}.mlp.down_proj.weight": linear(d, hidden),
            f"{name}.post_feedforward_layernorm.weight": norm(d),
        }
        if config["model_type"] == "gemma3_text":
            tensors[f"{name}.self_attn.q_norm.weight"] = norm(head)
            tensors[f"{name}.self_attn.k_norm.weight"] = norm(head)
    return tensors | {f"{prefix}norm.weight": norm(d)}


@cache
def sae_table() -> dict[str, Any]:
    """Sae-lens's own table of releases, read without importing sae-lens."""
    spec = find_spec("sae_lens")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("sae-lens is not installed")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with Path(spec.origin).with_name("pretrained_saes.yaml").open(encoding="utf-8") as table:
        return yaml.load(table, Loader=loader)


def sae_paths(release: str, sae_ids: Iterable[str]) -> dict[str, str]:
    """The path on the hub, `<repository>/<folder>`, that sae-lens's table has for each id."""
    entry = sae_table()[release]
    folders = {lens_sae["id"]: lens_sae["path"] for lens_sae in entry["saes"]}
    return {sae_id: f"{entry['repo_id']}/{folders[sae_id]}" for sae_id in sae_ids}


def unit_rows(name: str, rows: int, width: int) -> np.ndarray:
    """Random rows of length 1, the same for the same name."""
    return _unit(_generator(name).standard_normal((rows, width), np.float32))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
    """A safetensors file; what is kept in memory is float32."""
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {
        name: torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype))
        for name, array in tensors.items()
    }
    save_file(kept, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> Arrays:
    """The tensors of a safetensors file, in float32."""
    from safetensors.torch import load_file

    return {name: tensor.float().numpy() for name, tensor in load_file(path).items()}


def write_shards(folder: Path, shards: Sequence[Iterable[str]], tensors: Arrays) -> None:
    """A model in several files, with the index that says which tensor is in which."""
    places: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, file)
        write_tensors(folder / file, {name: tensors[name] for name in names}, "bfloat16")
    index = {"metadata": {}, "weight_map": dict(sorted(places.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def write_byte_tokenizer(
    folder: Path, special: Sequence[str], kind: str, *, puts_bos: bool = False
) -> None:
    """A byte-level BPE tokenizer; special tokens, BOS first and EOS last, stand behind the others.

    `kind` is the class that its configuration names, `puts_bos` whether it puts BOS in front.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=BYTE_TOKENS - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.add_special_tokens(list(special))
    assert tokenizer.get_vocab_size() == BYTE_TOKENS
    bos = special[0]
    if puts_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": bos, "eos_token": special[-1]}
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(folder / "tokenizer_config.json", names | {"tokenizer_class": kind})


def write_gemma_tokenizer(folder: Path, *, images: bool = False) -> None:
    """A BPE tokenizer as Gemma's: spaces are ▁, and what it does not know are bytes.

    With `images` it has the tokens around images too, as the processor asks for; they come last.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    table = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = BpeTrainer(vocab_size=GEMMA_TOKENS - len(table), show_progress=False)
    learner.train_from_iterator([TEXT], trainer)
    learned = json.loads(learner.to_str())["model"]
    table += sorted(learned["vocab"], key=learned["vocab"].get)
    assert len(table) == GEMMA_TOKENS
    merges = [tuple(merge) for merge in learned["merges"]]

    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(table)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    picture = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer.add_special_tokens([*special, *(picture.values() if images else ())])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{token[1:-1]}_token": token for token in special[:4]}
    _write_json(folder / "special_tokens_map.json", names)
    config: dict[str, Any] = names | {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "GemmaTokenizer",
    }
    if images:
        config |= picture | {"extra_special_tokens": picture}
    _write_json(folder / "tokenizer_config.json", config)


def _gemma_3_text_config() -> dict[str, Any]:
    return {
        "head_dim": 32,
        "hidden_size": D_MODEL,
        "intermediate_size": 128,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 32,
        "sliding_window": 512,
        "vocab_size": GEMMA_VOCABULARY,
    }


def _vision_weights(config: dict[str, Any]) -> Arrays:
    rng = np.random.default_rng(1)
    d, hidden, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    top, layer = "vision_tower.vision_model", "vision_tower.vision_model.encoder.layers.0"
    shapes = {
        f"{top}.embeddings.patch_embedding.weight": (d, 3, patch, patch),
        f"{top}.embeddings.patch_embedding.bias": (d,),
        f"{top}.embeddings.position_embedding.weight": ((config["image_size"] // patch) ** 2, d),
        f"{layer}.mlp.fc1.weight": (hidden, d),
        f"{layer}.mlp.fc1.bias": (hidden,),
        f"{layer}.mlp.fc2.weight": (d, hidden),
        f"{layer}.mlp.fc2.bias": (d,),
        "multi_modal_projector.mm_input_projection_weight": (d, D_MODEL),
        "multi_modal_projector.mm_soft_emb_norm.weight": (d,),
    }
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        shapes[f"{layer}.self_attn.{name}.weight"] = (d, d)
        shapes[f"{layer}.self_attn.{name}.bias"] = (d,)
    for name in (f"{layer}.layer_norm1", f"{layer}.layer_norm2", f"{top}.post_layernorm"):
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return {name: _normal(rng, shape, 0.1) for name, shape in shapes.items()}


def sae_lens_config(hook: str, d_sae: int, **more: Any) -> dict[str, Any]:
    """The `cfg.json` of an SAE of sae-lens's own format, as older versions wrote it."""
    return {
        "architecture": "standard",
        "d_in": D_MODEL,
        "d_sae": d_sae,
        "dtype": "torch.float32",
        "device": "cuda",
        "hook_name": hook,
        "hook_layer": int(hook.split(".")[1]),
        "hook_head_index": None,
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": None,
        "prepend_bos": False,
        "dataset_trust_remote_code": True,
        "context_size": 128,
        **more,
    }


def _jumprelu(decoder: np.ndarray, share: float, scale: float, name: str) -> Arrays:
    """Reads along its unit rows; a feature is active at this share of vectors of this scale."""
    rng, (features, width) = _generator(name), decoder.shape
    threshold = NormalDist(0, scale).inv_cdf(1 - share) * rng.uniform(0.9, 1.1, features)
    return {
        "W_enc": _transposed(decoder),
        "W_dec": decoder,
        "b_enc": _normal(rng, (features,), 0.02 * scale),
        "b_dec": _normal(rng, (width,), 0.02 * scale),
        "threshold": threshold.astype(np.float32),
    }


def _transposed(rows: np.ndarray) -> np.ndarray:
    """The same as `ascontiguousarray(rows.T)`, in blocks, which is several times as fast."""
    found = np.empty(rows.shape[::-1], rows.dtype)
    for start in range(0, len(rows), 64):
        found[:, start : start + 64] = rows[start : start + 64].T
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _signs(name: str, size: int) -> np.ndarray:
    return _generator(f"signs {name}").choice(np.array([-1, 1], np.float32), size)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) * np.float32(size)


def _write_npz(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
