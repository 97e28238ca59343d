"""Which feature stands for a subject: by where it is active, not by how well it tells texts apart.

A feature of the letter g may tell weddings from all else, for Wolfgang and kindergarten are there.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowhelpers.activations.sampling import text_length
from flowhelpers.activations.sparse import FeatureActivations, collect
from flowhelpers.core.features import FeatureId, Site, parse_feature
from flowhelpers.labels.describe import auc_and_share, text_means
from flowhelpers.suites.model import token_strings

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites.load import Suite

CONTEXTS = 8  # of a half, each in another passage
LEAST, TIMES = 4, 3  # contexts of a half that have to count; times what other subjects have
TELLS = 0.9  # the AUC, or it is a word that few of the subject's passages have
SHOWN, OF_SHOWN = 5, 4  # contexts that a reader sees first, and of them
SHORTLIST = 20
COLUMNS = ["subject", "feature", "contexts", "before", "after", "strong_share", "auc"]
COLUMNS += ["contexts_other", "strong_share_other", "auc_other", "first", "passes"]


def subject_features(
    suite: "Suite", activations: FeatureActivations, topics: Sequence[str], matches: "pd.DataFrame"
) -> "pd.DataFrame":
    """The residual features that may stand for each subject, best first.

    A word belongs to a subject if two thirds of the passages that hold it are on it; it has three
    letters or more, and its token begins it. A feature's contexts are its strongest tokens, one a
    passage, the eight strongest of a half; one counts if it is such a word in a passage on the
    subject. Its strong share is how much of its activation lies on the subject, over the tokens
    where it is at least half as active as it ever is.

    A feature may stand for the subject if, on every second passage of each subject, 4 contexts
    count, the strong share is 3 times what the others have on average or more, the AUC 0.9 or more.
    The 20 best are kept, by contexts (of 8, with a quarter of those of the matches in the layers
    before and after), plus strong share, plus AUC. Those pass for which the same holds on the other
    half, and of whose 5 strongest contexts of all passages 4 count.

    Args:
        topics: The subject of each passage.
        matches: A match table of the suite, for the layers before and after.

    Returns:
        One row a subject and feature: `contexts`, `before`, `after` (how many count, of it and of
        its matches; 0 where those were not read), `strong_share`, `auc` (as `subject_scores`) on
        the half for choosing; three of these on the other half; `first`, of the 5 strongest;
        `passes`.
    """
    import pandas as pd

    names = pd.Series(list(topics), name="subject")
    half = (names.groupby(names).cumcount() % 2 == 0).to_numpy()
    is_word = _own_words(suite, activations, names)
    sites = [site for site in activations.by_site if site.module == "res"]
    counts = {site: _counts(activations, site, names, half, is_word) for site in sites}
    texts, parts = activations.tokens["text"].to_numpy(), [pd.DataFrame(columns=COLUMNS)]
    for site, count in counts.items():
        chosen = count[count["contexts"] >= LEAST].reset_index()
        for name, (near, match) in _neighbours(matches, site).items():
            places = [chosen["subject"], chosen["feature"].map(match).fillna(-1).astype(int)]
            there = counts[near]["contexts"] if near in counts else pd.Series(dtype=int)
            chosen[name] = there.reindex(pd.MultiIndex.from_arrays(places)).fillna(0).to_numpy()
        means = text_means(activations, site, chosen["feature"].tolist())
        by_feature = activations.by_site[site].tocsc()
        for subject, part in chosen.groupby("subject", sort=False):
            on, own = (names == subject).to_numpy(), means[:, part.index]
            codes = by_feature[:, part["feature"].tolist()].toarray()
            for end, h in (("", half), ("_other", ~half)):
                part[f"auc{end}"] = auc_and_share(own[h], on[h])["auc"].to_numpy()
                part[f"strong_share{end}"] = _strong_share(codes[h[texts]], on[texts][h[texts]])
            parts.append(part.assign(feature=[f"{site}/{i}" for i in part["feature"]]))
    found = pd.concat(parts[1:] or parts, ignore_index=True)
    high = TIMES / (TIMES + names.nunique() - 1)
    found = found[(found["strong_share"] >= high) & (found["auc"] >= TELLS)]
    rank = (found["contexts"] + (found["before"] + found["after"]) / 4) / CONTEXTS
    found = found.assign(rank=(rank + found["strong_share"] + found["auc"]).astype(float))
    found = found.sort_values("rank", ascending=False).groupby("subject", sort=False)
    found = found.head(SHORTLIST)
    passes = (found["contexts_other"] >= LEAST) & (found["strong_share_other"] >= high)
    passes &= (found["auc_other"] >= TELLS) & (found["first"] >= OF_SHOWN)
    found, by = found.assign(passes=passes.astype(bool)), ["subject", "passes", "rank"]
    return found.sort_values(by, ascending=[True, False, False], ignore_index=True)[COLUMNS]


def feature_of_subject(features: "pd.DataFrame", subject: str) -> FeatureId | None:
    """The best feature that passes for a subject; None if no subject of the table has one.

    Raises:
        ValueError: If this one has none, or is no subject; names those that have one.
    """
    passing = features[features["passes"].astype(bool)].drop_duplicates("subject")
    passing = passing.set_index("subject")["feature"]
    if subject in passing.index:
        return parse_feature(passing[subject])
    if len(passing):
        raise ValueError(
            f"no feature here stands for {subject!r}: expected a subject that has one,"
            f" {', '.join(passing.index)}, or a feature of your own"
        )
    return None


def shares_on(
    activations: FeatureActivations, topics: Sequence[str], subject: str, features: Iterable[str]
) -> dict[str, float]:
    """The share of each feature's activation that lies in passages on a subject.

    `topics` are the subjects of the passages. Features of sites that were not read are left out.
    """
    on = (np.asarray(topics, dtype=object) == subject)[activations.tokens["text"]]
    read = {name: parse_feature(name) for name in features}
    read = {name: f for name, f in read.items() if f.site in activations.by_site}
    values = {name: activations.of(feature) for name, feature in read.items()}
    return {n: float(v[on].sum() / v.sum()) if v.any() else np.nan for n, v in values.items()}


def strongest_sentences(
    suite: "Suite",
    feature: FeatureId | str,
    texts: Sequence[str],
    others: Sequence[FeatureId | str] = (),
    k: int = 8,
) -> "pd.DataFrame":
    """The sentences of texts in which a feature is most active, each read by itself.

    Columns `sentence`, `activation`, and `active`: how many of the others are active at the token
    where the feature is strongest. Sentences where any is stand first, the strongest of each kind
    before; those where the feature is not active are left out.
    """
    import pandas as pd

    chosen, beside = suite.feature(feature), suite.features(others)
    cut = (re.split(r"(?<=[.!?])[\"”’]?\s+", text.strip()) for text in texts)
    sentences = list(dict.fromkeys(s for some in cut for s in some if len(s.split()) > 3))
    table = pd.DataFrame(columns=["sentence", "activation", "active"])
    if sentences:
        sites = [chosen.site, *(other.site for other in beside)]
        read = collect(suite, sentences, sites, text_length(suite.model))
        active = sum((read.of(other) > 0).astype(int) for other in beside)
        values = {"text": read.tokens["text"], "activation": read.of(chosen), "active": active}
        table = pd.DataFrame(values).sort_values("activation", ascending=False)
        table = table[table["activation"] > 0].drop_duplicates("text").head(k)
        table = table.assign(any=table["active"] > 0)
        table = table.sort_values(["any", "activation"], ascending=False, ignore_index=True)
        table["sentence"] = [sentences[text] for text in table["text"]]
    return table[["sentence", "activation", "active"]]


def _own_words(suite: "Suite", activations: FeatureActivations, names: "pd.Series") -> np.ndarray:
    """Which tokens are words that belong to the subject of their passage."""
    import pandas as pd

    tokens = activations.tokens[["text", "token"]]
    strings = pd.Series(token_strings(suite.model, tokens["token"].tolist()))
    goes_on = strings.str.slice(-1).str.isalpha().shift(fill_value=False)
    goes_on &= tokens["text"].eq(tokens["text"].shift()).to_numpy()
    bare = strings.str.strip()
    is_word = bare.str.isalpha() & (bare.str.len() >= 3)
    is_word &= ~goes_on | strings.str.slice(0, 1).str.isspace()
    topic = names.to_numpy()[tokens["text"]]
    passages = tokens.assign(topic=topic).drop_duplicates()
    everywhere = passages.groupby("token").size().reindex(tokens["token"]).to_numpy()
    places = pd.MultiIndex.from_arrays([tokens["token"], topic])
    own = passages.groupby(["token", "topic"]).size().reindex(places).to_numpy()
    return is_word.to_numpy() & (3 * own >= 2 * everywhere)


def _counts(
    activations: FeatureActivations, site: Site, names: "pd.Series", half: np.ndarray,
    is_word: np.ndarray,
) -> "pd.DataFrame":  # fmt: skip
    """By subject and feature, how many of the strongest contexts count, of each half and of all."""
    import pandas as pd

    codes = activations.by_site[site].tocoo()
    text = activations.tokens["text"].to_numpy()[codes.row]
    columns = {"feature": codes.col, "text": text, "row": codes.row, "activation": codes.data}
    peaks = pd.DataFrame(columns).sort_values("activation", ascending=False, kind="stable")
    peaks = peaks[peaks["activation"] > 0].drop_duplicates(["feature", "text"])
    chosen_on = half[peaks["text"]]
    first = peaks.groupby("feature").cumcount() < SHOWN
    rank = peaks.groupby([peaks["feature"], chosen_on]).cumcount()
    own = is_word[peaks["row"]]
    counts = own & (rank < CONTEXTS)
    columns = {"contexts": counts & chosen_on, "contexts_other": counts & ~chosen_on}
    columns["first"] = own & first
    places = [names.loc[peaks["text"]].set_axis(peaks.index), peaks["feature"]]
    return pd.DataFrame(columns).groupby(places).sum()


def _strong_share(codes: np.ndarray, on: np.ndarray) -> np.ndarray:
    """Of columns of activations, what tokens on the subject have of those of half the highest."""
    strong = np.where(codes >= codes.max(axis=0) / 2, codes, 0)
    return strong[on].sum(axis=0) / np.maximum(strong.sum(axis=0), 1e-9)


def _neighbours(matches: "pd.DataFrame", site: Site) -> "dict[str, tuple[Site, pd.Series]]":
    """Of the features of a site, the best matches in the stream one layer before and after."""
    best = matches[(matches["rank"] == 1) & (matches["module"] == "res")]
    back = best[(best["direction"] == "backward") & (best["layer"] == site.layer)]
    on = best[(best["direction"] == "forward") & (best["source_layer"] == site.layer)]
    before, after = (Site(site.layer + by, "res") for by in (-1, 1))
    return {
        "before": (before, back.set_index("feature")["source"]),
        "after": (after, on.set_index("source")["feature"]),
    }
