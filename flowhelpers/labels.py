"""What a feature is about: the tokens it writes, and where it is active."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from flowhelpers.activations import FeatureActivations
from flowhelpers.features import FeatureId, Site
from flowhelpers.model import final_norm, token_strings

if TYPE_CHECKING:
    import pandas as pd

    from flowhelpers.suites import Suite


@torch.no_grad()
def written_tokens(suite: "Suite", feature: FeatureId | str, k: int = 10) -> "pd.DataFrame":
    """The tokens that a feature's direction makes most likely (logit lens through the final norm).

    Returns:
        `token` and `logit` of the k highest, best first; logits relative to their mean over the
        vocabulary, for a direction of the norm that the final norm expects.
    """
    import pandas as pd

    feature = suite.feature(feature)
    model = suite.model
    direction = suite.dictionary(feature.site).direction(feature).to(model.unembedding)
    # Without the bias that a norm may have: it writes the same tokens for every feature.
    normed = final_norm(model, direction) - final_norm(model, torch.zeros_like(direction))
    logits = normed @ model.unembedding
    top = (logits - logits.mean()).float().topk(k)
    return pd.DataFrame(
        {"token": token_strings(model, top.indices.tolist()), "logit": top.values.cpu().numpy()}
    )


def top_tokens(
    suite: "Suite", feature: FeatureId | str, activations: FeatureActivations, k: int = 10
) -> "pd.DataFrame":
    """The tokens of a corpus at which a feature is most active, each token once.

    Returns:
        `token`, `activation` (the highest at that token), `count` (how often it is active there).
    """
    import pandas as pd

    feature = suite.feature(feature)
    values = activations.of(feature)
    active = np.flatnonzero(values)
    found = pd.DataFrame(
        {"id": activations.tokens["token"].to_numpy()[active], "activation": values[active]}
    )
    best = found.groupby("id")["activation"].agg(["max", "size"]).nlargest(k, "max")
    return pd.DataFrame(
        {
            "token": token_strings(suite.model, best.index.tolist()),
            "activation": best["max"].to_numpy(),
            "count": best["size"].to_numpy(),
        }
    )


def top_contexts(
    suite: "Suite",
    feature: FeatureId | str,
    activations: FeatureActivations,
    k: int = 5,
    width: int = 8,
) -> "pd.DataFrame":
    """The places of a corpus where a feature is most active, at most one for each text.

    Returns:
        `text` (its number), `activation`, and the tokens `before`, `token`, `after`.
    """
    import pandas as pd

    feature = suite.feature(feature)
    values = activations.of(feature)
    frame = activations.tokens.assign(activation=values)
    frame = frame[frame["activation"] > 0].sort_values("activation", ascending=False)
    rows = []
    ids = activations.tokens["token"].to_numpy()
    texts = activations.tokens["text"].to_numpy()
    for row, place in frame.drop_duplicates("text").head(k).iterrows():
        span = np.arange(max(0, row - width), min(len(ids), row + width + 1))
        span = span[texts[span] == place["text"]]
        decode = suite.model.tokenizer.decode
        rows.append(
            {
                "text": int(place["text"]),
                "activation": float(place["activation"]),
                "before": decode(ids[span[span < row]].tolist()),
                "token": decode([int(ids[row])]),
                "after": decode(ids[span[span > row]].tolist()),
            }
        )
    return pd.DataFrame(rows, columns=["text", "activation", "before", "token", "after"])


def describe(
    suite: "Suite",
    features: Iterable[FeatureId | str],
    activations: FeatureActivations | None = None,
    k: int = 4,
) -> "pd.DataFrame":
    """What features write and, where activations are known, the tokens they are active at.

    Returns:
        `feature`, `writes`, `active_at` (empty if unknown) and `label`, which holds both, one a
        line.
    """
    import pandas as pd

    rows = []
    for feature in map(suite.feature, features):
        writes = _listed(written_tokens(suite, feature, k)["token"])
        reads, label = "", f"writes {writes}"
        if activations and feature.site in activations.by_site:
            reads = _listed(top_tokens(suite, feature, activations, k)["token"])
            label += f"\nactive at {reads or 'nothing read'}"
        rows.append((str(feature), writes, reads, label))
    return pd.DataFrame(rows, columns=["feature", "writes", "active_at", "label"])


def specificity(
    occurrences: "pd.DataFrame", activations: FeatureActivations, least: int = 10
) -> "pd.DataFrame":
    """Which of the features active in a sentence are strong there and rare elsewhere.

    Args:
        occurrences: The active residual features of the sentence, as `groups.occurrences` gives.
        activations: Activations on other texts, for the residual sites that are to be kept.
        least: Features active at fewer tokens of the other texts are left out.

    Returns:
        The occurrences at those sites, most specific first, with the columns `often` (share of the
        other tokens where the feature is active), `of_max` (activation as a share of the highest
        there, at most 1) and `specific`, which is -log(often) times `of_max`.
    """
    import pandas as pd

    parts = []
    for layer, part in occurrences.groupby("layer"):
        codes = activations.by_site.get(Site(int(layer), "res"))
        if codes is None:
            continue
        count = codes.getnnz(axis=0)[part["feature"]]
        highest = codes.max(axis=0).toarray()[0][part["feature"]]
        part = part.assign(often=count / codes.shape[0], highest=highest)[count >= least]
        part["of_max"] = (part["activation"] / part.pop("highest")).clip(upper=1)
        parts.append(part.assign(specific=-np.log(part["often"]) * part["of_max"]))
    none = occurrences.iloc[:0].assign(often=0.0, of_max=0.0, specific=0.0)
    found = pd.concat(parts) if parts else none
    return found.sort_values("specific", ascending=False, kind="stable", ignore_index=True)


def subject_scores(
    activations: FeatureActivations, site: Site, on_subject: np.ndarray, counted: np.ndarray
) -> "pd.DataFrame":
    """How well each feature tells the texts on one subject from others, by its mean activation.

    Args:
        activations: Activations on texts of several subjects.
        site: The site whose features are asked for.
        on_subject: For each text, whether it is on the subject.
        counted: For each text, whether it counts; the others can serve as a test.

    Returns:
        One row a feature: `auc`, the chance that a text on the subject has more of it than another
        text (0.5 for a feature that cannot tell), and `share` of its activation that is on the
        subject.

    Raises:
        ValueError: If all of the texts that count are on the subject, or none is.
    """
    import pandas as pd
    from scipy.sparse import csr_matrix
    from scipy.stats import rankdata

    mine = on_subject[counted]
    n, m = int(mine.sum()), int((~mine).sum())
    if not n or not m:
        raise ValueError(f"{n} texts on the subject and {m} others: expected some of each")
    text = activations.tokens["text"].to_numpy()
    members = csr_matrix((np.ones(len(text)), (text, np.arange(len(text)))))
    lengths = np.maximum(np.bincount(text, minlength=len(counted)), 1)[:, None]
    means = ((members @ activations.by_site[site]).toarray() / lengths)[counted]
    ranks = rankdata(means, axis=0)[mine].sum(axis=0)
    total = means.sum(axis=0)
    return pd.DataFrame(
        {
            "auc": (ranks - n * (n + 1) / 2) / (n * m),
            "share": means[mine].sum(axis=0) / np.where(total > 0, total, 1),
        }
    )


def _listed(tokens: Iterable[str]) -> str:
    stripped = [(token, token.strip()) for token in tokens]
    return ", ".join(bare if bare and bare.isprintable() else repr(t) for t, bare in stripped)
