"""Controls over one drawing, which changes in place."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any, TypeVar

from flowhelpers.core.progress_bar import live

T = TypeVar("T")


def panel(draw: Callable[..., T], first: T, **controls: Any) -> T | None:
    """What `draw` returns for the values of ipywidgets' controls, drawn anew as they change.

    Each control needs a `description`. A slider or a box takes effect once it is let go or left. An
    error of `draw` is shown as a sentence.

    Args:
        first: What `draw` returned for the first values: all there is without a live front end, and
            what a saved notebook shows.
    """
    from IPython.display import display
    from ipywidgets import HTML, Layout, Output, VBox

    if unlabelled := [name for name, control in controls.items() if not control.description]:
        raise ValueError(f"controls without a description: {', '.join(unlabelled)}")
    if not live():
        return first
    output, said = Output(), HTML()

    def show(what: object) -> None:
        data, metadata = _bundle(what)
        drawn = {"output_type": "display_data", "data": data, "metadata": metadata}
        output.outputs = (drawn,) if data else ()

    def redraw(_: object) -> None:
        said.value = '<span role="status">computing …</span>'
        try:
            show(draw(**{name: control.value for name, control in controls.items()}))
            said.value = ""
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            said.value = f'<span role="alert">{escape(f"{kind}{error}")}</span>'
            show(None)

    for control in controls.values():
        control.style.description_width = "initial"
        control.layout = Layout(width="min(95%, 45rem)")
        if control.has_trait("continuous_update"):  # one drawing at the end of each move
            control.continuous_update = False
        control.observe(redraw, "value")
    show(first)
    data, metadata = _bundle(first)
    view, _ = _bundle(VBox([*controls.values(), said, output]))
    display({**view, **data}, metadata=metadata, raw=True)
    return None


def _bundle(what: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """How a notebook shows an object, by type of content, and its metadata; nothing for None."""
    from IPython.core.interactiveshell import InteractiveShell

    if what is None:
        return {}, {}
    if hasattr(what, "_repr_mimebundle_"):  # a figure of plotly would else display itself
        found = what._repr_mimebundle_()
        return found if isinstance(found, tuple) else (found, {})
    formatter: Any = InteractiveShell.instance().display_formatter
    return formatter.format(what)
