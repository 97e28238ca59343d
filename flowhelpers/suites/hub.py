"""Files of the Hugging Face hub: the cache before the network, some tensors without the rest."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowhelpers.core.cache import cache_folder
from flowhelpers.core.files import read_json, writable_folder, write_whole

PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def cached(repository: str, file: str, revision: str | None = None) -> Path | None:
    """Where a file of the hub lies on this machine; None if it does not."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """A file of the hub, from the cache if it is there, and else fetched."""
    from huggingface_hub import hf_hub_download

    path = cached(repository, file, revision)
    return path or Path(hf_hub_download(repository, file, revision=revision))


def model_folder(model: str, revision: str | None = None) -> str:
    """The folder of a model, fetched if not complete; its name if it has no safetensors."""
    from huggingface_hub import snapshot_download

    def is_complete() -> bool:
        index = cached(model, INDEX, revision)
        weights = set(read_json(index)["weight_map"].values()) if index else {SINGLE}
        files = {"config.json", "tokenizer_config.json", *weights}
        return all(cached(model, file, revision) for file in files)

    if Path(model).is_dir():
        return model
    if not is_complete():
        snapshot_download(model, revision=revision, allow_patterns=PATTERNS, ignore_patterns="*/*")
    config = cached(model, "config.json", revision)
    return str(config.parent) if config and is_complete() else model


@contextmanager
def naming(what: object, problem: str = "cannot be read, it may be truncated") -> Iterator[None]:
    """What libraries raise is a ValueError that names `what`, but of memory, files and network."""
    from torch import OutOfMemoryError

    try:
        yield
    except (OSError, MemoryError, OutOfMemoryError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} {problem}: {kind}{error}") from error


def read_tensors(model: str, names: Iterable[str], revision: str | None = None) -> dict[str, Any]:
    """Torch tensors of a model's safetensors files by name, those that there are.

    Of a file that is not on this machine only the bytes of those tensors are fetched.
    """
    from huggingface_hub.errors import EntryNotFoundError
    from safetensors import safe_open

    names, index = list(names), None
    folder = Path(model) if Path(model).is_dir() else None
    if folder:
        index = None if (folder / SINGLE).is_file() else folder / INDEX  # as transformers chooses
    elif not cached(model, SINGLE, revision):
        with suppress(EntryNotFoundError):
            index = fetch(model, INDEX, revision)
    places = read_json(index)["weight_map"] if index else dict.fromkeys(names, SINGLE)
    tensors: dict[str, Any] = {}
    for file in sorted({places[name] for name in names if name in places}):
        wanted = [name for name in names if places.get(name) == file]
        path = folder / file if folder else cached(model, file, revision)
        path = path or _fetched_part(model, file, wanted, revision)
        with naming(path), safe_open(path, "pt") as stored:
            there = set(stored.keys())
            tensors |= {name: stored.get_tensor(name) for name in wanted if name in there}
    return tensors


def _fetched_part(model: str, file: str, names: list[str], revision: str | None) -> Path:
    """A safetensors file of some tensors alone, kept in the cache of tables."""
    from huggingface_hub import HfFileSystem

    digest = hashlib.blake2b(" ".join(names).encode(), digest_size=8).hexdigest()
    folder = cache_folder() / "tensors" / model.replace("/", "--") / (revision or "main")
    path = folder / f"{Path(file).stem}-{digest}.safetensors"
    if path.is_file():
        return path
    with HfFileSystem().open(f"{model}/{file}", revision=revision, cache_type="none") as remote:
        length = int.from_bytes(remote.read(8), "little")
        header = json.loads(remote.read(length))
        content, kept = b"", {}
        for name in names:
            if name in header:
                first, last = header[name]["data_offsets"]
                remote.seek(8 + length + first)
                end = len(content) + last - first
                kept[name] = header[name] | {"data_offsets": [len(content), end]}
                content += remote.read(last - first)
                if len(content) != end:  # what is kept has to be whole
                    raise ConnectionError(f"{model}/{file}: tensor {name} was cut short")
    head = json.dumps(kept).encode()
    writable_folder(folder)
    whole = len(head).to_bytes(8, "little") + head + content
    write_whole(path, lambda partial: partial.write_bytes(whole))
    return path
