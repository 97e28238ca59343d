"""Checks for the exercises of the notebooks."""


def check(answer: float | str | None, truth: float | str, tolerance: float = 0.01) -> str:
    """Says whether an answer is right, without giving the right one away.

    Args:
        answer: The reader's answer; None until there is one.
        truth: The right one; a word is compared without regard to case.
        tolerance: How far a number may be off.
    """
    if answer is None:
        return "no answer yet: put yours in place of None and run the cell again"
    if isinstance(truth, str):
        right = isinstance(answer, str) and answer.strip().lower() == truth.lower()
        return "right" if right else f"{answer!r} is not it: try again"
    if isinstance(answer, str):
        return f"{answer!r} is a word: a number is wanted"
    if abs(answer - truth) <= tolerance:
        return "right"
    return f"{answer:g} is too {'high' if answer > truth else 'low'}: try again"
