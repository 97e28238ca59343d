"""Match features across layers and modules: the match table of a suite.

A match is an edge from a source feature to a target feature that lies later in the stream:
R_{L-1}, M_L or A_L to R_L. It is `backward` where the target chose its best sources, `forward`
where the source chose its best targets (paper 3.2 and 3.3).
"""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from flowhelpers.core.cache import cached_table
from flowhelpers.core.directions import prepare, unit_rows
from flowhelpers.core.features import MODULES, Site, check_choice, parse_site
from flowhelpers.core.machine import check_device, free_memory
from flowhelpers.core.progress_bar import progress
from flowhelpers.core.versions import check_workers
from flowhelpers.matching.cosine import Rows
from flowhelpers.matching.layers import sites_by_layer, with_weights
from flowhelpers.matching.matchers import (
    LEAST_ACTIVE,
    Null,
    PairMatch,
    Weights,
    by_cosine,
    by_pearson,
    by_permutation,
    random_of_top_k,
    read_codes,
)
from flowhelpers.matching.null import (
    NULL_DRAWS,
    NULL_QUANTILE,
    cached_null,
    null_error,
    null_threshold,
)
from flowhelpers.suites.load import KEPT, decoders_memory, load_suite
from flowhelpers.suites.model import is_edited
from flowhelpers.suites.registry import SuiteRow, registered

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite
    from flowhelpers.suites.saes import SAE

Method = Literal["cosine", "random", "permutation", "pearson"]
METHODS: tuple[Method, ...] = ("cosine", "random", "permutation", "pearson")
DIRECTIONS = ("backward", "forward")
ONE_LAYER = threading.Lock()  # at a time in a worker of Dask, whatever threads it has
TABLE_VERSION = 4  # of what a table on disk holds: raise it when that changes


