"""The sample of an experiment: texts of several datasets, and tokens chosen in each (paper A.1)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations.corpora import CORPORA, LOCAL_DATASETS, PAPER_DATASETS, load_texts
from flowhelpers.suites.model import Model, Tokens, tokenize

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.registry import SuiteRow

MAX_TOKENS = 128  # of a text, BOS included, unless told otherwise


@dataclass(frozen=True)
class Sample:
    """Texts, and the tokens chosen in them.

    Attributes:
        texts: One row a text: `dataset`, `text`, and `eligible`, the tokens to choose from.
        tokens: One row a chosen token, by text and position: `dataset`, `text` (row of `texts`),
            `position` (0 is BOS), `token` (its id).
        ids: The texts as token ids, a row each.
    """

    texts: "pd.DataFrame"
    tokens: "pd.DataFrame"
    ids: Tokens


def datasets_for(row: "SuiteRow") -> tuple[str, ...]:
    """The paper's four datasets for a suite of the hub; four without network for a local one."""
    return LOCAL_DATASETS if row.is_local else tuple(PAPER_DATASETS)


def texts_of(datasets: Sequence[str], n_texts: int, seed: int = 0) -> dict[str, list[str]]:
    """So many texts of each dataset, or all that it has; names in `CORPORA`, or your own paths."""
    if isinstance(datasets, str) or not datasets or len(set(datasets)) < len(datasets):
        raise ValueError(f"datasets {datasets!r}: expected some of {', '.join(CORPORA)}, each once")
    return {name: load_texts(name, n_texts, seed, or_fewer=True) for name in datasets}


def unscored_texts(corpus: str, n: int, scored: Iterable[str], seed: int = 0) -> list[str]:
    """At most `n` texts of a corpus, none of them among those `scored`: for `pearson` (C.4).

    A correlation chooses matches for being active together; on texts that it has read, it would be
    judged by what chose it. Texts are the same where all their characters are.

    Raises:
        ValueError: If `n` is below 1, or all texts of the corpus are scored.
    """
    if n < 1:
        raise ValueError(f"{n} texts of {corpus!r} for pearson: expected 1 or more")
    known = set(scored)
    there = load_texts(corpus, n + len(known), seed, or_fewer=True)
    texts = [text for text in there if text not in known]
    if not texts:
        told = f"all {len(there)} texts of {corpus!r} are scored, and none is left for pearson"
        raise ValueError(f"{told}: score fewer, or give another pearson_corpus")
    return texts[:n]


def text_length(model: Model, usual: int = MAX_TOKENS) -> int:
    """Where texts of our own are cut: as usual, or where the model's context ends, if sooner."""
    return min(usual, model.bridge.cfg.n_ctx)


def draw_sample(
    model: Model,
    texts: Mapping[str, Sequence[str]],
    tokens_per_text: int = 5,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> Sample:
    """Chooses tokens at random in every text, none twice (paper A.1; CHOICES 6 and 31).

    `texts` are by dataset, each cut to `max_tokens`, BOS included; the paper gives no length. BOS
    and other special tokens are never chosen. A text with fewer tokens gives all.

    Raises:
        ValueError: If `tokens_per_text` is below 1, or a dataset leaves no token to choose.
    """
    import pandas as pd

    if not isinstance(tokens_per_text, int) or tokens_per_text < 1:
        raise ValueError(f"tokens_per_text={tokens_per_text}: expected 1 or more")
    named = [(dataset, text) for dataset, some in texts.items() for text in some]
    frame = pd.DataFrame(named, columns=["dataset", "text"])
    ids = tokenize(model, frame["text"].tolist(), max_tokens)
    is_text = ids.is_text.cpu().numpy()
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int]] = []
    for number, allowed in enumerate(is_text):
        there = np.flatnonzero(allowed)
        chosen = rng.choice(there, min(tokens_per_text, len(there)), replace=False)
        rows += [(number, int(position)) for position in np.sort(chosen)]
    tokens = pd.DataFrame(rows, columns=["text", "position"])
    tokens["token"] = ids.ids.cpu().numpy()[tokens["text"], tokens["position"]]
    tokens.insert(0, "dataset", frame["dataset"].to_numpy()[tokens["text"]])
    if empty := [dataset for dataset in texts if dataset not in set(tokens["dataset"])]:
        raise ValueError(f"{empty[0]!r} has no text, or its texts hold special tokens only")
    return Sample(frame.assign(eligible=is_text.sum(axis=1)), tokens, ids)


def sample_sizes(sample: Sample, n_texts: int, tokens_per_text: int) -> "pd.DataFrame":
    """What was asked for and what there is, by dataset; `short_texts` have too few tokens."""
    eligible = sample.texts.groupby("dataset", sort=False)["eligible"]
    found = eligible.agg(texts="size").assign(
        texts_asked=n_texts,
        tokens=sample.tokens.groupby("dataset").size(),
        tokens_asked=n_texts * tokens_per_text,
        short_texts=eligible.agg(lambda tokens: int((tokens < tokens_per_text).sum())),
    )
    return found.reset_index()
