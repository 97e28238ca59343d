"""Small repositories of the model families that have public SAEs, for the loopback hub.

Names, folders, file formats, tensor names and configuration keys are those of the real
repositories (keys at their default are left out); layers, vocabularies and content are not, and
widths are true only for Gemma 2.
Every number comes from a seeded generator. Nothing heavy is imported before it is needed.
"""

import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
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
LETTERS = string.ascii_letters + ".,;"
GEMMA_TOKENS, GEMMA_VOCABULARY = 5 + 256 + 1 + len(LETTERS), 384
BYTES, BYTE_VOCABULARY = 256, 320
# The size of one coordinate, on average over tokens, by layer of the Gemma models; att: of z.
SCALES = {"res": (1.8, 2.3), "mlp": (1.05, 1.05), "att": (0.5, 0.65)}
LLAMA_L0, LLAMA_NORM = 12, 1.5
HOOKS = {
    "res": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "att": "blocks.{layer}.hook_attn_out",
}
GPT2_KINDS = {"res": "resid-post", "mlp": "mlp-out", "att": "attn-out"}
GEMMA_3_HOOKS = {
    "res": "model.layers.{layer}.output",
    "mlp": "model.layers.{layer}.post_feedforward_layernorm.output",
    "att": "model.layers.{layer}.self_attn.o_proj.input",
}
Arrays = dict[str, np.ndarray]


def write_gemma_2(root: Path, features: int, wide: Mapping[str, str]) -> None:
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
    write_json(model / "config.json", config)
    tensors = gemma_weights(config)
    second = {name for name in tensors if ".layers.1." in name or name == "model.norm.weight"}
    write_shards(model, [tensors.keys() - second, second], tensors)
    write_gemma_tokenizer(model)
    release, sae_id = "gemma-scope-2b-pt-{module}-canonical", "layer_{layer}/width_16k/canonical"
    write_saes(root, release, sae_id, partial(_write_gemma_2_sae, features))
    for module, sae_id in wide.items():
        folder = sae_folder(root, {"release": f"gemma-scope-2b-pt-{module}", "id": sae_id})
        _write_gemma_2_sae(WIDTH_16K, folder, module, int(sae_id[len("layer_")]))


def _write_gemma_2_sae(features: int, folder: Path, module: str, layer: int) -> None:
    """Writes `params.npz`; as many of 16,384 features are active as the folder's name says."""
    share, scale = int(folder.name.split("_")[-1]) / WIDTH_16K, SCALES[module][layer]
    decoder = gemma_2_decoder(module, layer, features)
    arrays = _jumprelu(decoder, share, scale, f"{module} {folder.name}")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", allow_pickle=False, **arrays)


def gemma_2_decoder(module: str, layer: int, features: int) -> np.ndarray:
    """The decoder rows at one site, some of which are those of a neighbour.

    With `order = gemma_2_order(module, features)`, feature i of R_1 has the direction of feature
    `order[i]` of R_0 if i is even, and that of M_1 the one of `order[i]` of R_1 if that is odd.
    """
    width = Z_GEMMA_2 if module == "att" else D_GEMMA_2
    rows = unit_rows(f"gemma 2 {module} {layer}", features, width)
    order = gemma_2_order(module, features)
    if layer and module == "res":
        rows[::2] = gemma_2_decoder("res", 0, features)[order[::2]]
    elif layer and module == "mlp":
        odd = order % 2 == 1
        rows[odd] = gemma_2_decoder("res", 1, features)[order[odd]]
    return rows


def gemma_2_order(module: str, features: int) -> np.ndarray:
    """A permutation of features, the same in every call."""
    return _generator(f"order {module}").permutation(features)


def write_llama_scope(root: Path) -> None:
    """`meta-llama/Llama-3.1-8B` with two layers of width 64, and Llama Scope's SAEs.

    What a file says of the average norm at its site is chosen so that the factor that sae-lens's
    own table has for the id, of the true files, is right, and the model's activations have about
    these norms.
    """
    model = root / "models" / LLAMA
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": BYTES,
        "eos_token_id": BYTES + 1,
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
    write_json(model / "config.json", config)
    sizes = {"norm": 0.1, "embed_tokens": 0.0073}
    for layer in range(LAYERS):  # what is written has about the norms that the SAEs' files state
        att, mlp = (average_norm(module, layer) / D_MODEL**0.5 for module in ("att", "mlp"))
        sizes |= {f"{layer}.self_attn.o_proj": 0.27 * att, f"{layer}.mlp.down_proj": 0.17 * mlp}
    tensors = model_weights(config, sizes | {"": 0.12})
    write_tensors(model / "model.safetensors", tensors, "bfloat16")
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    write_byte_tokenizer(model, special, "PreTrainedTokenizerFast", puts_bos=True)
    write_saes(root, "llama_scope_lx{m}_8x", "l{layer}{m}_8x", _write_llama_sae)


