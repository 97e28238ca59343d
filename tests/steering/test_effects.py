"""Effects of features, beside passes that are made and read by hand, one feature at a time."""

from dataclasses import replace

import pytest
import torch
import toys
from transformers import Gemma3ForCausalLM

from flowhelpers.core.features import FeatureId, Site, parse_feature
from flowhelpers.interventions.edits import add
from flowhelpers.steering.themes import output_scores
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Model, logits_of, run_model, tokenize
from flowhelpers.suites.saes import make_sae

PROMPT = "The cat sat"
# Of several sites, not in the order of sites or indices. At 1/att an SAE reads z.
FEATURES = ["1/res/3", "0/mlp/2", "2/att/1", "1/res/0", "1/mlp/6", "0/res/5", "2/res/1", "1/mlp/1"]
FEATURES += ["1/att/4", "1/att/0", "1/att/2"]
COLUMNS = ["output_score", "confidence_change"]


def by_hand(
    suite: Suite, plain: Gemma3ForCausalLM, name: str, prompt: str
) -> tuple[float, float, str, int]:
    """Score, change, token and its rank, of one feature, from passes over the whole prompt."""
    feature = parse_feature(name)
    sae = suite.sae(feature.site)
    ids = tokenize(suite.model, prompt).ids
    _, read = run_model(suite.model, ids, [sae.input_site])
    greatest = float(sae.encode(read[sae.input_site][0, 1:]).max())
    row = sae.lens_sae.W_dec.detach()[feature.index]
    push = add(sae.input_site, row, 10 * greatest, positions=[ids.shape[1] - 1])
    clean, steered = (logits_of(suite.model, ids, some)[0, -1] for some in ([], [push]))
    before, after = clean.double().softmax(-1), steered.double().softmax(-1)
    with torch.no_grad():
        lens = plain.lm_head(plain.model.norm(sae.directions[feature.index]))
    written = lens.argsort(descending=True)[:20]
    token = int(written[after[written].argmax()])
    rank = after.argsort(descending=True).tolist().index(token)
    score = (1 - rank / len(after)) * float(after[token])
    change = -float(after.max().log()) + float(before.max().log())
    return score, change, suite.model.tokenizer.decode([token]), rank


@pytest.mark.parametrize(
    ("prompt", "batch_size"), [(PROMPT, 256), ("The rivers rose and the cat", 2)]
)
def test_effects_are_those_of_whole_passes_one_feature_at_a_time(
    planted: Suite, toy: Model, plain_toy: Gemma3ForCausalLM, prompt: str, batch_size: int
):
    suite = replace(planted, saes={**planted.saes, Site(1, "att"): toys.sae_at_z(toy)})
    again: list[FeatureId | str] = [FeatureId(0, "mlp", 2), " 1/res/3"]
    table = output_scores(suite, iter(FEATURES + again), prompt, batch_size)
    assert list(table.columns) == ["feature", *COLUMNS, "token"]
    assert table["feature"].tolist() == FEATURES  # each once
    rows = [by_hand(suite, plain_toy, name, prompt) for name in FEATURES]
    scores, changes, tokens, ranks = zip(*rows, strict=True)
    assert table["output_score"].to_numpy() == pytest.approx(scores, rel=1e-3)
    assert table["confidence_change"].to_numpy() == pytest.approx(changes, abs=1e-4)
    assert table["token"].tolist() == list(tokens)
    assert any(rank > 0 for rank in ranks)  # else the formula was not put to the test
    # BOS is no part of the prompt: at this site nothing is more active than it.
    site, ids = Site(1, "mlp"), tokenize(planted.model, PROMPT).ids
    codes = planted.sae(site).encode(run_model(planted.model, ids, [site])[1][site][0])
    assert codes[0].max() > codes[1:].max()


def test_where_nothing_is_active_the_effect_is_missing(planted: Suite):
    site = Site(1, "mlp")
    rows = toys.planted_directions()[site]
    silent = make_sae(site, toys.write_lens_sae(rows, site, 1e9), toys.D_MODEL, "planted")
    suite = replace(planted, saes={**planted.saes, site: silent})
    table = output_scores(suite, FEATURES, PROMPT).set_index("feature")
    assert list(table.index) == FEATURES
    missing = table.index.str.startswith("1/mlp")
    assert table.loc[missing, COLUMNS].isna().all(axis=None)
    assert (table.loc[missing, "token"] == "").all()
    there = output_scores(planted, FEATURES, PROMPT).set_index("feature")
    assert table[~missing].equals(there[~missing])
    with pytest.raises(ValueError, match="no feature 1/res/99 in"):
        output_scores(planted, ["1/res/3", "1/res/99"])
