"""The judge that works offline: how much of a theme a text has, how well it reads (paper 5.3, B).

It reads no meaning: a text of the theme's words in grammatical order is all it asks for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowhelpers.activations.corpora import load_texts, passages, subjects
from flowhelpers.core.features import check_choice
from flowhelpers.core.progress_bar import progress
from flowhelpers.suites.model import Model, logits_of, token_losses, tokenize

if TYPE_CHECKING:
    import pandas as pd

WORD = re.compile(r"[^\W\d_]+")
WINDOW = 30  # words that the embedded judge learns from at a time, about as many as it judges
HUMAN = ("fiction", "science")  # held-out text that coherence is measured by
FOLDS = 6
LOOP = 4  # words that a text without coherence goes on repeating


@dataclass(frozen=True)
class EmbeddedJudge:
    """Looks for a theme of the package's passages; coherent is what `model`, unsteered, expects."""

    theme: str
    model: Model
    classifier: Any  # tells the subjects of the passages apart; scikit-learn's
    folds: tuple[tuple[Any, np.ndarray], ...]  # others, and the passages each was not trained on
    accuracy: float  # share of held-out pieces of passages whose subject it names
    auc: float  # how often it finds more of the theme in a held-out piece of it than in another
    human: float  # mean loss of human text in nats a token, coherence 1
    shuffled: float  # that of the same in shuffled words, coherence 0
    various: float  # share of different tokens that 95 % of human texts exceed
    looped: float  # mean share in human text that goes on repeating its first words

    @property
    def about(self) -> str:
        """What it is worth on held-out passages, in a line."""
        return (
            f"embedded, for {self.theme.replace('_', ' ')!r}: it names the subject of"
            f" {self.accuracy:.0%} of held-out pieces, and ranks one on the theme above another"
            f" {self.auc:.0%} of the time"
        )

    def judge(self, texts: Sequence[str]) -> "pd.DataFrame":
        """Scores from 0 to 1: `behavioral`, `coherence`, one row a text; of an empty text both 0.

        Behavioral is the probability of the theme among the subjects of the passages. Coherence is
        where the text's loss lies between that of shuffled and of human text, times where its share
        of different tokens lies between that of looped and of human text: nothing is more
        likely than one word over and over.
        """
        import pandas as pd

        scores = np.zeros((len(texts), 2))
        if nonempty := [number for number, text in enumerate(texts) if text.strip()]:
            judged = [texts[number] for number in nonempty]
            scores[nonempty, 0] = self.behavioral(judged)
            likely = self.shuffled - mean_losses(self.model, judged)
            various = distinct_tokens(self.model, judged) - self.looped
            likely = (likely / (self.shuffled - self.human)).clip(0, 1)
            scores[nonempty, 1] = likely * (various / (self.various - self.looped)).clip(0, 1)
        return pd.DataFrame(scores, columns=["behavioral", "coherence"])

    def behavioral(self, texts: Sequence[str], classifier: Any = None) -> np.ndarray:
        """The probability of the theme alone, of texts that are not empty."""
        classifier = classifier or self.classifier
        return classifier.predict_proba(texts)[:, list(classifier.classes_).index(self.theme)]


def embedded_judge(model: Model, theme: str, seed: int = 0) -> EmbeddedJudge:
    """Trains the embedded judge for a subject of the passages.

    The classifier is naive Bayes over word stems, calibrated on passages that it was not trained
    on; what it is worth is measured on passages left out once more. The seed decides the folds and
    the shuffled words.
    """
    check_choice("theme", theme, subjects())
    classifier, left_out, accuracy, aucs = _classifier(seed)
    worth = accuracy, aucs[theme]
    return EmbeddedJudge(theme, model, classifier, left_out, *worth, *_marks(model, seed))