def _write_llama_sae(folder: Path, module: str, layer: int) -> None:
    """Writes one SAE; decoder rows have norms about 1.5, encoder rows 1 / 1.5.

    In raw units a feature's value has a standard deviation of about `average / √64 / 1.5` over
    tokens; the threshold is such that about 12 of 512 features lie above it.
    """
    name, features = f"llama {module} {layer}", 8 * D_MODEL
    hook, average = HOOKS[module].format(layer=layer), average_norm(module, layer)
    spread = average / D_MODEL**0.5 / LLAMA_NORM
    hyperparams = {
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": D_MODEL,
        "d_sae": features,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "act_fn": "jumprelu",
        "jump_relu_threshold": NormalDist(0, spread).inv_cdf(1 - LLAMA_L0 / features),
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": average, "out": average},
    }
    rng, rows = _generator(f"{name} norms"), unit_rows(name, features, D_MODEL)
    norms = LLAMA_NORM * rng.uniform(0.9, 1.1, (features, 1)).astype(np.float32)
    arrays = {
        "encoder.weight": rows / norms,
        "encoder.bias": _normal(rng, (features,), 0.1),
        "decoder.weight": (rows * norms).T,
        "decoder.bias": _normal(rng, (D_MODEL,), 0.1),
    }
    write_json(folder / "hyperparams.json", hyperparams)
    write_tensors(folder / "checkpoints" / "final.safetensors", arrays, "bfloat16")


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


def write_gpt2(root: Path) -> None:
    """`openai-community/gpt2` with two layers of width 64, and OpenAI's v5 SAEs of 256 features."""
    model = root / "models" / GPT2
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": BYTES,
        "eos_token_id": BYTES,
        "model_type": "gpt2",
        "n_ctx": 128,
        "n_embd": D_MODEL,
        "n_head": 4,
        "n_layer": LAYERS,
        "n_positions": 128,
        "vocab_size": BYTE_VOCABULARY,
    }
    write_json(model / "config.json", config)
    sizes = {"wte": 0.5, "wpe": 0.1, "bias": 0.1, "ln_": 0.1, "": 0.12}
    weights = model_weights(config, sizes)
    tensors = {name.removeprefix("transformer."): array for name, array in weights.items()}
    mask = np.tril(np.ones((128, 128), np.float32))[None, None]
    tensors |= {f"h.{layer}.attn.bias": mask.copy() for layer in range(LAYERS)}
    write_tensors(model / "model.safetensors", tensors)
    write_byte_tokenizer(model, ["<|endoftext|>"], "GPT2Tokenizer")
    write_saes(root, "gpt2-small-{kind}-v5-32k", "{hook}", _write_gpt2_sae)


def _write_gpt2_sae(folder: Path, module: str, layer: int) -> None:
    name = f"gpt2 {module} {layer}"
    write_sae(
        folder,
        HOOKS[module].format(layer=layer),
        sae_arrays(unit_rows(name, 256, D_MODEL), 0.05, name),
        model_name="gpt2-small",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": 8},
        dataset_path="Skylion007/openwebtext",
        normalize_activations="layer_norm",
    )


def write_gemma_scope_2(root: Path, size: str = "270m") -> None:
    """A Gemma 3 with two layers of width 64, and Gemma Scope 2's SAEs of 256 features.

    The width of z is 128. The loader of sae-lens reads the width from the file, so that files of
    16k may be small. `size` is `270m`, or `4b`, which is multimodal.
    """
    if size == "4b":
        write_gemma_3_multimodal(root)
    else:
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
        write_json(folder / "config.json", config)
        write_tensors(folder / "model.safetensors", gemma_weights(config), "bfloat16")
        write_gemma_tokenizer(folder)
    release, sae_id = f"gemma-scope-2-{size}-pt-{{module}}-all", "layer_{layer}_width_16k_l0_big"
    write_saes(root, release, sae_id, partial(_write_gemma_3_sae, f"gemma-v3-{size}-pt"))


