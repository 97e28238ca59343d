"""The files of an SAE: which they are, and the decoder alone out of them.

Whole SAEs are sae-lens's to load. It always reads both matrices, though matching needs one: what is
known here of each family's format serves to read the decoder by itself.
"""

import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowhelpers.core.features import suggestion
from flowhelpers.core.files import fingerprint, read_json
from flowhelpers.suites.hub import cached_only, fetch, fetch_if_there

if TYPE_CHECKING:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

SHA256 = re.compile(r"[0-9a-f]{64}")
BROKEN = (SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError)
UNREADABLE = (
    *BROKEN,
    RuntimeError,
    TypeError,
)  # of sae-lens, where a file is not what it should be
UNITS_AGREE = 0.01  # how far two statements of one scale may lie apart


@dataclass(frozen=True)
class SaeFiles:
    """What has to be known to read an SAE's decoder by itself.

    Attributes:
        source: `release/id`, or a folder.
        weights: The file with the weights.
        hook: TransformerLens's name of the hook point where the SAE was trained.
        content: A digest of the files.
        model: The model it was trained on, if that is said; `revision` likewise.
        decoder: The decoder's name in the file.
        by_column: Whether each feature is a column of the decoder, and not a row.
        thresholds: The name of the thresholds in the file, or the one threshold of all features.
        scale: How much larger activations are, as sae-lens gives them, than those that go with the
            file's numbers: thresholds are larger by that factor, decoder rows smaller.
    """

    source: str
    weights: Path
    hook: str
    content: str
    model: str | None = None
    revision: str | None = None
    decoder: str = "W_dec"
    by_column: bool = False
    thresholds: str | float = "threshold"
    scale: float = 1.0


def read_decoder(files: SaeFiles) -> Tensor:
    """The decoder in its stored type, one row a feature; its rows are to be divided by the scale.

    Of a safetensors file in the hub's cache it is memory-mapped: what is not used is not read.

    Raises:
        ValueError: If the file is truncated or corrupt, or has no decoder.
    """
    decoder = _read(files, files.decoder)
    if decoder is None or decoder.ndim != 2:
        raise ValueError(f"{files.weights} of {files.source} has no decoder {files.decoder!r}")
    return decoder.T if files.by_column else decoder


def read_thresholds(files: SaeFiles, features: int) -> Tensor | None:
    """The thresholds in float32, one for each feature; None if it has none."""
    if not isinstance(files.thresholds, str):
        return torch.full((features,), files.thresholds * files.scale)
    thresholds = _read(files, files.thresholds)
    return None if thresholds is None else thresholds.float() * files.scale


def _read(files: SaeFiles, name: str) -> Tensor | None:
    """One array of a file, of which no more is read than that.

    A file of a folder may be written anew, which a mapping would not survive: that is copied.
    """
    import numpy as np

    path = files.weights
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return torch.from_numpy(arrays[name]) if name in arrays else None
        with safe_open(path, "pt") as tensors:
            if name not in set(tensors.keys()):
                return None
            tensor = tensors.get_tensor(name)
            return tensor if _is_blob(path) else tensor.clone()
    except BROKEN as error:
        raise unreadable(files.source, error) from error


def unreadable(source: str | Path, error: Exception) -> ValueError:
    """The error for an SAE whose files cannot be read."""
    return ValueError(f"the SAE in {source} cannot be read, a file may be truncated: {error}")


def load_folder(folder: Path, device: str, dtype: str) -> Any:
    """The whole of an SAE in a folder, by sae-lens."""
    from sae_lens import SAE

    try:
        return SAE.load_from_disk(folder, device=device, dtype=dtype)
    except UNREADABLE as error:
        raise unreadable(folder, error) from error


def load_release(files: SaeFiles | None, release: str, sae_id: str, device: str, dtype: str) -> Any:
    """The whole of an SAE of a release, by sae-lens; its `files`, if known, have been fetched."""
    from sae_lens import SAE

    if files is None:
        return SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)
    # Of Gemma Scope 2 sae-lens's own way asks the hub for the shapes each time.
    is_gemma_3 = listed_release(release, sae_id).conversion_func == "gemma_3"
    converter = partial(_gemma_scope_2_parts, files) if is_gemma_3 else None
    try:
        with cached_only():
            return SAE.from_pretrained(
                release, sae_id, device=device, dtype=dtype, converter=converter
            )
    except UNREADABLE as error:
        raise unreadable(files.source, error) from error


def _gemma_scope_2_parts(
    files: SaeFiles, device: str, cfg_overrides: dict[str, Any] | None = None, **_: Any
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """Configuration and weights, as sae-lens takes them from a converter."""
    from safetensors.torch import load_file

    weights = load_file(files.weights, device=device)
    d_in, d_sae = weights["w_enc"].shape
    config = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": device,
        "model_name": files.model,
        "hook_name": files.hook,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "prepend_bos": True,
        "context_size": 1024,
    }
    state = {
        "W_enc": weights["w_enc"],
        "W_dec": weights["w_dec"],
        **{name: weights[name] for name in ("b_enc", "b_dec", "threshold")},
    }
    return config | (cfg_overrides or {}), state, None


def folder_files(folder: Path) -> SaeFiles:
    """The files of an SAE that sae-lens saved in a folder.

    Raises:
        FileNotFoundError: If the folder is no sae-lens folder.
    """
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}: expected a folder saved by sae-lens")
    return _of_sae_lens(str(folder), folder / "cfg.json", folder / "sae_weights.safetensors")


