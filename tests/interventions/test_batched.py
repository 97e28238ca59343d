"""Many edits in a batch give what one at a time gives, and bad input never gives a number."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import toys
import transformers
from torch import Tensor

from flowhelpers.activations.sparse import FeatureActivations, collect
from flowhelpers.core.features import MODULES, FeatureId, Site, predecessor_site
from flowhelpers.interventions import batched
from flowhelpers.interventions.batched import intervene
from flowhelpers.interventions.edits import add, add_per_row, rescale
from flowhelpers.suites.bridge import load_model
from flowhelpers.suites.load import OnDemand, Suite, load_suite
from flowhelpers.suites.model import (
    Edit,
    Model,
    PromptCache,
    Tokens,
    cache_prompt,
    logits_of,
    run_model,
    takes_padding,
    tokenize,
)

TEXTS = [
    "At night the astronomers watched the stars and wrote down what they saw.",
    "The cook put the bread into the oven, and the whole house smelt of it.",
    "If a number is even, then half of it is a number too; call it n.",
]


@pytest.fixture(scope="module")
def flowlet() -> SimpleNamespace:
    suite = load_suite("flowlet")
    tokens = tokenize(suite.model, TEXTS)
    return SimpleNamespace(suite=suite, tokens=tokens, activations=collect(suite, tokens))


def cases_of(*rows: tuple[int, int, int]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["text", "position", "layer"])


def edits_of(*rows: tuple[int, str, int, float], size: str = "amount") -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["case", "module", "feature", size])


def random_cases(
    suite: Suite, activations: FeatureActivations, n: int, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cases at all layers; each rescales active features at one to three of its places."""
    rng = np.random.default_rng(seed)
    cases, edits = [], []
    while len(cases) < n:
        row = int(rng.integers(len(activations.tokens)))
        layer = int(rng.integers(1, suite.layers))
        changes = []
        for module in rng.permutation(MODULES)[: rng.integers(1, 4)]:
            codes = activations.by_site[predecessor_site(layer, str(module))][row]
            if codes.nnz:
                at, r = int(rng.integers(codes.nnz)), float(rng.choice([-2, -1, 0, 0.5, 2, 3]))
                amount = (r - 1) * float(codes.data[at])
                changes.append((len(cases), str(module), int(codes.indices[at]), amount))
        if changes:
            text, position = (int(activations.tokens[c][row]) for c in ("text", "position"))
            cases.append((text, position, layer))
            edits += changes
    return cases_of(*cases), edits_of(*edits)


Place = tuple[int, str]  # layers above the target, and module
HERE: list[Place] = [(0, "res"), (0, "mlp")]


def every_feature(suite: Suite, cases: pd.DataFrame, places: list[Place]) -> pd.DataFrame:
    """Reads of all features at places of all cases."""
    parts = []
    for case, layer in enumerate(cases["layer"]):
        for up, module in places:
            features = np.arange(suite.sae(Site(layer + up, module)).width)
            part = {"case": case, "layer": layer + up, "module": module, "feature": features}
            parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def one_at_a_time(
    suite: Suite, tokens: Tokens, case: Any, edits: pd.DataFrame, places: list[Place]
) -> tuple[np.ndarray, Tensor]:
    """Features at the edited token and the loss at every token, from a pass over the whole text."""
    ids = tokens.ids[case.text, : 1 + int(tokens.is_text[case.text].nonzero().max())][None]
    changes = []
    for edit in edits.itertuples():
        sae, at = suite.sae(predecessor_site(case.layer, edit.module)), [case.position]
        if "r" in edits:
            feature = FeatureId(sae.site.layer, sae.site.module, edit.feature)
            changes.append(rescale(sae, [feature], edit.r, at))
        else:
            vector = sae.lens_sae.W_dec[edit.feature]
            changes.append(add(sae.input_site, vector, edit.amount, at))
    saes = [suite.sae(Site(case.layer + up, module)) for up, module in places]
    logits, stream = run_model(suite.model, ids, [sae.input_site for sae in saes], changes)
    assert logits is not None
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    codes = [sae.encode(stream[sae.input_site][0, case.position]) for sae in saes]
    return torch.cat(codes).numpy(), loss


