"""A suite on Neuronpedia: the pages of its features, all of its labels, and a check on its matches.

Which SAEs are there, and by what names, the suite's row says. Nobody is asked for anything
but by `neuronpedia_labels`, `single_labels` and `cosine_check`.
"""

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flowhelpers.core.cache import cache_folder
from flowhelpers.core.features import FeatureId, Site, parse_feature, parse_site, suggestion
from flowhelpers.core.files import writable_folder, write_whole
from flowhelpers.core.progress_bar import progress
from flowhelpers.labels.neuronpedia import (
    API,
    DATASETS,
    NOBODY,
    NotThere,
    bulk_labels,
    cosine_neighbours,
    embed,
    feature_info,
    page,
)

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

VERSION = 1  # of the files that are kept
COLUMNS = ["site", "index", "label", "label_from"]  # of such a file


def feature_page(suite: "Suite", feature: FeatureId | str) -> str | None:
    """The address of a feature's page on Neuronpedia; None if its SAE is not there.

    Whether the SAE has so many features is not asked: nothing is loaded.
    """
    place = _place(suite, feature)
    return page(*place) if place else None


def feature_embed(suite: "Suite", feature: FeatureId | str, **parts: Any) -> str | None:
    """The address of that page as it is put into another one.

    Args:
        suite: The suite.
        feature: The feature.
        parts: What is shown of it, as `neuronpedia.embed` takes it.
    """
    place = _place(suite, feature)
    return embed(*place, **parts) if place else None


def neuronpedia_labels(
    suite: "Suite",
    sites: Iterable[Site | str] | None = None,
    *,
    explained_by: str | None = None,
    lenient: bool = False,
    base_url: str = DATASETS,
    folder: Path | None = None,
    refresh: bool = False,
) -> "pd.DataFrame":
    """Neuronpedia's labels of a suite's features, from its public export.

    They need neither the model nor an encoder. All of an SAE's come at once: for a few,
    `single_labels` is quicker. What was fetched is kept in one file for the suite,
    with the date; later calls need no network for it. If fetching ends early, the SAEs that
    were whole by then are kept.

    Args:
        suite: The suite.
        sites: The sites wanted; all that Neuronpedia has unless given.
        explained_by: The explainer to prefer, as in `neuronpedia.bulk_labels`.
        lenient: Whether to leave out, with a warning, what cannot be used, and SAEs of
            which the export has nothing.
        base_url: Where the export is.
        folder: Of the cache; `tables.cache_folder()` unless given.
        refresh: Whether to fetch all anew.

    Returns:
        `feature`, `label`, and `label_from`: who explained it, and when it was fetched. It serves
        as `own` of `labels.describe`.

    Raises:
        ValueError: If the suite, or a site, is not on Neuronpedia; and as `bulk_labels` says.
        ConnectionError: If the export cannot be had.
        OSError: If the folder cannot be written to.
    """
    import pandas as pd

    wanted = _wanted(suite, sites)
    name = re.sub(r"[^\w.@+=-]+", "_", suite.name)
    path = Path(folder or cache_folder()) / "neuronpedia" / f"{name}.parquet"
    asked = {
        str(site): {
            "of": suite.row.neuronpedia[site],
            "width": suite.row.features or suite.sae(site).width,
            "explained_by": explained_by,
        }
        for site in wanted
    }
    frame, about = _read(path)
    missing = [
        site for site in asked if refresh or not _serves(about.get(site), asked[site], lenient)
    ]
    if missing:
        writable_folder(path.parent)
    fresh: dict[str, pd.DataFrame] = {}
    try:
        for site in progress(missing, f"labels of {suite.name}"):
            fresh[site] = _fetched(site, **asked[site], lenient=lenient, base_url=base_url)
    finally:  # what is whole by now is kept, whatever happened
        if fresh:
            today = {"lenient": lenient, "date": date.today().isoformat()}
            about |= {site: asked[site] | today for site in fresh}
            parts = [frame[~frame["site"].isin(fresh)], *fresh.values()]
            parts = [part for part in parts if len(part)] or [frame[:0]]
            frame = pd.concat(parts, ignore_index=True)
            _write(path, frame, about)
    order = {site: place for place, site in enumerate(asked)}
    place = frame["site"].astype(str).map(order)  # of a category, a map would sort otherwise
    frame = frame.assign(place=place)[place.notna()].sort_values("place", kind="stable")
    names = frame["site"].astype(str) + "/" + frame["index"].astype(str)
    labels = frame[["label", "label_from"]].astype(str)
    return labels.assign(feature=names)[["feature", "label", "label_from"]].reset_index(drop=True)


