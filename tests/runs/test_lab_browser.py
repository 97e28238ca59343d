"""JupyterLab as `flowhelpers lab` opens it, driven in a browser: controls, saving, no network."""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from browsers import Pages
from lab_server import NOTEBOOK, cell_of, open_lab, run_all, save
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from playwright.sync_api import Locator, Page, expect

from flowhelpers.runs.lab import COPIES
from flowhelpers.runs.parameters import NOTEBOOKS

PLANTED = """# papermill_description=Planted
import time
import plotly.graph_objects as go
from ipywidgets import Dropdown, IntSlider
from flowhelpers import core
from flowhelpers.core.figures import dress

def drawn(height, colour):
    time.sleep(1.5)  # longer than the browser is left alone
    if height == 7:
        raise ValueError("7 is <no> height: expected another")
    bars = go.Figure(go.Bar(y=[height], marker_color=colour))
    return dress(bars, f"{height} in {colour}", "planted", 300)

height = IntSlider(5, max=1023, description="height of the bar")
colour = Dropdown(options={"as the sea": "blue", "as blood": "red"}, description="colour")
core.panel(drawn, drawn(5, "blue"), height=height, colour=colour)"""
COUNTED = """# papermill_description=Counted
number = IntSlider(2, max=9, description="number")
core.panel(lambda number: "ab" * number, "abab", number=number)"""

OURS = Path(__file__).parents[2] / "notebooks"
SMALL = {  # parameters that make a notebook short
    "06_theme_activation": {
        **{"candidates": 2, "strategies": ["single", "constant"], "strengths": [4.0]},
        **{"n_samples": 2, "max_new_tokens": 6},
    }
}
DRIVEN = ["00_start_here", "01_matching", "02_flow_graphs", "06_theme_activation"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder; the notebooks are one small one."""
    folder = tmp_path_factory.mktemp("user")
    cells = [new_markdown_cell("# Planted: a title"), *map(new_code_cell, [PLANTED, COUNTED])]
    (folder / "package").mkdir()
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    book = new_notebook(cells=cells, metadata=kernel)
    nbformat.write(book, folder / "package/00_start_here.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NOTEBOOKS, str(folder / "package"))
        with open_lab(folder) as address:
            yield address


def titles(page: Page) -> list[str]:
    return page.locator(f"{NOTEBOOK} .gtitle").all_text_contents()


def test_controls_redraw_one_picture_and_a_saved_notebook_shows_it(
    folder: Path, lab: str, browser: Pages
) -> None:
    browser.problems.clear()
    page = browser.new()
    page.goto(lab)
    run_all(page, 60)
    assert page.title().startswith("00_start_he")
    cell = cell_of(page, "Planted")
    handle, said = cell.locator(".noUi-handle"), cell.get_by_role("status")
    expect(cell.locator(".widget-label").first).to_have_text("height of the bar")
    expect(cell.locator(".gtitle")).to_have_text("5 in blue")
    box = cell.locator(".widget-slider").bounding_box()
    assert box is not None
    assert box["width"] > 500  # of 1,024 values
    handle.focus()
    handle.press("ArrowRight")
    expect(said).to_have_text("computing …")
    expect(cell.locator(".gtitle")).to_have_text("6 in blue")
    expect(cell.locator(".js-plotly-plot")).to_have_count(1)
    cell.locator("select").select_option("as blood")
    expect(cell.locator(".gtitle")).to_have_text("6 in red")
    handle.press("ArrowRight")
    expect(cell.get_by_role("alert")).to_have_text("7 is <no> height: expected another")
    expect(cell.locator(".js-plotly-plot")).to_have_count(0)
    handle.press("ArrowRight")
    expect(cell.locator(".gtitle")).to_have_text("8 in red")
    expect(cell.get_by_role("alert")).to_have_count(0)
    expect(cell.locator(".modebar")).to_have_count(1)
    assert cell.locator(".modebar [data-title*='Share']").count() == 0
    assert "news" not in page.locator("body").inner_text()
    browser.shot(page, "lab_controls")
    save(page)
    page.reload()
    page.locator(f"{NOTEBOOK} .gtitle").first.wait_for(timeout=30_000)
    expect(page.locator(NOTEBOOK)).to_contain_text("'abab'", use_inner_text=True)
    browser.shot(page, "lab_reloaded")
    shown = page.locator(NOTEBOOK).inner_text()
    assert "Error displaying widget" not in shown
    assert "model not found" not in shown
    assert shown.count("Run this cell to use its controls.") == 2
    assert titles(page) == ["5 in blue"]
    assert browser.problems == []
    saved = (folder / COPIES / "00_start_here.ipynb").read_text("utf-8")
    assert "widget-view" not in saved
    assert "widget-view" not in (folder / "package/00_start_here.ipynb").read_text("utf-8")
    page.context.close()


def shorten(path: Path, parameters: dict[str, object]) -> None:
    """Leaves out what comes after the last controls, and sets parameters."""
    book = nbformat.read(path, as_version=4)
    last = max(at for at, cell in enumerate(book.cells) if "panel(" in cell.source)
    book.cells = book.cells[: last + 1]
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbformat.write(book, path)


@pytest.fixture(scope="module")
def lab_of_ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of a user, and JupyterLab there with the notebooks of this package."""
    folder = tmp_path_factory.mktemp("ours")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(NOTEBOOKS, str(OURS))
        with open_lab(folder) as address:
            yield folder / COPIES, address


def move(panel: Locator) -> None:
    """Moves the first control of a panel to another value."""
    control = panel.locator("select, .noUi-handle, input, textarea").first
    kind = control.evaluate("each => each.type === 'number' ? each.type : each.tagName")
    if kind == "SELECT":
        control.select_option(index=(control.evaluate("each => each.selectedIndex") + 1) % 2)
    elif kind == "number":
        control.fill(str(int(control.input_value()) + 1))
        control.press("Enter")
    elif kind == "DIV":
        control.focus()
        control.press("ArrowRight")
        control.press("ArrowRight")
    else:
        control.fill("Doctors said that the wound was infected by bacteria.")
        control.press("Tab")


@pytest.mark.slow
@pytest.mark.parametrize("name", DRIVEN)
def test_each_control_of_the_notebooks_changes_what_is_shown(
    name: str, lab_of_ours: tuple[Path, str], browser: Pages
) -> None:
    copies, address = lab_of_ours
    shorten(copies / f"{name}.ipynb", SMALL.get(name, {}))
    browser.problems.clear()
    page = browser.new(viewport={"width": 1280, "height": 1000})
    page.goto(address.replace("00_start_here", name) + "?reset")
    run_all(page, 240)
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    panels = page.locator(f"{NOTEBOOK} .widget-vbox")
    assert panels.count() > 0
    for number in range(panels.count()):
        panel = panels.nth(number)
        panel.scroll_into_view_if_needed()
        output = panel.locator(".jp-OutputArea").first
        before = output.inner_html()
        assert "" not in panel.locator(".widget-label:visible").all_inner_texts()
        move(panel)
        page.wait_for_function("([each, was]) => each.innerHTML !== was",
                               arg=[output.element_handle(), before], timeout=30_000)  # fmt: skip
        expect(panel.get_by_role("status")).to_have_count(0, timeout=30_000)
        expect(panel.get_by_role("alert")).to_have_count(0)
    browser.shot(page, f"lab_{name}")
    assert browser.problems == []
    page.context.close()
