"""Generations stand beside each other as they are: escaped, the theme's words marked."""

import re
from html import unescape

import pandas as pd
import pytest

from flowhelpers.steering.text_table import marked_generations

ROW = {
    "cell": 3, "kind": "best cell", "theme": "Gods & myths", "strategy": "single", "layer": 5.0,
    "strength": -4.0, "sample": 3, "behavioral": 0.5, "coherence": 0.756, "score": float("nan"),
    "text": "The gods spoke.", "unsteered": "A plain text.", "steered": "The gods spoke.",
}  # fmt: skip


def page(*rows: dict, words: tuple[str, ...] = ("god", "myth")) -> str:
    table = pd.DataFrame([ROW | row for row in rows])
    return marked_generations(table, {theme: words for theme in table["theme"]})


def cells(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", html, re.DOTALL)


def test_a_pair_is_a_row_with_its_cell_and_scores():
    kind, theme, _, layer, *_, coherence, score, unsteered, steered = cells(page({}))
    assert (kind, theme, layer) == ("best cell", "Gods &amp; myths", "5.00")
    assert (coherence, score) == ("0.76", "")
    assert (unsteered, steered) == ("A plain text.", "The <mark>gods</mark> spoke.")
    assert cells(page({"steered": "a\n b"}))[-1] == "a\n b"
    assert "white-space: pre-wrap" in page({})


@pytest.mark.parametrize("column", ["unsteered", "steered", "kind", "theme", "strategy", "sample"])
def test_nothing_of_a_text_becomes_html(column: str):
    text = "<script>alert(\"1\")</script> & <b>bold</b> &lt; 'x' </td>"
    shown = cells(page({column: text}, words=()))
    assert len(shown) == 11
    assert not any("<" in cell for cell in shown)
    assert text in map(unescape, shown)


def test_marks_are_on_words_of_the_theme_alone():
    text = "GODS, (god)! Godly “Myths”: god's, mythology; gods—myth 3gods4 _god_ ungod. & amp"
    marks = re.findall("<mark>(.*?)</mark>", page({"steered": text}))
    assert marks == ["GODS", "god", "Godly", "Myths", "god", "gods", "myth", "gods", "god"]
    both = pd.DataFrame([ROW | {"theme": theme, "steered": "a god, a ship"} for theme in "ab"])
    html = marked_generations(both, {"a": ["god"], "b": ["ship"], "c": ["a"]})
    assert re.findall("<mark>(.*?)</mark>", html) == ["god", "ship"]
    assert re.findall("<mark>(.*?)</mark>", page({"steered": "x & y"}, words=("amp",))) == []
