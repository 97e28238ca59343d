"""A suite on Neuronpedia: pages of its features, their labels, and a check on our matches.

No key is needed; one in NEURONPEDIA_API_KEY is sent to its API alone, and is in no error or log.
"""

import gzip
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterable
from datetime import date
from functools import partial
from itertools import count
from operator import itemgetter
from typing import TYPE_CHECKING

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from flowhelpers.core.cache import cached_table
from flowhelpers.core.features import FeatureId, Site, parse_feature, parse_site, predecessor_site
from flowhelpers.core.progress_bar import progress

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

API = "https://www.neuronpedia.org"
EXPORT = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/v1"
COLUMNS = ["feature", "label", "label_from"]
KEY = "NEURONPEDIA_API_KEY"
TRIES = 6  # of one request, with pauses of 0.5, 1, 2, 4 and 8 seconds
# /api/cossim has had two spellings of its list and of each value in it.
COSINES = {
    "topk_decoder_cossim_features": "cosine_similarity",
    "topkDecoderCossimFeatures": "cosineSimilarity",
}


def feature_page(suite: "Suite", feature: FeatureId | str) -> str | None:
    """The address of a feature's page; None if its SAE is not on Neuronpedia. Nothing is loaded."""
    feature = parse_feature(str(feature))
    source = suite.row.neuronpedia.get(feature.site)
    return f"{API}/{source}/{feature.index}" if source else None


def neuronpedia_labels(suite: "Suite", sites: Iterable[Site | str] | None = None) -> "pd.DataFrame":
    """Neuronpedia's labels of all features of a suite's SAEs, or some `sites`, from its export.

    What was fetched is kept for each SAE, with its date, in `core.cache_folder()`. An SAE that the
    export lacks has no labels, with a warning. Columns: `feature`, `label`, and `label_from`, the
    explainer and the date.
    """
    import pandas as pd

    if sites is None:
        sites = sorted(site for site in suite.row.neuronpedia if site in suite.saes)
    if not (sources := {site: _source(suite, site) for site in map(parse_site, map(str, sites))}):
        warnings.warn(f"no SAE of suite {suite.name} is on Neuronpedia", stacklevel=2)
    tables = [pd.DataFrame(columns=COLUMNS)]
    for site, source in progress(list(sources.items()), f"labels of {suite.name}"):
        try:
            table = cached_table("neuronpedia", {"source": source}, partial(_exported, source))
        except LookupError as error:
            warnings.warn(f"{site} is without labels: {error.args[0]}", stacklevel=2)
            continue
        width = suite.row.features or suite.sae(site).width
        if not table["index"].between(0, width - 1).all():
            raise ValueError(f"{source} has features beyond the {width} of {site}: the same SAE?")
        table["feature"] = [f"{site}/{index}" for index in table["index"]]
        tables.append(table[COLUMNS])
    return pd.concat(tables, ignore_index=True)


def cosine_check(
    suite: "Suite", table: "pd.DataFrame", features: Iterable[FeatureId | str], module: str = "res"
) -> "pd.DataFrame":
    """Our best matches of residual features beside those that Neuronpedia's servers find.

    It compares decoder rows, so the SAEs at these sites have to decode to the stream (not to z).

    Returns:
        `feature`, `ours` (our best match back at the module) and its `cosine`, `theirs` and
        `their_cosine`, and whether they are the `same`. What does not exist is missing.
    """
    import pandas as pd

    if (of := table["suite"].iloc[0]) != suite.name:
        raise ValueError(f"a match table of {of}: expected one of {suite.name}")
    best = table.query("direction == 'backward' and rank == 1 and module == @module")
    best = best.set_index(["layer", "feature"])
    rows = []
    for feature in progress([*map(suite.feature, features)], "cosines of Neuronpedia"):
        if feature.module != "res" or (feature.layer, feature.index) not in best.index:
            raise ValueError(f"the match table has no match back of {feature} at {module}")
        site = predecessor_site(feature.layer, module)
        source, target = _source(suite, feature.site), _source(suite, site)
        match = best.loc[(feature.layer, feature.index)]
        ours = f"{site}/{match['source']}" if match["source"] >= 0 else None
        index, cosine = _nearest(source, feature.index, target)
        theirs = f"{site}/{index}" if index is not None else None
        same = ours is not None and ours == theirs
        rows.append((str(feature), ours, float(match["cosine"]), theirs, cosine, same))
    columns = ["feature", "ours", "cosine", "theirs", "their_cosine", "same"]
    return pd.DataFrame(rows, columns=columns).astype({"their_cosine": float, "same": bool})


