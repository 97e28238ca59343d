"""Occurrences of the planted suite, and what they are by hand."""

import numpy as np
import pandas as pd
import toys

from flowhelpers.core.features import MODULES, Site
from flowhelpers.groups.occurrences import Occurrences, complete_layers, find_occurrences
from flowhelpers.groups.shares import group_transition
from flowhelpers.matching.table import match_table

BY_BITS: dict[tuple[int, ...], str] = {
    (0, 0, 0): "From nowhere",
    (1, 0, 0): "From RES",
    (0, 1, 0): "From MLP",
    (0, 0, 1): "From ATT",
    (1, 1, 0): "From RES & MLP",
    (1, 0, 1): "From RES & ATT",
    (0, 1, 1): "From MLP & ATT",
    (1, 1, 1): "From RES & MLP & ATT",
}


def table_of(matches: dict[tuple[int, str, int], list[tuple[int, float]]]) -> pd.DataFrame:
    """A match table from the sources and scores of each layer, module and feature, best first."""
    rows = [
        (layer, module, feature, rank, source, score)
        for (layer, module, feature), chosen in matches.items()
        for rank, (source, score) in enumerate(chosen, 1)
    ]
    columns = ["layer", "module", "feature", "rank", "source", "score"]
    table = pd.DataFrame(rows, columns=columns)
    source_layer = table["layer"] - (table["module"] == "res")
    return table.assign(
        source_layer=source_layer, suite="planted", method="cosine", direction="backward"
    )


def planted_occurrences(tokens: int = 40) -> tuple[Occurrences, set[tuple[int, int, int, str]]]:
    """Occurrences in the planted suite at random activity, and what they are by hand."""
    rng = np.random.default_rng(0)
    codes = {
        site: (rng.random((tokens, len(rows))) * (rng.random((tokens, len(rows))) < 0.4)).tolist()
        for site, rows in toys.planted_directions().items()
    }
    activity = toys.planted_activations(codes)
    activity.tokens["dataset"] = ["one" if text < 2 else "two" for text in activity.tokens["text"]]
    found = find_occurrences(match_table(toys.bare_suite(), k=1), activity, incomplete=True)
    expected = set()
    for layer in (1, 2):
        for token in range(tokens):
            for feature, coordinate in enumerate(toys.COORDINATE[layer]):
                if not codes[Site(layer, "res")][token][feature]:
                    continue
                module = "mlp" if coordinate < toys.MODULE else "att"
                bits = {
                    "res": codes[Site(layer - 1, "res")][token][toys.RES_FROM[layer][feature]],
                    module: codes[Site(layer, module)][token][coordinate % toys.MODULE],
                }
                key = tuple(int(bits.get(m, 0) > 0) for m in MODULES)
                expected.add((layer, feature, token, BY_BITS[key]))
    return found, expected


def transition_of(found: Occurrences) -> np.ndarray:
    """The transition between groups over all layers that have all three sites."""
    table = complete_layers(found.table)
    features = table.groupby(["layer", "feature"]).ngroup().to_numpy()
    return group_transition(features, table["group"].cat.codes.to_numpy())
