"""`flowhelpers lab`: a copy of the notebooks in the user's folder, and what is saved of them."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from flowhelpers.__main__ import main
from flowhelpers.runs.lab import COPIES, WIDGET, copy_notebooks, without_views
from flowhelpers.runs.parameters import NOTEBOOKS, find_notebooks


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the package's notebooks: one, presets and what is no business of the user's."""
    folder = tmp_path / "package"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    text = "See [CHOICES 27](../flowhelpers/CHOICES.md) and [matching](01_matching.ipynb)."
    nbformat.write(new_notebook(cells=[new_markdown_cell(text)]), folder / "00_start_here.ipynb")
    (folder / "presets.yaml").write_text("planted: {}")
    monkeypatch.setenv(NOTEBOOKS, str(folder))
    return folder


def test_lab_opens_00_in_a_copy_and_hands_its_options_on(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def execv(_: str, command: list[str]) -> None:
        called.append(command)
        raise SystemExit  # what takes the place of this process does not return

    monkeypatch.setattr(os, "execv", execv)
    for name in ("FLOWHELPERS_RUNS", "JUPYTER_CONFIG_PATH"):
        monkeypatch.setenv(name, "")  # given back afterwards
        monkeypatch.delenv(name)
    user = tmp_path / "user"
    user.mkdir()
    monkeypatch.chdir(user)
    with pytest.raises(SystemExit):
        main(["lab", "--no-browser", "--port=8899"])
    command = called[0]
    assert command[1:3] == ["-m", "jupyterlab"]
    assert command[-2:] == ["--no-browser", "--port=8899"]
    assert f"--ServerApp.root_dir={user}" in command
    assert f"--LabApp.default_url=/lab/tree/{COPIES}/00_start_here.ipynb" in command
    assert os.environ["FLOWHELPERS_RUNS"] == str(user / "runs")
    assert sorted(path.name for path in user.iterdir()) == [COPIES]
    assert find_notebooks() == [package / "00_start_here.ipynb"]  # what `run` reads


def test_a_copy_has_what_it_links_to_and_what_the_user_changed_stays(
    package: Path, tmp_path: Path
) -> None:
    copies = copy_notebooks(tmp_path / "deep/copies")
    assert sorted(path.name for path in copies.iterdir()) == [
        *("00_start_here.ipynb", "CHOICES.md", "presets.yaml")
    ]
    text = nbformat.read(copies / "00_start_here.ipynb", as_version=4).cells[0].source
    assert "[CHOICES 27](CHOICES.md) and [matching](01_matching.ipynb)" in text
    assert "| 27 |" in (copies / "CHOICES.md").read_text("utf-8")
    (copies / "00_start_here.ipynb").write_text("the user's")
    (package / "01_new.ipynb").write_text((package / "00_start_here.ipynb").read_text())
    copy_notebooks(copies)
    assert (copies / "00_start_here.ipynb").read_text() == "the user's"
    assert (copies / "01_new.ipynb").is_file()


def test_what_goes_on_to_jupyterlab_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lab", "--help"])
    said = capsys.readouterr().out
    assert "flowhelpers lab --no-browser --port 8890" in said
    assert "goes on to JupyterLab" in said
    assert "./flowhelpers-notebooks" in said


def test_a_saved_notebook_keeps_what_stands_for_its_widgets() -> None:
    figure = {"application/vnd.plotly.v1+json": {"data": []}}
    view = {WIDGET: {"model_id": "1"}, "text/plain": "VBox(children=(IntSlider(value=0),))"}
    outputs: list[Any] = [
        new_output("stream", text="planted"),
        new_output("display_data", data=view | figure),
        new_output("display_data", data=view | {"text/plain": "'steered text'"}),
    ]
    cells = [
        new_code_cell(outputs=outputs),
        new_code_cell(outputs=[new_output("display_data", data=view)]),
    ]
    book = new_notebook(cells=cells, metadata={"widgets": {"planted": 1}})
    without_views(model={"type": "notebook", "content": book}, path="", contents_manager=None)
    nbformat.validate(book)
    note = {"text/markdown": "*Run this cell to use its controls.*"}
    first = [output.get("data", output.get("text")) for output in book.cells[0].outputs]
    plain = {"text/plain": view["text/plain"]}
    assert first == [note, "planted", figure | plain, {"text/plain": "'steered text'"}]
    assert [output["data"] for output in book.cells[1].outputs] == [note]
    assert "widgets" not in book.metadata
    file: dict[str, Any] = {"type": "file", "content": "text"}
    without_views(model=file)
    assert file["content"] == "text"
