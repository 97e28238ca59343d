"""Generations stand beside each other as they are: escaped, the theme's words marked."""

import re

import pandas as pd
import pytest

from flowhelpers.steering.text_table import marked_generations

ROW = {
    "kind": "best cell", "theme": "Gods & myths", "strategy": "single", "layer": 5.0,
    "strength": -4.0, "sample": 3, "unsteered": "A plain text.", "steered": "The gods spoke.",
    "behavioral": 0.5, "coherence": 0.756, "score": float("nan"),
}  # fmt: skip


def page(*rows: dict, words: tuple[str, ...] = ("god", "myth")) -> str:
    table = pd.DataFrame([ROW | row for row in rows])
    return marked_generations(table, {theme: words for theme in table["theme"]})


def cells(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", html, re.DOTALL)


def test_a_pair_is_a_row_with_its_cell_and_scores():
    first, unsteered, steered, *second = cells(page({}, {"layer": None, "steered": "a\n b"}))
    for words in ("best cell", "Gods &amp; myths", "layer: 5", "sample: 3", "coherence: 0.76"):
        assert words in first
    assert unsteered == "A plain text."
    assert steered == "The <mark>gods</mark> spoke."
    assert "layer" not in second[0]
    assert second[2] == "a\n b"
    assert "white-space: pre-wrap" in page({})


@pytest.mark.parametrize("column", ["unsteered", "steered", "kind", "theme", "strategy", "sample"])
def test_nothing_of_a_text_becomes_html(column: str):
    html = page({column: "<script>alert(\"1\")</script> & <b>bold</b> &lt; 'x' </td>"}, words=())
    assert "<script" not in html
    assert "<b>bold" not in html
    assert len(cells(html)) == 3
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &lt;b&gt;" in html


def test_marks_are_on_words_of_the_theme_alone():
    text = "GODS, (god)! Godly “Myths”: god's, mythology; gods—myth 3gods4 _god_ ungod. & amp"
    marks = re.findall("<mark>(.*?)</mark>", page({"steered": text}))
    assert marks == ["GODS", "god", "Godly", "Myths", "god", "gods", "myth", "gods", "god"]
    both = pd.DataFrame([ROW | {"theme": theme, "steered": "a god, a ship"} for theme in "ab"])
    html = marked_generations(both, {"a": ["god"], "b": ["ship"], "c": ["a"]})
    assert re.findall("<mark>(.*?)</mark>", html) == ["god", "ship"]
    assert re.findall("<mark>(.*?)</mark>", page({"steered": "x & y"}, words=("amp",))) == []