def single_labels(
    suite: "Suite",
    features: Iterable[FeatureId | str],
    *,
    key: str | None = None,
    base_url: str = API,
) -> "pd.DataFrame":
    """Neuronpedia's labels of a few features, asked for one by one and not kept.

    Args:
        suite: The suite.
        features: The features; those that Neuronpedia does not have, or has no explanation of,
            are left out. Of several explanations of one it is the first.
        key: A key, which is not needed, as in `neuronpedia.feature_info`.
        base_url: Where the site is.

    Returns:
        As `neuronpedia_labels`.

    Raises:
        ValueError: If the suite is not on Neuronpedia; and as `neuronpedia.feature_info` says, like
            PermissionError and ConnectionError.
    """
    import pandas as pd

    _check_there(suite)
    rows = []
    for name in progress(list(map(str, features)), "labels of Neuronpedia"):
        place = _place(suite, name)
        try:
            found = feature_info(*place, key=key, base_url=base_url) if place else {}
        except NotThere:
            found = {}
        for each in found.get("explanations") or []:
            if label := str(each.get("description") or "").strip():
                who = each.get("explanationModelName") or NOBODY
                rows.append((name, label, f"neuronpedia, {who}, {date.today().isoformat()}"))
                break
    return pd.DataFrame(rows, columns=["feature", "label", "label_from"])


def cosine_check(
    suite: "Suite",
    table: "pd.DataFrame",
    features: Iterable[FeatureId | str],
    *,
    module: str = "res",
    key: str | None = None,
    base_url: str = API,
) -> "pd.DataFrame":
    """Our best matches beside those that Neuronpedia computes on its own servers.

    It is asked once for each feature. It compares decoder rows as they are: at an SAE that
    does not read in the stream, such as one at z, it has nothing to say about ours.

    Args:
        suite: The suite.
        table: Its match table.
        features: Residual features.
        module: Where their sources are.
        key: A key for Neuronpedia, as in `neuronpedia.feature_info`.
        base_url: Where the site is.

    Returns:
        One row a feature: `feature`, `ours` (our best match back) and its `cosine`, `theirs` and
        `their_cosine`, and whether they are the `same`. What does not exist is missing.

    Raises:
        ValueError: If the table is another suite's or has no match of a feature, or one of the
            SAEs is not on Neuronpedia; and as `neuronpedia.cosine_neighbours` says, like
            PermissionError and ConnectionError.
    """
    import pandas as pd

    from flowhelpers.core.features import predecessor_site

    if (of := table["suite"].iloc[0]) != suite.name:
        raise ValueError(f"a match table of {of}: expected one of {suite.name}")
    back = table[(table["direction"] == "backward") & (table["rank"] == 1)]
    back = back[back["module"] == module].set_index(["layer", "feature"])
    pairs = []
    for feature in map(suite.feature, features):
        if feature.module != "res" or (feature.layer, feature.index) not in back.index:
            raise ValueError(f"the match table has no match back of {feature} at {module}")
        site = predecessor_site(feature.layer, module)
        sources = [_called(suite, each) for each in (feature.site, site)]
        pairs.append((feature, site, back.loc[(feature.layer, feature.index)], *sources))
    rows = []
    for feature, site, match, (model, source), (other, target) in progress(
        pairs, "cosines of Neuronpedia"
    ):
        there = cosine_neighbours(
            model,
            source,
            feature.index,
            target,
            target_model=other,
            key=key,
            base_url=base_url,
        )
        ours = f"{site}/{match['source']}" if match["source"] >= 0 else None
        theirs, cosine = None, None
        if len(there):
            theirs = f"{site}/{int(there['index'].iloc[0])}"
            cosine = float(there["cosine"].iloc[0])
        same = ours is not None and ours == theirs
        rows.append((str(feature), ours, float(match["cosine"]), theirs, cosine, same))
    columns = ["feature", "ours", "cosine", "theirs", "their_cosine", "same"]
    return pd.DataFrame(rows, columns=columns).astype({"their_cosine": float, "same": bool})


