"""Pages as a browser draws them: on a narrow screen, in the dark, without a network."""

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import plotly.graph_objects as go
import pytest
from browsers import Pages
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import expect

from flowhelpers.core.figures import dress
from flowhelpers.runs.pages import PLOTLY, index_page, notebook_page
from flowhelpers.runs.run import Run

NARROW = {"width": 420, "height": 800}
TEXT = "# Planted: a title\n\nProse ([CHOICES 27](../flowhelpers/CHOICES.md)).\n\n## A part"
SUBTITLE = " · ".join(["a long subtitle that goes on and on"] * 6)
FINDING = {"claim": "It holds.", "ours": "We see 3.", "control": "Chance gives 1."}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of a run of one notebook, with its page and a figure."""
    root = tmp_path_factory.mktemp("pages")
    run = Run(root / "run")
    run.folder.mkdir()
    bars = go.Figure(go.Bar(x=[f"a long name {n}" for n in range(12)], y=[*range(12)]))
    figure = run.figure("bars", dress(bars, "Planted bars", SUBTITLE, 400))
    run.results({"findings": [FINDING | {"verdict": "holds here"}]})
    bundle = {PLOTLY: json.loads(str(figure.to_json()))}
    table = pd.DataFrame({"text": ["word " * 40], "n": [1]}).to_html()
    outputs = [new_output("display_data", data=data) for data in (bundle, {"text/html": table})]
    hidden = new_code_cell("# papermill_description=Hidden\n1")
    hidden.metadata["jupyter"] = {"source_hidden": True}
    code = new_code_cell("# papermill_description=Shown\nx = 1  # " + "long " * 60, outputs=outputs)
    cells = [new_markdown_cell(TEXT), code, hidden]
    nbformat.write(new_notebook(cells=cells), run.folder / "notebook.ipynb")
    pages = {"00_before": "../run-0/notebook.html", "01_planted": "../run/notebook.html"}
    notebook_page(run.folder / "notebook.ipynb", pages, "../index.html")
    entry = {"name": "01_planted", "notebook": run.folder / "notebook.ipynb", "error": None}
    entry |= {"status": "finished", "seconds": 1.0, "parameters": {}, "folder": "run"}
    index_page(root / "index.html", "1 of 1", [entry])
    return root / "index.html"


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_read_on_a_narrow_screen_and_in_the_dark(
    scheme: str, index: Path, browser: Pages
) -> None:
    browser.problems.clear()
    for name, path in {"index": index, "notebook": index.parent / "run/notebook.html"}.items():
        page = browser.new(viewport=NARROW, color_scheme=scheme)
        page.goto(path.as_uri())
        page.locator(".main-svg").first.wait_for()
        browser.shot(page, f"{name}_{scheme}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        ground, ink = page.locator("body").evaluate(
            "b => [getComputedStyle(b).backgroundColor, getComputedStyle(b).color]"
        )
        figure = page.locator("figure.plot").first
        assert "Planted bars. a long subtitle" in str(figure.get_attribute("aria-label"))
        sizes = figure.evaluate("each => [each.scrollWidth, each.clientWidth]")
        assert sizes[0] > 700 > sizes[1]  # it scrolls inside
        turned = figure.locator(".plotly-graph-div").evaluate("e => getComputedStyle(e).filter")
        if scheme == "dark":
            assert brightness(ink) > 180
            assert "invert" in turned
            assert name == "index" or brightness(ground) < 60
        else:
            assert turned == "none"
        page.context.close()
    assert browser.problems == []


def test_a_notebook_is_walked_by_its_links_and_its_code_can_be_hidden(
    index: Path, browser: Pages
) -> None:
    browser.problems.clear()
    page = browser.new()
    page.goto(index.as_uri())
    assert "We see 3. Chance gives 1. Holds here." in page.locator("section").inner_text()
    page.get_by_role("link", name="Planted: a title").click()
    expect(page).to_have_title("Planted: a title")
    code = page.locator("details.code")
    expect(code).to_have_count(2)
    assert code.evaluate_all("all => all.map(each => each.open)") == [True, False]
    page.get_by_role("button", name="Hide code").click()
    assert code.evaluate_all("all => all.map(each => each.open)") == [False, False]
    page.get_by_role("button", name="Show code").click()
    assert code.evaluate_all("all => all.map(each => each.open)") == [True, True]
    page.locator("nav a", has_text="00 before")
    page.get_by_role("link", name="CHOICES 27").click()
    expect(page.locator("#choice-27")).to_be_in_viewport()
    page.get_by_role("link", name="A part").click()
    assert page.url.endswith("#A-part")
    page.get_by_role("link", name="All notebooks").click()
    page.get_by_text("All figures and tables").click()
    page.get_by_role("link", name="Planted bars").click()
    expect(page).to_have_title(re.compile("^Planted bars"))
    assert browser.problems == []
    page.context.close()


def test_no_figure_offers_to_be_uploaded(index: Path, browser: Pages) -> None:
    browser.problems.clear()
    for path in (index.parent / "run/notebook.html", index.parent / "run/figures/bars.html"):
        page = browser.new()
        page.goto(path.as_uri())
        page.locator(".modebar-btn").first.wait_for(state="attached")
        titles = page.locator(".modebar-btn").evaluate_all("all => all.map(e => e.dataset.title)")
        assert "Download plot as a PNG" in titles
        assert not [title for title in titles if title and "Share" in title]
        page.context.close()
    assert browser.problems == []
    figure = json.loads((index.parent / "run/figures/bars.json").read_text("utf-8"))
    subtitle = figure["layout"]["title"]["subtitle"]["text"]
    assert "·" not in subtitle
    assert max(map(len, subtitle.split("<br>"))) <= 120
