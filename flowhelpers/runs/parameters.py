"""A notebook's parameters: read from its `parameters` cell, and checked before anything runs.

The cell is the declaration: one `name: type = default  # help` a line. Types are those that
papermill can hand over: int, float, str, bool, None, lists and dicts of them, `|` between them, and
Literal.
"""

import ast
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

TYPES = {kind.__name__: kind for kind in (int, float, str, bool, list, dict)} | {
    "Literal": typing.Literal,
    "Optional": typing.Optional,
}
UNIONS = (typing.Union, UnionType)
WORDS = {"none": None, "true": True, "false": False}


@dataclass(frozen=True)
class Parameter:
    """What a notebook says of one of its parameters; `type` is its text, `kind` the type itself."""

    name: str
    type: str
    kind: Any
    default: Any
    help: str


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
        found = [_parameter(line, source) for line in ast.parse(source).body if _assigns(line)]
    except (SyntaxError, ValueError, NameError, TypeError) as error:
        raise ValueError(f"{notebook.name}: its parameters cannot be read: {error}") from error
    return {parameter.name: parameter for parameter in found}


def check(
    notebook: str, parameters: Mapping[str, Parameter], values: Mapping[str, Any]
) -> dict[str, Any]:
    """The values if each names a parameter and is of its type.

    Raises:
        ValueError: Naming the nearest valid name, or the type and an example of it.
    """
    checked = {}
    for name, value in values.items():
        if name not in parameters:
            raise ValueError(f"{notebook}: {unknown('parameter', name, parameters)}")
        if not accepts(parameters[name].kind, value):
            raise ValueError(_wrong(notebook, parameters[name], value))
        checked[name] = value
    return checked


def from_text(notebook: str, parameter: Parameter, text: str) -> Any:
    """The value that a text given on the command line stands for.

    Raises:
        ValueError: If it is not one of the parameter's type.
    """
    value = _parse(text, parameter.kind)
    if not accepts(parameter.kind, value):
        raise ValueError(_wrong(notebook, parameter, text))
    return value


def accepts(kind: Any, value: Any) -> bool:
    """Whether a value is of a type. An int will do for a float; a bool is not an int."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return any(accepts(member, value) for member in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(accepts(arguments[0], item) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            accepts(arguments[0], key) and accepts(arguments[1], item)
            for key, item in value.items()
        )
    if isinstance(value, bool):
        return kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name, with the nearest that is known."""
    known = sorted(known)
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f": did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known) or 'none'}"


def _assigns(line: ast.stmt) -> bool:
    documents = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
    return not (documents or isinstance(line, ast.Import | ast.ImportFrom))


def _parameter(line: ast.stmt, source: str) -> Parameter:
    match line:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr()):
            text = ast.unparse(annotation)
            kind = eval(text, {"__builtins__": {}}, TYPES)
            kind = NoneType if kind is None else kind
        case ast.Assign(targets=[ast.Name(id=name)]):
            kind = text = None
        case _:
            raise ValueError(f"line {line.lineno} is not `name: type = value`")
    assert line.value is not None
    default = ast.literal_eval(line.value)
    if text is None:
        kind = object if default is None else type(default)
        text = kind.__name__
    if not accepts(kind, default):
        raise ValueError(f"{name} is {text}, but its default is {default!r}")
    last = source.splitlines()[(line.end_lineno or line.lineno) - 1].encode()
    help = last[line.end_col_offset or 0 :].decode().strip().lstrip("# ")
    return Parameter(name, text, kind, default, help)


def _wrong(notebook: str, parameter: Parameter, value: object) -> str:
    name, example = parameter.name, parameter.default
    return (
        f"{notebook}: parameter {name!r} is {parameter.type}, not {value!r}; "
        f"for example {name}={example if isinstance(example, str) else repr(example)}"
    )


def _parse(text: str, kind: Any) -> Any:
    """The value of a type that a text stands for; the text itself if there is none."""
    try:
        value = WORDS[text.lower()] if text.lower() in WORDS else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if not isinstance(value, str) and accepts(kind, value):
        return float(value) if kind is float else value
    members = typing.get_args(kind) if typing.get_origin(kind) in UNIONS else [kind]
    items = [(typing.get_args(each) or (object,))[0] for each in members if _is_list(each)]
    if items and str not in members:  # a list may be given as its items with commas between
        parts = text.strip().removeprefix("[").removesuffix("]").split(",")
        return [_parse(part.strip(), items[0]) for part in parts if part.strip()]
    return text


def _is_list(kind: Any) -> bool:
    return list in (kind, typing.get_origin(kind))
