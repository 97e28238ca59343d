"""Steered texts beside unsteered ones, as an HTML table to be read."""

import html
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from flowhelpers.steering.judge_embedded import WORD, stem

if TYPE_CHECKING:
    import pandas as pd

CELL = {"vertical-align": "top", "text-align": "left", "white-space": "pre-wrap"}
TEXTS = ["unsteered", "steered"]


def marked_generations(texts: "pd.DataFrame", words: Mapping[str, Collection[str]]) -> str:
    """The texts of `beside_unsteered`, the words of their theme, given by their stems, marked."""
    marked = texts.drop(columns=["cell", "text"])
    for column in TEXTS:
        both = zip(texts[column], texts["theme"], strict=True)
        marked[column] = [_marked(text, words.get(theme, ())) for text, theme in both]
    style = marked.style.hide(axis="index").set_properties(**CELL)
    style.format(precision=2, na_rep="", escape="html", subset=marked.columns.difference(TEXTS))
    return style.to_html(table_uuid="generations")


def _marked(text: str, stems: Collection[str]) -> str:
    return "".join(
        f"<mark>{html.escape(piece)}</mark>" if stem(piece.lower()) in stems else html.escape(piece)
        for piece in re.split(f"({WORD.pattern})", text)
    )
