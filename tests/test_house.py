"""The house stays thin and in order: sizes, floors, circles, faces, the notebooks' cells."""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flowhelpers"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINES, CODE_LINES, FILE_LINES, TEST_LINES, FLOORS = 17_050, 11_730, 350, 22_455, 6


def lines_of(paths: list[Path]) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def code_lines(path: Path) -> int:
    """Lines of a module that are neither blank, nor comment, nor docstring."""
    text = path.read_text("utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    documented = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    prose: set[int] = set()
    for node in documented:
        if ast.get_docstring(node, clean=False) is not None:
            prose |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" for n, line in lines if n not in prose)


def imports(path: Path) -> Iterator[str]:
    """What a module imports of the package, wherever in the file, as `folder.module`."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flowhelpers"):
            name = (node.module or "").removeprefix("flowhelpers").removeprefix(".")
            yield from (
                [name] if "." in name else [f"{name}.{a.name}".strip(".") for a in node.names]
            )


@cache
def graph() -> nx.DiGraph:
    """The modules and what each imports."""
    arrows = nx.DiGraph()
    for path in MODULES:
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        arrows.add_edges_from((name, other) for other in imports(path) if other != "__version__")
    return arrows


@cache
def folders() -> nx.DiGraph:
    """The folders, and which folders each imports from."""
    places = ((a.split(".")[0], b.split(".")[0]) for a, b in graph().edges)
    return nx.DiGraph((a, b) for a, b in places if a != b and {a, b} <= set(FOLDERS))


def test_the_package_is_thin():
    assert lines_of(MODULES) <= LINES
    assert sum(map(code_lines, MODULES)) <= CODE_LINES
    long = {path.name: lines_of([path]) for path in MODULES if lines_of([path]) > FILE_LINES}
    assert not long


def test_the_tests_are_no_larger_than_what_they_test_needs():
    assert lines_of(sorted((ROOT / "tests").rglob("*.py"))) <= TEST_LINES
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {
        "benchmarks",
        "__pycache__",
    } <= set(FOLDERS)


def test_modules_and_folders_import_in_no_circle():
    assert list(nx.simple_cycles(graph())) == []
    assert list(nx.simple_cycles(folders())) == []


def test_folders_stand_on_six_floors_and_the_paper_is_imported_by_none():
    assert nx.dag_longest_path_length(folders()) + 1 <= FLOORS
    assert set(folders().predecessors("core")) | {"core"} == set(FOLDERS)
    assert set(graph().predecessors("paper")) <= {"__main__", "paper_page"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_face_hands_on_names_that_are_there_and_shadow_no_module(folder: str):
    face = import_module(f"flowhelpers.{folder}")
    modules = {path.stem for path in (PACKAGE / folder).glob("*.py")}
    assert face.__all__
    for name in face.__all__:
        assert name not in modules  # the module would be handed out in its place
        getattr(face, name)


def code_cells(notebook: Path) -> list[list[str]]:
    """The code lines of each cell: no comments, no blank lines."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    sources = [("".join(c["source"]), c) for c in cells if c["cell_type"] == "code"]
    return [
        [line for line in source.splitlines() if line.strip() and not line.startswith("#")]
        for source, cell in sources
        if "parameters" not in cell["metadata"].get("tags", [])
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_cell_is_one_step_of_at_most_ten_lines(notebook: Path):
    first, *others = code_cells(notebook)
    assert sum(bool(re.match(r"(from|import) ", line)) for line in first) <= 10
    assert [cell for cell in others if len(cell) > 10] == []
