"""Generations are told as they are: escaped, beside each other, the theme's words marked."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from flowhelpers.steering.text_table import marked_generations

ROW = {
    "kind": "best cell", "theme": "Gods & myths", "strategy": "single", "layer": 5.0,
    "strength": -4.0, "sample": 3, "unsteered": "A plain text.", "steered": "The gods spoke.",
    "behavioral": 0.5, "coherence": 0.756, "score": 0.378,
}  # fmt: skip


class Table(HTMLParser):
    """The texts of the cells of each row, what is marked in them, and all tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.marks: list[str] = []
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag == "br":
            self.rows[-1][-1] += "\n"
        elif tag != "col":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "mark":
            self.marks.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.rows[-1][-1] += data
        if self.open[-1] == "mark":
            self.marks[-1] += data


def stem(word: str) -> str:
    assert word == word.lower()
    return word.removesuffix("s")


def shown(*rows: dict, words=("god", "myth")) -> Table:
    table = pd.DataFrame([ROW | row for row in rows])
    return Table(marked_generations(table, {theme: words for theme in table["theme"]}, stem))


def test_a_pair_is_a_row_with_its_cell_and_scores():
    table = shown({}, {"kind": "worst cell", "strategy": "linear", "sample": 4})
    assert table.rows[0] == ["cell, scores when steered", "unsteered", "steered"]
    assert table.rows[1] == [
        "best cell\nGods & myths\nsingle, layer 5, strength −4\nsample 3\n"
        "behavioral 0.50\ncoherence 0.76\nscore 0.38",
        "A plain text.",
        "The gods spoke.",
    ]
    assert table.rows[2][0].startswith("worst cell\nGods & myths\nlinear, layer 5")
    assert len(table.rows) == 3


def test_missing_things_are_dashes_or_left_out():
    gone = {"layer": np.nan, "strength": None, "score": np.nan, "behavioral": None, "steered": None}
    table = shown(gone, ROW)
    assert table.rows[1][0] == (
        "best cell\nGods & myths\nsingle\nsample 3\nbehavioral –\ncoherence 0.76\nscore –"
    )
    assert table.rows[1][2] == "–"
    assert "sample" not in shown({"sample": None}).rows[1][0]
    assert "sample a1\n" in shown({"sample": "a1"}).rows[1][0]


@pytest.mark.parametrize("column", ["unsteered", "steered", "kind", "theme", "strategy", "sample"])
def test_nothing_of_a_text_becomes_html(column: str):
    evil = "<script>alert(\"1\")</script> & <b>bold</b> &lt; 'x' </td>"
    html = marked_generations(pd.DataFrame([ROW | {column: evil}]), {ROW["theme"]: ["god"]}, stem)
    assert "<script" not in html
    assert "<b>bold" not in html
    table = Table(html)
    assert len(table.rows[1]) == 3
    assert any(evil in cell for cell in table.rows[1])


def test_marks_are_on_words_of_the_theme_alone():
    both = pd.DataFrame([ROW | {"theme": theme, "steered": "a god, a ship"} for theme in "ab"])
    marks = Table(marked_generations(both, {"a": ["god"], "b": ["ship"], "c": ["a"]}, stem)).marks
    assert [mark for mark in marks if mark in ("god", "ship", "a")] == ["god", "ship"]
    text = "GODS, (god)! Godly “Myths”: god's, mythical; gods—myth 3gods4 _god_ ungod."
    table = shown({"steered": text})
    assert table.marks == ["GODS", "god", "Myths", "god", "gods", "myth", "gods", "god"]
    assert table.rows[1][2] == text
    assert shown({"unsteered": "One god", "steered": "None"}).marks == ["god"]
    assert shown({"steered": text}, words=()).marks == []
    assert shown({"theme": "god", "kind": "god", "steered": ""}).marks == []
    assert shown({"steered": "ÉTÉS <mark>no</mark>"}, words=["été"]).marks == ["ÉTÉS"]
    assert shown({"steered": "script & amp lt <script>"}, words=["amp", "lt"]).marks == [
        "amp",
        "lt",
    ]


def test_newlines_and_spaces_stay_visible():
    table = shown({"steered": "One\n\n  two\r\nthree"})
    assert table.rows[1][2] == "One⏎\n⏎\n  two⏎\nthree"
    styles = [attrs["style"] for tag, attrs in table.seen if tag == "td"]
    assert all("pre-wrap" in style for style in styles)


def test_it_reads_on_light_and_dark_pages_and_needs_nothing_else():
    html = marked_generations(pd.DataFrame([ROW]), {ROW["theme"]: ["god"]}, stem)
    table = Table(html)
    assert html.startswith("<table")
    assert not {tag for tag, _ in table.seen} & {"style", "script", "link", "img"}
    style = next(attrs["style"] for tag, attrs in table.seen if tag == "mark")
    assert "color: inherit" in style
    assert "underline" in style  # not told by colour alone
    colours = re.findall(r"(?:color|background): ?([^;]+);", html)
    assert all(colour == "inherit" or "rgba(" in colour for colour in colours)
    heads = [attrs.get("scope") for tag, attrs in table.seen if tag == "th"]
    assert heads == ["col"] * 3 + ["row"]


def test_a_missing_column_is_an_error_that_names_it():
    with pytest.raises(
        ValueError, match=r"no column kind, score: expected kind, theme.*found theme"
    ):
        marked_generations(pd.DataFrame([ROW]).drop(columns=["kind", "score"]), {}, stem)