def checked(
    suite: Suite, tokens: Tokens, cases: pd.DataFrame, edits: pd.DataFrame, places: list[Place]
) -> pd.DataFrame:
    """What is read of all features, equal to passes over whole texts."""
    read, losses = intervene(
        suite, tokens, cases, edits, every_feature(suite, cases, places), loss=True
    )
    assert losses is not None
    reads = every_feature(suite, cases, places)
    packed, _ = intervene(suite, tokens, cases, edits, reads)  # without the loss, all places share
    pd.testing.assert_frame_equal(read, packed, atol=1e-5)
    for i, case in enumerate(cases.itertuples()):
        own = read[read["case"] == i]
        codes, loss = one_at_a_time(suite, tokens, case, edits[edits["case"] == i], places)
        clean, clean_loss = one_at_a_time(suite, tokens, case, edits[:0], places)
        assert own["new"].to_numpy() == pytest.approx(codes, abs=1e-5, rel=1e-5)
        assert own["old"].to_numpy() == pytest.approx(clean, abs=1e-5, rel=1e-5)
        own_loss = float(loss[case.position]) if case.position < len(loss) else np.nan
        expected = [float(clean_loss.mean()), float(loss.mean()), own_loss]
        given = losses.loc[i, ["loss_before", "loss_after", "token_loss_after"]].tolist()
        assert given == pytest.approx(expected, abs=1e-5, nan_ok=True)
    return read


def moved(read: pd.DataFrame) -> pd.Series:
    """The largest change of each case at each site."""
    keys = [read["case"], read["module"], read["layer"]]
    return (read["new"] - read["old"]).abs().groupby(keys).max()


def test_a_batch_gives_what_one_at_a_time_gives(flowlet: SimpleNamespace):
    cases, edits = random_cases(flowlet.suite, flowlet.activations, 200)
    assert set(edits["module"]) == set(MODULES)
    assert edits["amount"].min() < 0 < edits["amount"].max()
    read = checked(flowlet.suite, flowlet.tokens, cases, edits, HERE)
    assert (moved(read) > 1e-3).groupby("module").sum().min() > 150


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_how_many_go_at_once_changes_no_number(flowlet: SimpleNamespace, batch_size: int):
    # Where SAEs are read on demand, a pass serves one layer; else all at the same token.
    cases, edits = random_cases(flowlet.suite, flowlet.activations, 40, seed=1)
    cases[["text", "position"]] = (1, 7)  # so that a batch is full
    apart = replace(flowlet.suite, saes=MappingProxyType(dict(flowlet.suite.saes)))
    reads = every_feature(flowlet.suite, cases, HERE)
    known, *others = (
        intervene(suite, flowlet.tokens, cases, edits, reads, True, size)
        for suite, size in ((flowlet.suite, None), (flowlet.suite, batch_size), (apart, batch_size))
    )
    for tables in others:
        for one, other in zip(known, tables, strict=True):
            pd.testing.assert_frame_equal(one, other, atol=1e-5)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The shape of the batch, the layer to stop at and the prefix's length of every pass."""
    made = []

    def watched(*given: Any) -> Any:
        made.append((given[1].shape, given[4], len(given[5])))
        return run_model(*given)

    monkeypatch.setattr(batched, "run_model", watched)
    return made


def test_what_is_asked_for_twice_is_done_once(world: SimpleNamespace, passes: list[tuple]):
    cases = cases_of((0, 3, 1), (0, 3, 1), (0, 3, 1), (0, 4, 1), (1, 3, 1))
    edits = edits_of(
        (0, "res", 1, -1.0), (0, "mlp", 1, -2.0), (1, "mlp", 1, -2.0), (1, "res", 1, -1.0),
        (2, "res", 1, -1.0), (3, "res", 1, -1.0), (4, "res", 1, -1.0),
    )  # fmt: skip
    checked(world.suite, world.tokens, cases, edits, HERE)
    # With the loss two rows and one at the same place, each text with a clean row, and then one;
    # without it all at once.
    assert [shape[0] for shape, _, _ in passes] == [5, 2, 7]


def test_a_pass_is_as_short_as_it_can_be(flowlet: SimpleNamespace, passes: list[tuple]):
    cases = cases_of((0, 5, 2), (0, 5, 2), (0, 8, 6))
    edits = edits_of((0, "res", 3, 1.0), (1, "mlp", 3, 1.0), (2, "att", 3, 1.0))
    given = (flowlet.suite, flowlet.tokens, cases, edits)
    reads = every_feature(flowlet.suite, cases, HERE)
    intervene(*given, reads)
    assert passes == [((5, 1), 6, 8)]
    passes.clear()
    intervene(*given, reads, loss=True)
    length = int(flowlet.tokens.is_text[0].sum()) + 1
    assert passes == [((3, length - 5), None, 5), ((2, length - 8), None, 8)]


