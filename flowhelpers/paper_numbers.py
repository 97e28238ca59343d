"""Every number that the paper prints, and in which notebook's table ours stands."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowhelpers.across.phases import PHASES
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.matching.matchers import WEIGHTS
from flowhelpers.paper import (
    FIGURE_13,
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    TABLE_5_MLP,
    TABLE_5_RES,
    TABLE_5_SCORES,
    figure_14,
    paper_figure_4,
)

if TYPE_CHECKING:
    import pandas as pd

# Figure 23: of permutations, by where thresholds are folded; the lowest and highest printed value.
# Which bar has which value is our reading: the paper's text does not say.
FIGURE_23 = dict.fromkeys(("inference", "both"), (0.783, 0.786))
FIGURE_23 |= dict.fromkeys(("no", "search"), (0.747, 0.751))
FIGURE_23_BIAS = (0.631, 0.669)  # with the encoder's bias folded in the search
FIGURE_23_COSINE = 0.791
# What the axes of figures that print no numbers run from and to.
AXES = [
    ("Figure 6", "04_deactivation", "figure_6", "success", 0.3, 0.7),
    ("Figure 6", "04_deactivation", "figure_6", "change", 0.2, 1.0),
    ("Figure 7", "04_deactivation", "figure_7", "change", -2.0, 1.0),
    ("Figure 7", "04_deactivation", "figure_7", "loss_change", 0.0, 0.001),
    ("Figure 9", "05_theme_suppression", "means", "behavioral", 0.0, 0.5),
    ("Figure 9", "05_theme_suppression", "means", "coherence", 0.2, 0.8),
    ("Figure 10", "05_theme_suppression", "figure_10", "chosen_on", 0.5, 0.7),
    ("Figure 11", "06_theme_activation", "figure_11", "score", 0.0, 0.6),
    ("Figure 11", "06_theme_activation", "figure_11", "behavioral", 0.0, 0.8),
    ("Figure 24", "08_transcoders", "figure_24", "explained", 0.5, 0.8),
]
BEST_LAYER = 5  # of Figure 17 b, where no seed lies (C.3)
TARGETS = 13_106  # features whose predecessors were removed (Figure 15)
SEARCHED = 1_894  # of them, those of Table 1


@dataclass(frozen=True)
class Printed:
    """Numbers that the paper prints in one place, and where ours stand.

    `numbers` has the `paper`'s value, the highest (`most`) where it prints a range, and the columns
    by which a row of the notebook's table is found; ours are in its `column`. `rows` makes such
    rows of a table that does not hold them. `kind` is `printed`, `computed` of what is printed,
    `printed, our reading` where the paper does not say what a number belongs to, or `axis`.
    """

    where: str
    notebook: str
    table: str
    column: str
    numbers: "pd.DataFrame"
    rows: "Callable[[pd.DataFrame], pd.DataFrame] | None" = None
    kind: str = "printed"


def printed_numbers() -> list[Printed]:
    """Every number that the paper prints, in the order of its tables and figures."""
    groups, removal = "03_group_statistics", "04_deactivation"
    flows, suppression, activation = "02_flow_graphs", "05_theme_suppression", "06_theme_activation"
    figure_4 = paper_figure_4().assign(unit="occurrences")  # 87 % alone is printed, in its caption
    return [
        *(Printed("Table 1", removal, "table_1", c, _table_1(c)) for c in ("change", "success")),
        Printed("5.2", removal, "table_1", "n", _table_1("n")),
        _seeds("Table 2", suppression, "seeds", TABLE_2),
        _seeds("Table 3", activation, "features", TABLE_3.values()),
        _seeds("Table 4", activation, "figure_17_seeds", TABLE_4),
        Printed("Table 5", flows, "table_5", "ours", _table_5()),
        Printed("Appendix E", flows, "table_5", "our_score", _scores()),
        Printed("Figure 4", groups, "figure_4", "share", figure_4, kind="computed"),
        Printed("Figure 13", groups, "figure_13", "share", _figure_13()),
        Printed("Figure 14", groups, "figure_14", "share", figure_14()),
        Printed("Figure 15", removal, "targets", "targets", _one("targets", TARGETS), _count),
        Printed("Figure 17 (b)", activation, "figure_17", "layer", *_best_layer()),
        *(
            Printed("5.1, appendix D", "07_across_models", "phases", end, _phases(end), _of_groups)
            for end in ("first", "last")
        ),
        Printed("Figure 23", "08_transcoders", "one_pair", "explained", _cosine()),
        Printed(
            *("Figure 23", "08_transcoders", "figure_23", "explained", _figure_23()),
            kind="printed, our reading",
        ),
        *(
            Printed(where, notebook, table, column, *_axis(column, low, high), kind="axis")
            for where, notebook, table, column, low, high in AXES
        ),
    ]


def _one(what: str, paper: float | str) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame({"of": [what], "paper": [paper]})


def _table_1(column: str) -> "pd.DataFrame":
    import pandas as pd

    single = pd.DataFrame(TABLE_1, ["change", "success"]).T.rename_axis("method").reset_index()
    single = single.assign(n=SEARCHED, targets="all of them").rename(columns={column: "paper"})
    return single[["method", "targets", "paper"]].head(1 if column == "n" else 3)


def _seeds(where: str, notebook: str, table: str, features: Iterable[str]) -> Printed:
    import pandas as pd

    numbers = pd.DataFrame({"of": list(features)}).assign(paper=lambda t: t["of"])

    def used(found: "pd.DataFrame") -> "pd.DataFrame":
        there = numbers["of"].isin(set(found["feature"]))
        return numbers.assign(feature=numbers["of"].where(there, "none"))

    return Printed(where, notebook, table, "feature", numbers, used)


def _table_5() -> "pd.DataFrame":
    import pandas as pd

    nodes = [(layer, "res", index) for layer, index in enumerate(TABLE_5_RES)]
    nodes += [(layer, "mlp", index) for layer, index in TABLE_5_MLP.items()]
    rows = [(layer, module, f"{layer}/{module}/{index}") for layer, module, index in nodes]
    return pd.DataFrame(rows, columns=["layer", "module", "paper"])


def _scores() -> "pd.DataFrame":
    import pandas as pd

    steps = [(str(source), score) for (source, _), score in TABLE_5_SCORES.items()]
    return pd.DataFrame(steps, columns=["paper_feature", "paper"])


def _figure_13() -> "pd.DataFrame":
    import pandas as pd

    pairs = [(a, b, FIGURE_13[i][j]) for i, a in enumerate(GROUPS) for j, b in enumerate(GROUPS)]
    return pd.DataFrame(pairs, columns=["first", "second", "paper"]).query("first != second")


def _cosine() -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame({"prediction": ["matches"], "paper": [FIGURE_23_COSINE]})


def _figure_23() -> "pd.DataFrame":
    import pandas as pd

    rows = [
        (w, folded, *(FIGURE_23_BIAS if w == "all" and folded in ("search", "both") else ends))
        for folded, ends in FIGURE_23.items()
        for w in WEIGHTS
    ]
    return pd.DataFrame(rows, columns=["weights", "folded", "paper", "most"])


def _count(targets: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame({"of": ["targets"], "targets": [len(targets)]})


def _best_layer() -> "tuple[pd.DataFrame, Callable[[pd.DataFrame], pd.DataFrame]]":
    def best(means: "pd.DataFrame") -> "pd.DataFrame":
        steered = means.dropna(subset=["layer"])
        return steered.nlargest(1, "score").assign(of="best layer")

    return _one("best layer", BEST_LAYER), best


def _phases(end: str) -> "pd.DataFrame":
    import pandas as pd

    rows = [
        (suite, i, part[end == "last"])
        for suite, parts in PHASES.items()
        for i, part in enumerate(parts, 1)
    ]
    return pd.DataFrame(rows, columns=["suite", "phase", "paper"])


def _of_groups(phases: "pd.DataFrame") -> "pd.DataFrame":
    groups = phases[phases["of"] == "groups"]
    return groups.assign(suite=groups["suite"].str.split("@").str[0])


def _axis(
    column: str, low: float, high: float
) -> "tuple[pd.DataFrame, Callable[[pd.DataFrame], pd.DataFrame]]":
    import pandas as pd

    ends = ["lowest", "highest"]

    def extremes(table: "pd.DataFrame") -> "pd.DataFrame":
        return pd.DataFrame({"of": ends, column: [table[column].min(), table[column].max()]})

    return pd.DataFrame({"of": ends}).assign(paper=low, most=high), extremes
