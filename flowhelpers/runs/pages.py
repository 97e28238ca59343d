"""Pages that open with no network: an executed notebook, and the index of a run."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from flowhelpers.core.files import read_json, write_text

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
MADE = {"Notebook": "notebook.*", "Figures": "figures/*.html", "Tables": "tables/*.csv"}
INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Run {{ name }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; overflow-wrap: anywhere }
section { border: 1px solid #888; border-radius: .6rem; padding: 1rem 1.25rem; margin: 1.25rem 0 }
th, td { text-align: left; vertical-align: top } th { white-space: nowrap; font-weight: normal }
.finished { color: #15803d } .failed { color: #b91c1c } .stopped { color: #b45309 }
</style></head><body>
<h1>Run {{ name }}</h1>
<p>{{ summary }}</p>
{%- for entry in entries %}
<section><h2>{{ entry.name }}</h2>
<p><strong class="status {{ entry.status }}">{{ entry.status }}</strong> {{ entry.took }}
{%- for key, value in entry.parameters.items() %} · {{ key }}={{ value }}{% endfor %}</p>
{%- if entry.error %}<pre>{{ entry.error }}</pre>{% endif %}
<table>
{%- for key, value in entry.results.items() %}
<tr><th>{{ key }}</th><td>{{ "%.4g" | format(value) if value is float else value }}</td></tr>
{%- endfor %}
{%- for kind, files in entry.made.items() if files %}
<tr><th>{{ kind }}</th><td>
{%- for file in files %}
<a href="{{ file.relative_to(root).as_posix() | urlencode }}">{{ file.name }}</a>
{%- endfor %}
</td></tr>
{%- endfor %}
</table></section>
{%- endfor %}
</body></html>
"""


def notebook_page(notebook: Path) -> None:
    """Writes an executed notebook as a page beside it, its figures alive and its formulae drawn.

    Widgets are left out, for they are dead without a kernel, and links to files are plain text.
    """
    import nbformat
    from nbconvert.exporters.html import HTMLExporter
    from plotly.offline import get_plotlyjs

    book = nbformat.read(notebook, as_version=4)
    book.metadata.pop("widgets", None)
    resources = {"metadata": {"name": notebook.parent.name}, "plotly_js": ""}
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if not _is_dead(output)]
        for output in cell.outputs:
            if PLOTLY in output.get("data", {}):
                output.data["text/html"] = _figure(output.data.pop(PLOTLY))
                resources["plotly_js"] = get_plotlyjs()
    exporter = HTMLExporter(raw_template=TEMPLATE)
    exporter.register_filter("markdown2html", _markdown)
    write_text(notebook.with_suffix(".html"), exporter.from_notebook_node(book, resources)[0])


def index_page(path: Path, summary: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes the page that leads to all that a run made.

    The folders of the entries lie beside it. An entry has the `name`, `status`, `seconds`,
    `parameters`, `folder` and `error` of a notebook.
    """
    import pandas as pd
    from jinja2 import Template

    shown = []
    for entry in entries:
        folder = path.parent / (entry["folder"] or "none yet")
        numbers = folder / "results.json"
        found = read_json(numbers) if numbers.exists() else {}
        made = {kind: sorted(folder.glob(files)) for kind, files in MADE.items()}
        took = "" if entry["seconds"] is None else duration(entry["seconds"])
        (results,) = pd.json_normalize([found]).to_dict("records")
        shown.append({**entry, "took": took, "made": made, "results": results})
    page = Template(INDEX, autoescape=True)
    write_text(path, page.render(root=path.parent, name=path.stem, summary=summary, entries=shown))


def duration(seconds: float) -> str:
    """A duration as hours, minutes and seconds: `0:03:20`."""
    return str(timedelta(seconds=round(seconds)))


def _is_dead(output: Any) -> bool:
    """Whether an output is a widget, or what a progress bar leaves when it is wiped out."""
    wiped = output.get("name") == "stderr" and not output.get("text", "").strip()
    return wiped or WIDGET in output.get("data", {})


def _figure(data: dict[str, Any]) -> str:
    import plotly.io

    figure = {key: data[key] for key in ("data", "layout", "frames") if key in data}
    options = {"include_plotlyjs": False, "full_html": False, "validate": False}
    return plotly.io.to_html(figure, data.get("config"), default_height="450px", **options)


def _markdown(source: str) -> str:
    """Markdown as HTML, with TeX as MathML, which browsers draw by themselves."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def link(self, text: str, url: str, title: str | None = None) -> str:
            return super().link(text, url, title) if re.match(r"#|\w+:", url) else text

        def inline_math(self, body: str) -> str:
            return _mathml(body, "inline")

        def block_math(self, body: str) -> str:
            return _mathml(body.replace(r"\max_", r"\max\limits_"), "block")

    return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)


def _mathml(tex: str, display: str) -> str:
    """A formula as MathML; browsers ignore its `mathvariant`, so bold letters are Unicode's own."""
    from latex2mathml.converter import convert

    def letter(found: re.Match[str]) -> str:
        style = {"bf": "BOLD", "bb": "DOUBLE-STRUCK"}[found[1]]
        name = re.sub("LATIN |LETTER ", "", unicodedata.name(found[2]))
        return unicodedata.lookup(f"MATHEMATICAL {style} {name}")

    try:
        tex = re.sub(r"\\math(bf|bb) *\{?(\w)\}?", letter, tex)
        return convert(tex.replace(r"\arg", r"\operatorname{arg}"), display=display)
    except Exception:  # a formula beyond the converter is shown as it was written
        return f"<code>{escape(tex)}</code>"