def test_live_activations_are_read_after_earlier_edits(flowlet: SimpleNamespace):
    # Trap 15. With less at R_{L-1} the MLP answers, so that its own activation is no longer clean.
    read = flowlet.activations
    text, position = (int(read.tokens[column][12]) for column in ("text", "position"))
    at_res, at_mlp = (read.by_site[site][12] for site in (Site(3, "res"), Site(4, "mlp")))
    first, second = (int(codes.indices[codes.data.argmax()]) for codes in (at_res, at_mlp))
    live = edits_of((0, "res", first, -2.0), (0, "mlp", second, 0.0), size="r")
    amounts = -3 * float(at_res.data.max()), -float(at_mlp.data.max())
    clean = edits_of((0, "res", first, amounts[0]), (0, "mlp", second, amounts[1]))
    given = (flowlet.suite, flowlet.tokens, cases_of((text, position, 4)))
    by_live, by_clean = (checked(*given, edits, HERE)["new"] for edits in (live, clean))
    assert (by_live - by_clean).abs().max() > 1e-3


def test_saes_at_z_are_edited_and_read_there(toy: Model, planted: Suite):
    suite = Suite(planted.row, toy, {**planted.saes, Site(1, "att"): toys.sae_at_z(toy)})
    tokens = tokenize(toy, toys.TEXTS[:2])
    read = collect(suite, tokens, [Site(1, "att")])
    codes = read.by_site[Site(1, "att")].tocoo()
    text, position = (int(read.tokens[c][codes.row[0]]) for c in ("text", "position"))
    edits = edits_of((0, "att", int(codes.col[0]), -float(codes.data[0])))
    places: list[Place] = [(-1, "res"), (0, "att"), (0, "mlp"), (0, "res")]
    found = checked(suite, tokens, cases_of((text, position, 1)), edits, places)
    at_att = found[found["module"] == "att"].set_index("feature")["old"]
    assert at_att[codes.col[0]] == pytest.approx(float(codes.data[0]), abs=1e-5)
    assert moved(found)[0, "res", 0] == 0 < moved(found)[0, "att", 1]


@pytest.mark.parametrize("module", MODULES)
def test_what_comes_before_an_edit_stays_as_it_was(flowlet: SimpleNamespace, module: str):
    # Trap 14: after an edit at M_L, A_L and R_{L-1} are as they were at that token.
    cases, edits = random_cases(flowlet.suite, flowlet.activations, 60, seed=2)
    edits = edits[edits["module"] == module]
    cases = cases.iloc[edits["case"]].reset_index(drop=True)
    edits = edits.assign(case=range(len(edits)))
    places: list[Place] = [(-1, "res"), (0, "att"), (0, "mlp"), (0, "res")]
    reads = every_feature(flowlet.suite, cases, places)
    read, _ = intervene(flowlet.suite, flowlet.tokens, cases, edits, reads)
    up = read["layer"] - read["case"].map(cases["layer"])
    for number, place in enumerate(places):
        has_moved = moved(read[(up == place[0]) & (read["module"] == place[1])]) > 1e-4
        if number < ["res", "att", "mlp"].index(module):
            assert not has_moved.any()
        else:
            assert has_moved.mean() > 0.5


def test_an_edit_that_reaches_an_earlier_site_is_an_error(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    def misplaced(site: Site, rows: Tensor, vectors: Tensor, positions: list[int]) -> Edit:
        earlier = Site(1, "att") if site.module == "mlp" else site
        made = add_per_row(earlier, rows, vectors, positions)
        return Edit(earlier, made.change)

    monkeypatch.setattr(batched, "add_per_row", misplaced)
    cases = cases_of((0, 3, 1), (0, 3, 1))
    edits = edits_of((0, "mlp", 1, -1.0), (1, "res", 1, -1.0))
    for places in ([(0, "att"), (0, "res")], [(0, "res")]):  # whether it is asked for or not
        reads = every_feature(world.suite, cases, places)
        with pytest.raises(RuntimeError, match="an edit changed 1/att, which lies before it, by"):
            intervene(world.suite, world.tokens, cases, edits, reads)


@pytest.mark.parametrize("where", ["run_model", "token_losses"])
def test_memory_that_runs_out_halves_the_batch_and_goes_on(
    flowlet: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, where: str
):
    cases, edits = random_cases(flowlet.suite, flowlet.activations, 40, seed=3)
    cases[["text", "position", "layer"]] = (1, 7, 4)
    reads = every_feature(flowlet.suite, cases, HERE)
    given = (flowlet.suite, flowlet.tokens, cases, edits, reads, True)
    known = intervene(*given)
    whole, sizes, room = getattr(batched, where), [], 12

    def small(first: Any, ids: Tensor, *rest: Any) -> Any:
        sizes.append(len(ids) - 1)
        if len(ids) > room:
            raise torch.OutOfMemoryError("no room")
        return whole(first, ids, *rest)

    monkeypatch.setattr(batched, where, small)
    with pytest.warns(UserWarning, match="out of memory with 40 interventions .* half") as told:
        found = intervene(*given)
    assert len(told) == 1
    assert [size for size in sizes if size > 0] == [40, 20, 10, 10, 10, 10]
    for one, other in zip(known, found, strict=True):
        pd.testing.assert_frame_equal(one, other, atol=1e-5)
    room = 1
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(MemoryError, match="no room for one intervention"),
    ):
        intervene(*given)


