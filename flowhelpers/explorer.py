"""The explorer: click through the flow of a model, in JupyterLab or in one page on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets

from flowhelpers.activations.sparse import FeatureActivations, collect
from flowhelpers.core.features import FeatureId
from flowhelpers.core.files import write_text
from flowhelpers.core.progress_bar import live
from flowhelpers.flow.graph import flow_graph, labelled
from flowhelpers.flow.index import FlowIndex, best_five, flow_index
from flowhelpers.flow.lifespans import flow_by_layer
from flowhelpers.flow.page import FILES, explorer_page, pack
from flowhelpers.flow.plots import births_and_deaths, flow_picture
from flowhelpers.flow.reading import WRITTEN, direct_matches
from flowhelpers.interventions.edits import rescale
from flowhelpers.labels.describe import describe_features, read_labels, top_logit_tokens
from flowhelpers.steering.plans import make_plan
from flowhelpers.steering.sweeps import steer
from flowhelpers.suites.load import load_suite
from flowhelpers.suites.model import editing, token_strings

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from flowhelpers.suites.load import Suite

SAMPLES = 3  # texts of each kind that the card writes


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
    if live():
        index = flow_index(suite, activations, labels)
        return Explorer(suite, index, "" if feature is None else str(index.feature(feature)))
    table = best_five(suite)
    note = f"suite {suite.name} · a still picture: run this cell in JupyterLab to click through it"
    if feature is None:
        return births_and_deaths(flow_by_layer(table), note)
    graph = flow_graph(suite, feature, table)
    told = describe_features(suite, graph.nodes["feature"], activations, user_labels=labels)
    return flow_picture(labelled(graph, told), note)


def write_page(
    name: str, features: Sequence[str], path: Path, label_file: Path | None = None
) -> str:
    """Writes the explorer of a suite as a page, and says what it holds."""
    suite = load_suite(name)
    own = None if label_file is None else read_labels(label_file, suite)
    index = flow_index(suite, labels=own)
    page = explorer_page(index, features)
    write_text(path, page)
    held = "all features" if index.is_small else f"what is near {', '.join(features)}, not all"
    return f"{path}: {held} of {suite.name}, {len(page.encode()) / 1e6:.1f} MB"


class Explorer(anywidget.AnyWidget):
    """The view in JupyterLab. Records and answers are messages, which no notebook keeps."""

    _esm = FILES / "explorer.js"
    _css = FILES / "explorer.css"
    feature = traitlets.Unicode().tag(sync=True)
    pinned = traitlets.List(traitlets.Unicode()).tag(sync=True)

    def __init__(self, suite: Suite, index: FlowIndex, feature: str = "") -> None:
        super().__init__(feature=feature)
        self.suite, self.index = suite, index
        self.on_msg(self._answer)

    def _answer(self, _: Any, message: dict[str, Any], __: list[Any]) -> None:
        """Answers what the view asks for; what cannot be done is told in its words."""
        try:
            ask = {"start": self._start, "plotly": self._plotly, "near": self._near}
            ask |= {"search": self._search, "listed": self._listed, "direct": self._direct}
            ask |= {"writes": self._writes, "change": self._change, "steer": self._steer}
            reply = ask[message["ask"]](**message["given"])
        except (ValueError, OSError, MemoryError, FloatingPointError) as error:
            reply = {"error": str(error)}
        buffers = [reply.pop("bytes")] if "bytes" in reply else None
        self.send(reply | {"id": message["id"]}, buffers)

    def _start(self) -> dict[str, Any]:
        asked = [self.index.feature(self.feature)] if self.feature else []
        whole = self.index.is_small
        records = self.index.everything() if whole else self.index.neighbourhood(asked)
        return {"bytes": pack(self.index, records, asked)}

    def _plotly(self) -> dict[str, Any]:
        from plotly.offline import get_plotlyjs

        return {"bytes": get_plotlyjs().encode()}

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
        asked = self.index.feature(feature)
        return {"direct": direct_matches(self.suite, asked.site, asked.index)}

    def _writes(self, feature: str) -> dict[str, Any]:
        return {"writes": top_logit_tokens(self.suite, feature, WRITTEN)["token"].tolist()}

    def _change(
        self, features: Sequence[str], r: float, text: str, watched: Sequence[str]
    ) -> dict[str, Any]:
        """Activations along a sentence, before and after features are rescaled by r."""
        if not text.strip():
            raise ValueError("no sentence to read: type one")
        edited = self._some(features)
        sites = {feature.site for feature in edited}
        by_site = [[feature for feature in edited if feature.site == site] for site in sites]
        edits = [rescale(self.suite.sae(some[0].site), some, r) for some in by_site]
        seen = self._some(watched)
        before = collect(self.suite, [text], {feature.site for feature in seen})
        with editing(self.suite.model, edits):
            after = collect(self.suite, [text], {feature.site for feature in seen})
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
        told = f"{len(plan.steps)} features are added, in units of {of_unit}"
        return {"about": told} | {n: texts[texts["plan"] == n]["text"].tolist() for n in plans}

    def _some(self, names: Sequence[str]) -> list[FeatureId]:
        if not names:
            raise ValueError("no feature is chosen: pin some first")
        return self.suite.features(names)
