"""What steering does to texts, to be read: generations beside each other, as an HTML table."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import pandas as pd

from flowhelpers.steering.judge_embedded import WORD, stem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

COLUMNS = (
    "kind", "theme", "strategy", "layer", "strength", "sample", "unsteered", "steered",
    "behavioral", "coherence", "score",
)  # fmt: skip
# Colours are the page's own or half transparent, so that they read on light and on dark pages.
LINE = "1px solid rgba(128, 128, 128, 0.45)"
CELL = f"padding: 0.6em 0.8em; vertical-align: top; text-align: left; border-top: {LINE};"
STYLES = {
    "table": "width: 100%; table-layout: fixed; border-collapse: collapse; color: inherit;"
    " font-size: 0.95em; line-height: 1.5;",
    "head": f"{CELL} font-weight: 600;",
    "cell": f"{CELL} font-weight: normal; overflow-wrap: anywhere;",
    "text": f"{CELL} white-space: pre-wrap; overflow-wrap: anywhere;",
    "mark": "background: rgba(255, 190, 0, 0.35); color: inherit; font-weight: 600;"
    " text-decoration: underline; padding: 0 0.1em;",
    "newline": "opacity: 0.5;",
    "scores": "white-space: nowrap; font-variant-numeric: tabular-nums;",
}


def marked_generations(
    texts: pd.DataFrame, words: Mapping[str, Collection[str]], stem_of: Callable[[str], str] = stem
) -> str:
    """Texts as the model writes them beside steered ones, as HTML, the words of a theme marked.

    Args:
        texts: One row a pair: `kind` ("best cell"), `theme`, `strategy`, `layer`, `strength`,
            `sample`, the texts `unsteered` and `steered`, and of the steered one `behavioral`,
            `coherence` and `score`; missing scores are dashes.
        words: Stems of the words of each theme; of a theme that is not there none are marked.
        stem_of: Gives the stem of a word in small letters.

    Raises:
        ValueError: If columns are missing.
    """
    lacking = [name for name in COLUMNS if name not in texts]
    if lacking:
        raise ValueError(
            f"no column {', '.join(lacking)}: expected {', '.join(COLUMNS)}, "
            f"found {', '.join(map(str, texts.columns))}"
        )
    stems = {theme: frozenset(some) for theme, some in words.items()}
    widths = "".join(f'<col style="width: {share}%">' for share in (22, 39, 39))
    heads = "".join(
        _element("th", "head", name, ' scope="col"')
        for name in ("cell, scores when steered", "unsteered", "steered")
    )
    rows = [
        _element("th", "cell", _cell(row), ' scope="row"')
        + "".join(
            _element(
                "td",
                "text",
                _marked(row[name], stems.get(row["theme"], frozenset()), stem_of),
                ' dir="auto"',
            )
            for name in ("unsteered", "steered")
        )
        for row in texts.to_dict("records")
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    inside = f"<colgroup>{widths}</colgroup><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return _element("table", "table", inside)


def _element(tag: str, style: str, inside: str, more: str = "") -> str:
    return f'<{tag}{more} style="{STYLES[style]}">{inside}</{tag}>'


def _cell(row: Mapping[Any, Any]) -> str:
    """Which pair it is, and its scores."""
    where = [row["strategy"]]
    where += [f"{name} {_number(row[name])}" for name in ("layer", "strength") if _known(row[name])]
    lines = [f"<b>{_escape(row['kind'])}</b>", _escape(row["theme"])]
    lines.append(_escape(", ".join(map(str, where))))
    if _known(row["sample"]):
        lines.append(f"sample {_escape(_number(row['sample']))}")
    scores = [
        _element("span", "scores", f"{name} {_score(row[name])}")
        for name in ("behavioral", "coherence", "score")
    ]
    return "<br>".join([*lines, *scores])


def _marked(text: object, stems: frozenset[str], stem_of: Callable[[str], str]) -> str:
    """The text escaped, its theme words marked and its newlines visible; a dash if missing."""
    if not _known(text):
        return "–"
    found, at, text = [], 0, str(text)
    for match in WORD.finditer(text):
        found.append(_escape(text[at : match.start()]))
        word, at = match[0], match.end()
        is_theme = stem_of(word.lower()) in stems
        found.append(_element("mark", "mark", _escape(word)) if is_theme else _escape(word))
    found.append(_escape(text[at:]))
    newline = _element("span", "newline", "⏎") + "<br>"
    return "".join(found).replace("\r\n", "\n").replace("\n", newline)


def _known(value: object) -> bool:
    return not pd.isna(value)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _number(value: object) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}".replace("-", "−")


def _score(value: float) -> str:
    return f"{value:.2f}" if _known(value) else "–"


def _escape(text: object) -> str:
    return html.escape(str(text))
