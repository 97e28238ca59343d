"""What a notebook says to its reader: answers below a fold, and what it found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from flowhelpers.core.features import check_choice

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Markdown
    from pandas.io.formats.style import Styler

    from flowhelpers.runs.run import Run

Verdict = Literal["holds here", "not seen here", "cannot be told here", "not asked here"]
NO_NUMBER = re.compile(r"[+-]?\bnan\b%?")
SAID = {"not seen here": "is not seen here"} | {v: v for v in ("holds here", "cannot be told here")}


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

    said = NO_NUMBER.sub("too few", text)
    return Markdown(f"<details><summary>What came out</summary>\n\n{said}\n\n</details>")


def verdict_of(low: float, high: float) -> Verdict:
    """On the claim that a difference is above 0, by the ends of its interval."""
    return "holds here" if low > 0 else "not seen here" if high < 0 else "cannot be told here"


def spread(of: Any, digits: str = ".2f", name: str = "difference", sign: str = "+") -> str:
    """A number and its 95 % interval, as in "+0.12 (+0.05 to +0.22)"; never -0.00.

    `of` is a row that has them as `name`, `name`_low and `name`_high, or the three numbers; with
    the sign "-" they have no plus, as where they are no difference. A difference in % is in points.
    """
    names = [name + end for end in ("", "_low", "_high")]
    three = [getattr(of, each) for each in names] if hasattr(of, name) else of
    value, *ends = (f"{x:{sign}z{digits}}" for x in three)
    told = value if NO_NUMBER.search(value) else "{} ({} to {})".format(value, *ends)
    return told.replace("%", " points", 1).replace("%", "") if sign == "+" else told


def show(table: pd.DataFrame, digits: int = 2, caption: str = "") -> Styler:
    """A table for its reader: texts whole, numbers of few digits, no bare row numbers."""
    import pandas as pd

    is_bare = table.index.names == [None] and pd.api.types.is_numeric_dtype(table.index)
    table = table.reset_index(drop=True) if is_bare else table  # a Styler takes each label once
    look = {"white-space": "pre-wrap", "text-align": "left"}
    texts = [*table.columns[[not pd.api.types.is_numeric_dtype(each) for each in table.dtypes]]]
    short = [each for each in ("layer", "strength") if each in table and each not in texts]
    is_float, number = pd.api.types.is_float, f"{{:z.{digits}f}}".format  # never -0.00
    style = table.style.format(lambda x: number(x) if is_float(x) else x, na_rep="", escape="html")
    style = style.format("{:zg}", subset=short, na_rep="")
    style = style.set_properties(texts, **look)
    style = style.set_table_styles([{"selector": "th", "props": "text-align: left"}])
    style = style.set_caption(caption) if caption else style
    return style.hide(axis="index") if is_bare else style


def conclude(run: Run, findings: Sequence[Finding]) -> Markdown:
    """Writes what was found to `results.json`, as `findings`, and shows it as paragraphs.

    Where a number is missing, for want of cases, no verdict is given.
    """
    from IPython.display import Markdown

    findings = [_without_nan(finding) for finding in findings]
    run.results({"findings": [asdict(finding) for finding in findings]})
    return Markdown(
        "\n\n".join(
            f"**{each.claim}**\n\n{each.ours} {each.control} *This {SAID[each.verdict]}.*"
            if each.verdict != "not asked here"
            else f"**{each.claim}**\n\n*This was {each.verdict}.* {each.ours}"
            for each in findings
        )
    )


def _without_nan(finding: Finding) -> Finding:
    ours, control = (NO_NUMBER.sub("too few", text) for text in (finding.ours, finding.control))
    if (ours, control) == (finding.ours, finding.control):
        return finding
    return Finding(finding.claim, ours, control, "cannot be told here")