def test_the_size_of_a_batch_follows_memory(
    flowlet: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    suite, reads = flowlet.suite, pd.DataFrame({"layer": [4], "module": "res"})

    def rows(room: int, loss: bool = False) -> int:
        monkeypatch.setattr(batched, "free_memory", lambda device: room)
        return batched._fitting(suite, 14, loss, reads)[0]

    assert (rows(2**20), rows(2**20, loss=True), rows(2**40)) == (1, 1, 1024)
    codes = 16 * suite.sae("4/res").width
    assert 1 < rows(2**26) <= 2**25 // (suite.model.d_model * batched.PASS_TENSORS * 4 + codes)
    assert rows(2**26, loss=True) < rows(2**26)


@pytest.mark.parametrize(
    ("cases", "edits", "message"),
    [
        ([(0, 0, 1)], [(0, "res", 1, 1.0)], "a case is at BOS or a special token"),
        ([(2, 16, 1)], [(0, "res", 1, 1.0)], "a case is at BOS or a special token"),
        ([(0, 2, 1)], [(0, "res", 1, float("nan"))], "0/res is given nan: expected finite"),
        ([(0, 2, 1)], [(0, "res", -1, 1.0)], "an edit of feature -1"),
        ([(0, 2, 0)], [(0, "res", 1, 1.0)], "layer 0 has no predecessor in the stream"),
        ([(0, 2, 2)], [(0, "mlp", 1, 1.0)], "no SAE at 2/mlp in suite adder"),
        ([(0, 2, 1)] * 2, [(0, "res", 1, 1.0)], "edits of 1 cases: expected some for each of 2"),
    ],
)
def test_what_would_give_a_wrong_number_is_an_error(
    world: SimpleNamespace,
    cases: list[tuple[int, int, int]],
    edits: list[tuple[int, str, int, float]],
    message: str,
):
    reads = every_feature(world.suite, cases_of((0, 3, 1)), HERE)
    with pytest.raises(ValueError, match=message):
        intervene(world.suite, world.tokens, cases_of(*cases), edits_of(*edits), reads)


SMALL = {
    "vocab_size": toys.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
FAMILIES = ("Gemma2", "Gemma3Text", "Llama", "GPT2", "GPTNeoX")  # all that the hub's suites have


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_after_a_prefix_is_a_whole_pass(family: str, toy_folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL)
    config.update({} if family.startswith("GPT") else GROUPED)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(toy_folder).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    ids = torch.arange(20, 60)[None]  # longer than the window where there is one
    whole = logits_of(model, ids)
    logits, prefix = cache_prompt(model, ids)
    assert len(prefix) == 40
    assert torch.allclose(logits, whole, atol=1e-5)
    site = Site(1, "mlp")
    _, stream = run_model(model, ids, [site])
    for position in (1, 7, 30, 39):
        rest, earlier = ids[:, position:].expand(3, -1), prefix.first(position)
        for stop in (None, 1, 2):
            logits, read = run_model(model, rest, [site], stop_after=stop, prefix=earlier)
            here = stream[site][:, position:].expand(3, -1, -1)
            assert torch.allclose(read[site], here, atol=1e-5)
            if logits is not None:
                assert torch.allclose(logits, whole[:, position:].expand(3, -1, -1), atol=1e-5)
    texts = torch.cat([ids, ids.flip(1)])
    both, prefixes = zip(*(cache_prompt(model, text) for text in texts.split(1)), strict=True)
    all_layers = [each.layers for each in prefixes]
    layers = [list(zip(*layer, strict=True)) for layer in zip(*all_layers, strict=True)]
    stacked = PromptCache(tuple((torch.cat(k), torch.cat(v)) for k, v in layers))
    rows, at = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([5, 9, 20, 36, 1])
    rest = torch.stack([texts[row, p : p + 3] for row, p in zip(rows, at, strict=True)])
    logits, _ = run_model(model, rest, prefix=stacked.of_rows(rows, at))
    assert logits is not None
    for row, p, own in zip(rows, at, logits, strict=True):
        assert torch.allclose(own, both[row][0, p : p + 3], atol=1e-5)
    assert takes_padding(model)
    with pytest.raises(ValueError, match="41 tokens of a prefix of 40"):
        prefix.first(41)


@pytest.mark.parametrize("part", ["attention_mask", "position_ids"])
def test_a_model_that_takes_no_padding_has_a_pass_for_each_place(
    flowlet: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, passes: list[tuple], part: str
):
    cases, edits = random_cases(flowlet.suite, flowlet.activations, 40, seed=5)
    reads = every_feature(flowlet.suite, cases, HERE)
    given = (flowlet.suite, flowlet.tokens, cases, edits, reads)
    known, _ = intervene(*given)
    assert len(passes) == 1
    padding = PromptCache.padding

    def wrong(self: PromptCache, new: int) -> dict[str, Tensor]:
        given = padding(self, new)
        return given | {part: given[part].clamp(min=1, max=1)} if given else {}

    monkeypatch.setattr(PromptCache, "padding", wrong)
    pd.testing.assert_frame_equal(known, intervene(*given)[0], atol=1e-5)
    assert len(passes) == 1 + cases["position"].nunique()


def test_each_sae_is_loaded_once_however_many_passes_there_are(
    flowlet: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    cases, edits = random_cases(flowlet.suite, flowlet.activations, 120, seed=6)
    reads = pd.concat(
        cases.assign(case=cases.index, layer=layer, module="res", feature=feature)
        for layer in range(8)
        for feature in (3, 5)
    )
    reads = reads[reads["layer"] >= reads["case"].map(cases["layer"])].reset_index(drop=True)
    given = (flowlet.tokens, cases, edits, reads)
    known, _ = intervene(flowlet.suite, *given)
    for room in (2**30, 2**16):
        loads: Counter[Site] = Counter()

        def load(site: Site, loads: Counter[Site] = loads) -> Any:
            loads[site] += 1
            return flowlet.suite.saes[site]

        few = replace(flowlet.suite, saes=OnDemand(flowlet.suite.saes, load, kept=4))
        monkeypatch.setattr(batched, "KEPT_BYTES", room)
        found, _ = intervene(few, *given, batch_size=5)
        pd.testing.assert_frame_equal(known, found, atol=1e-5)
        # Once for what it is, once to edit the layer above and once to be read.
        assert (max(loads.values()) <= 3) == (room == 2**30)


def test_a_model_whose_prefix_is_ignored_is_refused(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    empty = transformers.DynamicCache
    monkeypatch.setattr(PromptCache, "cache", lambda self, batch, layers=None: empty())
    with pytest.raises(ValueError, match="a pass after a prefix gives other logits"):
        load_model(str(toy_folder))


def test_the_loss_of_a_small_step_needs_float32(flowlet: SimpleNamespace):
    # In bfloat16 a step of nothing is nothing too, but rounding is larger than a small step.
    suite, path = flowlet.suite, flowlet.suite.row.model
    cases, edits = random_cases(suite, flowlet.activations, 60, seed=4)
    edits["amount"] /= edits.groupby("case")["amount"].transform(lambda a: 8 * a.abs().max())
    reads = cases.assign(case=cases.index, module="res", feature=0)

    def change(kind: str, size: float) -> np.ndarray:
        model = load_model(path, dtype=getattr(torch, kind))
        given = (replace(suite, source=model), flowlet.tokens, cases)
        changed = edits.assign(amount=size * edits["amount"])
        _, losses = intervene(*given, changed, reads, loss=True)
        assert losses is not None
        return (losses["loss_after"] / losses["loss_before"] - 1).to_numpy()

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.square(one - other).mean() ** 0.5)

    assert (change("bfloat16", 0.0) == 0).all()
    exact = change("float64", 1.0)
    assert apart(change("float32", 1.0), exact) < 2e-6 < apart(exact, np.zeros(60)) / 10
    assert apart(change("bfloat16", 1.0), exact) > 5e-5
