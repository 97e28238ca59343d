"""The files of an SAE: which they are, and the decoder alone out of them.

Whole SAEs are sae-lens's to load. It always reads both matrices, though matching needs one: what is
known here of each family's format serves to read the decoder by itself.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from flowhelpers.core.files import fingerprint, read_json
from flowhelpers.suites.hub import fetch, fetch_if_there, naming, replaced
from flowhelpers.suites.registry import listed_release

if TYPE_CHECKING:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

SHA256 = re.compile(r"[0-9a-f]{64}")
UNITS_AGREE = 0.01  # how far two statements of one scale may lie apart
# Gemma Scope's hook points by the first letters of a site; attention SAEs read z, before o_proj,
# whatever their folders are called.
GEMMA_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


@dataclass(frozen=True)
class SaeFiles:
    """What has to be known to read an SAE's decoder by itself.

    Attributes:
        source: `release/id`, or a folder.
        weights: The file with the weights.
        hook: TransformerLens's name of the hook point where the SAE was trained.
        content: A digest of the files.
        revision: Of the model it was trained on, if that is said.
        decoder: The decoder's name in the file.
        by_column: Whether each feature is a column of the decoder, and not a row.
        scale: How much larger activations are, as sae-lens gives them, than those that go with the
            file's numbers: decoder rows are smaller by that factor.
    """

    source: str
    weights: Path
    hook: str
    content: str
    revision: str | None = None
    decoder: str = "W_dec"
    by_column: bool = False
    scale: float = 1.0


def read_decoder(files: SaeFiles) -> Tensor:
    """The decoder in its stored type, one row a feature; its rows are to be divided by the scale.

    Of a safetensors file in the hub's cache it is memory-mapped: what is not used is not read. A
    file of a folder may be written anew, which a mapping would not survive: that is copied.

    Raises:
        ValueError: If the file is truncated or corrupt, or has no decoder.
    """
    import numpy as np

    with naming(f"the SAE in {files.source}"):
        if files.weights.suffix == ".npz":
            with np.load(files.weights) as arrays:
                decoder = torch.from_numpy(arrays[files.decoder])
        else:
            with safe_open(files.weights, "pt") as tensors:
                decoder = tensors.get_tensor(files.decoder)
            decoder = decoder if _is_blob(files.weights) else decoder.clone()
    return decoder.T if files.by_column else decoder


def load_folder(folder: Path, device: str, dtype: str) -> Any:
    """The whole of an SAE in a folder, by sae-lens."""
    from sae_lens import SAE

    with naming(f"the SAE in {folder}"):
        return SAE.load_from_disk(folder, device=device, dtype=dtype)


def load_release(files: SaeFiles | None, release: str, sae_id: str, device: str, dtype: str) -> Any:
    """The whole of an SAE of a release, by sae-lens; its `files`, if known, have been fetched."""
    from huggingface_hub import constants, parse_local_safetensors_file_metadata
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders

    if files is None:
        return SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)

    def shapes(*_: Any) -> dict[str, Any]:
        tensors = parse_local_safetensors_file_metadata(files.weights).tensors
        return {name: tensor.shape for name, tensor in tensors.items()}

    with (
        naming(f"the SAE in {files.source}"),
        replaced(constants, "HF_HUB_OFFLINE", True),  # sae-lens asks whether files have changed
        replaced(pretrained_sae_loaders, "get_safetensors_tensor_shapes", shapes),  # of the hub
    ):
        return SAE.from_pretrained(release, sae_id, device=device, dtype=dtype)


def folder_files(folder: Path) -> SaeFiles:
    """The files of an SAE that sae-lens saved in a folder.

    Raises:
        FileNotFoundError: If the folder is no sae-lens folder.
    """
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}: expected a folder saved by sae-lens")
    return _of_sae_lens(str(folder), folder / "cfg.json", folder / "sae_weights.safetensors")


def release_files(release: str, sae_id: str) -> SaeFiles | None:
    """The files of an SAE of a release, fetched; None for formats that sae-lens alone reads."""
    listed = listed_release(release, sae_id)
    read = FORMATS.get(listed.conversion_func)
    return read and read(f"{release}/{sae_id}", listed, sae_id)


def sae_config(path: Path) -> dict[str, Any]:
    """What sae-lens wrote of an SAE, in one dictionary whatever its version."""
    about = read_json(path)
    if not isinstance(about, dict):
        raise ValueError(f"{path} is no configuration of an SAE: expected keys and values")
    return {**about, **(about.get("metadata") or {})}


def _sae_lens(source: str, listed: "PretrainedSAELookup", sae_id: str) -> SaeFiles:
    folder = listed.saes_map[sae_id]
    config = fetch(listed.repo_id, f"{folder}/cfg.json")
    weights = fetch(listed.repo_id, f"{folder}/sae_weights.safetensors")
    fetch_if_there(listed.repo_id, f"{folder}/sparsity.safetensors")  # sae-lens asks for it
    return _of_sae_lens(source, config, weights)


def _of_sae_lens(source: str, config: Path, weights: Path) -> SaeFiles:
    about = sae_config(config)
    hook = about.get("hook_name") or about.get("hook_point") or ""
    revision = (about.get("model_from_pretrained_kwargs") or {}).get("revision")
    return SaeFiles(source, weights, hook, _content(weights, config), revision)


def _gemma_scope(source: str, listed: "PretrainedSAELookup", sae_id: str) -> SaeFiles:
    """The site is named by the repository; in Gemma Scope 2 by the folder."""
    folder = listed.saes_map[sae_id]
    if listed.conversion_func == "gemma_3":
        fetch_if_there(listed.repo_id, f"{folder}/config.json")  # sae-lens asks for it
        file, decoder, site = "params.safetensors", "w_dec", folder[:3]
    else:
        file, decoder, site = "params.npz", "W_dec", listed.repo_id[-3:]
    weights = fetch(listed.repo_id, f"{folder}/{file}")
    layer = re.search(r"layer_(\d+)", folder)
    hook = f"blocks.{layer[1]}.{GEMMA_HOOKS.get(site)}" if layer else folder
    return SaeFiles(source, weights, hook, _content(weights), decoder=decoder)


def _llama_scope(source: str, listed: "PretrainedSAELookup", sae_id: str) -> SaeFiles:
    """The file's numbers are in units of the raw stream (CHOICES 45).

    sae-lens's activations are larger by the factor that brings the stream to a norm of √d.
    """
    folder = listed.saes_map[sae_id]
    config = fetch(listed.repo_id, f"{folder}/hyperparams.json")
    weights = fetch(listed.repo_id, f"{folder}/checkpoints/final.safetensors")
    about = read_json(config)
    scale = about["d_model"] ** 0.5 / about["dataset_average_activation_norm"]["in"]
    folded = listed.norm_scaling_factor.get(sae_id)
    if folded is None or abs(folded / scale - 1) > UNITS_AGREE:
        raise ValueError(
            f"{source}: sae-lens scales its activations by {folded}, and {config.name} says"
            f" {scale:.4g}: their units are not known"
        )
    content, hook = _content(weights, config), about["hook_point_in"]
    names = {"decoder": "decoder.weight", "by_column": True}
    return SaeFiles(source, weights, hook, content, scale=folded, **names)


# By sae-lens's name of the function that reads a format.
FORMATS: Mapping[str | None, Callable[..., SaeFiles]] = {
    None: _sae_lens,
    "sae_lens": _sae_lens,
    "gemma_2": _gemma_scope,
    "gemma_3": _gemma_scope,
    "llama_scope": _llama_scope,
}


def _content(*paths: Path) -> str:
    """A digest of files: of a large one in the hub's cache the SHA-256 that is its name."""
    return "".join(path.resolve().name if _is_blob(path) else fingerprint(path) for path in paths)


def _is_blob(path: Path) -> bool:
    return SHA256.fullmatch(path.resolve().name) is not None
