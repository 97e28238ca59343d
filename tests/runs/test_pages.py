"""What is read: pages of a run, and the words that the package points its reader to."""

import json
import os
import re
import subprocess
import sys
import tomllib
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from flowhelpers.runs.lesson import answer
from flowhelpers.runs.pages import index_page, notebook_page
from flowhelpers.runs.run import settled_choices

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def page_of(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    notebook = folder / "notebook.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell(text)]), notebook)
    notebook_page(notebook)
    return notebook.with_suffix(".html")


@pytest.mark.parametrize(
    ("tex", "drawn"),
    [
        (r"\mathbf f \cdot \mathbf W_k", "𝐟·𝐖k"),
        (r"\mathbf{1}", "𝟏"),
        (r"\mathbb I", "𝕀"),
        (r"\mathrm{top}_k x", "topkx"),
    ],
)
def test_letters_of_formulae_are_unicodes_own(tmp_path: Path, tex: str, drawn: str) -> None:
    page = page_of(tmp_path / "run", f"Planted ${tex}$").read_text("utf-8")
    formula = re.findall(r"<math.*?</math>", page)[0]
    assert unescape(re.sub(r"<[^>]*>", "", formula)) == drawn
    assert set(re.findall(r'mathvariant="(.*?)"', formula)) <= {"normal"}


def test_what_a_maximum_is_taken_over_stands_below_it(tmp_path: Path) -> None:
    page = page_of(tmp_path / "run", "$$\\arg\\max_k x$$").read_text("utf-8")
    assert re.search(r"<munder><mo>max</mo><mi>k</mi></munder>", page)


def test_a_hat_is_over_its_letter_alone(tmp_path: Path) -> None:
    page = page_of(tmp_path / "run", r"$\hat{\mathbf h} = \hat{\mathbf{x}} + b$").read_text("utf-8")
    hats = [unescape(re.sub(r"<[^>]*>", "", hat)) for hat in re.findall("<mover.*?</mover>", page)]
    assert hats == ["𝐡^", "𝐱^"]


def test_links_to_files_are_plain_text(tmp_path: Path) -> None:
    text = "[two](02_two.ipynb#at) [*read*](../README.md) [web](https://example.org) [here](#there)"
    page = page_of(tmp_path / "run", text).read_text("utf-8")
    links = re.findall(r'<a [^>]*href="([^"]*)"', page)
    assert links == ["https://example.org", "#there"]
    assert re.search(r"two <em>read</em> <a", page)


def executed_notebook(folder: Path, *cells: Any) -> Path:
    folder.mkdir(parents=True)
    nbformat.write(new_notebook(cells=[*cells]), folder / "notebook.ipynb")
    return folder / "notebook.ipynb"


def test_a_page_leads_to_the_notebooks_around_and_to_the_choices(tmp_path: Path) -> None:
    text = "# Planted *title*\n\n[one](01_one.ipynb#at) ([CHOICES 3](../flowhelpers/CHOICES.md),"
    text += " CHOICES 7 and 9–11)\n\n## First part\n\n[all](../flowhelpers/CHOICES.md)"
    notebook = executed_notebook(tmp_path / "run-2", new_markdown_cell(text))
    names = ["01_one", "02_two", "03_three"]
    pages = {name: f"../run-{at}/notebook.html" for at, name in enumerate(names, 1)}
    notebook_page(notebook, pages, "../index.html")
    page = notebook.with_suffix(".html").read_text("utf-8")
    assert "<title>Planted title</title>" in page
    bar = re.findall(r'<a href="([^"]*)">([^<]*)</a>', page.partition("<nav")[2].split("</nav>")[0])
    assert bar == [
        ("../index.html", "All notebooks"),
        ("../run-1/notebook.html", "← 01 one"),
        ("../run-3/notebook.html", "→ 03 three"),
    ]
    assert '<li><a href="#First-part">First part</a></li>' in page
    assert '<a href="../run-1/notebook.html#at">one</a>' in page
    assert re.search(r'<a href="#choice-3" title="top-k: [^"]*">CHOICES 3</a>', page)
    rows = re.findall(r'<div id="choice-(\d+)"><strong>\1</strong> (.*?)\n?</div>', page, re.DOTALL)
    assert [int(number) for number, _ in rows] == [3, 7, 9, 10, 11]
    assert settled_choices()[9].split(":")[0] in rows[2][1]
    assert '<a href="#choices">all</a>' in page


def test_code_can_be_hidden_and_folds_and_tables_are_read_whole(tmp_path: Path) -> None:
    table = "<table><tr><td>1.25</td><td>a text</td><td>&nbsp;</td></tr></table>"
    outputs = [
        new_output("display_data", data={"text/html": table}),
        new_output("execute_result", data={"text/markdown": str(answer("**27 %**").data)}),
    ]
    hidden = new_code_cell("# papermill_description=Check_it\n1 + 1", outputs=outputs)
    hidden.metadata["jupyter"] = {"source_hidden": True}
    telling = new_code_cell("# papermill_description=In_words\nruns.answer('what came out')")
    notebook = executed_notebook(tmp_path / "run", hidden, new_code_cell("2 + 2"), telling)
    notebook_page(notebook)
    page = notebook.with_suffix(".html").read_text("utf-8")
    folds = re.findall(r'<details class="code"( open="")?>\s*<summary>(.*?)</summary>', page)
    assert folds == [("", "Check it"), (' open=""', "Code"), ("", "In words")]
    assert '<td>1.25</td><td class="text">a text</td>' in page
    fold = re.search(r"<details><summary>What came out</summary>(.*?)</details>", page, re.DOTALL)
    assert fold is not None
    assert "<strong>27 %</strong>" in fold[1]


def test_the_index_tells_what_was_found_with_a_picture(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    found = {"claim": "It <holds>.", "ours": "We see `3`.", "control": "Chance: $1$."}
    results = {"findings": [found | {"verdict": "not seen here"}], "dumped": 0.123456789}
    for name in ("first", "named"):
        title = {"text": f"{name} &lt;b&gt;", "subtitle": {"text": "two<br>lines"}}
        layout = {"data": [{"y": [1]}], "layout": {"title": title}}
        (folder / f"figures/{name}.json").write_text(json.dumps(layout))
    book = new_notebook(cells=[new_markdown_cell("# Matching: what comes from where")])
    nbformat.write(book, tmp_path / "01_one.ipynb")
    entry = {"name": "01_one", "notebook": tmp_path / "01_one.ipynb", "status": "finished"}
    entry |= {"seconds": 75.0, "parameters": {"k": 1}, "folder": "run", "error": None}

    def index(**more: object) -> str:
        (folder / "results.json").write_text(json.dumps(results | more))
        index_page(tmp_path / "index.html", "1 of 1", [entry])
        return (tmp_path / "index.html").read_text("utf-8")

    page = index()
    assert "Matching: what comes from where</h2>" in page
    assert "<strong>It &lt;holds&gt;.</strong> We see <code>3</code>. Chance: <math" in page
    assert '<span class="verdict">Not seen here.</span>' in page
    assert "0:01:15, k=1" in page
    assert "0.1234" not in page
    label = 'aria-label="{} &lt;b&gt;. two lines"'
    assert label.format("first") in page
    assert label.format("named") in index(picture="named")
    (folder / "figures/named.svg").write_text("<svg/>")
    assert 'src="run/figures/named.svg" alt="named &lt;b&gt;. two lines"' in index()


def test_the_readmes_example_of_python_runs_as_it_stands(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
    env = os.environ | {"FLOWHELPERS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    chain = re.findall(r"^\d +(\d)/res/\d+ ", said.stdout, re.MULTILINE)
    assert chain == [str(layer) for layer in range(8)]
    assert "4/res/73" in said.stdout
    assert "telescope" in said.stdout.partition("activation")[2]
    assert said.stdout.count("unsteered") == said.stdout.count(" steered") == 3
    assert '"suite": "flowlet"' in (tmp_path / "plan.json").read_text("utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_readme_names_the_time_that_the_notebook_does(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0].source
    time = re.findall(r"\*\*Time\*\* (.*?) (?:to run )?on two CPU cores", first)
    rows = re.findall(rf"^\| \[{path.stem}\].*\|$", README, re.MULTILINE)
    assert [row.split(" | ")[3] for row in rows] == time


def test_every_choice_that_is_cited_can_be_looked_up() -> None:
    choices = (ROOT / "flowhelpers/CHOICES.md").read_text("utf-8")
    numbers = set(re.findall(r"^\| (\d+) \|", choices, re.MULTILINE))
    cited: set[str] = set()
    for path in [*ROOT.glob("flowhelpers/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]:
        for found in re.findall(r"CHOICES (\d+(?:(?:,| and|–|-) ?\d+)*)", path.read_text("utf-8")):
            cited |= set(re.findall(r"\d+", found))
    assert set() < cited <= numbers
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["flowhelpers"]  # whole, what is no Python included
    assert "(flowhelpers/CHOICES.md)" in README
