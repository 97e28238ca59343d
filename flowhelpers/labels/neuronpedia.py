"""Labels and addresses of features on Neuronpedia, and its own answers as a check on ours.

All labels of one SAE come from the public export, once, and are then on disk. Nothing is
fetched at import, and `page` and `embed` only spell addresses.
"""

import gzip
import json
import os
import re
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

from flowhelpers.core.cache import cache_folder
from flowhelpers.core.features import Site, parse_site, suggestion
from flowhelpers.core.files import writable_folder, write_whole
from flowhelpers.core.progress_bar import progress

if TYPE_CHECKING:
    import httpx2
    import pandas as pd
    import pyarrow

T = TypeVar("T")

API = "https://www.neuronpedia.org"
DATASETS = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/v1"
KEY = "NEURONPEDIA_API_KEY"
VERSION = 1  # of the files that are kept
AT_ONCE = 8  # batches that are fetched at a time
TIMEOUT = 30.0  # seconds for a server to say something
TRIES = 6  # of one request
PAUSE = 0.5  # seconds before the second try; twice as long before each one after
LONGEST = 60.0  # seconds: a server that asks for a longer wait is not waited for
TOLD = 3  # lines that cannot be read, in a message
KEPT = 20  # of them in the file
NOBODY = "unknown"  # who explained it, where the export does not say
# What /api/cossim calls the list and each value, by the version of the site.
COSINES = (
    ("topk_decoder_cossim_features", "cosine_similarity"),
    ("topkDecoderCossimFeatures", "cosineSimilarity"),
)


class NotThere(ValueError):
    """Neuronpedia, or its export, has nothing of that name."""


def source_of(patterns: Mapping[str, str], site: Site | str) -> str:
    """What Neuronpedia calls the SAE of a site.

    Args:
        patterns: For each module, the name with a place for the layer, such as
            `{"res": "{layer}-gemmascope-res-16k"}`.
        site: The site.

    Raises:
        ValueError: If its module has no pattern, or one without a place for the layer.
    """
    site = _site(site)
    if site.module not in patterns:
        raise ValueError(
            f"no source on Neuronpedia is known for {site}{suggestion(site.module, patterns)}"
        )
    pattern = patterns[site.module]
    if "{layer}" not in pattern:
        raise ValueError(
            f"the pattern of {site.module} is {pattern!r}:"
            " expected a place for the layer, as in '{layer}-gemmascope-res-16k'"
        )
    return pattern.replace("{layer}", str(site.layer))


