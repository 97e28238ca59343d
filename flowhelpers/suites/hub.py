"""Files of the Hugging Face hub: fetched once, checked, and then found with the network off.

The library that fetches them goes on where it broke off and is patient with a hub that is busy.
Here is what it leaves open: the cache comes before the network, what arrived is compared with its
checksum, and an error says what to do.
"""

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowhelpers.core.cache import cache_folder
from flowhelpers.core.features import suggestion
from flowhelpers.core.files import writable_folder, write_whole

SHA256 = re.compile(r"[0-9a-f]{64}")
FULL = (errno.ENOSPC, errno.EDQUOT)
OFFLINE_HINT = "the suite flowlet needs no network"
SMALL = (".json", ".txt", ".model", ".jinja")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class NotOnHub(FileNotFoundError):
    """The hub has no such repository, revision or file."""


def cached(repository: str, file: str, revision: str | None = None) -> Path | None:
    """Where a file of the hub lies on this machine; None if it does not."""
    found = _known(repository, file, revision)
    return Path(found) if isinstance(found, str) else None


def _known(repository: str, file: str, revision: str | None) -> object:
    # A path, or the library's mark of a file that the repository was seen not to have, or None.
    from huggingface_hub import constants, try_to_load_from_cache

    return try_to_load_from_cache(
        repository, file, cache_dir=constants.HF_HUB_CACHE, revision=revision
    )


def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """A file of the hub, from the cache if it is there, and else fetched.

    Raises:
        PermissionError: If the hub refuses it; the message says what to accept, or how to log in.
        NotOnHub: If the hub has no such repository, revision or file.
        ConnectionError: If it is not cached and there is no network, or the hub is in trouble.
        ValueError: If what arrived is not what the hub says it is.
        OSError: If the cache cannot be written to, or is full.
    """
    from huggingface_hub import hf_hub_download

    here = cached(repository, file, revision)
    if here is not None:
        return here
    with told(repository, file):
        path = Path(hf_hub_download(repository, file, revision=revision))
    _check(path, repository, file)
    return path


def fetch_if_there(repository: str, file: str, revision: str | None = None) -> Path | None:
    """A file of the hub that not every repository has; None if this one does not.

    That it does not is remembered as well, and known with the network off.
    """
    from huggingface_hub import constants

    known = _known(repository, file, revision)
    if known is not None and not isinstance(known, str):
        return None
    try:
        return fetch(repository, file, revision)
    except NotOnHub:
        return None
    except ConnectionError:
        if constants.HF_HUB_OFFLINE:  # as if it had none: a mirror's plain 404 is not remembered
            return None
        raise


def broken(path: Path, error: Exception) -> ValueError:
    """What to say of a file that cannot be read; one in a cache is removed, so that it is fetched.

    Args:
        path: The file.
        error: What reading it gave.
    """
    from huggingface_hub import constants

    said = f"{path} is truncated or corrupt: {error}"
    caches = (Path(constants.HF_HUB_CACHE), cache_folder())
    if not any(path.is_relative_to(place) for place in caches):
        return ValueError(said)
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    return ValueError(f"{said}. It was removed from the cache: load again to fetch it")


def read_hub_json(path: Path) -> dict[str, Any]:
    """A JSON file of the hub's cache, or of a folder.

    Raises:
        ValueError: If it is no JSON object; one in the cache is removed.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        raise ValueError("expected an object")
    except ValueError as error:
        raise broken(path, error) from error


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
def fetched(model: str, revision: str | None = None) -> Iterator[None]:
    """A model's configuration, tokenizer and weights are on this machine inside the block.

    Libraries that load it there ask the hub for nothing more, unless its weights are of another
    kind than safetensors.

    Raises:
        What `fetch` raises.
    """
    from huggingface_hub import HfApi

    if Path(model).is_dir() or _is_complete(model, revision):
        with cached_only():
            yield
        return
    with told(model):
        files = HfApi().list_repo_files(model, revision=revision)
    weights = [file for file in files if re.fullmatch(r"model[^/]*\.safetensors", file)]
    if not weights:
        with told(model):
            yield
        return
    small = [file for file in files if "/" not in file and Path(file).suffix in SMALL]
    for file in (*small, *weights):
        fetch(model, file, revision)
    with cached_only():
        yield


def _is_complete(model: str, revision: str | None) -> bool:
    if not all(cached(model, file, revision) for file in ("config.json", "tokenizer_config.json")):
        return False
    if cached(model, SINGLE, revision):
        return True
    index = cached(model, INDEX, revision)
    if index is None:
        return False
    files = read_hub_json(index)["weight_map"].values()
    return all(cached(model, file, revision) for file in set(files))


def _check(path: Path, repository: str, file: str) -> None:
    # A large file is kept under its SHA-256; a small one under a hash of git's.
    blob = path.resolve()
    if not SHA256.fullmatch(blob.name):
        return
    with blob.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise ValueError(
            f"{repository}/{file} arrived with the SHA-256 {found}, and the hub says {blob.name}:"
            " it was removed; try again"
        )


@contextmanager
def told(repository: str, file: str = "") -> Iterator[None]:
    """What goes wrong with the hub inside the block, said so that one knows what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    what = f"{repository}/{file}" if file else repository
    missed = f"{what} is not cached and could not be fetched"
    try:
        yield
    except LocalEntryNotFoundError as error:  # the library's word for whatever went wrong
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise _refused(cause, repository, file) from error
        raise ConnectionError(f"{missed}; {OFFLINE_HINT} ({_first(cause or error)})") from error
    except HfHubHTTPError as error:
        raise _refused(error, repository, file) from error
    except (OfflineModeIsEnabled, httpx.TransportError, ConnectionError) as error:
        raise ConnectionError(f"{missed}; {OFFLINE_HINT} ({_first(error)})") from error
    except OSError as error:
        if error.errno in FULL or _is_of_cache(error):
            raise _unwritable(error, what) from error
        if "Consistency check failed" in str(error):  # of the library: fewer bytes than said
            raise ConnectionError(f"{missed}: it was cut short ({_first(error)})") from error
        raise


