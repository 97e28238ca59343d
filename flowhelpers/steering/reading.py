"""Texts to be read whole, with the words marked that raise the embedded judge's Behavioral."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from flowhelpers.steering.judge_embedded import WORD, stem, stems
from flowhelpers.steering.limits import theme_words

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

    from flowhelpers.steering.scores import Judge


def read_texts(
    table: pd.DataFrame, judges: Mapping[str, Judge], texts: Sequence[str] = ("text",)
) -> Styler:
    """A table without its index, whose columns `texts` are whole and marked by the `theme`'s judge.

    A judge that tells no words, such as one behind an endpoint, marks none. A token that is part of
    a character is shown as "(byte)".
    """

    def marked(theme: str, text: str) -> str:
        (words,) = theme_words(judges[theme], [text], len(text))
        known = set(stems(words))
        parts = re.split(f"({WORD.pattern})", text)
        raises = [stem(part.lower()) in known for part in parts]
        pairs = zip(parts, raises, strict=True)
        whole = "".join(f"<mark>{p}</mark>" if is_own else escape(p) for p, is_own in pairs)
        return whole.replace("\ufffd", "(byte)")

    shown = table.copy()
    for column in texts:
        rows = zip(table["theme"], table[column].astype(str), strict=True)
        shown[column] = [marked(*row) for row in rows]
    others = [column for column in shown if column not in texts]
    page = shown.style.hide().format(precision=2, na_rep="")
    page = page.format(escape="html", precision=2, na_rep="", subset=others)
    return page.set_properties(**{"white-space": "pre-wrap", "text-align": "left"})