@lru_cache(maxsize=2)
def _marks(model: Model, seed: int) -> tuple[float, float, float, float]:
    """`human`, `shuffled`, `various` and `looped` of a judge, by this model."""
    rng = np.random.default_rng(seed)
    human = [w for name in HUMAN for text in load_texts(name, 40, seed) for w in windows(text)[:2]]
    mixed = [" ".join(rng.permutation(text.split())) for text in human]
    loops = [" ".join((text.split()[:LOOP] * WINDOW)[:WINDOW]) for text in human]
    everything = [window for text in passages()["text"] for window in windows(text)[:1]]
    likely, unlikely = (float(mean_losses(model, texts).mean()) for texts in (human, mixed))
    various = float(np.quantile(distinct_tokens(model, everything), 0.05))
    return likely, unlikely, various, float(distinct_tokens(model, loops).mean())


@torch.no_grad()
def mean_losses(model: Model, texts: Sequence[str], batch: int = 32) -> np.ndarray:
    """The model's mean next-token cross-entropy over each text in nats; ∞ without a token."""
    losses = []
    for start in progress(range(0, len(texts), batch), "likelihood"):
        tokens = tokenize(model, texts[start : start + batch], model.bridge.cfg.n_ctx)
        loss = token_losses(logits_of(model, tokens.ids)[:, :-1], tokens.ids[:, 1:])
        counted = tokens.is_text[:, 1:]
        total, n = (loss * counted).sum(1), counted.sum(1)
        losses.append(torch.where(n > 0, total / n.clamp(min=1), torch.inf).cpu().numpy())
    return np.concatenate(losses)


def distinct_tokens(model: Model, texts: Sequence[str], width: int = 32) -> np.ndarray:
    """Share of different ones among the tokens of each text (distinct-1, Li et al. 2016).

    It is the mean over pieces of `width` tokens, as a longer text has fewer; 1 where there is none.
    """
    distinct = []
    for ids in model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        pieces = [ids[start : start + width] for start in range(0, len(ids), width)]
        shares = [len(set(piece)) / len(piece) for piece in pieces if len(piece) > width // 4]
        distinct.append(np.mean(shares) if shares else 1.0)
    return np.array(distinct)


def windows(text: str, words: int = WINDOW) -> list[str]:
    """A text in pieces of so many words; a rest shorter than half of that is left out."""
    all_words = text.split()
    starts = range(0, max(len(all_words) - words // 2 + 1, 1), words)
    return [" ".join(all_words[start : start + words]) for start in starts]


@cache
def _classifier(seed: int) -> tuple[Any, tuple, float, dict[str, float]]:
    """It, those of the folds, the accuracy, and each subject's AUC, by passages left out."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.naive_bayes import ComplementNB
    from sklearn.pipeline import make_pipeline

    table = passages().assign(text=lambda rows: rows["text"].map(windows)).explode("text")
    pieces, subject = (table[column].to_numpy(str) for column in ("text", "subject"))

    def folds(of: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        return list(splitter.split(pieces[of], subject[of], table.index.to_numpy()[of]))

    def fitted(of: np.ndarray) -> Any:
        vectors = TfidfVectorizer(tokenizer=stems, token_pattern=None, sublinear_tf=True)
        bayes, options = make_pipeline(vectors, ComplementNB()), {"method": "temperature"}
        calibrated = CalibratedClassifierCV(bayes, cv=folds(of), ensemble=False, **options)
        return calibrated.fit(pieces[of], subject[of])

    everything = np.arange(len(pieces))
    classifier = fitted(everything)
    names = classifier.classes_
    chances = np.zeros((len(pieces), len(names)))
    left_out = []
    for train, test in progress(folds(everything), "judge"):
        left_out.append((fitted(train), np.unique(table.index[test])))
        chances[test] = left_out[-1][0].predict_proba(pieces[test])
    accuracy = float((names[chances.argmax(axis=1)] == subject).mean())
    aucs = [float(roc_auc_score(subject == name, chances[:, i])) for i, name in enumerate(names)]
    return classifier, tuple(left_out), accuracy, dict(zip(names.tolist(), aucs, strict=True))


def stems(text: str) -> list[str]:
    """The stems of the words of a text."""
    return [stem(word) for word in WORD.findall(text.lower())]


@cache
def stem(word: str) -> str:
    """The stem of a word in small letters (Snowball)."""
    from nltk.stem.snowball import SnowballStemmer

    return SnowballStemmer("english").stem(word)
