"""All features and matches of a suite in one Arrow file, found by their place, not by scanning.

Every feature has as many matches as every other of its SAE, so its own begin at a place that can be
computed. The file is memory-mapped: opening it reads nothing but what is asked for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.core.cache import cached_arrays
from flowhelpers.core.features import MODULES, FeatureId, Site, parse_feature, parse_site
from flowhelpers.explorer_reading import NEAR, read_features
from flowhelpers.flow.lifespans import feature_lifespans
from flowhelpers.labels.neuronpedia import feature_page
from flowhelpers.matching.null import NULL_DRAWS
from flowhelpers.matching.scores import CLASSES, classify, dominant_module, feature_scores
from flowhelpers.matching.table import TABLE_VERSION, match_table

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.activations.sparse import FeatureActivations
    from flowhelpers.suites.load import Suite

RANKS = 5
SMALL = 100_000  # features of a suite that is read and labelled whole, without being asked
FOUND = 60  # features that a search or a bar lists
VERSION = 2  # of what the file holds: raise it when that changes


@dataclass(frozen=True)
class FlowIndex:
    """The features and matches of a suite.

    Attributes:
        about: What holds for all of them: `suite`, `sites` with the width of each, `start` of each
            block of matches with its `ranks` and `null`, the `tokens` that were read, and so on.
        arrays: Of each match, by blocks, chooser and rank: `other`, `score`, `mutual`. Of each
            feature, by site: `class`, `born`, `first`, `last`, and what `read_features` gives.
        labels: Your own label and where it is from, by the feature's name.
    """

    about: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    labels: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def is_small(self) -> bool:
        """Whether all of it is at hand in a view or a page at once."""
        return sum(self.about["sites"].values()) <= SMALL

    def feature(self, text: str | FeatureId) -> FeatureId:
        """A feature from its written form; a ValueError says what there is."""
        feature, widths = parse_feature(str(text)), self.about["sites"]
        if str(feature.site) not in widths:
            there = ", ".join(widths)
            raise ValueError(f"no SAE at {feature.site} in {self.about['suite']}: it has {there}")
        if feature.index >= (width := widths[str(feature.site)]):
            raise ValueError(
                f"no feature {feature} in {self.about['suite']}: {feature.site} has features 0 to"
                f" {width - 1}"
            )
        return feature

    def place(self, feature: FeatureId) -> int:
        """The row of a feature in the arrays of features."""
        return self.about["first"][str(feature.site)] + feature.index

    def choices(self, direction: str, layer: int, module: str, chooser: int) -> dict[str, Any]:
        """What a feature chose, best first: `to` (indices), `score`, and whether it is `mutual`.

        `layer` is that of the later site, and `module` that of the earlier, as in a match table.
        """
        block = self.about["blocks"].get(f"{direction} {layer} {module}")
        if block is None:
            return {}
        first = block["start"] + chooser * block["ranks"]
        rows = slice(first, first + block["ranks"])
        there = self.arrays["other"][rows] >= 0
        scores = self.arrays["score"][rows][there].astype(float).round(4).tolist()
        to = self.arrays["other"][rows][there].tolist()
        return {"to": to, "score": scores, "mutual": bool(self.arrays["mutual"][first])}

    def record(self, feature: FeatureId, whole: bool = True) -> dict[str, Any]:
        """What the explorer shows of a feature: its card and, of a `whole` one, its matches."""
        at, arrays, layer = self.place(feature), self.arrays, feature.layer
        made: dict[str, Any] = {}
        if str(feature) in self.labels:
            made["label"], made["from"] = self.labels[str(feature)]
        if feature.module == "res" and arrays["class"][at] >= 0:
            made["class"] = CLASSES[arrays["class"][at]]
            made["life"] = [int(arrays["first"][at]), int(arrays["last"][at])]
            if arrays["born"][at]:
                made["born"] = MODULES[arrays["born"][at]]
        if "writes" in arrays:
            written = arrays["writes"][at]
            made["writes"] = [self.about["words"][i] for i in written.tolist() if i >= 0]
        if "rate" in arrays and self.about["read"][str(feature.site)]:
            made["rate"] = float(f"{arrays['rate'][at]:.3g}")
            made["contexts"] = [*self._contexts(at)]
            if arrays["subject"][at] >= 0:
                made["subject"] = [*self.about["subjects"]][arrays["subject"][at]]
                made |= {key: round(float(arrays[key][at]), 3) for key in ("auc", "chance")}
            if (shares := arrays["groups"][at]).sum():
                made["groups"] = shares.astype(float).round(3).tolist()
        if "theta" in arrays and arrays["theta"][at] > 0:
            made["theta"] = float(f"{arrays['theta'][at]:.5g}")
        if not whole:
            return made
        if feature.module == "res":
            back = {m: self.choices("backward", layer, m, feature.index) for m in MODULES}
            made["back"] = {module: chosen for module, chosen in back.items() if chosen}
            if "direct" in arrays:
                to, score = arrays["direct"][at].tolist(), arrays["direct_score"][at].astype(float)
                pairs = zip(self.about["layers"], to, score.round(4).tolist(), strict=True)
                made["direct"] = [pair for pair in pairs if pair[1] >= 0]
        later = layer + (feature.module == "res")
        made["on"] = self.choices("forward", later, feature.module, feature.index)
        return made

    def _contexts(self, at: int) -> Iterable[list[Any]]:
        """The row of the token, its activation, and the shares of it that tokens near it have."""
        rows = zip(*(self.arrays[name][at] for name in ("peak", "active", "near")), strict=True)
        for peak, active, near in rows:
            if peak >= 0:
                there = np.flatnonzero(near).tolist()
                shares = [x for i in there for x in (i - NEAR, int(near[i]))]
                yield [int(peak), float(f"{active:.3g}"), shares]

    def chain(self, feature: FeatureId) -> list[FeatureId]:
        """The feature with all that best matches in the stream lead to, back and on.

        Of a feature at an MLP or attention, those of the residual feature that it matches best.
        """
        found = [feature]
        if feature.module != "res":
            best = self.choices("forward", feature.layer, feature.module, feature.index)
            if not best.get("to"):
                return found
            feature = FeatureId(feature.layer, "res", best["to"][0])
            found.append(feature)
        for step in (-1, 1):
            node, direction = feature, "backward" if step < 0 else "forward"
            while True:
                later = max(node.layer, node.layer + step)
                to = self.choices(direction, later, "res", node.index).get("to")
                if not to:
                    break
                node = FeatureId(node.layer + step, "res", to[0])
                found.append(node)
        return found

    def neighbourhood(self, features: Iterable[FeatureId]) -> dict[str, Any]:
        """The records of the features' chains, and short ones of all that these chose."""
        chains = dict.fromkeys(node for feature in features for node in self.chain(feature))
        whole = {node: self.record(node) for node in chains}
        others: dict[FeatureId, None] = {}
        for node, made in whole.items():
            later = node.layer + (node.module == "res")
            ends = [(later, "res", made["on"].get("to", []))]
            for module, chosen in made.get("back", {}).items():
                ends.append((node.layer - (module == "res"), module, chosen["to"]))
            ends += [(layer, "res", [index]) for layer, index, _ in made.get("direct", [])]
            others |= {FeatureId(at, m, i): None for at, m, some in ends for i in some}
        brief = {str(node): self.record(node, False) for node in others if node not in whole}
        return {str(node): made for node, made in whole.items()} | brief

    def records(self, features: Iterable[FeatureId]) -> dict[str, Any]:
        """The records of all features of a small suite, else the neighbourhood of some."""
        return self.everything() if self.is_small else self.neighbourhood(features)

    def everything(self) -> dict[str, Any]:
        """The records of all features."""
        sites = [(parse_site(site), width) for site, width in self.about["sites"].items()]
        names = (FeatureId(s.layer, s.module, i) for s, width in sites for i in range(width))
        return {str(name): self.record(name) for name in names}

    def search(self, text: str) -> list[str]:
        """The features that stand for a subject, or whose label of your own holds a text."""
        wanted = text.strip().lower()
        found = self.about["subjects"].get(wanted.replace(" ", "_"), [])
        own = [name for name, (label, _) in self.labels.items() if wanted in label.lower()]
        return [*dict.fromkeys(found + own)][:FOUND]

    def listed(self, view: str, layer: int, value: str) -> list[str]:
        """The features behind a bar of the overview, the first `FOUND` of them."""
        site = f"{layer}/res"
        some = slice(first := self.about["first"][site], first + self.about["sites"][site])
        values, names = _viewed(self.arrays, some)[view]
        return self._names(first + np.flatnonzero(values == names.index(value))[:FOUND])

    def _names(self, rows: np.ndarray) -> list[str]:
        sites, starts = [*self.about["first"]], np.array([*self.about["first"].values()])
        at = np.searchsorted(starts, rows, side="right") - 1
        return [f"{sites[i]}/{row - starts[i]}" for i, row in zip(at, rows, strict=True)]


