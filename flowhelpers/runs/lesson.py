"""What a notebook says to its reader: answers below a fold, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from flowhelpers.core.features import check_choice

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Markdown
    from pandas.io.formats.style import Styler

    from flowhelpers.runs.run import Run

Verdict = Literal["holds here", "not seen here", "cannot be told here", "not asked here"]


@dataclass(frozen=True)
class Finding:
    """One claim of the paper, or a question of ours, and what this run says to it, in sentences."""

    claim: str
    ours: str
    control: str  # what chance, or the control, gives
    verdict: Verdict

    def __post_init__(self) -> None:
        check_choice("verdict", self.verdict, get_args(Verdict))


def answer(text: str) -> Markdown:
    """The answer to a prediction, below a fold that its reader opens."""
    from IPython.display import Markdown

    return Markdown(f"<details><summary>What came out</summary>\n\n{text}\n\n</details>")


def shown(table: pd.DataFrame, digits: int = 3) -> Styler:
    """A table for reading: without its index, its texts whole and from the left."""
    texts = [name for name in table if table[name].dtype.kind not in "iufb"]
    style = (
        table.reset_index(drop=True).style.hide(axis="index").format(precision=digits, na_rep="–")
    )
    looks = {"text-align": "left", "white-space": "pre-wrap", "max-width": "40rem"}
    return style.set_properties(subset=texts, **looks)  # pyright: ignore[reportArgumentType]


def conclude(run: Run, findings: Sequence[Finding]) -> Markdown:
    """Writes what was found to `results.json`, as `findings`, and shows it as paragraphs."""
    from IPython.display import Markdown

    run.results({"findings": [asdict(finding) for finding in findings]})
    return Markdown(
        "\n\n".join(
            f"**{each.claim}**\n\n{each.ours} {each.control}"
            f" *This {'was ' * each.verdict.startswith('not ')}{each.verdict}.*"
            if each.verdict != "not asked here"
            else f"**{each.claim}**\n\n*This was {each.verdict}.* {each.ours}"
            for each in findings
        )
    )