def match_table(
    suite: "Suite",
    k: int = 5,
    seed: int = 0,
    method: Method = "cosine",
    *,
    weights: Weights = "decoder",
    folded: bool = False,
    texts: Sequence[str] | None = None,
    max_tokens: int = 128,
    layers: Sequence[int] | None = None,
    device: str | None = None,
    cache: Path | None = None,
    client: Any = None,
) -> "pd.DataFrame":
    """The matches of a suite's residual features with all sites that precede them.

    Each layer's matches are cached on disk, under a key of all that they depend on, the directions
    included.

    Args:
        k: Matches kept for each feature and pair of sites; for `random`, how many are drawn from.
        seed: The random seed of the null and of `random`.
        method: `cosine` of directions (top-k, paper 3.2); `random`, one of the k of highest cosine
            (paper A.2); `permutation`, one to one as in SAE Match (paper 3.1, CHOICES 15);
            `pearson`, correlation of activations over `texts` (paper C.4, CHOICES 14).
        weights: For `permutation`: what is matched; `both` are decoder and encoder, `all` the
            encoder's bias as well.
        folded: For `permutation`: fold thresholds into the weights first (CHOICES 16).
        texts: For `pearson`: the text sample.
        max_tokens: For `pearson`: where each text is cut, BOS included.
        layers: The layers whose residual features are matched; by default all.
        device: Where to compute; by default where the SAEs are. Correlations are on the CPU.
        cache: The folder of the tables on disk; by default `cache_folder()`.
        client: Of Dask: each layer that is not on disk is a task of a worker that has memory for
            it, one at a time, and can load the suite. Tables are the same, to the byte.

    Returns:
        One row a match: `suite`, `method`, `direction` (backward or forward), `layer` and `feature`
        of the residual target, `module`, `source_layer` and `source` (-1 where there is none),
        `rank` (from 1) among the matches of the side that chose, `score` (what the method ranks
        by), `cosine`, `margin` (of the score, to the next rank; missing at the last), `mutual`
        (each is the other's best), `null_quantile` (the share of best scores by chance that lie
        below), `null` (the 99.9 % quantile of those scores; CHOICES 27) and `null_error` (its
        standard error).

        Sites whose SAEs lack what a permutation compares (those at z all weights, those without
        thresholds what is folded) have no rows, and a warning names them.

    Raises:
        ValueError: If no residual SAE has an SAE before it, or none can be permuted, the method
            lacks its texts or gets an argument it does not use, the device does not exist, or k
            exceeds an SAE's width.
        MemoryError: If no worker of the client has memory for the SAEs of a layer.

    Example:
        >>> from flowhelpers import load_suite, match_table, matching
        >>> matches = match_table(load_suite("flowlet"), k=1, layers=[4])
        >>> best = matching.best_matches(matches, module="res")
        >>> len(best), float(best["null"].iloc[0]) < float(best["cosine"].median())
        (1024, True)
    """
    import pandas as pd

    check_choice("method", method, METHODS)
    if method != "permutation" and (weights != "decoder" or folded):
        raise ValueError(f"method={method!r}: weights and folded are for 'permutation' alone")
    if (method == "pearson") != (texts is not None):
        raise ValueError(f"method={method!r}: texts are for 'pearson', which needs them")
    if device is not None:
        check_device(device)
    sites = sites_by_layer(suite, layers)
    choices: dict[str, Any] = {"method": method, "k": k, "seed": seed}
    choices["null"] = (NULL_QUANTILE, NULL_DRAWS)
    if method == "permutation":
        sites = with_weights(suite, sites, weights, folded)
        choices |= {"weights": weights, "folded": folded}
    if method == "pearson":
        from flowhelpers.activations.sparse import VERSION

        if is_edited(suite.model):
            raise ValueError("the model is being edited, and tables are kept: match it unedited")
        choices |= {"texts": list(texts or ()), "max_tokens": max_tokens, "activations": VERSION}
        choices |= {"least_active": LEAST_ACTIVE, "model": suite.model.fingerprint}

    first = [sum(len(at) - 1 for at in sites.values())]  # pairs, told to the first assignment alone

    @once  # one pass of the model, when the first layer is not on disk
    def codes() -> Any:
        needed = {site for at in sites.values() for site in at}
        return read_codes(suite, texts or (), needed, seed, max_tokens)

    rows: dict[Site, Rows] = {}  # of the layer at hand, normalised once
    nulls: dict[Site, Tensor] = {}

    def match(target: "SAE", source: "SAE") -> tuple[PairMatch, Null]:
        if method == "pearson":
            by_site, shifted = codes()
            return by_pearson(by_site[target.site], by_site[source.site], shifted, k)
        for sae in (target, source):
            if sae.site not in rows:
                rows[sae.site] = _normalised(sae, device)
            if sae.site not in nulls:
                nulls[sae.site] = cached_null(sae, rows[sae.site], seed, device, cache)
        null = nulls[source.site], nulls[target.site]  # a target chooses among sources
        if method == "permutation":
            pairs = first.pop() if first else 0
            return by_permutation(target, source, weights, folded, device, pairs), null
        found = by_cosine(rows[target.site], rows[source.site], k, device)
        if method == "random":
            # A seed for each pair of sites: what is drawn at one says nothing of another.
            text = f"{seed} {target.site} {source.site}".encode()
            own = int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")
            found = random_of_top_k(found, k, own)
        return found, null

    groups, coming = list(sites.values()), {}

    # The last few that were read stay in memory: the target, which is needed again, comes last.
    def read(place: int) -> "list[SAE]":
        return [suite.sae(site) for site in reversed(groups[place])][::-1]

    def matches_at(place: int, reader: ThreadPoolExecutor) -> "pd.DataFrame":
        saes = coming.pop(place).result() if place in coming else read(place)
        if place + 1 < len(groups):  # while these are matched
            coming[place + 1] = reader.submit(read, place + 1)
        tables = []
        for site in set(rows) - set(groups[place]):
            del rows[site]
        for source in saes[1:]:
            tables += _both_sides(*match(saes[0], source), saes[0], source, k, method)
            if source.site.module != "res":
                rows.pop(source.site, None)
        return pd.concat(tables, ignore_index=True)

    # A few words over and over: as categories, all layers of a large suite fit into memory.
    modules = sorted({site.module for some in sites.values() for site in some[1:]})
    words = {"suite": [suite.name], "method": [method], "module": modules}
    categories = {name: pd.CategoricalDtype(some) for name, some in words.items()}
    tables, given = [], {"seed": seed, "weights": weights, "folded": folded, "texts": texts}
    given |= {"max_tokens": max_tokens, "device": device, "cache": cache}
    if client is not None:
        check_workers(client)
    with ThreadPoolExecutor(1 if client is None else len(groups)) as pool:

        def table_of(place: int) -> "Callable[[], pd.DataFrame]":
            at = groups[place]
            for site in at:
                if k not in range(1, (width := suite.about(site, "width")) + 1):
                    raise ValueError(f"k={k}: expected 1 to {width}, the features of {site}")
            prints = {str(site): suite.about(site, "fingerprint") for site in reversed(at)}
            key = {"suite": suite.name, "layer": at[0].layer, "sites": prints} | choices
            make: Any = partial(matches_at, place, pool)
            if client is not None:
                make = partial(_elsewhere, client, suite, prints, k, method, given)
            table = partial(cached_table, "matches", key, make, cache, TABLE_VERSION)
            return table if client is None else pool.submit(table).result

        coming_tables = map(table_of, range(len(groups)))
        if client is not None:  # all at once
            coming_tables = list(coming_tables)
        for table in progress(coming_tables, "matching", len(groups)):
            made = table()
            made.insert(0, "suite", suite.name)
            tables.append(made.astype(categories))
    return pd.concat(tables, ignore_index=True)