def bulk_labels(
    model_id: str,
    source: str,
    site: Site | str,
    width: int,
    *,
    explained_by: str | None = None,
    lenient: bool = False,
    base_url: str = DATASETS,
    folder: Path | None = None,
    refresh: bool = False,
) -> "pd.DataFrame":
    """The labels of one SAE, from Neuronpedia's public export.

    All explanations of the source are kept in one file, with the date and a count for each
    explainer; later calls need no network. One that cannot be read is fetched again, with a
    warning.

    Of several explanations of a feature, that by `explained_by` is taken; else that of the
    explainer who has most of this source (the first by name, of several such); of one explainer's,
    the last in the export. A feature without an explanation, or with an empty one, has no row.

    Args:
        model_id: The model, such as `gemma-2-2b`.
        source: The SAE, such as `12-gemmascope-res-16k`; see `source_of`.
        site: The site of the SAE here.
        width: How many features it has.
        explained_by: The explainer to prefer, such as `gpt-4o-mini`.
        lenient: Whether to leave out, with a warning, what cannot be used.
        base_url: Where the export is.
        folder: Of the cache; `tables.cache_folder()` unless given.
        refresh: Whether to fetch the export even if it is there.

    Returns:
        By index: `feature`, `index`, `label`, and `label_from`: who explained it, and when it was
        fetched. It serves as `own` of `labels.describe`.

    Raises:
        NotThere: If the export has no such source.
        ValueError: If it has rows of another one; if nothing is by `explained_by`; and unless
            `lenient`, if a line is not as it should be, its index is none of the SAE, or a
            batch is missing.
        ConnectionError: If the export cannot be had.
        OSError: If the folder cannot be written to.
    """
    import pandas as pd
    import pyarrow.parquet as parquet

    site, name = _site(site), _name(model_id, source)
    if width < 1:
        raise ValueError(f"the width of {name} is {width}: expected at least 1")
    path = Path(folder or cache_folder()) / "neuronpedia" / model_id / f"{source}.parquet"
    table = None if refresh else _read(path, name)
    if table is None:
        writable_folder(path.parent)
        table = fetched = _download(model_id, source, base_url)
        write = partial(parquet.write_table, compression="zstd", write_page_checksum=True)
        write_whole(path, lambda file: write(fetched, file))
    about = _about(table)
    frame = table.to_pandas()
    inside = frame["index"].between(0, width - 1)
    problems = about["problems"] + [
        f"batch {row['batch']}, line {row['line']}: the index is {row['index']},"
        f" expected 0 to {width - 1}"
        for row in frame[~inside].head(TOLD).to_dict("records")
    ]
    if problems:
        n = about["left_out"] + int((~inside).sum())
        told = "; ".join(problems[:TOLD])
        told = f"{name}: {told}" + (f"; and {n - TOLD} more" if n > TOLD else "")
        if not lenient:
            raise ValueError(
                f"{told}. lenient=True leaves such lines out, refresh=True fetches all anew"
            )
        warnings.warn(f"lines left out: {n}. {told}", stacklevel=2)
    counts = about["explained_by"]
    if explained_by is not None and explained_by not in counts:
        raise ValueError(
            f"no explanation of {name} is by {explained_by!r}{suggestion(explained_by, counts)}"
        )
    best_first = sorted(counts, key=lambda who: (who != explained_by, -counts[who], who))
    frame = _one_each(frame[inside], best_first)
    indices, who = frame["index"].tolist(), frame["explained_by"].tolist()
    return pd.DataFrame(
        {
            "feature": [f"{site}/{index}" for index in indices],
            "index": indices,
            "label": frame["label"].tolist(),
            "label_from": [f"neuronpedia, {each}, {about['date']}" for each in who],
        }
    ).astype({"index": "int64"})


def feature_info(
    model_id: str, source: str, index: int, *, key: str | None = None, base_url: str = API
) -> dict[str, Any]:
    """All that Neuronpedia's page of a feature is made of, as JSON has it.

    Args:
        model_id: The model.
        source: The SAE.
        index: The feature in it.
        key: A key, which is not needed; that in NEURONPEDIA_API_KEY unless given. It is written
            nowhere.
        base_url: Where the site is.

    Raises:
        NotThere: If there is no such feature.
        PermissionError: If the key is refused.
        ConnectionError: If the site cannot be reached, fails, or asks to wait for long.
    """
    name = _name(model_id, source, index)
    found = _api("GET", f"/api/feature/{name}", name, key, base_url)
    if not isinstance(found, dict) or not found:
        raise NotThere(f"Neuronpedia has no feature {name}")
    return found


def cosine_neighbours(
    model_id: str,
    source: str,
    index: int,
    target_source: str,
    *,
    target_model: str | None = None,
    key: str | None = None,
    base_url: str = API,
) -> "pd.DataFrame":
    """The features of another SAE nearest to one, as Neuronpedia computes them.

    It compares decoder directions on its own servers: a check on our matches that shares no code
    with them. What it answers was read off its public source, and could not be tried where this
    was written: its list may be spelled in either way that the source has had, and anything else
    is an error that names the keys that came.

    Args:
        model_id: The model.
        source: The SAE.
        index: The feature in it.
        target_source: The SAE to look in.
        target_model: Its model; the same unless given.
        key: As in `feature_info`.
        base_url: Where the site is.

    Returns:
        `index` in the target, and `cosine`, best first.

    Raises:
        NotThere: If there is no such feature.
        ValueError: If the answer is of another form or SAE.
        PermissionError: If the key is refused.
        ConnectionError: If the site cannot be reached, fails, or asks to wait for long.
    """
    import pandas as pd

    target_model = target_model or model_id
    name = f"{_name(model_id, source, index)} in {_name(target_model, target_source)}"
    body = {
        "modelId": model_id,
        "source": source,
        "index": index,
        "targetModelId": target_model,
        "targetSourceId": target_source,
    }
    reply = _api("POST", "/api/cossim", name, key, base_url, body)
    listed = [
        (reply[many], one) for many, one in COSINES if isinstance(reply, dict) and many in reply
    ]
    if not listed or not isinstance(listed[0][0], list):
        raise ValueError(
            f"the neighbours of {name}: expected a list {' or '.join(many for many, _ in COSINES)},"
            f" and {_keys(reply)} came"
        )
    neighbours, value = listed[0]
    rows = []
    for each in neighbours:
        try:
            feature = each["feature"]
            of = feature.get("model", target_model), feature.get("source", target_source)
            rows.append((int(feature["index"]), float(each[value])))
        except (AttributeError, LookupError, TypeError, ValueError):
            raise ValueError(
                f"a neighbour of {name}: expected a feature with an index, and {value};"
                f" {_keys(each)} came"
            ) from None
        if of != (target_model, target_source):
            raise ValueError(f"a neighbour of {name} is of {'/'.join(map(str, of))}")
    table = pd.DataFrame(rows, columns=["index", "cosine"])
    return table.sort_values("cosine", ascending=False, kind="stable", ignore_index=True)


