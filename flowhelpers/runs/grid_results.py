"""What a grid found: one table, and a page with each number of its runs as a small panel."""

import json
from collections.abc import Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

from flowhelpers.core.pages import figure_html, page
from flowhelpers.core.storage import write_bytes
from flowhelpers.runs.execute import Job

if TYPE_CHECKING:
    import pandas as pd

ABOUT = ("notebook", "folder", "status", "seconds")  # a run, in the table of a grid
PANELS, ACROSS, HEIGHT = 30, 3, 190  # at most, in a row, and the pixels of one
TICKS = 12  # values of a parameter that are all written at the axis


def grid_table(fs: Any, root: str, jobs: Sequence[Job]) -> "pd.DataFrame":
    """One row a run: `notebook`, `folder`, `status`, `seconds`, its parameters, and its numbers.

    The numbers are those of `results.json`, of what is nested by names joined by a dot; one that
    has a parameter's name is called `result.<name>`. Parameters that are no scalars are JSON.
    """
    import pandas as pd

    names = dict.fromkeys(name for job in jobs for name in job.parameters)
    rows = [{name: getattr(job, name) for name in ABOUT} | job.parameters for job in jobs]
    table = pd.DataFrame(rows, columns=[*ABOUT, *names])
    table["notebook"] = [job.notebook.stem for job in jobs]
    for name in names:
        table[name] = [json.dumps(v) if isinstance(v, list | dict) else v for v in table[name]]
    paths = [f"{root}/{job.folder}/results.json" for job in jobs]
    found = fs.cat(paths, on_error="omit")
    results = [json.loads(found.get(path, "{}")) for path in paths]
    numbers = pd.json_normalize(results).select_dtypes("number")
    clash = {name: f"result.{name}" for name in numbers.columns if name in table.columns}
    return pd.concat([table, numbers.rename(columns=clash)], axis=1)


def write_table(fs: Any, root: str, jobs: Sequence[Job]) -> "pd.DataFrame":
    """Writes `grid_table` as grid.csv and grid.parquet, and its page grid.html; returns it."""
    table, parquet = grid_table(fs, root, jobs), BytesIO()
    table.to_parquet(parquet)
    write_bytes(fs, f"{root}/grid.csv", table.to_csv(index=False).encode())
    write_bytes(fs, f"{root}/grid.parquet", parquet.getvalue())
    parameters = list(dict.fromkeys(name for job in jobs for name in job.parameters))
    write_bytes(fs, f"{root}/grid.html", grid_page(table, parameters).encode())
    return table


def grid_page(table: "pd.DataFrame", parameters: Sequence[str]) -> str:
    """The page of a table of `grid_table`; it opens with no network."""
    finished = table[table["status"] == "finished"]
    figures = [grid_figure(runs, parameters) for _, runs in finished.groupby("notebook")]
    drawn = [figure_html(figure, script=not at) for at, figure in enumerate(filter(None, figures))]
    shown = table[[*ABOUT, *parameters]].copy()
    shown["folder"] = [
        f'<a href="{escape(name)}/notebook.html">{escape(name)}</a>' if status != "waiting" else ""
        for name, status in zip(table["folder"], table["status"], strict=True)
    ]
    texts = shown.drop(columns="folder").select_dtypes(exclude="number").columns
    shown[texts] = shown[texts].map(lambda value: escape(str(value)))
    title = f"A grid of {len(table):,} runs, {len(finished):,} finished"
    files = '<p><a href="grid.csv">grid.csv</a> and grid.parquet hold all numbers.</p>'
    listed = shown.to_html(index=False, escape=False, border=0, float_format="{:.4g}".format)
    return page(title, "\n".join([f"<h1>{title}</h1>", files, *drawn, listed]))


def grid_figure(runs: "pd.DataFrame", parameters: Sequence[str]) -> Any:
    """Small multiples of a notebook's runs: a panel for each number that differs between them.

    Along x is the parameter of most values, colours tell the one of second most, symbols the third;
    of further ones the hover tells. None if no parameter or no number differs.
    """
    import plotly.express as px

    from flowhelpers.core.figures import finish

    runs = runs.fillna(dict.fromkeys(parameters, "none"))
    varied = sorted(parameters, key=lambda name: -runs[name].nunique())
    varied = [name for name in varied if runs[name].nunique() > 1]
    numbers = [
        name
        for name in runs.columns
        if name not in {*ABOUT, *parameters} and runs[name].nunique() > 1
    ]
    if not (varied and numbers):
        return None
    kept, (along, colour, symbol) = numbers[:PANELS], (*varied, None, None)[:3]
    long = runs.melt([*parameters], kept, "number", "value").dropna(subset="value")
    long[varied[1:]] = long[varied[1:]].astype(str)  # a colour, a symbol for each value
    rows = -(-len(kept) // ACROSS)
    figure = px.scatter(
        long, x=along, y="value", color=colour, symbol=symbol, facet_col="number",
        facet_col_wrap=ACROSS, hover_data=varied, labels={"value": ""},
        facet_row_spacing=0.4 / rows, category_orders={"number": kept}, facet_col_spacing=0.07,
        opacity=0.6,
    )  # fmt: skip
    figure.update_yaxes(matches=None, showticklabels=True).update_xaxes(showticklabels=True)
    if runs[along].nunique() <= TICKS:
        figure.update_xaxes(tickvals=runs[along].unique())
    left = f"; {len(numbers) - PANELS} more in the table" if len(numbers) > PANELS else ""
    by = f" by {along}" + (f", coloured by {colour}" if colour else "")
    by += f", with a symbol for {symbol}" if symbol else ""
    title = f"{runs['notebook'].iloc[0]}: {len(runs)} runs{by}"
    return finish(figure, title, f"Numbers that differ between the runs{left}.",
                  160 + HEIGHT * rows)  # fmt: skip
