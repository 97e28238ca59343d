"""Pages that open with no network: an executed notebook, and the index of a run."""

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flowhelpers.core.files import write_text

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
# nbconvert's page without the scripts that it fetches (require.js, MathJax, Mermaid, widgets)
TEMPLATE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}
{%- if resources.plotly_js -%}<script>{{ resources.plotly_js }}</script>{%- endif -%}
{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""
# what the converter to MathML does not know, and what says the same
TEX = {"{aligned}": "{align*}", r"\operatorname*": r"\operatorname", r"\arg": r"\operatorname{arg}"}
VARIANT = re.compile(r'<(m[ion]) mathvariant="([\w-]+)">([^<]+)</\1>')
LOCAL = re.compile(r'<(a|span) data-to="([^"#]*)(#?[^"]*)"[^>]*>(.*?)</\1>', re.DOTALL)
INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: light-dark(#d9dce1, #3a3f47);
  --soft: light-dark(#f5f6f8, #1f2329); --dim: light-dark(#5c6470, #9aa3af) }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto;
  padding: 0 1.25rem }}
h1 {{ font-size: 1.5rem; margin: 0 }} h2 {{ font-size: 1.15rem; margin: 0; display: inline }}
section {{ border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.25rem;
  margin: 1.25rem 0 }}
.dim, th {{ color: var(--dim) }} .dim {{ margin: .25rem 0 .75rem; overflow-wrap: anywhere }}
.status {{ font-size: .8rem; font-weight: 600; border-radius: 1rem; padding: .1rem .6rem;
  margin-left: .6rem; color: #fff; background: #6b7280 }}
.finished {{ background: #15803d }} .failed {{ background: #b91c1c }}
.stopped {{ background: #b45309 }}
table {{ border-collapse: collapse; margin: .5rem 0 }}
th, td {{ text-align: left; font-weight: 400; padding: .15rem 1.25rem .15rem 0;
  vertical-align: top; font-variant-numeric: tabular-nums }} td {{ overflow-wrap: anywhere }}
pre {{ background: var(--soft); border-radius: .4rem; padding: .75rem; overflow-x: auto;
  font-size: .85rem }}
</style></head><body>
<h1>{title}</h1>
<p class="dim">{summary}</p>
{sections}
</body></html>
"""


def notebook_page(notebook: Path) -> Path:
    """Writes an executed notebook as a page beside it, its figures alive and its formulae drawn.

    Widgets are left out, for they are dead without a kernel. What links to a file is plain text
    until `link_pages` finds a page for it.
    """
    import nbformat
    from nbconvert.exporters.html import HTMLExporter
    from plotly.offline import get_plotlyjs

    book = nbformat.read(notebook, as_version=4)
    book.metadata.pop("widgets", None)
    figures = 0
    for cell in book.cells:
        outputs = [one for one in cell.get("outputs", []) if not _is_dead(one)]
        for data in (output.data for output in outputs if PLOTLY in output.get("data", {})):
            data["text/html"] = _figure(data.pop(PLOTLY))
            figures += 1
        if cell.cell_type == "code":
            cell.outputs = outputs
    exporter = HTMLExporter(raw_template=TEMPLATE)
    exporter.register_filter("markdown2html", _markdown)
    resources = {
        "metadata": {"name": notebook.parent.name},
        "plotly_js": get_plotlyjs() if figures else "",
    }
    html, _ = exporter.from_notebook_node(book, resources)
    page = notebook.with_suffix(".html")
    write_text(page, html)
    return page


def link_pages(pages: Mapping[str, Path]) -> None:
    """Lets the links from notebook to notebook lead to the run's `pages`, by notebook name."""
    for page in pages.values():

        def linked(found: re.Match[str], page: Path = page) -> str:
            _, file, place, text = found.groups()
            target = pages.get(file.rpartition("/")[2].removesuffix(".ipynb"))
            if target is None:
                return f'<span data-to="{file}{place}">{text}</span>'
            href = quote(Path(os.path.relpath(target, page.parent)).as_posix()) + place
            return f'<a data-to="{file}{place}" href="{href}">{text}</a>'

        html = page.read_text(encoding="utf-8")
        if (changed := LOCAL.sub(linked, html)) != html:
            write_text(page, changed)


def index_page(path: Path, summary: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes the page that leads to all that a run made.

    Args:
        path: Where to write it; the folders of the entries lie beside it.
        summary: A line on the run as a whole.
        entries: Of each notebook `name`, `status`, `seconds`, `parameters`, `folder` and `error`.
    """
    sections = "\n".join(_section(path.parent, entry) for entry in entries)
    title = escape(f"Run {path.stem}")
    write_text(path, INDEX.format(title=title, summary=escape(summary), sections=sections))


def duration(seconds: float) -> str:
    """A duration as hours, minutes and seconds: `0:03:20`."""
    return str(timedelta(seconds=round(seconds)))


def _is_dead(output: Any) -> bool:
    """Whether an output is a widget, or what a progress bar leaves when it is wiped out."""
    wiped = output.get("name") == "stderr" and not output.get("text", "").strip()
    return wiped or WIDGET in output.get("data", {})


def _figure(data: dict[str, Any]) -> str:
    import plotly.io

    return plotly.io.to_html(
        {key: data[key] for key in ("data", "layout", "frames") if key in data},
        config=data.get("config"),
        include_plotlyjs=False,
        full_html=False,
        default_height="450px",
        validate=False,
    )


def _markdown(source: str) -> str:
    """Markdown as HTML, with TeX as MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def _math(self, tex: str, display: str) -> str:
            for old, new in TEX.items():
                tex = tex.replace(old, new)
            if display == "block":
                tex = tex.replace(r"\max_", r"\max\limits_")
            try:
                return VARIANT.sub(_lettered, convert(tex, display=display))
            except Exception:  # a formula beyond the converter is shown as it was written
                return f"<code>{escape(tex)}</code>"

        def link(self, text: str, url: str, title: str | None = None) -> str:
            if re.match(r"#|\w+:", url):
                return super().link(text, url, title)
            return f'<span data-to="{escape(url)}">{text}</span>'

        def inline_math(self, body: str) -> str:
            return self._math(body, "inline")

        def block_math(self, body: str) -> str:
            return self._math(body, "block")

        def latex_environment(self, name: str, body: str) -> str:
            return self._math(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)


def _lettered(found: re.Match[str]) -> str:
    """A bold or double-struck letter as Unicode's own: browsers ignore what MathML says of it."""
    tag, variant, text = found.groups()
    style = variant.upper().replace("BOLD-", "BOLD ")
    letters = []
    for letter in unescape(text):
        kind = re.sub(r"\b(LATIN|GREEK|LETTER) ", "", unicodedata.name(letter, ""))
        for name in (f"MATHEMATICAL {style} {kind}", f"{style} {kind}"):  # the older have no prefix
            try:
                letters.append(unicodedata.lookup(name))
                break
            except KeyError:
                continue
        else:
            return found[0]
    return f"<{tag}>{''.join(letters)}</{tag}>"


def _section(root: Path, entry: Mapping[str, Any]) -> str:
    name, status = escape(entry["name"]), escape(entry["status"])
    parts = [f'<section><h2>{name}</h2><span class="status {status}">{status}</span>']
    took = [duration(entry["seconds"])] if entry["seconds"] is not None else []
    given = [f"{key}={value!r}" for key, value in entry["parameters"].items()]
    parts.append(f'<p class="dim">{escape(" · ".join(took + given) or "defaults")}</p>')
    if entry["error"]:
        parts.append(f"<pre>{escape(entry['error'])}</pre>")
    if entry["folder"]:
        folder = root / entry["folder"]
        parts += [_results(folder / "results.json"), _files(root, folder)]
    return "\n".join([*parts, "</section>"])


def _results(path: Path) -> str:
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return _table([(escape(name), escape(value)) for name, value in _flat(results)])


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The numbers of results.json as rows, what is nested under names with dots."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _files(root: Path, folder: Path) -> str:
    def link(file: Path, text: str) -> str:
        return f'<a href="{quote(file.relative_to(root).as_posix())}">{escape(text)}</a>'

    pages = [folder / name for name in ("notebook.html", "notebook.ipynb", "config.json")]
    rows = [("Notebook", " · ".join(link(page, page.name) for page in pages if page.exists()))]
    figures = sorted(folder.glob("figures/*.html"))
    rows.append(("Figures", " · ".join(link(figure, figure.stem) for figure in figures)))
    tables = sorted(folder.glob("tables/*.parquet"))
    rows.append(("Tables", " · ".join(link(t.with_suffix(".csv"), t.stem) for t in tables)))
    return _table([row for row in rows if row[1]])


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in rows)
    return f"<table>{cells}</table>" if rows else ""
