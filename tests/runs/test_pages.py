"""What is read: pages of a run, and the words that the package points its reader to."""

import json
import os
import re
import subprocess
import sys
import tomllib
from html import unescape
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from flowhelpers.runs.pages import index_page, notebook_page

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


def test_links_to_files_are_plain_text(tmp_path: Path) -> None:
    text = "[two](02_two.ipynb#at) [*read*](../README.md) [web](https://example.org) [here](#there)"
    page = page_of(tmp_path / "run", text).read_text("utf-8")
    links = re.findall(r'<a [^>]*href="([^"]*)"', page)
    assert links == ["https://example.org", "#there"]
    assert re.search(r"two <em>read</em> <a", page)


def test_results_are_rounded_and_laid_out(tmp_path: Path) -> None:
    results = {"nested": {"share": {"res": 0.9486607142857143}}, "count": 1234}
    results |= {"feature": "4/res/<17>", "found": ["res", 0.50001], "nothing": None}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    entry = {"name": "01_one", "status": "finished", "seconds": 75.0, "parameters": {}}
    index_page(tmp_path / "index.html", "planted", [entry | {"folder": "run", "error": None}])
    page = (tmp_path / "index.html").read_text("utf-8")
    rows = dict(re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td></tr>", page))
    shown = {"nested.share.res": "0.9487", "count": "1234", "feature": "4/res/&lt;17&gt;"}
    assert rows == shown | {"found": "[&#39;res&#39;, 0.50001]", "nothing": "None"}
    assert "0:01:15" in page


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
