"""Pages that open with no network: the look that all share, and a figure on one."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

from flowhelpers.core.files import DATA

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def page_file(name: str) -> str:
    """A template or style of the folder `data/pages`."""
    return (DATA / "pages" / name).read_text("utf-8")


def page(title: str, body: str, head: str = "") -> str:
    """A page of this title, which is text, around a body and more of a head, which are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{page_file('style.css')}{page_file('page.css')}</style>{head}\n"
        f"</head><body>\n{body}\n</body></html>\n"
    )


def figure_title(figure: dict[str, Any]) -> str:
    """Title and subtitle of a plotly figure as text."""
    title = (figure.get("layout") or {}).get("title") or {}
    texts = [title.get("text"), (title.get("subtitle") or {}).get("text")]
    plain = (re.sub(r"\s*<[^>]*>\s*", " ", text) for text in texts if text)
    return html.unescape(". ".join(plain)).replace("?. ", "? ")


def figure_html(figure: Figure | dict[str, Any], script: str | bool = False, **config: Any) -> str:
    """A plotly figure as part of a page, titled for those who cannot see it.

    Args:
        script: How plotly.js comes along, as plotly's `include_plotlyjs`; False if the page has it.
        config: Of plotly.js, beside `core.figures.CONFIG`.
    """
    import plotly.io

    from flowhelpers.core.figures import CONFIG

    plain: Any = figure if isinstance(figure, dict) else figure.to_plotly_json()
    parts = {key: plain[key] for key in ("data", "layout", "frames") if key in plain}
    options: dict[str, Any] = {"include_plotlyjs": script, "full_html": False, "validate": False}
    config = (plain.get("config") or {}) | CONFIG | config
    drawn = plotly.io.to_html(parts, config, default_height="450px", **options)
    label = html.escape(figure_title(plain) or "figure")
    return f'<figure class="plot" role="img" aria-label="{label}">{drawn}</figure>'
