"""The explorer: click through the flow of a model, in JupyterLab or in one page on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
from plotly.offline import get_plotlyjs

from flowhelpers import explorer_index
from flowhelpers.activations.sparse import FeatureActivations, collect
from flowhelpers.core.features import FeatureId, check_choice
from flowhelpers.core.files import writable_folder, write_text
from flowhelpers.core.progress_bar import live
from flowhelpers.explorer_index import FlowIndex, best_five, flow_index
from flowhelpers.explorer_page import FILES, explorer_page, pack
from flowhelpers.explorer_reading import direct_matches, written
from flowhelpers.flow.graph import flow_graph, labelled
from flowhelpers.flow.lifespans import flow_by_layer
from flowhelpers.flow.plots import births_and_deaths, flow_picture
from flowhelpers.interventions.edits import rescale
from flowhelpers.labels.describe import describe_features
from flowhelpers.steering.plans import make_plan
from flowhelpers.steering.sweeps import steer
from flowhelpers.suites.model import editing, token_strings

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from flowhelpers.suites.load import Suite

SAMPLES = 3  # texts of each kind that the card writes
ASKED = (
    "start",
    "plotly",
    "keep",
    "near",
    "search",
    "listed",
    "direct",
    "writes",
    "change",
    "steer",
)


def explore(
    suite: Suite,
    feature: FeatureId | str | None = None,
    *,
    labels: pd.DataFrame | None = None,
    activations: FeatureActivations | None = None,
) -> Explorer | go.Figure:
    """A view of a suite's flow to click through; without a live front end, a still picture.

    It starts at a feature, or at the whole model. The features and matches are put into one file in
    the cache, once (`flow_index`). `labels` are your own, as `read_labels` and `neuronpedia_labels`
    give them; `activations`, as `collect` gives them, are where a suite of over 100,000 features
    has its contexts from.

    The view's `feature` is the one at its centre, and `pinned` the set that was put together by
    hand: `make_plan(suite, view.pinned, 2.0)` steers with it.
    """
    start = "" if feature is None else str(suite.feature(feature))
    if live():
        return Explorer(suite, flow_index(suite, activations, labels), start)
    table = best_five(suite)
    note = f"suite {suite.name} · a still picture: run this cell in JupyterLab to click through it"
    if not start:
        return births_and_deaths(flow_by_layer(table), note)
    graph = flow_graph(suite, start, table)
    told = describe_features(suite, graph.nodes["feature"], activations, user_labels=labels)
    return flow_picture(labelled(graph, told), note)


def write_page(
    suite: Suite,
    features: Sequence[FeatureId | str],
    path: Path,
    labels: pd.DataFrame | None = None,
    writes: bool = False,
) -> str:
    """Writes the explorer of a suite as a page, and says what it holds.

    A suite of at most 100,000 features is held whole. Of a larger one there is what is near the
    `features`, with what these write only if `writes` says so, for it takes the model.

    Raises:
        ValueError: If a large suite is without features, one does not exist, or the page would be
            over 15 MB.
    """
    named = check_page(suite, features, path)
    index = flow_index(suite, labels=labels)
    records, kept = index.records(named), {}
    for feature in [] if index.is_small else named:
        if feature.module == "res":
            far = records[str(feature)]["direct"] = direct_matches(suite, feature, kept)
            others = [FeatureId(layer, "res", i) for layer, i, _ in far]
            records = {str(each): index.record(each, False) for each in others} | records
    if writes and not index.is_small:
        for name, tokens in written(suite, map(index.feature, records)).items():
            records[name]["writes"] = tokens
    page = explorer_page(index, records, named)
    write_text(path, page)
    held = "all" if index.is_small else f"what is near {', '.join(map(str, named))}, not all,"
    return f"{path}: {held} of {suite.name}, {len(page.encode()) / 1e6:.1f} MB"


def check_page(suite: Suite, features: Sequence[FeatureId | str], path: Path) -> list[FeatureId]:
    """The features that a page is of; what cannot be written is refused before minutes of work."""
    named = suite.features(features)
    widths = (suite.row.features or suite.about(site, "width") for site in suite.saes)
    if not named and sum(widths) > explorer_index.SMALL:
        raise ValueError(
            f"{suite.name} is too large for one page: name the features whose neighbourhood it"
            " shall hold, such as 12/res/4230"
        )
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected a file, such as {path / 'flow.html'}")
    writable_folder(path.parent)
    return named


class Explorer(anywidget.AnyWidget):
    """The view in JupyterLab. Records and answers are messages, which no notebook keeps."""

    _esm = FILES / "explorer.js"
    _css = FILES / "explorer.css"

    def __init__(self, suite: Suite, index: FlowIndex, feature: str = "") -> None:
        super().__init__()
        self.suite, self.index = suite, index
        self.feature, self.pinned, self.records, self.kept = feature, [], {}, {}
        self.on_msg(self._answer)

    def _answer(self, _: Any, message: dict[str, Any], __: list[Any]) -> None:
        """Answers by the method of what the view asks; what cannot be done is told in its words."""
        try:
            check_choice("request", message["ask"], ASKED)
            reply = getattr(self, f"_{message['ask']}")(**message["given"])
        except Exception as error:  # or the view would wait for ever
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            reply = {"error": f"{kind}{error}"}
        buffers = [reply.pop("bytes")] if "bytes" in reply else None
        self.send(reply | {"id": message["id"]}, buffers)

    def _start(self) -> dict[str, Any]:
        asked = [self.index.feature(self.feature)] if self.feature else []
        if not self.records or not self.index.is_small:
            self.records = self.index.records(asked)
        return {"bytes": pack(self.index, self.records, asked)}

    def _plotly(self) -> dict[str, Any]:
        return {"bytes": get_plotlyjs().encode()}

    def _keep(self, feature: str, pinned: list[str]) -> dict[str, Any]:
        self.feature, self.pinned = feature, pinned
        return {}

    def _near(self, feature: str) -> dict[str, Any]:
        return {"records": self.index.neighbourhood([self.index.feature(feature)])}

    def _search(self, text: str) -> dict[str, Any]:
        return self._brief(self.index.search(text))

    def _listed(self, view: str, layer: int, value: str) -> dict[str, Any]:
        return self._brief(self.index.listed(view, layer, value))

    def _brief(self, names: Sequence[str]) -> dict[str, Any]:
        features = map(self.index.feature, names)
        return {"records": {str(each): self.index.record(each, False) for each in features}}

    def _direct(self, feature: str) -> dict[str, Any]:
        return {"direct": direct_matches(self.suite, self.index.feature(feature), self.kept)}

    def _writes(self, features: Sequence[str]) -> dict[str, Any]:
        """What features write, if the model is at hand: a large one takes minutes to load."""
        at_hand = not callable(self.suite.source) or "model" in vars(self.suite)
        return {"writes": written(self.suite, map(self.index.feature, features)) if at_hand else {}}

    def _change(
        self, features: Sequence[str], r: float, text: str, watched: Sequence[str]
    ) -> dict[str, Any]:
        """Activations along a sentence, before and after features are rescaled by r."""
        if not text.strip():
            raise ValueError("no sentence to read: type one")
        edited = self._some(features)
        by_site = {at: [f for f in edited if f.site == at] for at in {f.site for f in edited}}
        edits = [rescale(self.suite.sae(site), some, r) for site, some in by_site.items()]
        seen = self._some(watched)
        sites = {feature.site for feature in seen}
        before = collect(self.suite, [text], sites)
        with editing(self.suite.model, edits):
            after = collect(self.suite, [text], sites)
        rows = [
            {"feature": str(f), "before": before.of(f).tolist(), "after": after.of(f).tolist()}
            for f in seen
        ]
        tokens = token_strings(self.suite.model, before.tokens["token"].tolist())
        return {"tokens": tokens, "watched": rows}

    def _steer(
        self, features: Sequence[str], prompt: str, strategy: str, strength: float, seed: int
    ) -> dict[str, Any]:
        """Steered and unsteered texts of the same random streams."""
        chosen = self._some(features)
        lacking = any(self.suite.sae(each.site).thresholds is None for each in chosen)
        unit = "unit" if lacking else "theta"
        plan = make_plan(self.suite, chosen, strength, strategy=strategy, unit=unit)
        plans = {"unsteered": None, "steered": plan}
        texts = steer(self.suite, plans, prompt, SAMPLES, seed=seed, show_progress=False)
        of_unit = {"unit": "vectors of norm 1", "theta": "each feature's threshold"}[unit]
        told = f"features added: {len(plan.steps)}, in units of {of_unit}"
        return {"about": told} | {n: texts[texts["plan"] == n]["text"].tolist() for n in plans}

    def _some(self, names: Sequence[str]) -> list[FeatureId]:
        if not names:
            raise ValueError("no feature is chosen: pin some first")
        return self.suite.features(names)