def flow_index(
    suite: "Suite",
    activations: "FeatureActivations | None" = None,
    labels: "pd.DataFrame | None" = None,
    cache: Path | None = None,
) -> FlowIndex:
    """The index of a suite, made once and kept on disk.

    A suite of at most 100,000 features is read on the package's passages and labelled by the logit
    lens as a whole. Of a larger one there are contexts where `activations` are given, as `collect`
    gives them. `labels` (`feature`, `label`, `label_from`) are your own.
    """
    sites = sorted(suite.saes)
    widths = {site: suite.about(site, "width") for site in sites}
    prints = {str(site): suite.about(site, "fingerprint") for site in sites}
    small = sum(widths.values()) <= SMALL
    activations = None if small else activations
    key: dict[str, Any] = {"suite": suite.name, "saes": prints}
    key |= {"table": TABLE_VERSION, "draws": NULL_DRAWS, "model": ""}
    if small or activations is not None:
        key["model"] = suite.model.fingerprint
    if activations is not None:
        from pandas.util import hash_pandas_object

        of_tokens = hash_pandas_object(activations.tokens, index=False)
        key["tokens"] = int(of_tokens.sum()), sorted(map(str, activations.by_site))

    def make() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        table = best_five(suite, cache)
        about, arrays = index_matches(table, widths)
        about["links"] = {str(at): (feature_page(suite, f"{at}/0") or "")[:-1] for at in sites}
        if small or activations is not None:
            read, made = read_features(suite, table, activations, small)
            about, arrays = about | read, arrays | made
        return about, arrays

    index = FlowIndex(*cached_arrays("explorer", key, make, cache, VERSION))
    if labels is None:
        return index
    rows = labels[["feature", "label", "label_from"]].itertuples(index=False)
    return replace(index, labels={name: (label, source) for name, label, source in rows})


