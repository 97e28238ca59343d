"""One page with every number that the paper prints, and ours beside it.

It reads the tables of runs, the latest of each notebook. Of a suite other than the paper's the
numbers are another model's, and what the paper finds is looked for instead, each finding beside its
control.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhelpers.core.files import read_json
from flowhelpers.groups.occurrences import GROUPS
from flowhelpers.paper import (
    FIGURE_13,
    TABLE_1,
    TABLE_5_MLP,
    TABLE_5_RES,
    TABLE_5_SCORES,
    TABLE_5_SUITE,
    figure_14,
)

if TYPE_CHECKING:
    import pandas as pd

# Figure 23: of permutations, by where thresholds are folded; the lowest and highest printed value.
FIGURE_23 = {"inference": (0.783, 0.786), "no": (0.747, 0.751)}
COLUMNS = ["where", "what", "paper", "ours", "low", "high", "difference", "verdict"]
COLUMNS += ["notebook", "table"]
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>The paper's numbers</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem } table { border-collapse: collapse }
td, th { padding: .15rem .7rem; text-align: left; border-bottom: 1px solid #8884 }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.inside, .same, .holds { color: #15803d } .outside, .other, .fails { color: #b91c1c }
</style></head><body>
<h1>The paper's numbers, and ours</h1>
<p>Suites: {{ suites }}. {{ counts }}</p>
{%- if findings %}
<h2>What the paper finds, looked for in this model</h2>
<table><tr><th>finding</th><th>ours</th><th>control</th><th></th><th>where</th></tr>
{%- for row in findings %}
<tr><td>{{ row.finding }}</td><td class="n">{{ row.ours }}</td><td class="n">{{ row.control }}</td>
<td class="{{ row.verdict }}">{{ row.verdict }}</td><td>{{ row.link | safe }}</td></tr>
{%- endfor %}
</table>
{%- endif %}
<h2>Every printed number</h2>
<table><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{%- for row in numbers %}
<tr>{% for name in columns %}
<td{% if row[name] is number %} class="n"{% endif %}{% if name == "verdict" %} class="{{ row[name].split(" ")[0] }}"{% endif %}>
{%- if name == "table" %}{{ row.link | safe }}{% else %}{{ "%.3f" | format(row[name]) if row[name] is float else row[name] }}{% endif %}</td>
{%- endfor %}</tr>
{%- endfor %}
</table></body></html>
"""


class Runs:
    """The tables of the latest run of each notebook below a folder."""

    def __init__(self, folder: Path) -> None:
        self.by_notebook: dict[str, Path] = {}
        for path in sorted(folder.glob("*/config.json")):
            self.by_notebook[read_json(path)["notebook"]] = path.parent
        if not self.by_notebook:
            raise FileNotFoundError(f"{folder} holds no run: expected folders with a config.json")
        self.root = folder

    def suite(self, notebook: str) -> str:
        """The suite of a notebook's run, without its variant; empty if it was not run."""
        folder = self.by_notebook.get(notebook)
        return str(read_json(folder / "config.json")["suite"]).split("@")[0] if folder else ""

    def table(self, notebook: str, name: str) -> "pd.DataFrame | None":
        """A table of a notebook's run, if it was written."""
        import pandas as pd

        path = self.path(notebook, name)
        return pd.read_parquet(path) if path and path.exists() else None

    def path(self, notebook: str, name: str) -> Path | None:
        """Where a table of a notebook's run lies."""
        folder = self.by_notebook.get(notebook)
        return folder / "tables" / f"{name}.parquet" if folder else None


