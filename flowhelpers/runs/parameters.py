"""Which notebooks there are, what parameters each declares, and with what values they are to run.

A notebook's cell with the tag `parameters` is the declaration, one `name: type = default  # help` a
line. Values are held against these types by pydantic, strictly, before anything runs.
"""

import ast
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowhelpers.core.features import suggestion
from flowhelpers.core.files import DATA

NOTEBOOKS = "FLOWHELPERS_NOTEBOOKS"  # a folder of notebooks to use in place of the package's own
TYPES = {kind.__name__: kind for kind in (int, float, str, bool, list, dict)}
TYPES |= {"Literal": typing.Literal}
WORDS = {"none": None, "true": True, "false": False}


@dataclass(frozen=True)
class Parameter:
    """What a notebook says of one of its parameters; `type` is its text, `kind` the type itself."""

    name: str
    type: str
    kind: Any
    default: Any
    help: str

    def check(self, value: Any) -> Any:
        """The value, if it is of the type; an int will do for a float.

        Raises:
            ValueError: If it is not.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(self.kind).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(
                f"parameter {self.name!r} is {self.type}, not {value!r};"
                f" for example {self.name}={self.default}"
            ) from error

    def parse(self, text: str) -> Any:
        """The value that a text of the command line stands for; a list may be `a,b`.

        Raises:
            ValueError: If it stands for none of the type.
        """
        items = text.strip().removeprefix("[").removesuffix("]").split(",")
        for value in (_literal(text), [_literal(item.strip()) for item in items], text):
            try:
                return self.check(value)
            except ValueError:
                continue
        return self.check(text)


def inspect(notebook: Path) -> dict[str, Parameter]:
    """The parameters of a notebook by name; none if it has no cell tagged `parameters`.

    Raises:
        ValueError: If the cell holds anything but literals with types that a parameter can have.
    """
    import nbformat

    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        raise ValueError(f"{notebook} is not a notebook: {str(error)[:80]}") from error
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    source = tagged[0].source if tagged else ""
    try:
        parameters = [_parameter(line, source) for line in ast.parse(source).body]
    except (SyntaxError, ValueError, NameError, TypeError) as error:
        raise ValueError(f"{notebook.name}: its parameters cannot be read: {error}") from error
    return {parameter.name: parameter for parameter in parameters}


def notebooks_folder() -> Path:
    """The folder of the notebooks: FLOWHELPERS_NOTEBOOKS, the package's own, or the checkout's.

    Raises:
        FileNotFoundError: If there is none.
    """
    named = os.environ.get(NOTEBOOKS)
    places = [Path(named)] if named else [DATA / "notebooks", DATA.parents[1] / "notebooks"]
    for place in places:
        if place.is_dir():
            return place.resolve()
    raise FileNotFoundError(f"no folder of notebooks at {places[-1]}")


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The notebooks of these names, numbers (`01`) or paths; the whole folder if none is given.

    Raises:
        ValueError: If there is none of that name; it names the nearest.
    """
    paths = [Path(name) for name in names if name.endswith(".ipynb") and Path(name).is_file()]
    if paths and len(paths) == len(names):
        return [path.resolve() for path in paths]
    ours = {path.stem: path for path in sorted(notebooks_folder().glob("*.ipynb"))}
    notebooks = []
    for name in names or ours:
        stem = name.removesuffix(".ipynb")
        named = [path for other, path in ours.items() if other == stem]
        numbered = [path for other, path in ours.items() if other.startswith(f"{name}_")]
        if Path(name) in paths:
            notebooks.append(Path(name).resolve())
        elif len(named or numbered) == 1:
            notebooks += named or numbered
        else:
            raise ValueError(f"unknown notebook {name!r}{suggestion(stem, ours)}")
    return notebooks


def plan(
    names: Sequence[str] = (), given: Mapping[str, str] | None = None, preset: str | None = None
) -> dict[Path, dict[str, Any]]:
    """The notebooks to run, and the parameters to override in each, all checked.

    Args:
        names: The notebooks, all if none.
        given: Parameters as texts; each goes to every notebook that has it.
        preset: A preset of `presets.yaml` in the notebooks' folder, which `given` overrides. Where
            all notebooks are run, those without it run as they stand.

    Raises:
        ValueError: For an unknown notebook, preset or parameter, a value of the wrong type, or a
            preset that a notebook of `names` does not have.
    """
    declared = {notebook: inspect(notebook) for notebook in find_notebooks(names)}
    known = sorted({name for parameters in declared.values() for name in parameters})
    given = given or {}
    for name in given:
        if name not in known:
            raise ValueError(f"unknown parameter {name!r}{suggestion(name, known)}")
    presets = _preset(preset) if preset else {}
    planned = {}
    for notebook, parameters in declared.items():
        stem = notebook.stem
        if preset and names and stem not in presets:
            raise ValueError(f"{notebook.name} has no preset {preset!r}: give parameters by -p")
        values = {}
        try:
            for name, value in presets.get(stem, {}).items():
                if name not in parameters:
                    raise ValueError(f"unknown parameter {name!r}{suggestion(name, parameters)}")
                values[name] = parameters[name].check(value)
        except ValueError as error:
            raise ValueError(f"preset {preset} of {stem}: {error}") from error
        for name in given.keys() & parameters.keys():
            values[name] = parameters[name].parse(given[name])
        planned[notebook] = values
    return planned


def _preset(preset: str) -> dict[str, dict[str, Any]]:
    """What a preset sets in each notebook that has it."""
    import yaml

    path = notebooks_folder() / "presets.yaml"
    presets = (yaml.safe_load(path.read_text("utf-8")) if path.exists() else None) or {}
    known = sorted({name for by_name in presets.values() for name in by_name})
    if preset not in known:
        raise ValueError(f"unknown preset {preset!r}{suggestion(preset, known)}")
    return {stem: by_name[preset] or {} for stem, by_name in presets.items() if preset in by_name}


def _parameter(line: ast.stmt, source: str) -> Parameter:
    match line:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr()):
            text = ast.unparse(annotation)
        case _:
            raise ValueError(f"line {line.lineno} is not `name: type = value`")
    assert line.value is not None
    kind = eval(text, {"__builtins__": {}}, TYPES)
    last = source.splitlines()[(line.end_lineno or line.lineno) - 1].encode()
    words = last[line.end_col_offset or 0 :].decode().strip().lstrip("# ")
    parameter = Parameter(name, text, kind, ast.literal_eval(line.value), words)
    parameter.check(parameter.default)
    return parameter


def _literal(text: str) -> Any:
    """The number, word or list that a text writes in Python; the text itself where it is none."""
    try:
        value = WORDS[text.lower()] if text.lower() in WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return text if isinstance(value, str) else value