def page(model_id: str, source: str, index: int) -> str:
    """The address of a feature's page."""
    return f"{API}/{_name(model_id, source, index)}"


def embed(
    model_id: str,
    source: str,
    index: int,
    *,
    explanation: bool = True,
    plots: bool = True,
    test: bool = False,
    activations: bool | None = None,
    link: bool | None = None,
    steer: bool | None = None,
    test_field: bool | None = None,
    test_text: str | None = None,
) -> str:
    """The address of a feature's page as it is put into another one.

    Args:
        model_id: The model.
        source: The SAE.
        index: The feature in it.
        explanation: Whether it shows the explanation.
        plots: The histogram and the logits.
        test: A test of the feature on a text.
        activations: The texts where it is most active; None leaves it, as those below, to the site.
        link: A link to the page.
        steer: The way to steering.
        test_field: The field for the text to test.
        test_text: The text in it at first.
    """
    parts = {
        "embed": True,
        "embedexplanation": explanation,
        "embedplots": plots,
        "embedtest": test,
        "embedactivations": activations,
        "embedlink": link,
        "embedsteer": steer,
        "embedtestfield": test_field,
        "defaulttesttext": test_text,
    }
    said = {
        name: str(value).lower() if isinstance(value, bool) else value
        for name, value in parts.items()
        if value is not None
    }
    return f"{page(model_id, source, index)}?{urlencode(said)}"


def _site(site: Site | str) -> Site:
    return parse_site(site) if isinstance(site, str) else site


def _name(model_id: str, source: str, index: int | None = None) -> str:
    """`model/source` or `model/source/index`, which are safe in an address and as a path."""
    for what, given in (("model", model_id), ("source", source)):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", given):
            raise ValueError(
                f"the {what} is {given!r}: expected Neuronpedia's name of it, such as"
                " gemma-2-2b for a model and 12-gemmascope-res-16k for a source"
            )
    if index is None:
        return f"{model_id}/{source}"
    if index < 0:
        raise ValueError(f"the index is {index}: expected at least 0")
    return f"{model_id}/{source}/{index}"


def _keys(value: object) -> str:
    return f"the keys {sorted(value)}" if isinstance(value, dict) else f"a {type(value).__name__}"


def _one_each(frame: "pd.DataFrame", best_first: list[str]) -> "pd.DataFrame":
    """By index, the last explanation of the best explainer that has one."""
    ranks = {who: -place for place, who in enumerate(best_first)}
    frame = frame.assign(rank=frame["explained_by"].astype(str).map(ranks))
    frame = frame.sort_values(["index", "rank", "batch", "line"])
    return frame.drop_duplicates("index", keep="last")


@dataclass(frozen=True)
class _Batch:
    """What one file of the export says.

    Attributes:
        rows: Line, index, label and explainer.
        problems: What is wrong with other lines, each with batch and line.
    """

    rows: list[tuple[int, int, str, str]]
    problems: list[str]


