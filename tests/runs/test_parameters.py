from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from flowhelpers.runs.parameters import NOTEBOOKS, find_notebooks, inspect, merged, plan

CELL = """suite: str = "flowlet"  # which suite: é, # and "quotes" do not confuse
k: int = 5
share: float = 0.5  # of the features
layers: list[int] = [
    1,
    2,
]  # which layers
texts: list[str] = ["a, b", "c"]
device: str | None = None  # found out if None
deep: bool = False
mode: Literal["add", "set"] = "add"
limit: int | float | None = 3
some: list[int] | None = None
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a notebook with a parameters cell into the notebooks' folder."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setenv(NOTEBOOKS, str(folder))

    def write(name: str, cell: str = CELL) -> Path:
        cells = [new_code_cell("x = 1"), new_code_cell(cell, metadata={"tags": ["parameters"]})]
        path = folder / f"{name}.ipynb"
        nbformat.write(new_notebook(cells=cells), path)
        return path

    return write


def test_inspect_reads_names_types_defaults_and_help(write: Write) -> None:
    found = inspect(write("n"))
    names = ["suite", "k", "share", "layers", "texts", "device", "deep", "mode", "limit", "some"]
    assert [*found] == names
    assert [found[name].type for name in ("layers", "device", "mode", "limit")] == [
        *("list[int]", "str | None", "Literal['add', 'set']", "int | float | None")
    ]
    defaults = ["flowlet", 5, 0.5, [1, 2], ["a, b", "c"], None, False, "add", 3, None]
    assert [each.default for each in found.values()] == defaults
    helps = ['which suite: é, # and "quotes" do not confuse', "", "of the features", "which layers"]
    assert [each.help for each in found.values()][:4] == helps


@pytest.mark.parametrize(
    "cell", ["x: int = len([1])", "x: Path = 1", "x: int = 'one'", "x: int", "%matplotlib inline"]
)
def test_inspect_refuses_what_cannot_be_a_parameter(write: Write, cell: str) -> None:
    with pytest.raises(ValueError, match=r"n\.ipynb: its parameters cannot be read"):
        inspect(write("n", cell))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("k", "7", 7),
        ("share", "1", 1.0),
        ("suite", "12", "12"),
        ("suite", "None", "None"),
        ("layers", "2,4", [2, 4]),
        ("texts", "[a, b]", ["a", "b"]),
        ("texts", '["Hello, world", "x"]', ["Hello, world", "x"]),
        ("suite", '"quoted"', '"quoted"'),
        ("some", "2, 4", [2, 4]),
        ("device", "None", None),
        ("deep", "true", True),
        ("mode", "set", "set"),
        ("limit", "2.5", 2.5),
        ("limit", "none", None),
    ],
)
def test_texts_become_values_of_the_type(write: Write, name: str, text: str, value: object) -> None:
    made = inspect(write("n"))[name].parse(text)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("k", "2.5", "parameter 'k' is int, not '2.5'; for example k=5"),
        ("layers", "1,x", r"'layers' is list\[int\], not '1,x'; for example layers=\[1, 2\]"),
        ("deep", "1", "'deep' is bool"),
        ("mode", "ad", r"'mode' is Literal\['add', 'set'\], not 'ad'"),
    ],
)
def test_wrong_types_are_refused_with_an_example(
    write: Write, name: str, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        inspect(write("n"))[name].parse(text)


def test_settings_are_merged_over_usual_ones_by_name_and_type() -> None:
    usual = {"alpha": -0.05, "is_far": False, "phases": ["prompt", "generation"], "texts": 16}
    found = merged(usual, {"alpha": -1, "phases": ["prompt"]})
    assert found == usual | {"alpha": -1.0, "phases": ["prompt"]}
    assert usual["alpha"] == -0.05
    for given, message in (
        ({"alhpa": 1.0}, "unknown parameter 'alhpa'; did you mean 'alpha'"),
        ({"alpha": "big"}, "parameter 'alpha' is float, not 'big'; for example alpha=-0.05"),
        ({"texts": 1.5}, "'texts' is int"),
        ({"is_far": 1}, "'is_far' is bool"),
        ({"phases": [1]}, r"'phases' is list\[str\], not \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            merged(usual, given)
    assert merged(usual, {"alpha": None}, or_none=["alpha"]) == usual | {"alpha": None}
    assert merged(usual, {"alpha": 1}, or_none=["alpha"])["alpha"] == 1.0
    with pytest.raises(ValueError, match=r"'alpha' is float \| None, not 'big'"):
        merged(usual, {"alpha": "big"}, or_none=["alpha"])
    with pytest.raises(ValueError, match=r"'alpha' is float, not None"):
        merged(usual, {"alpha": None}, or_none=["texts"])


def test_a_dict_may_be_written_in_python_or_in_json(write: Write) -> None:
    advanced = inspect(write("n", "advanced: dict = {}"))["advanced"]
    assert advanced.parse("{'skip_bos': True}") == {"skip_bos": True}
    assert advanced.parse('{"skip_bos": true, "alpha": -0.1}') == {"skip_bos": True, "alpha": -0.1}
    assert advanced.parse('{"judge_temperature": null}') == {"judge_temperature": None}
    with pytest.raises(ValueError, match="'advanced' is dict, not"):
        advanced.parse("{skip_bos: true}")


def test_parameters_go_to_every_notebook_that_has_them(write: Write) -> None:
    one, two = write("01_one", "k: int = 1\nseed: int = 0"), write("02_two", "k: float = 1.0")
    assert plan(given={"k": "3", "seed": "4"}) == {one: {"k": 3, "seed": 4}, two: {"k": 3.0}}


def test_notebooks_are_found_by_name_number_and_path(write: Write, tmp_path: Path) -> None:
    one, two = write("01_matching"), write("02_groups")
    mine = tmp_path / "mine.ipynb"
    mine.write_bytes(one.read_bytes())
    assert find_notebooks() == [one, two]
    assert find_notebooks(["02", "01_matching.ipynb", str(mine)]) == [two, one, mine]


def test_a_preset_may_set_more_for_a_suite_and_its_variants(write: Write) -> None:
    one = write("01_one", 'suite: str = "flowlet"\nk: int = 1\nn: int = 1')
    preset = "{k: 2, by_suite: {gemma-2-2b: {n: 5}, flowlet: {k: 3}}}"
    one.with_name("presets.yaml").write_text(f"01_one:\n  paper: {preset}\n")
    assert plan(preset="paper") == {one: {"k": 3}}
    for suite in ("gemma-2-2b", "gemma-2-2b@l0=70"):
        expected = {"k": 2, "n": 5, "suite": suite}
        assert plan(given={"suite": suite}, preset="paper") == {one: expected}
    assert plan(given={"suite": "gpt2", "n": "7"}, preset="paper")[one]["n"] == 7


def test_presets_lie_below_what_is_given(write: Write) -> None:
    one, two = write("01_one", "k: int = 1\nn: int = 1"), write("02_two", "k: int = 1")
    presets = one.with_name("presets.yaml")
    presets.write_text("01_one:\n  quick: {k: 2, n: 3}\n  paper: {k: 9}\n")
    assert plan(given={"n": "4"}, preset="quick") == {one: {"k": 2, "n": 4}, two: {}}
    assert plan(["01"], preset="quick") == {one: {"k": 2, "n": 3}}
    with pytest.raises(ValueError, match=r"02_two\.ipynb has no preset 'quick'"):
        plan(["01", "02"], preset="quick")
    with pytest.raises(ValueError, match="unknown preset 'quik'; did you mean 'quick'"):
        plan(preset="quik")
    presets.write_text("01_one:\n  quick: {kk: 2}\n")
    with pytest.raises(ValueError, match="preset quick of 01_one: unknown parameter 'kk'; did you"):
        plan(preset="quick")
    presets.write_text("01_one:\n  quick: {k: two}\n")
    with pytest.raises(ValueError, match="preset quick of 01_one: parameter 'k' is int, not 'two'"):
        plan(preset="quick")
