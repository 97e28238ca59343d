"""Pages that open with no network: an executed notebook, and the index of a run."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from flowhelpers.core.files import read_json, write_text
from flowhelpers.core.pages import figure_html, figure_title, page, page_file
from flowhelpers.runs.lab import CHOICES, WIDGET
from flowhelpers.runs.run import settled_choices

PLOTLY = "application/vnd.plotly.v1+json"
CITED = r"CHOICES (\d+(?:(?:,| and| to|–|-) ?\d+)*)"
NAMED = re.compile(r"# papermill_description=(\w+)")
TELLS = re.compile(r"\b(answer|Finding|conclude)\(")  # code that holds what a reader is to guess
LARGEST = 400_000  # bytes of a figure that the index shows


def notebook_page(
    notebook: Path, pages: Mapping[str, str] | None = None, index: str | None = None
) -> None:
    """Writes an executed notebook as a page beside it, its figures alive and its formulae drawn.

    Widgets are left out, for they are dead without a kernel. Links to other notebooks lead to their
    pages, those to CHOICES.md to the rows at the end; links to other files are plain text. Code is
    folded where its cell hides it, or says the answer to a question.

    Args:
        pages: The addresses of the pages of a run, from this one, by the notebooks' names in order.
        index: The address of the page that leads to them all.
    """
    import nbformat
    from nbconvert.exporters.html import HTMLExporter
    from plotly.offline import get_plotlyjs

    book, pages = nbformat.read(notebook, as_version=4), pages or {}
    book.metadata.pop("widgets", None)
    title = _title(book.cells) or notebook.parent.name
    resources = {"metadata": {"name": title}, "plotly_js": "", "around": []}
    resources["style"] = page_file("style.css") + page_file("notebook.css")
    resources["around"] = _around(notebook, pages, index)
    cited = "".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        if named := NAMED.match(cell.source):
            cell.metadata["named"] = named[1].replace("_", " ")
        if TELLS.search(cell.source):
            cell.metadata.setdefault("jupyter", {})["source_hidden"] = True
        cell.outputs = [output for output in cell.outputs if not _is_dead(output)]
        for data in (output.data for output in cell.outputs if "data" in output):
            cited += data.get("text/markdown", "")
            if PLOTLY in data:
                data["text/html"] = figure_html(data.pop(PLOTLY))
                resources["plotly_js"] = resources["plotly_js"] or get_plotlyjs()
            elif "text/html" in data:  # text stands at the left of its cell, numbers at the right
                data["text/html"] = re.sub(r"<td>(?=[^<]*[^\W\d_])", '<td class="text">',
                                           data["text/html"])  # fmt: skip
    resources["choices"] = {n: _markdown(settled_choices()[n]) for n in _cited(cited)}
    exporter = HTMLExporter(raw_template=page_file("notebook.html.j2"))
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    exporter.register_filter("markdown2html", lambda source: _markdown(source, pages))
    text = exporter.from_notebook_node(book, resources)[0]
    write_text(notebook.with_suffix(".html"), text.replace("<!--contents-->", _contents(text)))


def _title(cells: Iterable[Any]) -> str | None:
    """The heading of a notebook, as text."""
    sources = ("".join(each["source"]) for each in cells if each["cell_type"] == "markdown")
    found = re.search(r"^# (.+)", next(iter(sources), ""), re.MULTILINE)
    return re.sub(r"[*`$\\]", "", found[1]).strip() if found else None


def _around(notebook: Path, pages: Mapping[str, str], index: str | None) -> list[tuple]:
    """Links to the index of a run and to the notebooks before and after: word, address, name."""
    names, own = [*pages], [f"../{notebook.parent.name}/" in address for address in pages.values()]
    place = own.index(True) if True in own else None
    links = [("All notebooks", index, "")] if index else []
    for word, at in (("← ", -1), ("→ ", 1)):
        if place is not None and 0 <= place + at < len(names):
            name = names[place + at]
            links.append((word, pages[name], name.replace("_", " ")))
    return links


def _contents(text: str) -> str:
    """The contents of a page, from its headings."""
    headings = re.findall(r'<h2 id="([^"]*)">(.*?)<a class="anchor-link"', text)
    items = "".join(f'<li><a href="#{at}">{name}</a></li>' for at, name in headings)
    return f'<details class="contents" open><summary>Contents</summary><ul>{items}</ul></details>'


def _cited(text: str) -> list[int]:
    """The rows of CHOICES.md that a text names; `9–11` are three."""
    numbers: set[int] = set()
    for found in re.findall(CITED, text):
        for first, last in re.findall(r"(\d+)(?: ?(?:[–-]|to) ?(\d+))?", found):
            numbers |= {*range(int(first), int(last or first) + 1)}
    return sorted(numbers & settled_choices().keys())


def index_page(path: Path, summary: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes the page that tells what a run found, and leads to all that it made.

    The folders of the entries lie beside it. An entry has the `name`, the path `notebook`,
    `status`, `seconds`, `parameters`, `folder` and `error` of a notebook. Its findings are those of
    `results.json`, its picture the figure that this names as `picture`, else a flow graph, else its
    first figure.
    """
    from jinja2 import Template

    entries = [*entries]
    pages = {entry["name"]: f"{entry['folder']}/notebook.html" for entry in entries}
    pages = {name: page for name, page in pages.items() if (path.parent / page).exists()}
    shown = [_entry(path.parent, entry, pages) for entry in entries]
    title = f"What {'these notebooks' if len(shown) != 1 else 'this notebook'} found"
    template = Template(page_file("index.html.j2"), autoescape=True)
    body = template.render(title=title, summary=summary, entries=shown)
    scripts = [each["picture"]["script"] for each in shown if "html" in each["picture"]]
    head = f'\n<script src="{escape(scripts[0])}"></script>' if scripts else ""
    write_text(path, page(f"{title}: {path.stem}", body, head))


