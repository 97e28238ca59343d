"""What a feature is about: the tokens it writes, and where it is active."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from flowhelpers.activations import FeatureActivations
from flowhelpers.features import FeatureId
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
    direction = suite.dictionary(feature.site).direction(feature)
    logits = final_norm(model, direction.to(model.unembedding)) @ model.unembedding
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