def _elsewhere(
    client: Any, suite: "Suite", prints: dict[str, str], k: int, method: Method, given: dict
) -> "pd.DataFrame":
    """The matches of a layer, as `cached_table` keeps them, from a worker with memory for it."""
    needed = decoders_memory(suite.row)
    limits = {a: w["memory_limit"] for a, w in client.scheduler_info()["workers"].items()}
    able = [address for address, limit in limits.items() if not limit or limit >= needed]
    if not able:
        limit = max(limits.values(), default=0)
        raise MemoryError(
            f"matching in suite {suite.name} needs {needed / 2**30:.2f} GiB on a worker, and of"
            f" {len(limits)} workers none has more than {limit / 2**30:.2f} GiB"
        )
    asked = (suite.row, suite.device, suite.dtype, prints, k, method, given)
    some = able if len(able) < len(limits) else None  # with all, one that is replaced is among them
    return client.submit(_on_worker, *asked, workers=some, pure=False).result()


def _on_worker(
    row: SuiteRow, device: str, dtype: str, prints: dict[str, str], k: int, method: Method,
    given: dict[str, Any],
) -> "pd.DataFrame":  # fmt: skip
    """The matches of the layer of these sites, whose SAEs have to be those of whoever asks."""
    import pandas as pd

    with ONE_LAYER:
        named = row.name.split("@")[0] in registered()  # its files may lie elsewhere here
        suite = load_suite(row.name if named else row, device, dtype)
        for site, expected in prints.items():
            if suite.sae(site).fingerprint != expected:
                raise ValueError(f"this worker has another SAE at {site} of suite {suite.name}")
        layer = max(parse_site(site) for site in prints).layer
        made = match_table(suite, k, method=method, layers=[layer], **given).drop(columns="suite")
    words = {"module": sorted(MODULES), "method": METHODS}
    return made.astype({name: pd.CategoricalDtype(list(some)) for name, some in words.items()})


def _normalised(sae: "SAE", device: str | None) -> Rows:
    """Directions ready for all products of a layer; of the largest SAEs, block by block there."""
    at = device or sae.decoder.device
    needed = KEPT * 6 * sae.decoder.numel()
    return prepare(sae.decoder, at) if needed < free_memory(str(at)) // 2 else sae.decoder


def _both_sides(
    match: PairMatch, null: Null, target: "SAE", source: "SAE", k: int, method: str
) -> "list[pd.DataFrame]":
    """The rows of a pair of sites: what each target chose, and what each source chose."""
    import numpy as np
    import pandas as pd

    def word(one: str, words: Sequence[str], n: int) -> pd.Categorical:
        return pd.Categorical.from_codes(np.full(n, words.index(one), np.int8), list(words))

    frames = []
    for direction, chosen, other, chance in (
        ("backward", match.backward, match.forward, null[0]),
        ("forward", match.forward, match.backward, null[1]),
    ):
        choosing, width = chosen.indices.shape
        ranks = min(k, width)
        best, scores = chosen.indices[:, :ranks].cpu(), chosen.scores[:, :ranks].cpu()
        leads = (chosen.scores[:, :-1] - chosen.scores[:, 1:]).cpu()
        chooser = torch.arange(choosing)[:, None].expand(-1, ranks)
        mutual = (best >= 0) & (other.indices[:, 0].cpu()[best] == chooser)
        mutual[:, 1:] = False  # of lower rank is not the chooser's best
        ends = (chooser, best) if direction == "backward" else (best, chooser)
        cosines = scores
        if method == "pearson":
            cosines = _cosines(target, source, ends[0].flatten(), ends[1].flatten())
        below = torch.searchsorted(chance, scores.contiguous()).float() / len(chance)
        columns = {
            "feature": ends[0].int(),
            "source": ends[1].int(),
            "rank": torch.arange(1, ranks + 1, dtype=torch.int16).expand(choosing, -1),
            "score": scores.float(),
            "cosine": cosines.float(),
            "margin": torch.nn.functional.pad(leads, (0, 1), value=torch.nan)[:, :ranks],
            "mutual": mutual,
            "null_quantile": below,
        }
        frame = pd.DataFrame({name: column.flatten().numpy() for name, column in columns.items()})
        of_all = {
            "direction": word(direction, DIRECTIONS, len(frame)),
            "layer": np.int16(target.site.layer),
            "module": word(source.site.module, sorted(MODULES), len(frame)),
            "source_layer": np.int16(source.site.layer),
            "null": np.float32(null_threshold(chance)),
            "null_error": np.float32(null_error(chance)),
            "method": word(method, METHODS, len(frame)),
        }
        frames.append(frame.assign(**of_all))
    return frames


def _cosines(target: "SAE", source: "SAE", ends: Tensor, starts: Tensor) -> Tensor:
    """The cosine of each match, whatever chose it; 0 where there is none."""
    parts = [
        (unit_rows(target.decoder[t]) * unit_rows(source.decoder[s])).sum(-1).cpu()
        for t, s in zip(ends.split(2**14), starts.split(2**14), strict=True)
    ]
    return torch.cat(parts).clamp(-1, 1).where((ends >= 0) & (starts >= 0), 0.0)
