"""Steered texts beside unsteered ones, as an HTML table to be read."""

import html
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from flowhelpers.steering.judge_embedded import WORD, stem

if TYPE_CHECKING:
    import pandas as pd

CELL = {"vertical-align": "top", "text-align": "left", "white-space": "pre-wrap"}
TABLE = [{"selector": "", "props": [("width", "100%"), ("table-layout", "fixed")]}]
SHOWN = ["kind", "theme", "strategy", "layer", "strength", "sample"]


def marked_generations(texts: "pd.DataFrame", words: Mapping[str, Collection[str]]) -> str:
    """The texts `unsteered` and `steered` side by side, the words of their theme marked.

    Args:
        texts: As `beside_unsteered` gives.
        words: Stems of the words of each theme.
    """
    import pandas as pd

    rows = []
    for row in texts.to_dict("records"):
        stems = frozenset(words.get(row["theme"], ()))
        cell = [f"{name}: {row[name]}" for name in SHOWN if not pd.isna(row[name])]
        scores = [f"{name}: {row[name]:.2f}" for name in ("behavioral", "coherence", "score")]
        both = [_marked(row[name], stems) for name in ("unsteered", "steered")]
        rows.append((html.escape("\n".join(cell + scores)), *both))
    table = pd.DataFrame(rows, columns=["cell, scores when steered", "unsteered", "steered"])
    style = table.style.hide(axis="index").set_properties(**CELL).set_table_styles(TABLE)
    return style.to_html(table_uuid="generations")


def _marked(text: str, stems: Collection[str]) -> str:
    return "".join(
        f"<mark>{html.escape(piece)}</mark>" if stem(piece.lower()) in stems else html.escape(piece)
        for piece in re.split(f"({WORD.pattern})", text)
    )