def _download(model_id: str, source: str, base_url: str) -> "pyarrow.Table":
    """All explanations of a source, with what is wrong among them.

    Batches are asked for until none of the next few is there, and not only until each feature has
    an explanation: it may have more.
    """
    import pandas as pd
    import pyarrow as pa

    rows: list[tuple[int, int, int, str, str]] = []
    problems: list[str] = []
    numbers = []
    with _client(base_url) as client:
        url = f"{base_url.rstrip('/')}/{model_id}/{source}/explanations/batch-{{}}.jsonl.gz"
        fetch = partial(_batch, client, url, model_id, source)
        for number, batch in progress(_found(fetch), f"labels of {source}"):
            numbers.append(number)
            rows += [(number, *row) for row in batch.rows]
            problems += batch.problems
    if not numbers:
        raise NotThere(
            f"the export has no explanations of {model_id}/{source}: {url.format(0)} is not there,"
            " or not public. Is that what Neuronpedia calls the model and the source?"
        )
    holes = sorted(set(range(numbers[-1])) - set(numbers))
    problems += [f"batch {hole} is missing, batch {numbers[-1]} is there" for hole in holes]
    frame = pd.DataFrame(rows, columns=["batch", "line", "index", "label", "explained_by"])
    about = {
        "version": VERSION,
        "of": f"{model_id}/{source}",
        "date": date.today().isoformat(),
        "batches": len(numbers),
        "explanations": len(frame),
        "features": int(frame["index"].nunique()),
        "explained_by": dict(Counter(row[-1] for row in rows).most_common()),
        "left_out": len(problems),
        "problems": problems[:KEPT],
    }
    kinds = {
        "batch": pa.int32(),
        "line": pa.int32(),
        "index": pa.int64(),
        "label": pa.string(),
        "explained_by": pa.dictionary(pa.int32(), pa.string()),
    }
    schema = pa.schema(list(kinds.items()), metadata={"flowhelpers": json.dumps(about)})
    return pa.Table.from_pandas(frame, schema=schema, preserve_index=False).replace_schema_metadata(
        schema.metadata
    )


def _found(fetch: Callable[[int], _Batch | None]) -> Iterator[tuple[int, _Batch]]:
    """The batches that are there, in order, several fetched at a time."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        for first in count(0, AT_ONCE):
            ask = range(first, first + AT_ONCE)
            there = False
            for number, batch in zip(ask, pool.map(fetch, ask), strict=True):
                if batch is not None:
                    there = True
                    yield number, batch
            if not there:
                return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batch(
    client: "httpx2.Client", url: str, model_id: str, source: str, number: int
) -> _Batch | None:
    """One file of the export; None if it is not there."""

    def read(response: "httpx2.Response") -> bytes | None:
        if response.status_code in (403, 404):  # S3 says 403 where it may not tell that none is
            return None
        if response.status_code != 200:
            raise ValueError(f"{url.format(number)}: the server answers {response.status_code}")
        if not response.content:
            raise EOFError("it is empty")
        whole = response.headers.get("Content-Encoding") == "gzip"  # httpx2 has undone it
        return response.content if whole else gzip.decompress(response.content)

    content = _patiently(partial(client.get, url.format(number)), read, url.format(number))
    if content is None:
        return None
    batch = _Batch([], [])
    for line, text in enumerate(content.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            row = _explanation(text, model_id, source)
        except _Unusable as error:
            batch.problems.append(f"batch {number}, line {line}: {error}")
        except ValueError as error:
            raise ValueError(f"batch {number}, line {line}: {error}") from None
        else:
            if row[1]:
                batch.rows.append((line, *row))
    return batch


class _Unusable(Exception):
    """A line that is not as it should be."""


def _explanation(text: bytes, model_id: str, source: str) -> tuple[int, str, str]:
    """The index, the label and the explainer that a line of the export names."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        raise _Unusable("it is not JSON") from None
    if not isinstance(row, dict):
        raise _Unusable(f"it is {_keys(row)}, expected an object")
    of = row.get("modelId", model_id), row.get("layer", source)
    if of != (model_id, source):
        raise ValueError(f"it is of {'/'.join(map(str, of))}, not of {model_id}/{source}")
    for field in ("index", "description"):
        if row.get(field) is None:
            raise _Unusable(f"it has no {field}, only {_keys(row)}")
    index, label = row["index"], row["description"]
    who = row.get("explanationModelName") or NOBODY
    if not re.fullmatch(r"-?[0-9]{1,18}", str(index)):
        raise _Unusable(f"the index is {index!r}, expected a number")
    try:
        label.encode()
        who.encode()
    except (AttributeError, UnicodeEncodeError):
        raise _Unusable("its description or explainer is no valid text") from None
    return int(index), label.strip(), who


