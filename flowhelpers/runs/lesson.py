"""What a notebook says to its reader: answers below a fold, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from flowhelpers.core.features import check_choice

if TYPE_CHECKING:
    from IPython.display import Markdown

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


def within(value: float, low: float, high: float, digits: int = 2) -> str:
    """A number and its 95 % interval, as in "0.12 (0.05 to 0.22)"."""
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def answer(text: str) -> Markdown:
    """The answer to a prediction, below a fold that its reader opens."""
    from IPython.display import Markdown

    return Markdown(f"<details><summary>What came out</summary>\n\n{text}\n\n</details>")


def conclude(run: Run, findings: Sequence[Finding]) -> Markdown:
    """Writes what was found to `results.json`, as `findings`, and shows it as paragraphs."""
    from IPython.display import Markdown

    run.results({"findings": [asdict(finding) for finding in findings]})
    return Markdown(
        "\n\n".join(
            f"**{each.claim}**\n\n{each.ours} {each.control} *This {each.verdict}.*"
            if each.verdict != "not asked here"
            else f"**{each.claim}**\n\n*This was {each.verdict}.* {each.ours}"
            for each in findings
        )
    )
