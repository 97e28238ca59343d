"""The files of an SAE: which they are, and the decoder alone out of them.

Whole SAEs are sae-lens's to load. It always reads both matrices, though matching needs one.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.core.files import fingerprint, read_json
from flowhelpers.suites.hub import fetch, naming
from flowhelpers.suites.model import HOOKS
from flowhelpers.suites.registry import Source, check_is_sae, listed_release

if TYPE_CHECKING:
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

LENS_FILES = ("cfg.json", "sae_weights.safetensors")
UNREAD = "cannot be read: expected whole files, as sae-lens's save_inference_model saves them"
SHA256 = re.compile(r"[0-9a-f]{64}")
UNITS_AGREE = 0.01  # how far two statements of one scale may lie apart
# Gemma Scope's hook points by the first letters of a site; attention SAEs read z, before o_proj,
# whatever their folders are called.
GEMMA_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}

# Other names of the same places, on every architecture.
SAME = {
    "res": ("blocks.{next}.hook_resid_pre", "blocks.{next}.hook_in", "blocks.{layer}.hook_out"),
    "z": ("blocks.{layer}.attn.o.hook_in", "hook_z"),
}


@dataclass(frozen=True)
class SaeFiles:
    """What has to be known to read an SAE's decoder by itself.

    Attributes:
        hook: TransformerLens's name of the hook point where the SAE was trained.
        content: A digest of the files.
        model_kwargs: With what its model was loaded in training, if that is said.
        prepend_bos: Whether it was trained on texts that begin with BOS.
        by_column: Whether each feature is a column of the decoder, and not a row.
        scale: How much larger activations are, as sae-lens gives them, than those that go with the
            file's numbers: decoder rows are smaller by that factor. None where it takes each row
            for one of unit norm.
    """

    source: str
    weights: Path
    hook: str
    content: str
    model_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    prepend_bos: bool = True
    decoder: str = "W_dec"
    by_column: bool = False
    scale: float | None = 1.0


def read_decoder(files: SaeFiles) -> Tensor:
    """The decoder in its stored type, one row a feature; its rows are to be divided by the scale.

    Of a safetensors file in the hub's cache it is memory-mapped: what is not used is not read. A
    file of a folder may be written anew, which a mapping would not survive: that is copied.
    """
    import numpy as np

    with naming(f"the SAE in {files.source}", UNREAD):
        if files.weights.suffix == ".npz":
            with np.load(files.weights) as arrays:
                decoder = torch.from_numpy(arrays[files.decoder])
        else:
            with safe_open(files.weights, "pt") as tensors:
                decoder = tensors.get_tensor(files.decoder)
            decoder = decoder if _is_blob(files.weights) else decoder.clone()
    return decoder.T if files.by_column else decoder


def find_files(source: Source) -> SaeFiles | None:
    """The files of an SAE, fetched; None for a format that sae-lens alone reads."""
    if isinstance(source, str):
        return _of_sae_lens(source, *(Path(source) / file for file in LENS_FILES))
    listed = listed_release(source["release"], source["id"])
    name, kind = f"{source['release']}/{source['id']}", listed.conversion_func or "sae_lens"
    return FORMATS[kind](name, listed, source["id"]) if kind in FORMATS else None


def load_whole(what: str, source: Source, is_fetched: bool, device: str, dtype: str) -> Any:
    """sae-lens's SAE, by what errors call it; once its files are fetched, the hub is not asked."""
    from huggingface_hub import constants, parse_local_safetensors_file_metadata
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders

    def shapes(repository: str, file: str) -> dict[str, Any]:
        tensors = parse_local_safetensors_file_metadata(fetch(repository, file)).tensors
        return {name: tensor.shape for name, tensor in tensors.items()}

    with (
        naming(what, UNREAD),
        # sae-lens asks the hub whether files have changed, and for the shapes in them.
        patch.object(constants, "HF_HUB_OFFLINE", is_fetched or constants.HF_HUB_OFFLINE),
        patch.object(pretrained_sae_loaders, "get_safetensors_tensor_shapes", shapes),
    ):
        if isinstance(source, str):
            return SAE.load_from_disk(source, device=device, dtype=dtype)
        return SAE.from_pretrained(source["release"], source["id"], device=device, dtype=dtype)


def sae_config(path: Path) -> dict[str, Any]:
    """What sae-lens wrote of an SAE, in one dictionary whatever its version."""
    about = read_json(path)
    if not isinstance(about, dict):
        raise ValueError(f"{path} is no configuration of an SAE: expected keys and values")
    return {**about, **(about.get("metadata") or {})}


def hook_names(site: Site) -> list[str]:
    """The names of the hook point at a site: ours, and others of the same place."""
    names = [HOOKS[site.module], *SAME.get(site.module, ())]
    return [name.format(layer=site.layer, next=site.layer + 1) for name in names]


def hook_of(about: Mapping[str, Any]) -> str:
    """The hook point that a configuration names, or how its name begins where a layer is all.

    One without a name that lays heads out is at z.
    """
    at_z = "hook_z" * (about.get("reshape_activations") == "hook_z")
    layer = about.get("hook_layer", about.get("hook_point_layer"))
    begins = "" if layer is None else f"blocks.{layer}."
    return about.get("hook_name") or about.get("hook_point") or at_z or begins


def _sae_lens(source: str, listed: "PretrainedSAELookup", sae_id: str) -> SaeFiles:
    folder = listed.saes_map[sae_id]
    files = (fetch(listed.repo_id, f"{folder}/{file}") for file in LENS_FILES)
    return _of_sae_lens(source, *files)


def _of_sae_lens(source: str, config: Path, weights: Path) -> SaeFiles:
    about = sae_config(config)
    check_is_sae(f"the SAE in {source}", about)
    kwargs = about.get("model_from_pretrained_kwargs") or {}
    unit = "topk" in str(about.get("architecture")) and about.get("rescale_acts_by_decoder_norm")
    hook, begins = hook_of(about), about.get("prepend_bos") not in (False, "false")
    content = _content(weights, config)
    return SaeFiles(source, weights, hook, content, kwargs, begins, scale=None if unit else 1.0)


def _gemma_scope(source: str, listed: "PretrainedSAELookup", sae_id: str) -> SaeFiles:
    """The site is named by the repository; in Gemma Scope 2 by the folder."""
    folder = listed.saes_map[sae_id]
    if listed.conversion_func == "gemma_3":
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
FORMATS: dict[str, Callable[..., SaeFiles]] = {
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