def _place(suite: "Suite", feature: FeatureId | str) -> tuple[str, str, int] | None:
    """Model, source and index of a feature as Neuronpedia has them."""
    feature = parse_feature(feature) if isinstance(feature, str) else feature
    if feature.site not in suite.row.neuronpedia:
        return None
    return *_called(suite, feature.site), feature.index


def _called(suite: "Suite", site: Site) -> tuple[str, str]:
    known = suite.row.neuronpedia
    if site not in known:
        _check_there(suite)
        near = suggestion(str(site), map(str, sorted(known)))
        raise ValueError(f"{site} of suite {suite.name} is not on Neuronpedia{near}")
    model, _, source = known[site].partition("/")
    return model, source


def _check_there(suite: "Suite") -> None:
    if not suite.row.neuronpedia:
        raise ValueError(f"suite {suite.name} is not on Neuronpedia: no SAE of it has a name there")


def _wanted(suite: "Suite", sites: Iterable[Site | str] | None) -> list[Site]:
    _check_there(suite)
    if sites is None:
        sites = sorted(site for site in suite.row.neuronpedia if site in suite.saes)
    found = [parse_site(site) if isinstance(site, str) else site for site in sites]
    for site in found:
        _called(suite, site)
    return found


def _serves(kept: Mapping[str, Any] | None, asked: Mapping[str, Any], lenient: bool) -> bool:
    """Whether what is kept of a site is what is asked for; what is whole serves the lenient too."""
    if kept is None or (kept["lenient"] and not lenient):
        return False
    return all(kept[name] == value for name, value in asked.items())


def _fetched(
    site: str, of: str, width: int, explained_by: str | None, lenient: bool, base_url: str
) -> "pd.DataFrame":
    import pandas as pd

    model, _, source = of.partition("/")
    with TemporaryDirectory() as passing:  # what is kept is the suite's file
        try:
            found = bulk_labels(
                model,
                source,
                site,
                width,
                explained_by=explained_by,
                lenient=lenient,
                base_url=base_url,
                folder=Path(passing),
            )
        except NotThere as error:
            if not lenient:
                raise
            warnings.warn(f"{site} is without labels: {error}", stacklevel=3)
            found = pd.DataFrame({"index": [], "label": [], "label_from": []})
    return found.assign(site=site)[COLUMNS]


def _read(path: Path) -> "tuple[pd.DataFrame, dict[str, dict[str, Any]]]":
    """The labels that are kept for a suite, and what is known of each site's."""
    import pandas as pd
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    if path.exists():
        try:
            table = parquet.read_table(path, page_checksum_verification=True)
            about = json.loads((table.schema.metadata or {})[b"flowhelpers"])
            if about["version"] == VERSION:
                return table.select(COLUMNS).to_pandas(), about["sites"]
            problem = f"it is of version {about['version']}"
        except (ArrowException, OSError, LookupError, TypeError, ValueError) as error:
            problem = str(error).partition("\n")[0]
        warnings.warn(f"{path} is made again: {problem}", stacklevel=3)
    return pd.DataFrame(columns=COLUMNS), {}


def _write(path: Path, frame: "pd.DataFrame", sites: Mapping[str, Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    few = pa.dictionary(pa.int32(), pa.string())
    kinds = dict(zip(COLUMNS, (few, pa.int32(), pa.string(), few), strict=True))
    about = {"version": VERSION, "sites": sites}
    schema = pa.schema(list(kinds.items()), metadata={"flowhelpers": json.dumps(about)})
    frame = frame.astype({"site": str, "index": "int32", "label_from": str})
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    table = table.replace_schema_metadata(schema.metadata)
    write_whole(
        path,
        lambda file: parquet.write_table(table, file, compression="zstd", write_page_checksum=True),
    )