def _write_gemma_3_sae(model: str, folder: Path, module: str, layer: int) -> None:
    """Writes one SAE, of which a 16th of the features is active."""
    name, hook = f"gemma 3 {module} {layer}", GEMMA_3_HOOKS[module].format(layer=layer)
    config = {
        "hf_hook_point_in": hook,
        "hf_hook_point_out": hook,
        "width": 256,
        "model_name": model,
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": False,
        "type": "sae",
    }
    rows = unit_rows(name, 256, 2 * D_MODEL if module == "att" else D_MODEL)
    arrays = _jumprelu(rows, 1 / 16, SCALES[module][layer], f"{name} big")
    tensors = {name.replace("W_", "w_"): array for name, array in arrays.items()}
    write_json(folder / "config.json", config)
    write_tensors(folder / "params.safetensors", tensors)


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
    write_json(folder / "config.json", config)
    language = {f"language_model.{name}": array for name, array in gemma_weights(text).items()}
    tensors = language | {
        f"vision_tower.vision_model.{name.removeprefix('vision_model.')}": array
        for name, array in model_weights(vision, {"": 0.1}, kind="AutoModel").items()
    }
    top, rng = "multi_modal_projector.mm", _generator("projector")
    tensors[f"{top}_input_projection_weight"] = _normal(rng, (32, D_MODEL), 0.1)
    tensors[f"{top}_soft_emb_norm.weight"] = _normal(rng, (32,), 0.1)
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
    write_json(folder / "preprocessor_config.json", images)
    processor = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    write_json(folder / "processor_config.json", processor)
    write_gemma_tokenizer(folder, images=True)
    return GEMMA_3_MULTIMODAL


def gemma_weights(config: dict[str, Any]) -> Arrays:
    """The tensors of a Gemma 2 or 3; norms hold the gain less 1.

    The stream begins with coordinates of size 1, and each layer adds two vectors of such ones.
    """
    stream = config["hidden_size"] ** -0.5  # Gemma multiplies embeddings by √d
    heads = config["num_attention_heads"] * config["head_dim"]
    written = {"o_proj": heads**-0.5, "down_proj": config["intermediate_size"] ** -0.5}
    return model_weights(config, {"norm": 0.3} | written | {"": stream}, gain=0)


def model_weights(
    config: dict[str, Any],
    sizes: Mapping[str, float],
    gain: float = 1,
    kind: str = "AutoModelForCausalLM",
) -> Arrays:
    """Numbers for all parameters of a model, by their names in its class in transformers.

    The standard deviation is that of the first key of `sizes` that is in the name; gains, the
    weights of one dimension, lie about `gain`.
    """
    import torch
    import transformers

    about = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, kind).from_config(about)
    rng, tensors = np.random.default_rng(0), {}
    for name, parameter in model.named_parameters():
        size = next(size for part, size in sizes.items() if part in name)
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        tensors[name] = gain * is_gain + _normal(rng, tuple(parameter.shape), size)
    return tensors


def write_transcoder(
    root: Path, source: Any, features: int, d_model: int, reads: str = "", is_affine: bool = False
) -> Arrays:
    """A transcoder of Gemma Scope, or of Gemma Scope 2 if `reads` gives Hugging Face's hook point.

    About a 50th of the features is active where what is read has coordinates of the size 1.
    """
    folder, name = sae_folder(root, source), f"transcoder {source['id']}"
    arrays = _jumprelu(unit_rows(name, features, d_model), 1 / 50, 1.0, name)
    arrays["W_dec"] = 0.3 * unit_rows(f"{name} writes", features, d_model)
    if not reads:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "params.npz", allow_pickle=False, **arrays)
        return arrays
    if is_affine:
        arrays["affine_skip_connection"] = _normal(_generator(name), (d_model, d_model), 0.02)
    layer = int(folder.name.split("_")[1])
    config = {
        "hf_hook_point_in": reads,
        "hf_hook_point_out": GEMMA_3_HOOKS["mlp"].format(layer=layer),
        "width": features,
        "model_name": "gemma-v3-270m-pt",
        "architecture": "jump_relu",
        "l0": 60,
        "affine_connection": is_affine,
        "type": "transcoder",
    }
    write_json(folder / "config.json", config)
    tensors = {name.replace("W_", "w_"): array for name, array in arrays.items()}
    write_tensors(folder / "params.safetensors", tensors)
    return arrays


def write_saes(
    root: Path,
    release: str,
    sae_id: str,
    write: Callable[[Path, str, int], None],
    layers: int = LAYERS,
) -> None:
    """Lets `write(folder, module, layer)` write the SAEs of a family, each where it lies."""
    for module in MODULES:
        for layer in range(layers):
            fill = {"module": module, "m": module[0], "kind": GPT2_KINDS[module], "layer": layer}
            fill["hook"] = HOOKS[module].format(layer=layer)
            source = {"release": release.format(**fill), "id": sae_id.format(**fill)}
            write(sae_folder(root, source), module, layer)