def _entry(root: Path, entry: Mapping[str, Any], pages: Mapping[str, str]) -> dict[str, Any]:
    """What the index shows of a notebook; addresses are relative to the index."""
    folder = root / (entry["folder"] or "none yet")
    results, book = folder / "results.json", Path(entry["notebook"])
    found = read_json(results) if results.exists() else {}
    title = _title(read_json(book)["cells"]) if book.is_file() else None
    made, files = sorted(folder.glob("figures/*.json"), key=lambda file: file.stat().st_mtime), {}
    figures = [(file, read_json(file)) for file in made if file.stat().st_size < 50 * LARGEST]
    for kind in ("tables/*.csv", "results.json", "config.json", "notebook.ipynb"):
        files |= {file.name: _at(root, file) for file in sorted(folder.glob(kind))}
    told = {"claim", "ours", "control"}  # the words of a finding that hold markup
    return {
        **entry,
        "title": title or entry["name"],
        "took": "" if entry["seconds"] is None else duration(entry["seconds"]),
        "page": pages.get(entry["name"]),
        "findings": [
            {key: _line(text, pages) if key in told else text for key, text in each.items()}
            for each in found.get("findings", [])
        ],
        "picture": _picture(root, figures, found.get("picture")),
        "figures": [
            {"page": _at(root, file.with_suffix(".html")), "title": figure_title(figure)}
            for file, figure in figures
        ],
        "files": files,
    }


def _picture(
    root: Path, figures: list[tuple[Path, dict[str, Any]]], named: str | None
) -> dict[str, Any]:
    """The figure that stands for a notebook in the index, which does not move; none if too large.

    Flow graphs have a light one that was drawn without a browser.
    """
    small = [each for each in figures if each[0].stat().st_size < LARGEST]
    chosen = [each for each in figures if each[0].stem == named]
    chosen += [each for each in figures if each[0].with_suffix(".svg").exists()] + small
    if not chosen:
        return {}
    file, figure = chosen[0]
    about = {"title": figure_title(figure), "page": _at(root, file.with_suffix(".html"))}
    if (svg := file.with_suffix(".svg")).exists():
        return about | {"svg": _at(root, svg)}
    script = _at(root, file.with_name("plotly.min.js"))
    return about | {"html": figure_html(figure, staticPlot=True), "script": script}


def _at(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()


def duration(seconds: float) -> str:
    """A duration as hours, minutes and seconds: `0:03:20`."""
    return str(timedelta(seconds=round(seconds)))


def _is_dead(output: Any) -> bool:
    """Whether an output is a widget, or what a progress bar leaves when it is wiped out."""
    wiped = output.get("name") == "stderr" and not output.get("text", "").strip()
    return wiped or WIDGET in output.get("data", {})


def _markdown(source: str, pages: Mapping[str, str] | None = None) -> str:
    """Markdown as HTML, with TeX as MathML, which browsers draw by themselves.

    Links to notebooks lead to their `pages`; CHOICES that are named, to the rows of the page.
    """
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    def choice(found: re.Match[str]) -> str:
        about = settled_choices().get(int(found[1]), "")
        return f'<a href="#choice-{found[1]}" title="{escape(about)}">{found[0]}</a>'

    class Renderer(IPythonRenderer):
        def link(self, text: str, url: str, title: str | None = None) -> str:
            if url.endswith(CHOICES):
                linked = re.sub(r"(?:CHOICES )?(\d+)", choice, text)
                return f'<a href="#choices">{text}</a>' if linked == text else linked
            name, _, place = url.rpartition("/")[2].partition("#")
            if name.endswith(".ipynb") and (known := (pages or {}).get(name[:-6])):
                return super().link(text, known + ("#" + place if place else ""), title)
            return super().link(text, url, title) if re.match(r"#|\w+:", url) else text

        def inline_math(self, body: str) -> str:
            return _mathml(body, "inline")

        def block_math(self, body: str) -> str:
            return _mathml(body.replace(r"\max_", r"\max\limits_"), "block")

    drawn = MarkdownWithMath(renderer=Renderer(escape=False)).render(source)
    return re.sub(CITED, lambda all: re.sub(r"(?:CHOICES )?(\d+)", choice, all[0]), drawn)


def _line(text: str, pages: Mapping[str, str]) -> str:
    """Markdown of one paragraph as HTML; `<` is a sign, as in `<bos>`."""
    drawn = _markdown(text.replace("<", "&lt;"), pages).strip()
    return drawn.removeprefix("<p>").removesuffix("</p>")


def _mathml(tex: str, display: str) -> str:
    """A formula as MathML; browsers ignore its `mathvariant`, so bold letters are Unicode's own."""
    from latex2mathml.converter import convert

    def letter(found: re.Match[str]) -> str:
        style = {"bf": "BOLD", "bb": "DOUBLE-STRUCK"}[found[1]]
        name = re.sub("LATIN |LETTER ", "", unicodedata.name(found[2] or found[3]))
        return unicodedata.lookup(f"MATHEMATICAL {style} {name}")

    try:
        tex = re.sub(r"\\math(bf|bb) *(?:\{(\w)\}|(\w))", letter, tex)
        return convert(tex.replace(r"\arg", r"\operatorname{arg}"), display=display)
    except Exception:  # a formula beyond the converter is shown as it was written
        return f"<code>{escape(tex)}</code>"