def best_five(suite: "Suite", cache: Path | None = None) -> "pd.DataFrame":
    """The matches that the explorer shows: five, or as many as the narrowest SAE has features."""
    widths = (suite.about(site, "width") for site in suite.saes)
    return match_table(suite, min(RANKS, *widths), cache=cache)


def index_matches(
    table: "pd.DataFrame", widths: Mapping[Site, int]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a match table says, as arrays: its matches by blocks, and of each feature its class."""
    starts = np.concatenate([[0], np.cumsum([*widths.values()])]).tolist()
    first = {str(site): start for site, start in zip(widths, starts, strict=False)}
    blocks, parts, start = {}, [], 0
    for names, part in table.groupby(["direction", "layer", "module"], observed=True):
        ranks = int(part["rank"].max())
        if (part["rank"].to_numpy().reshape(-1, ranks) != np.arange(1, ranks + 1)).any():
            raise ValueError(f"the matches of {names} are not in order of their ranks")
        null = round(float(part["null"].iloc[0]), 4)
        blocks[" ".join(map(str, names))] = {"start": start, "ranks": ranks, "null": null}
        other = "source" if names[0] == "backward" else "feature"
        parts.append([part[name].to_numpy() for name in (other, "score", "mutual")])
        start += len(part)
    columns = zip(("other", "score", "mutual"), zip(*parts, strict=True), strict=True)
    arrays = {name: np.concatenate(some) for name, some in columns}
    arrays["mutual"] = arrays["mutual"].astype(np.uint8)

    of_node = {"class": np.full(starts[-1], -1, np.int8), "born": np.zeros(starts[-1], np.int8)}
    of_node |= {name: np.full(starts[-1], -1, np.int16) for name in ("first", "last")}
    classes, spans = classify(feature_scores(table)), feature_lifespans(table)
    modules = dominant_module(classes).where(classes["class"] == "newborn")
    for rows, name, values in (
        (classes, "class", classes["class"].map(CLASSES.index)),
        (classes, "born", modules.map({name: i for i, name in enumerate(MODULES)}).fillna(0)),
        (spans, "first", spans["first"]),
        (spans, "last", spans["last"]),
    ):
        at = rows["layer"].map(lambda layer: first[f"{layer}/res"]) + rows["feature"]
        of_node[name][at] = values
    layers = [site.layer for site in widths if site.module == "res"]
    overview: dict[str, dict[str, list[int]]] = {}
    for layer in layers:
        some = slice(first[f"{layer}/res"], first[f"{layer}/res"] + widths[Site(layer, "res")])
        for view, (values, names) in _viewed(of_node, some).items():
            counts = np.bincount(values[values >= 0], minlength=len(names)).tolist()
            for name, count in zip(names, counts, strict=True):
                overview.setdefault(view, {}).setdefault(name, []).append(count)
    lines = {at: (f"forward {at} res", f"backward {at + 1} res") for at in layers}  # whoever chose
    nulls = {
        at: [blocks[key]["null"] for key in some if key in blocks] for at, some in lines.items()
    }
    chance = {at: some[0] if some else None for at, some in nulls.items()}
    about: dict[str, Any] = {"suite": str(table["suite"].iloc[0]), "first": first, "layers": layers}
    about |= {"sites": {str(site): width for site, width in widths.items()}, "blocks": blocks}
    about |= {"overview": overview, "chance": chance, "read": {}, "subjects": {}}
    return about, arrays | of_node


def _viewed(arrays: Mapping[str, np.ndarray], some: slice) -> dict[str, Any]:
    """The three views of the overview: of each feature the place of its bar in the bars' names."""
    lived = arrays["last"][some] - arrays["first"][some] + 1
    octave = np.where(arrays["first"][some] >= 0, np.log2(np.maximum(lived, 1)).astype(int), -1)
    spans = ["1", *(f"{2**i} to {2 ** (i + 1) - 1}" for i in range(1, 8))]
    born = arrays["born"][some].astype(int) - 1
    return {
        "class": (arrays["class"][some].astype(int), [*CLASSES]),
        "born": (born, [*MODULES[1:]]),
        "life": (octave, spans),
    }