def write_sae(folder: Path, hook: str, arrays: Arrays, **more: Any) -> None:
    """One SAE of sae-lens's own format, as older versions wrote it."""
    config = {
        "architecture": "standard",
        "d_in": D_MODEL,
        "d_sae": len(arrays["W_dec"]),
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
    write_json(folder / "cfg.json", config)
    write_tensors(folder / "sae_weights.safetensors", arrays)
    sparsity = {"sparsity": np.full(len(arrays["W_dec"]), -2, np.float32)}
    write_tensors(folder / "sparsity.safetensors", sparsity)


def sae_arrays(decoder: np.ndarray, noise: float, name: str) -> Arrays:
    """Reads along its decoder's rows, with biases of the size `noise`."""
    rng, (features, width) = _generator(f"{name} biases"), decoder.shape
    return {
        "W_enc": np.ascontiguousarray(decoder.T),
        "W_dec": decoder,
        "b_enc": _normal(rng, (features,), noise),
        "b_dec": _normal(rng, (width,), noise),
    }


def _jumprelu(decoder: np.ndarray, share: float, scale: float, name: str) -> Arrays:
    """Reads along its unit rows; a feature is active at this share of vectors of this scale."""
    spread = _generator(name).uniform(0.9, 1.1, len(decoder)).astype(np.float32)
    threshold = NormalDist(0, scale).inv_cdf(1 - share) * spread
    return sae_arrays(decoder, 0.02 * scale, name) | {"threshold": threshold}


def sae_folder(root: Path, source: Any) -> Path:
    """Where an SAE lies: sae-lens's table has the repository and the folder of each release and id.

    `source` holds both, as in a suite's row.
    """
    entry = sae_table()[source["release"]]
    path = next(lens_sae["path"] for lens_sae in entry["saes"] if lens_sae["id"] == source["id"])
    return root / "models" / entry["repo_id"] / path


def read_sae(root: Path, source: Any) -> Arrays:
    """The tensors of an SAE by the names in its file; bfloat16 as float32."""
    names, folder = ("params.*", "sae_weights.*", "checkpoints/*"), sae_folder(root, source)
    file = next(file for name in names for file in folder.glob(name))
    return dict(np.load(file)) if file.suffix == ".npz" else read_tensors(file)


@cache
def sae_table() -> dict[str, Any]:
    """Sae-lens's own table of releases, read without importing sae-lens."""
    spec = find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with Path(spec.origin).with_name("pretrained_saes.yaml").open(encoding="utf-8") as table:
        return yaml.load(table, Loader=loader)


def unit_rows(name: str, rows: int, width: int) -> np.ndarray:
    """Random rows of length 1, the same for the same name."""
    found = _normal(_generator(name), (rows, width), 1)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


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
    write_json(folder / "model.safetensors.index.json", index)


def write_byte_tokenizer(
    folder: Path, special: Sequence[str], kind: str, *, puts_bos: bool = False
) -> None:
    """A byte-level BPE tokenizer of single bytes, then special tokens, BOS first and EOS last.

    `kind` is the class that its configuration names, `puts_bos` whether it puts BOS in front.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(list(special))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    names = {"bos_token": special[0], "eos_token": special[-1]}
    _write_tokenizer(folder, tokenizer, names, puts_bos, tokenizer_class=kind)


def write_gemma_tokenizer(folder: Path, *, images: bool = False) -> None:
    """A BPE tokenizer as Gemma's: spaces are ▁, and what it does not know are bytes.

    It knows characters alone. With `images` it has the tokens around images too, as the processor
    asks for; they come last.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    table = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(table)},
            merges=[],
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
    picture = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer.add_special_tokens([*special, *(picture.values() if images else ())])
    more = picture | {"extra_special_tokens": picture} if images else {}
    _write_tokenizer(
        folder,
        tokenizer,
        {f"{token[1:-1]}_token": token for token in special[:4]},
        puts_bos=True,
        add_bos_token=True,
        add_eos_token=False,
        clean_up_tokenization_spaces=False,
        tokenizer_class="GemmaTokenizer",
        **more,
    )


def _write_tokenizer(
    folder: Path, tokenizer: Any, names: dict[str, str], puts_bos: bool, **config: Any
) -> None:
    from tokenizers import processors

    if puts_bos:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", names)
    write_json(folder / "tokenizer_config.json", names | config)


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


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    return rng.standard_normal(shape, np.float32) * np.float32(size)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
