"""Planted numbers reach the figures of notebook 01, in the panel of their module."""

import numpy as np
import pandas as pd
import pytest

from flowhelpers.matching import plots


def test_boxes_are_the_quantiles_of_each_module_beside_its_null():
    s = np.linspace(0, 1, 101)
    table = pd.DataFrame({"layer": 1, "s_res": s, "s_mlp": s / 2, "null_res": 0.3, "null_mlp": 0.2})
    first = table.assign(layer=0, s_res=np.nan, null_res=np.nan)
    figure = plots.scores_by_layer(pd.concat([first, table]), "toy")
    boxes = {trace.name: trace for trace in figure.data if trace.type == "box"}
    assert list(boxes) == ["s(R)", "s(M)"]
    assert list(boxes["s(R)"].x) == [1]
    assert list(boxes["s(M)"].q3) == pytest.approx([0.375, 0.375])
    for name, null in (("s(R)", [0.3]), ("s(M)", [0.2, 0.2])):
        [line] = [t for t in figure.data if t.type == "scatter" and t.xaxis == boxes[name].xaxis]
        assert list(line.y) == null


def test_shares_are_drawn_by_module_and_by_class():
    shares = pd.DataFrame({"layer": [0, 1], "above_res": [np.nan, 0.9], "above_att": [0.2, 0.4]})
    lines = {trace.name: trace for trace in plots.share_above_null(shares, "toy").data}
    assert list(lines) == ["s(R)", "s(A)"]
    assert list(lines["s(A)"].y) == [0.2, 0.4]
    classes = pd.DataFrame({"layer": [0, 1], "translated": 0.1, "processed": 0.2})
    classes = classes.assign(newborn=[0.3, 0.1], unexplained=[0.4, 0.6])
    bars = {bar.name: list(bar.y) for bar in plots.classes_by_layer(classes, "toy").data}
    assert bars["newborn"] == [0.3, 0.1]


def test_agreement_is_the_same_read_either_way_and_chance_shares_its_bins():
    rows = [("a", "b", "res", 10, 0.25), ("a", "c", "res", 10, 0.5), ("b", "c", "res", 10, 0.75)]
    table = pd.DataFrame(rows, columns=["first", "second", "module", "features", "same"])
    [square] = plots.agreement_map(table, "toy").data
    assert list(square.x) == list(square.y) == ["a", "b", "c"]
    assert np.array_equal(square.z, square.z.T, equal_nan=True)
    assert (square.z[0, 1], square.z[2, 0]) == (0.25, 0.5)
    cosines = pd.DataFrame({"found": [0.5, 0.9, 0.9], "chance": [0.1, 0.2, np.nan]})
    figure = plots.against_chance(cosines, 0.3, "title", "toy")
    bars = {bar.name: bar for bar in figure.data}
    assert list(bars["found"].x) == [0.5, 0.9, 0.9]
    assert bars["found"].xbins == bars["chance"].xbins
    assert figure.layout.shapes[0].x0 == 0.3
