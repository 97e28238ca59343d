"""One page with every number that the paper prints, and ours beside it.

It reads the tables of runs, the latest of each notebook. Of a suite other than the paper's the
numbers are another model's, and what the paper finds is looked for instead, each finding beside its
control.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhelpers.core.files import read_json, write_text
from flowhelpers.core.pages import page
from flowhelpers.paper import is_of_paper
from flowhelpers.paper_numbers import printed_numbers
from flowhelpers.runs.parameters import plan

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["where", "kind", "what", "paper", "most", "ours", "low", "high", "difference", "verdict"]
COLUMNS += ["notebook", "table"]
PAGE = """<h1>The paper's numbers, and ours</h1>
<p>Of {total} numbers: {counts}. Compared is the latest finished run of each notebook:</p>
{runs}
<h2>What the paper finds, looked for in these runs</h2>
<p>A finding holds where it stands out from its control, intervals included; where it says
<i>control</i>, the comparison is ours.</p>
{findings}
<h2>Every printed number</h2>
<p>Where the paper prints a range, it runs from <i>paper</i> to <i>most</i>; <i>low</i> and
<i>high</i> are the ends of our 95&nbsp;% interval. What is <i>computed</i> is the mean of numbers
that are printed. Numbers of another model are not compared.</p>
{numbers}
<h2>Axes of figures that print no numbers</h2>
{axes}
"""


def latest_runs(folder: Path) -> dict[str, Path]:
    """The folder of each notebook's latest run, of a finished one where there is one.

    A FileNotFoundError if there is none.
    """
    configs = sorted(folder.glob("*/config.json"), key=lambda path: (_is_finished(path), path))
    if not configs:
        raise FileNotFoundError(f"{folder} holds no run: expected folders with a config.json")
    return {read_json(path)["notebook"]: path.parent for path in configs}


def _is_finished(config: Path) -> bool:
    return (config.parent / "results.json").exists()


def unlike_preset(config: "dict[str, Any]") -> list[str]:
    """The parameters of a run that are not what the preset `paper` has for its suite."""
    suite, used = str(config.get("suite")), config.get("parameters", {})
    (settings,) = plan([config["notebook"]], {"suite": suite}, "paper").values()
    return sorted(name for name in settings.keys() & used.keys() if settings[name] != used[name])


def compare_numbers(folder: Path) -> "pd.DataFrame":
    """Every printed number with ours: one row a number, columns `COLUMNS`.

    Verdicts: `inside our interval` or `outside`, where what is printed counts to half of its last
    digit; for an axis `inside the axis` or `outside the axis`; for a feature `same` or `other`;
    `not run`; and `another model` for another suite.
    """
    import pandas as pd

    runs, parts = latest_runs(folder), []
    for printed in printed_numbers():
        keys = [c for c in printed.numbers if c not in ("paper", "most")]
        run = runs.get(printed.notebook, folder)
        path, column = run / "tables" / f"{printed.table}.parquet", printed.column
        ours = pd.DataFrame(columns=[*keys, "ours", "low", "high"])
        if path.exists():
            table = pd.read_parquet(path).rename(columns={"paper": "paper_feature"})
            table = printed.rows(table) if printed.rows else table
            table = table.drop(columns=[] if column == "ours" else "ours", errors="ignore")
            ends = {f"{column}_{end}": end for end in ("low", "high")} | {column: "ours"}
            ours = table.rename(columns=ends).reindex(columns=ours.columns)
        part = printed.numbers.merge(ours, "left", on=keys)
        part["what"] = column + ": " + part[keys].astype(str).agg(", ".join, axis=1)
        is_run = printed.notebook in runs
        suite = str(read_json(run / "config.json").get("suite")) if is_run else ""
        of_paper = is_of_paper(suite) | (part["ours"].notna() & ("suite" in keys))
        part = part.assign(is_run=is_run, of_paper=of_paper)
        about = {name: getattr(printed, name) for name in ("where", "kind", "notebook", "table")}
        parts.append(part.assign(**about))
    numbers = pd.concat(parts, ignore_index=True)
    numbers["verdict"] = [_verdict(row) for row in numbers.to_dict("records")]
    is_number = numbers["verdict"].isin(["inside our interval", "outside"])
    ours, theirs = (pd.to_numeric(numbers[c], errors="coerce") for c in ("ours", "paper"))
    return numbers.assign(difference=(ours - theirs).where(is_number))[COLUMNS]


def _verdict(row: "dict[str, Any]") -> str:
    import pandas as pd

    if row["is_run"] and not row["of_paper"]:
        return "another model"
    if pd.isna(row["ours"]):
        return "not run"
    if isinstance(row["paper"], str):
        return "same" if row["ours"] == row["paper"] else "other"
    least, most = row["paper"], row["paper"] if pd.isna(row["most"]) else row["most"]
    low, high = (row["ours"] if pd.isna(row[end]) else row[end] for end in ("low", "high"))
    is_axis = row["kind"] == "axis"
    half = 0.0 if is_axis else _half_digit(least)
    inside, outside = (
        ("inside the axis", "outside the axis") if is_axis else ("inside our interval", "outside")
    )
    return inside if low <= most + half and least - half <= high else outside


def _half_digit(printed: float) -> float:
    """Half of the last digit of what is printed: shares have two or three, counts are exact."""
    if printed >= 2:
        return 0.0
    return 0.0005 if len(f"{printed:g}") == len("0.123") else 0.005


def _above_chance(summary: "pd.DataFrame") -> tuple[float, float, bool]:
    ours = float(summary["above_res"].mean())
    return ours, 0.001, ours > 0.5


def _nowhere(shares: "pd.DataFrame") -> tuple[float, float, bool]:
    row = shares.set_index("group").loc["From nowhere"]
    return row["share"], row["by_chance"], bool(row["high"] < row["by_chance"])


def _ao_above_ib(shares: "pd.DataFrame") -> tuple[float, float, bool]:
    once = shares[shares["unit"] == "unique features"]
    return once["AO"].mean(), once["IB"].mean(), bool((once["difference_low"] > 0).all())


def _ahead(
    names: str, ours: str, control: str, value: str, low: str, high: str
) -> Callable[["pd.DataFrame"], tuple[float, float, bool]]:
    """Whether one name's `value` is above the control's in every layer, intervals apart."""

    def found(table: "pd.DataFrame") -> tuple[float, float, bool]:
        first, second = (table[table[names] == n].set_index("layer") for n in (ours, control))
        apart = first[low] > second[high].reindex(first.index)
        return first[value].mean(), second[value].mean(), bool(apart.all())

    return found


ABLATION = "success", "success_low", "success_high"
BRIDGE = "explained", "low", "high"


def _random_features(means: "pd.DataFrame") -> tuple[float, float, bool]:
    best = means[means["strategy"].isin(["single", "cumulative"])]["score_low"].max()
    rivals = means[means["strategy"].str.startswith("random")]
    ours = means[means["strategy"].isin(["single", "cumulative"])]["score"].max()
    return ours, rivals["score"].max(), bool(best > rivals["score_high"].max())


def _out_of_distribution(gaps: "pd.DataFrame") -> tuple[float, float, bool]:
    python = gaps[gaps["dataset"].isin(["python", "python-github-code"])].set_index("method")
    ours = python.loc["pearson top-1"]
    return ours["difference"], ours["difference"] - ours["beyond"], bool(ours["beyond_low"] > 0)


def _spreading(pooled: "pd.DataFrame") -> tuple[float, float, bool]:
    same_norm = pooled.set_index("comparison").loc["many layers, same norm"]
    return same_norm["difference"], 0.0, bool(same_norm["difference_low"] > 0)


def _promotion(verdicts: "pd.DataFrame") -> tuple[float, float, bool]:
    above = verdicts[verdicts["rival"] == "random features"]
    return above["difference"].mean(), 0.0, bool((above["difference_low"] > 0).mean() > 0.5)


# What the paper finds: claim, where, and the notebook's table that shows it, with its control.
FINDINGS: list[tuple[str, str, str, str, Callable[["pd.DataFrame"], tuple[float, float, bool]]]] = [
    ("of the features of a layer, most have a match before it above 99.9 % of chance", "3.3",
     "01_matching", "summary", _above_chance),
    ("fewer active features are 'From nowhere' than with predecessors read at other tokens", "5.1",
     "03_group_statistics", "shares_overall", _nowhere),
    ("groups differ in a module's score where it is active in one of them", "Figure 4",
     "03_group_statistics", "ao_against_ib", _ao_above_ib),
    ("on Python, which Pearson did not read, it loses more predecessors than cosine", "C.4",
     "03_group_statistics", "dataset_gaps", _out_of_distribution),
    ("removing the best match deactivates more than a random one of the five best", "Figure 6",
     "04_deactivation", "control", _ahead("method", "top-1", "random", *ABLATION)),
    ("removing the best match deactivates more than an active feature of equal norm", "control",
     "04_deactivation", "control", _ahead("method", "top-1", "another active feature", *ABLATION)),
    ("suppression by the flow graph beats that by random features", "control",
     "05_theme_suppression", "random_features", _random_features),
    ("most themes are promoted more by their features than by random ones", "Figure 11",
     "06_theme_activation", "verdicts", _promotion),
    ("steering many layers beats one layer, at equal norm, over all themes", "5.3",
     "06_theme_activation", "pooled", _spreading),
    ("matches carry activations to the next layer better than shuffled ones", "appendix F",
     "08_transcoders", "neighbours", _ahead("kind", "matches", "shuffled", *BRIDGE)),
    ("matches foretell the next layer better than the features' own directions do", "control",
     "08_transcoders", "neighbours", _ahead("kind", "matches", "copied SAE", *BRIDGE)),
]  # fmt: skip


def findings(folder: Path) -> "pd.DataFrame":
    """What the paper finds, with the control of each, and whether it holds in these runs."""
    import pandas as pd

    runs, rows = latest_runs(folder), []
    for claim, where, notebook, name, look in FINDINGS:
        path = runs.get(notebook, folder) / "tables" / f"{name}.parquet"
        row = {"finding": claim, "where": where, "notebook": notebook, "table": name}
        if path.exists():
            try:
                ours, control, holds = look(pd.read_parquet(path))
            except KeyError:  # the run was asked for other methods
                ours = control = float("nan")
            row |= {"ours": ours, "control": control}
            if not pd.isna([ours, control]).any():
                row["verdict"] = "holds" if holds else "not seen"
        rows.append({"verdict": "not run"} | row)
    columns = ["finding", "where", "ours", "control", "verdict", "notebook", "table"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _link(address: str, text: str) -> str:
    return f'<a href="{address}">{text}</a>'


def write_page(folder: Path) -> Path:
    """Writes `paper.html` and `paper.csv` below a folder of runs; returns the page's path."""
    import pandas as pd

    runs, numbers, found = latest_runs(folder), compare_numbers(folder), findings(folder)
    numbers.to_csv(folder / "paper.csv", index=False)
    for table in (numbers, found):
        table["table"] = [
            _link(f"{runs[n].name}/tables/{t}.csv", t) if n in runs else t
            for n, t in zip(table["notebook"], table["table"], strict=True)
        ]
        table["notebook"] = [
            _link(f"{runs[n].name}/notebook.html", n) if n in runs else n for n in table["notebook"]
        ]
    configs = [read_json(run / "config.json") for run in runs.values()]
    rows = [(c["notebook"], c.get("suite"), ", ".join(unlike_preset(c))) for c in configs]
    about = pd.DataFrame(sorted(rows), columns=["run", "suite", "not as in the preset paper"])
    axes = numbers["kind"] == "axis"
    verdicts = numbers.loc[~axes, "verdict"].value_counts()
    words = {
        "runs": about, "findings": found, "numbers": numbers[~axes], "axes": numbers[axes],
        "counts": ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items()),
        "total": str((~axes).sum()),
    }  # fmt: skip
    look = {"index": False, "na_rep": "", "escape": False, "border": 0}
    body = PAGE
    for word, shown in words.items():
        if isinstance(shown, pd.DataFrame):
            shown = shown.to_html(**look, float_format="{:.3f}".format)
        body = body.replace(f"{{{word}}}", shown)
    write_text(folder / "paper.html", page("The paper's numbers", body))
    return folder / "paper.html"
