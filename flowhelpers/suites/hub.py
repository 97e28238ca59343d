"""Files of the Hugging Face hub: the cache before the network, and some tensors without the rest.

Fetching, resuming, patience and errors are huggingface_hub's.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowhelpers.core.cache import cache_folder
from flowhelpers.core.files import read_json, writable_folder, write_whole

SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def cached(repository: str, file: str, revision: str | None = None) -> Path | None:
    """Where a file of the hub lies on this machine; None if it does not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """A file of the hub, from the cache if it is there, and else fetched.

    Raises:
        OSError: huggingface_hub's, such as GatedRepoError or LocalEntryNotFoundError.
    """
    from huggingface_hub import hf_hub_download

    here = cached(repository, file, revision)
    return here or Path(hf_hub_download(repository, file, revision=revision))


def fetch_if_there(repository: str, file: str, revision: str | None = None) -> Path | None:
    """A file of the hub that not every repository has; None if this one does not.

    With the network off a file that is not cached is taken for one that is not there.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return fetch(repository, file, revision)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not constants.is_offline_mode():
            raise
        return None


@contextmanager
def cached_only() -> Iterator[None]:
    """Libraries that ask the hub find what is cached inside the block, and ask nobody."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def model_on_disk(model: str, revision: str | None = None) -> Iterator[None]:
    """A model's configuration, tokenizer and weights are on this machine inside the block.

    Libraries that load it there ask the hub for nothing more, unless its weights are of another
    kind than safetensors.
    """
    from huggingface_hub import snapshot_download

    if not Path(model).is_dir() and not _is_complete(model, revision):
        patterns = [*SMALL, "model*.safetensors"]
        snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
    if Path(model).is_dir() or _is_complete(model, revision):
        with cached_only():
            yield
    else:
        yield


def _is_complete(model: str, revision: str | None) -> bool:
    small = all(cached(model, file, revision) for file in ("config.json", "tokenizer_config.json"))
    if not small or cached(model, SINGLE, revision):
        return small
    index = cached(model, INDEX, revision)
    files = set(read_json(index)["weight_map"].values()) if index else set()
    return bool(files) and all(cached(model, file, revision) for file in files)


def read_tensors(model: str, names: Iterable[str], revision: str | None = None) -> dict[str, Any]:
    """Some tensors of a model's safetensors files, without the rest.

    Of a file that is not on this machine only the bytes of those tensors are fetched.

    Args:
        model: A folder, or a name on the hub.
        names: The tensors' names as in the files.
        revision: Of the hub.

    Returns:
        Torch tensors by name, those that there are.
    """
    names = list(names)
    folder = Path(model) if Path(model).is_dir() else None
    if folder:
        index = folder / INDEX if (folder / INDEX).is_file() else None
    else:
        single = cached(model, SINGLE, revision)
        index = None if single else fetch_if_there(model, INDEX, revision)
    places = read_json(index)["weight_map"] if index else dict.fromkeys(names, SINGLE)
    tensors: dict[str, Any] = {}
    for file in sorted({places[name] for name in names if name in places}):
        wanted = [name for name in names if places.get(name) == file]
        path = folder / file if folder else cached(model, file, revision)
        tensors |= _some_of(path or _fetched_part(model, file, wanted, revision), wanted)
    return tensors


def _some_of(path: Path, names: list[str]) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as tensors:
            there = set(tensors.keys())
            return {name: tensors.get_tensor(name) for name in names if name in there}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error


def _fetched_part(model: str, file: str, names: list[str], revision: str | None) -> Path:
    """A safetensors file of some tensors alone, kept in the cache of tables."""
    digest = hashlib.blake2b(" ".join(names).encode(), digest_size=8).hexdigest()
    folder = cache_folder() / "tensors" / model.replace("/", "--") / (revision or "main")
    path = folder / f"{Path(file).stem}-{digest}.safetensors"
    if not path.is_file():
        content = _fetch_ranges(model, file, names, revision)
        writable_folder(folder)
        write_whole(path, lambda partial: partial.write_bytes(content))
    return path


def _fetch_ranges(model: str, file: str, names: list[str], revision: str | None) -> bytes:
    from huggingface_hub import HfFileSystem

    with HfFileSystem().open(f"{model}/{file}", revision=revision, cache_type="none") as remote:
        length = int.from_bytes(remote.read(8), "little")
        header = json.loads(remote.read(length))
        parts, kept, end = [], {}, 0
        for name in names:
            if name in header:
                first, last = header[name]["data_offsets"]
                remote.seek(8 + length + first)
                parts.append(remote.read(last - first))
                if len(parts[-1]) != last - first:  # what is kept has to be whole
                    raise ConnectionError(f"{model}/{file}: tensor {name} was cut short")
                kept[name] = header[name] | {"data_offsets": [end, end + last - first]}
                end += last - first
    head = json.dumps(kept).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])