def trained_on(folder: Path) -> str | None:
    """The model that an SAE in a folder says it was trained on."""
    path = folder / "cfg.json"
    if not path.is_file():
        return None
    about = read_json(path)
    return {**about, **(about.get("metadata") or {})}.get("model_name")


def release_files(release: str, sae_id: str) -> SaeFiles | None:
    """The files of an SAE of a release, fetched; None for formats that sae-lens alone reads."""
    listed = listed_release(release, sae_id)
    read = FORMATS.get(listed.conversion_func)
    return None if read is None else read(f"{release}/{sae_id}", listed, sae_id)


def listed_release(release: str, sae_id: str) -> "PretrainedSAELookup":
    """What sae-lens's list says of a release.

    Raises:
        ValueError: If there is no such release, or no such SAE in it.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    if release not in known:
        raise ValueError(f"sae-lens knows no release {release!r}{suggestion(release, known)}")
    if sae_id not in known[release].saes_map:
        near = suggestion(sae_id, known[release].saes_map)
        raise ValueError(f"release {release} has no SAE {sae_id!r}{near}")
    return known[release]


def _sae_lens(source: str, listed: "PretrainedSAELookup", sae_id: str) -> SaeFiles:
    folder = listed.saes_map[sae_id]
    config = fetch(listed.repo_id, f"{folder}/cfg.json")
    weights = fetch(listed.repo_id, f"{folder}/sae_weights.safetensors")
    fetch_if_there(listed.repo_id, f"{folder}/sparsity.safetensors")  # sae-lens asks for it
    return _of_sae_lens(source, config, weights)


def _of_sae_lens(source: str, config: Path, weights: Path) -> SaeFiles:
    about = read_json(config)
    if not isinstance(about, dict):
        raise ValueError(f"{config} is no configuration of an SAE: expected keys and values")
    about = {**about, **(about.get("metadata") or {})}
    hook = about.get("hook_name") or about.get("hook_point") or ""
    revision = (about.get("model_from_pretrained_kwargs") or {}).get("revision")
    content = _content(weights) + _content(config)
    return SaeFiles(source, weights, hook, content, about.get("model_name"), revision)


def _gemma_scope(source: str, listed: "PretrainedSAELookup", sae_id: str) -> SaeFiles:
    """The folder and the repository name the site; attention SAEs read z."""
    folder = listed.saes_map[sae_id]
    weights = fetch(listed.repo_id, f"{folder}/params.npz")
    hooks = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
    hook = _hook(folder, hooks[listed.repo_id.rsplit("-", 1)[-1]])
    return SaeFiles(source, weights, hook, _content(weights), listed.model)


def _gemma_scope_2(source: str, listed: "PretrainedSAELookup", sae_id: str) -> SaeFiles:
    """Folders of attention SAEs say attn_out, and hold what reads the input of o_proj."""
    folder = listed.saes_map[sae_id]
    fetch_if_there(listed.repo_id, f"{folder}/config.json")
    weights = fetch(listed.repo_id, f"{folder}/params.safetensors")
    hooks = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z"}
    kind = next((name for name in hooks if folder.startswith(name)), None)
    hook = _hook(folder, hooks[kind]) if kind else folder
    return SaeFiles(source, weights, hook, _content(weights), listed.model, decoder="w_dec")


def _llama_scope(source: str, listed: "PretrainedSAELookup", sae_id: str) -> SaeFiles:
    """One threshold for all features, in units of the raw stream (CHOICES 45).

    sae-lens's activations are larger by the factor that brings the stream to a norm of √d.
    """
    folder = listed.saes_map[sae_id]
    config = fetch(listed.repo_id, f"{folder}/hyperparams.json")
    weights = fetch(listed.repo_id, f"{folder}/checkpoints/final.safetensors")
    about = read_json(config)
    norm = about["dataset_average_activation_norm"]["in"]
    scale = about["d_model"] ** 0.5 / norm
    folded = listed.norm_scaling_factor.get(sae_id)
    if folded is None or abs(folded / scale - 1) > UNITS_AGREE:
        raise ValueError(
            f"{source}: sae-lens scales its activations by {folded}, and {config.name} says"
            f" {scale:.4g} (√{about['d_model']} / {norm}): their units are not known"
        )
    content = _content(weights) + _content(config)
    return SaeFiles(
        source, weights, about["hook_point_in"], content, listed.model,
        decoder="decoder.weight", by_column=True,
        thresholds=float(about["jump_relu_threshold"]), scale=folded,
    )  # fmt: skip


# By sae-lens's name of the function that reads a format.
FORMATS: Mapping[str | None, Callable[..., SaeFiles]] = {
    None: _sae_lens,
    "sae_lens": _sae_lens,
    "gemma_2": _gemma_scope,
    "gemma_3": _gemma_scope_2,
    "llama_scope": _llama_scope,
}


def _hook(folder: str, name: str) -> str:
    layer = re.search(r"layer_(\d+)", folder)
    return f"blocks.{layer[1]}.{name}" if layer else folder


def _content(path: Path) -> str:
    """A digest: of a large file in the hub's cache the SHA-256 that is its name."""
    return path.resolve().name if _is_blob(path) else fingerprint(path)


def _is_blob(path: Path) -> bool:
    return SHA256.fullmatch(path.resolve().name) is not None