def _source(suite: "Suite", site: Site) -> str:
    """What Neuronpedia calls the SAE of a site: `model/source`."""
    names = suite.row.neuronpedia
    if site not in names:
        raise ValueError(f"{site} of {suite.name} is not on Neuronpedia: {[*map(str, names)]} are")
    return names[site]


def _exported(source: str) -> "pd.DataFrame":
    """By index the last explanation of an SAE's commonest explainer, of equals the first by name.

    It reads all files of the export.
    """
    import pandas as pd

    addresses = (f"{EXPORT}/{source}/explanations/batch-{n}.jsonl.gz" for n in count())
    files = iter(map(_ask, addresses).__next__, None)  # up to the first that is not there
    rows = pd.DataFrame([json.loads(line) for file in files for line in file.splitlines()])
    if rows.empty:
        raise LookupError(f"the export has nothing of {source}")
    others = {*(rows["modelId"] + "/" + rows["layer"])} - {source}
    if others:
        raise ValueError(f"the export of {source} has rows of {', '.join(sorted(others))}")
    label = rows["description"].fillna("").str.strip()
    explainer = rows["explanationModelName"].fillna("unknown")
    table = pd.DataFrame({"index": rows["index"].astype(int), "label": label, "by": explainer})
    table = table[table["label"] != ""]
    table["explained"] = table.groupby("by")["label"].transform("size")
    table = table[::-1].sort_values(["explained", "by"], ascending=[False, True], kind="stable")
    table = table.drop_duplicates("index").sort_values("index", ignore_index=True)
    table["label_from"] = "neuronpedia, " + table["by"] + f", {date.today().isoformat()}"
    return table[["index", "label", "label_from"]]


def _nearest(source: str, index: int, target: str) -> tuple[int | None, float | None]:
    """The feature of the target that Neuronpedia finds nearest to one, and its cosine."""
    (model, name), (target_model, target_name) = source.split("/", 1), target.split("/", 1)
    question = {"modelId": model, "source": name, "index": index}
    question |= {"targetModelId": target_model, "targetSourceId": target_name}
    key = os.environ.get(KEY, "").strip()
    if not re.fullmatch("[!-~]*", key):  # the client would quote such a key in its error
        raise ValueError(f"the key in {KEY} has a space or another character that no key has")
    content = _ask(f"{API}/api/cossim", question, key)
    if content is None:
        raise ValueError(f"Neuronpedia has no feature {source}/{index}")
    try:
        reply = json.loads(content)
        many = next(name for name in COSINES if name in reply)
        found = [(item["feature"], float(item[COSINES[many]])) for item in reply[many]]
        of = {(f.get("model", target_model), f.get("source", target_name)) for f, _ in found}
        cosines = {int(feature["index"]): value for feature, value in found}
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError):
        raise ValueError(f"no known form: Neuronpedia's reply for {source}/{index}") from None
    if of - {(target_model, target_name)}:
        raise ValueError(f"the neighbours of {source}/{index} are not of {target}")
    return max(cosines.items(), key=itemgetter(1), default=(None, None))


@retry(
    retry=retry_if_exception_type(ConnectionError), reraise=True,
    stop=stop_after_attempt(TRIES), wait=wait_exponential(0.5),
)  # fmt: skip
def _ask(address: str, question: object = None, key: str = "") -> bytes | None:
    """What a server answers, unpacked; None where it has no such page.

    No error quotes the server or comes from the client's own: both may hold the key.
    """
    import httpx2

    method, headers = "GET" if question is None else "POST", {"x-api-key": key} if key else {}
    status, content, problem = 0, b"", ""
    try:
        response = httpx2.request(method, address, json=question, headers=headers, timeout=30)
        status, content = response.status_code, response.content
        if status == 200 and content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (httpx2.RequestError, EOFError, OSError, zlib.error) as error:
        problem = f"{address}: the connection failed: {error or type(error).__name__}"
    if status == 429 or status >= 500:
        problem = f"{address}: the server answers {status}"
    if problem:
        raise ConnectionError(problem)
    if status == 404 or (status == 403 and address.startswith(EXPORT)):  # of S3: not there
        return None
    if status != 200:
        hint = f": give another key in {KEY}, or none" if status in (401, 403) else ""
        raise ValueError(f"{address}: the server answers {status}{hint}")
    return content
