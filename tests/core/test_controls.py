"""A panel without a front end is its first drawing; what it sends to one, and when it draws."""

from types import SimpleNamespace
from typing import Any

import IPython
import plotly.graph_objects as go
import pytest
from ipywidgets import HTML, Dropdown, IntSlider, Output, Text, VBox

from flowhelpers.core import controls as panels
from flowhelpers.core.controls import panel


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], VBox]]:
    """What is displayed in a front end that is alive: the bundle, and the box of its view."""
    shown: list[Any] = []
    boxes: list[VBox] = []
    of = panels._bundle

    def bundle(what: Any) -> Any:
        boxes.extend([what] if isinstance(what, VBox) else [])
        found = what.to_plotly_json() if isinstance(what, go.Figure) else None
        return ({"planted": found}, {}) if found else of(what)

    monkeypatch.setattr(panels, "live", lambda: True)
    monkeypatch.setattr(panels, "_bundle", bundle)
    monkeypatch.setattr(
        IPython.display, "display", lambda data, **_: shown.append((data, boxes[-1]))
    )
    return shown


def figure(height: int) -> go.Figure:
    return go.Figure(go.Bar(y=[height]))


def test_without_a_front_end_it_is_what_was_drawn_first() -> None:
    first = figure(1)
    assert panel(figure, first, height=IntSlider(1, description="height")) is first
    with pytest.raises(ValueError, match="controls without a description: height, name"):
        panel(figure, first, height=IntSlider(1), name=Text(), other=Text(description="other"))


def test_one_output_changes_in_place_and_errors_are_words(sent: list) -> None:
    calls: list[tuple[int, str]] = []

    def draw(height: int, name: str) -> go.Figure:
        calls.append((height, name))
        said.append(line.value)
        if height == 3:
            raise ValueError("3 is <too> high")
        if height == 4:
            raise KeyError("planted")
        return figure(height)

    height = IntSlider(1, max=9, description="height")
    name = Dropdown(options=[("as it is", "a"), ("other", "b")], description="name")
    said: list[str] = []
    assert panel(draw, figure(1), height=height, name=name) is None
    ((data, box),) = sent
    assert data["planted"]["data"][0]["y"] == [1]  # stays when the view is dropped
    assert "application/vnd.jupyter.widget-view+json" in data
    assert [type(child) for child in box.children] == [IntSlider, Dropdown, HTML, Output]
    line, output = box.children[2:]
    assert not height.continuous_update
    assert calls == []

    def heights() -> list[int]:
        return [each["data"]["planted"]["data"][0]["y"][0] for each in output.outputs]

    assert heights() == [1]
    height.value = 2
    name.value = "b"
    assert calls == [(2, "a"), (2, "b")]
    assert heights() == [2]
    assert "computing" in said[0]
    assert line.value == ""
    height.value = 3
    assert "3 is &lt;too&gt; high" in line.value
    assert heights() == []
    height.value = 4
    assert "KeyError: &#x27;planted&#x27;" in line.value
    height.value = 5
    assert (line.value, heights()) == ("", [5])


def test_what_displays_itself_is_shown_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    plain = SimpleNamespace(_repr_mimebundle_=lambda: {"text/plain": "planted"})
    assert panels._bundle(plain) == ({"text/plain": "planted"}, {})
    assert panels._bundle(None) == ({}, {})
    assert panels._bundle("words")[0]["text/plain"] == "'words'"
    panels._bundle(figure(1))
    assert capsys.readouterr().out == ""