def _about(table: "pyarrow.Table") -> dict[str, Any]:
    return json.loads((table.schema.metadata or {})[b"flowhelpers"])


def _read(path: Path, name: str) -> "pyarrow.Table | None":
    """The file that was kept; None, with a warning, if it is of no use."""
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    if not path.exists():
        return None
    try:
        table = parquet.read_table(path, page_checksum_verification=True)
        about = _about(table)
        if (about["of"], about["version"]) == (name, VERSION):
            return table
        problem = f"it is of {about['of']}, version {about['version']}"
    except (ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        problem = str(error).partition("\n")[0]
    warnings.warn(f"{path} is made again: {problem}", stacklevel=3)
    return None


def _client(base_url: str, key: str = "") -> "httpx2.Client":
    import httpx2

    if not re.match(r"https?://[^/@?#]+(/[^@?#]*)?$", base_url):
        raise ValueError(f"base_url is no address: expected one such as {API}")
    return httpx2.Client(
        base_url=base_url, timeout=TIMEOUT, headers={"x-api-key": key} if key else {}
    )


def _api(
    method: str, path: str, name: str, key: str | None, base_url: str, body: object = None
) -> Any:
    """What the site answers, read from JSON."""
    key = (key or os.environ.get(KEY) or "").strip()
    if not re.fullmatch(r"[!#-&(-\[\]-~]*", key):
        raise ValueError("the key has a space, a quote or another character that no key has")

    def read(response: "httpx2.Response") -> Any:
        status = response.status_code
        start = f"{name}: {client.base_url.host} answers {status}"
        if status in (401, 403):  # whatever else it says may repeat the key
            hint = f"give another, as key or in {KEY}" if key else f"give one, as key or in {KEY}"
            raise PermissionError(f"{start}. It refuses the key, or wants one: {hint}")
        if status == 404:
            raise NotThere(f"{start}: Neuronpedia has no {name}")
        if status != 200:
            said = (
                re.sub(re.escape(key), "[key]", response.text, flags=re.I) if key else response.text
            )
            raise ValueError(f"{start}: {said[:200]}")
        try:
            return response.json()
        except ValueError:
            pass
        raise ValueError(f"{start}, and not with JSON. Is base_url the site's address?")

    with _client(base_url, key) as client:
        send = partial(client.request, method, path, json=body)
        return _patiently(send, read, f"{name} at {client.base_url.host}")


def _patiently(
    send: "Callable[[], httpx2.Response]", read: "Callable[[httpx2.Response], T]", name: str
) -> T:
    """What is read off an answer; asked again where the server is busy or the answer is cut.

    No error of the client leaves it, for those hold the key.

    Raises:
        ConnectionError: If it is of no use, with the last reason.
    """
    import httpx2

    pause, problem, tries = PAUSE, "", 0
    while tries < TRIES:
        if tries:
            time.sleep(pause)
        tries += 1
        pause = PAUSE * 2 ** (tries - 1)
        try:
            response = send()
            status = response.status_code
            if status != 429 and status < 500:
                return read(response)
        except httpx2.RequestError as error:
            problem = f"the connection failed: {error or type(error).__name__}"
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            problem = f"the file is cut short or broken: {error}"
        else:
            problem = f"the server answers {status}"
            asked = _retry_after(response.headers.get("Retry-After", ""))
            if asked > LONGEST:
                problem += f", and asks to wait for {asked:.0f} s"
                break
            pause = max(pause, asked)
    raise ConnectionError(f"{name}: {problem} ({tries} of at most {TRIES} tries)")


def _retry_after(text: str) -> float:
    """The seconds that a server asks to wait for, given in seconds or as a date; else 0."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    now = datetime.now(UTC)
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds())