def _refused(error: Any, repository: str, file: str) -> OSError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = f"{repository}/{file}" if file else repository
    status = error.response.status_code
    accept = f"accept its licence at {constants.ENDPOINT}/{repository}"
    login = "log in with `hf auth login`, or put a token into the variable HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{what} is gated: {accept}, then {login} ({_first(error)})")
    if status in (401, 403):
        there = " (or it does not exist)" if isinstance(error, RepositoryNotFoundError) else ""
        return PermissionError(
            f"the hub refuses {what}, with {status}{there}: {accept} if it has one, then {login}"
            f" ({_first(error)})"
        )
    missing = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)
    if isinstance(error, missing) or status == 404:  # a mirror may not say which of them
        near = _nearest(repository, file) if isinstance(error, EntryNotFoundError) else ""
        return NotOnHub(f"the hub has no {what}{near} ({_first(error)})")
    return ConnectionError(
        f"{what} is not cached and could not be fetched: the hub says {status} ({_first(error)})"
    )


def _is_of_cache(error: OSError) -> bool:
    # Whether a file or folder of the hub's could not be made or opened.
    from huggingface_hub import constants

    if error.errno == errno.EROFS:
        return True
    places = [Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE)]
    places += [folder for place in places for folder in place.parents if len(folder.parts) > 1]
    return error.filename is not None and any(
        Path(error.filename).is_relative_to(place) for place in places
    )


def _unwritable(error: OSError, what: str) -> OSError:
    from huggingface_hub import constants

    return OSError(
        error.errno,
        f"{what} cannot be kept in the cache {constants.HF_HUB_CACHE} ({error.strerror}): make"
        " room, or give it another place in the variable HF_HOME",
    )


def _first(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text or type(error).__name__


def _nearest(repository: str, file: str) -> str:
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repository)
    except Exception:  # it only adds to a message
        return ""
    kind = Path(file).suffix
    return suggestion(file, [each for each in files if each.endswith(kind)])


def read_tensors(model: str, names: Iterable[str], revision: str | None = None) -> dict[str, Any]:
    """Some tensors of a model's safetensors files, without the rest.

    Of a file that is not on this machine only the bytes of those tensors are fetched.

    Args:
        model: A folder, or a name on the hub.
        names: The tensors' names as in the files.
        revision: Of the hub.

    Returns:
        Torch tensors by name, those that there are.

    Raises:
        What `fetch` raises; ValueError if a file is cut short.
    """
    names = list(names)
    found: dict[str, Any] = {}
    for file, here in _files_of(model, names, revision).items():
        path = Path(model) / file if Path(model).is_dir() else cached(model, file, revision)
        wanted = [name for name in names if here is None or name in here]
        found |= _from_file(path, wanted) if path else _from_hub(model, file, wanted, revision)
    return found


def _files_of(model: str, names: list[str], revision: str | None) -> dict[str, set[str] | None]:
    # Which files hold which of the tensors; None where one file holds all.
    if Path(model).is_dir():
        index = Path(model) / INDEX
        index = index if index.is_file() else None
    elif cached(model, SINGLE, revision):
        index = None
    else:
        index = fetch_if_there(model, INDEX, revision)
    if index is None:
        return {SINGLE: None}
    places: dict[str, str] = read_hub_json(index)["weight_map"]
    files: dict[str, set[str] | None] = {}
    for name in names:
        if name in places:
            held = files.setdefault(places[name], set())
            assert held is not None
            held.add(name)
    return files


def _from_file(path: Path, names: list[str]) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as tensors:
            there = set(tensors.keys())
            return {name: tensors.get_tensor(name) for name in names if name in there}
    except SafetensorError as error:
        raise broken(path, error) from error


def _from_hub(model: str, file: str, names: list[str], revision: str | None) -> dict[str, Any]:
    # A safetensors file of those tensors alone, kept beside the tables.
    path = _kept(model, names, revision, file)
    if not path.is_file():
        with told(model, file):
            content = _some_of(model, file, names, revision)
        writable_folder(path.parent)
        write_whole(path, lambda partial: partial.write_bytes(content))
    return _from_file(path, names)


def _kept(model: str, names: list[str], revision: str | None, file: str) -> Path:
    digest = hashlib.blake2b(" ".join(names).encode(), digest_size=8).hexdigest()
    place = cache_folder() / "tensors" / model.replace("/", "--") / (revision or "main")
    return place / f"{Path(file).stem}-{digest}.safetensors"


def _some_of(model: str, file: str, names: list[str], revision: str | None) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    if constants.is_offline_mode():
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    url = hf_hub_url(model, file, revision=revision)

    def read(first: int, size: int) -> bytes:
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{first + size - 1}"}
        reply = http_backoff("GET", url, headers=headers, follow_redirects=True)
        hf_raise_for_status(reply)
        if reply.status_code != 206 or len(reply.content) != size:
            raise ConnectionError(f"{len(reply.content)} bytes came, expected {size}")
        return reply.content

    length = int.from_bytes(read(0, 8), "little")
    header = json.loads(read(8, length))
    parts, kept, end = [], {}, 0
    for name in names:
        if name in header:
            first, last = header[name]["data_offsets"]
            parts.append(read(8 + length + first, last - first))
            kept[name] = header[name] | {"data_offsets": [end, end + last - first]}
            end += last - first
    head = json.dumps(kept).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])
