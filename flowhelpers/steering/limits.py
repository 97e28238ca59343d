"""What a judge cannot see, measured: its scores of texts whose worth is known beforehand."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flowhelpers.activations.corpora import passages
from flowhelpers.steering.judge_embedded import LOOP, WORD, EmbeddedJudge, stem
from flowhelpers.steering.scores import Judge
from flowhelpers.steering.themes import Theme

if TYPE_CHECKING:
    import pandas as pd

ON_THEME, OTHERS, HALVES = "human, on the theme", "human, other subjects", "halves of two of these"
SHUFFLED, LOOPED, OWN = "their words shuffled", "four words repeated", "this model's own, unsteered"
SHORTEST, READS_WELL = 8, 0.9


def judge_limits(judge: Judge, theme: Theme, own: Sequence[str], seed: int = 0) -> "pd.DataFrame":
    """What a judge gives to texts whose worth is known, all as long as the model's `own` texts.

    `own` are texts of the unsteered model. The human ones are of the package's passages, 24 on the
    theme and two of each other subject. An embedded judge scores `behavioral` of these by
    classifiers that were not trained on them. A half of one text and a half of another are fluent
    and have no sense.

    Returns:
        One row a kind of text: `text`, `n`, mean `behavioral` and `coherence`, the share
        `reads_well` of those with a coherence above 0.9, and the `example` of greatest coherence.
    """
    import pandas as pd

    rng, rows = np.random.default_rng(seed), []
    words = max(SHORTEST, int(np.median([len(text.split()) for text in own])))
    human = passages().groupby("subject").head(24)
    is_theme = human["subject"] == theme.subject
    human = human[is_theme | (human.groupby("subject").cumcount() < 2)]
    pieces = human["text"].map(lambda text: text.split()[:words])
    on_theme, others = (pieces[is_theme[human.index] == here] for here in (True, False))
    half, parts = words // 2, others.to_list()
    after = [*parts[2:], *parts[:2]]  # of another subject: each has two
    kinds = {
        ON_THEME: on_theme,
        OTHERS: others,
        HALVES: [a[:half] + b[half:] for a, b in zip(parts, after, strict=True)],
        SHUFFLED: [rng.permutation(part) for part in parts],
        LOOPED: [(part[:LOOP] * words)[:words] for part in parts],
        OWN: [text.split() for text in own],
    }
    for kind, some in kinds.items():
        texts = [" ".join(each) for each in some]
        scores = judge.judge(texts)
        if isinstance(judge, EmbeddedJudge) and kind in (ON_THEME, OTHERS):
            left_out = pd.Series(texts, some.index)
            for classifier, numbers in judge.folds:
                of_fold = left_out.index.isin(numbers)
                if of_fold.any():
                    found = judge.behavioral(left_out[of_fold].to_list(), classifier)
                    scores.loc[of_fold, "behavioral"] = found
        means = scores[["behavioral", "coherence"]].mean().to_dict()
        reads_well = (scores["coherence"] > READS_WELL).mean()
        best = texts[int(scores["coherence"].fillna(-1).argmax())]
        row = {"text": kind, "n": len(texts)} | means
        rows.append(row | {"reads_well": reads_well, "example": best})
    return pd.DataFrame(rows)


def limits_note(limits: "pd.DataFrame") -> str:
    """What coherence is worth, in a line to stand beside scores."""
    coherence = limits.set_index("text")["coherence"]
    names = {OTHERS: "human text", OWN: "unsteered", HALVES: "halves of two texts"}
    names |= {SHUFFLED: "shuffled words"}
    return "coherence: " + ", ".join(f"{name} {coherence[of]:.2f}" for of, name in names.items())


def theme_words(judge: Any, texts: Sequence[str], most: int = 4) -> list[str]:
    """The words of each text that raise an embedded judge's Behavioral most, the strongest first.

    Without the word its odds are at most two thirds. Of another judge, or of an empty text, "".
    """
    if not isinstance(judge, EmbeddedJudge):
        return [""] * len(texts)
    found = []
    for text in texts:
        if not WORD.search(text):
            found.append("")
            continue
        words = {stem(word.lower()): word for word in reversed(WORD.findall(text))}
        without = [
            WORD.sub(lambda at, of=of: "" if stem(at[0].lower()) == of else at[0], text)
            for of in words
        ]
        chances = judge.behavioral([text, *without]).clip(1e-9, 1 - 1e-9)
        odds = chances / (1 - chances)
        falls = sorted(zip(odds[0] / odds[1:], words.values(), strict=True), reverse=True)
        found.append(", ".join(word for fall, word in falls[:most] if fall >= 1.5))
    return found
