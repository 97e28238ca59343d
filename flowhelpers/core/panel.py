"""Controls over one drawing, which changes in place."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any, TypeVar

from flowhelpers.core.progress_bar import live

T = TypeVar("T")


def panel(draw: Callable[..., T], first: T, **controls: Any) -> T | None:
    """What `draw` returns for the values of ipywidgets' controls, drawn anew as they change.

    `first` is what it returned for their first values, and all there is without a live front end.
    Each control needs a `description`. A ValueError of `draw` is shown as a sentence.
    """
    from IPython.display import HTML, display
    from ipywidgets import HTML as Line
    from ipywidgets import Layout, Output, VBox

    if unlabelled := [name for name, control in controls.items() if not control.description]:
        raise ValueError(f"controls without a description: {', '.join(unlabelled)}")
    if not live():
        return first
    output, said = Output(), Line()

    def show(what: Any) -> None:
        output.clear_output(wait=True)
        with output:
            display(what)

    def redraw(_: object) -> None:
        said.value = "computing …"
        try:
            show(draw(**{name: control.value for name, control in controls.items()}))
            said.value = ""
        except ValueError as error:
            said.value = escape(str(error))
            show(HTML())

    for control in controls.values():
        control.style.description_width = "initial"
        control.layout = Layout(width="min(95%, 45rem)")
        control.observe(redraw, "value")
    display(VBox([*controls.values(), said, output]))
    show(first)
    return None