def printed_numbers() -> Iterator[dict[str, Any]]:
    """Every number that the paper prints: where, what, its value, and where ours stands.

    Ours is `column` of the row of a notebook's `table` that has the values in `row`; its interval
    is in the columns `low` and `high`, or `<column>_low` and so on.
    """
    for method, (change, success) in TABLE_1.items():
        row = {"method": method, "targets": "all of them"}
        at = {"where": "Table 1", "notebook": "04_deactivation", "table": "table_1", "row": row}
        yield at | {"what": f"{method}: activation change", "paper": change, "column": "change"}
        yield at | {"what": f"{method}: success", "paper": success, "column": "success"}
    row = {"method": "top-1 cosine", "targets": "all of them"}
    at = {"notebook": "04_deactivation", "table": "table_1", "row": row, "column": "n"}
    yield at | {"where": "A.2", "what": "targets with a single source", "paper": 1894}
    for (first, second), share in _pairs(FIGURE_13):
        row = {"first": first, "second": second}
        at = {"where": "Figure 13", "notebook": "03_group_statistics", "table": "figure_13"}
        yield at | {"what": f"{first} → {second}", "paper": share, "row": row, "column": "share"}
    for name, table, keys in (
        ("Figure 14", figure_14(), ["score", "first", "second"]),
        ("Figure 4", paper_figure_4().assign(unit="occurrences"), ["module", "pair", "score", "unit"]),
    ):
        for record in table.to_dict("records"):
            row = {key: record[key] for key in keys}
            what = ", ".join(value for key, value in row.items() if key != "unit")
            at = {"where": name, "notebook": "03_group_statistics", "row": row, "column": "share"}
            yield at | {
                "table": name.lower().replace(" ", "_"),
                "what": what,
                "paper": record["paper"],
            }
    nodes = [("res", layer, index) for layer, index in enumerate(TABLE_5_RES)]
    for module, layer, index in [*nodes, *(("mlp", at, i) for at, i in TABLE_5_MLP.items())]:
        at = {
            "where": "Table 5",
            "notebook": "02_flow_graphs",
            "table": "table_5",
            "column": "ours",
        }
        row = {"layer": layer, "module": module}
        yield at | {"what": f"{layer}/{module}", "paper": f"{layer}/{module}/{index}", "row": row}
    for (source, target), score in TABLE_5_SCORES.items():
        at = {"where": "Appendix E", "notebook": "02_flow_graphs", "table": "table_5"}
        yield at | {
            "what": f"{source} → {target}", "paper": score, "row": {"paper": str(source)},
            "column": "our_score",
        }  # fmt: skip
    at = {"where": "Figure 23", "notebook": "08_transcoders", "column": "explained"}
    row = {"prediction": "matches"}
    yield at | {"what": "best cosine", "paper": 0.791, "table": "one_pair", "row": row}
    for folded, (low, high) in FIGURE_23.items():
        for weights in ("decoder", "encoder", "both"):
            what, row = (
                f"permutation, {weights}, folded: {folded}",
                {"weights": weights, "folded": folded},
            )
            yield at | {"what": what, "paper": low, "most": high, "table": "figure_23", "row": row}


def _pairs(matrix: tuple[tuple[float, ...], ...]) -> Iterator[tuple[tuple[str, str], float]]:
    for first, shares in zip(GROUPS, matrix, strict=True):
        for second, share in zip(GROUPS, shares, strict=True):
            if first != second:
                yield (first, second), share


def compare_numbers(folder: Path) -> "pd.DataFrame":
    """Every printed number with ours: one row a number, columns `COLUMNS`.

    Verdicts: `inside our interval` or `outside` (without an interval, to the digits printed), `same`
    or `other` for a feature, `not run`, and `another model` for a suite other than the paper's.
    """
    import pandas as pd

    runs, rows = Runs(folder), []
    for number in printed_numbers():
        notebook, name, column = number["notebook"], number["table"], number["column"]
        table = runs.table(notebook, name)
        found = (
            None
            if table is None
            else table[(table[[*number["row"]]] == pd.Series(number["row"])).all(axis=1)]
        )
        record = {key: number[key] for key in ("where", "what", "paper", "notebook", "table")}
        if found is None or found.empty or column not in found:
            rows.append(record | {"verdict": "not run"})
            continue
        first = found.iloc[0]
        low, high = (first.get(f"{column}_{end}", first.get(end)) for end in ("low", "high"))
        record |= {"ours": first[column], "low": low, "high": high}
        if runs.suite(notebook) != TABLE_5_SUITE:
            rows.append(record | {"verdict": "another model"})
        elif isinstance(number["paper"], str):
            rows.append(
                record | {"verdict": "same" if first[column] == number["paper"] else "other"}
            )
        else:
            least, most = number["paper"], number.get("most", number["paper"])
            ends = (
                (low, high) if low is not None else (first[column] - 0.005, first[column] + 0.005)
            )
            is_inside = ends[0] <= most and least <= ends[1]
            verdict = "inside our interval" if is_inside else "outside"
            rows.append(record | {"difference": first[column] - least, "verdict": verdict})
    return pd.DataFrame(rows).reindex(columns=COLUMNS)
