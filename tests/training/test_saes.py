"""SAEs are trained on text alone, resumed as if never killed, and saved for raw streams."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from safetensors.torch import load_file

from flowhelpers.core.features import Site
from flowhelpers.suites.model import Model, hook_name, run_model
from flowhelpers.training import saes
from flowhelpers.training.language_model import token_rows
from flowhelpers.training.saes import SAERecipe, batches, new_sae, train_saes

CONTEXT = 17
SITES = [Site(0, "att"), Site(1, "mlp"), Site(1, "res")]
RECIPE = SAERecipe(
    features=24, k=3, tokens=16 * 12, batch=16, rows=4, lr=0.01, warmup=2, dead_after=64
)
OTHER_SEED = RECIPE.model_copy(update={"seed": 1})


@pytest.fixture(scope="module")
def rows(toy: Model) -> np.ndarray:
    """Rows of text with the ends of documents in them, and one of special tokens alone."""
    rows = token_rows(toys.TEXTS * 9, toy.tokenizer, CONTEXT)
    rows[2, 1:] = toy.tokenizer.eos_token_id
    return rows[:14]


def test_batches_hold_text_alone_and_each_token_about_once(toy: Model, rows: np.ndarray):
    site = Site(1, "res")
    assert RECIPE.steps_per_chunk(CONTEXT) == int(0.94 * 4 * 16) // 16 == 3
    special = torch.tensor(toy.tokenizer.all_special_ids)
    stream = batches(RECIPE, toy, rows, [site])
    drawn_once = 0
    for chunk in range(2):
        ids = torch.from_numpy(rows[4 * chunk : 4 * chunk + 4].astype(np.int64))
        _, read = run_model(toy, ids, read=[site])
        text = ~torch.isin(ids, special)
        allowed = {tuple(v.tolist()) for v in read[site][text]}
        assert {tuple(v.tolist()) for v in read[site][~text]} - allowed
        drawn = [tuple(v.tolist()) for _ in range(3) for v in next(stream)[hook_name(toy, site)]]
        assert set(drawn) <= allowed
        assert len(drawn) == 48
        if len(allowed) >= 48:
            assert len(set(drawn)) == 48
            drawn_once += 1
    assert drawn_once


def test_batches_are_seeded_shuffled_and_start_anywhere(toy: Model, rows: np.ndarray):
    hooks = [hook_name(toy, site) for site in SITES]
    whole = list(islice(batches(RECIPE, toy, rows, SITES), 12))
    for start in (3, 4, 8):
        again = islice(batches(RECIPE, toy, rows, SITES, start), 2)
        for one, two in zip(whole[start:], again, strict=False):
            assert all(torch.equal(one[hook], two[hook]) for hook in hooks)
    other = next(batches(OTHER_SEED, toy, rows, SITES))
    assert not torch.equal(other[hooks[0]], whole[0][hooks[0]])
    # Row 0 is read again after the last: of 14 rows the fourth chunk reads 12, 13, 0 and 1.
    _, read = run_model(toy, torch.from_numpy(rows[[12, 13, 0, 1]].astype(np.int64)), read=SITES)
    known = {tuple(v.tolist()) for v in read[SITES[0]].flatten(0, 1)}
    assert {tuple(v.tolist()) for v in whole[9][hooks[0]]} <= known
    # One token is at the same place of the batch at every site.
    _, read = run_model(toy, torch.from_numpy(rows[:4].astype(np.int64)), read=SITES)
    places = [
        [(read[site].flatten(0, 1) == v).all(-1).nonzero().flatten().tolist() for v in whole[0][h]]
        for site, h in zip(SITES[1:], hooks[1:], strict=True)
    ]
    assert places[0] == places[1]


def test_every_site_starts_from_weights_of_its_own(toy: Model):
    one, two, again = (new_sae(RECIPE, toy, SITES[i], "toy").W_dec for i in (0, 1, 0))
    assert torch.equal(one, again)
    for other in (two, new_sae(OTHER_SEED, toy, SITES[0], "toy").W_dec):
        assert torch.cosine_similarity(one[:, None], other[None], dim=-1).max() < 0.9
    assert torch.allclose(one.norm(dim=1), torch.ones(24), atol=1e-5)


def test_a_saved_sae_reads_raw_activations_as_it_was_trained_on_scaled_ones(
    toy: Model, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from sae_lens import SAE
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE

    site, scales, trained = Site(1, "res"), [], []
    fold = BatchTopKTrainingSAE.fold_activation_norm_scaling_factor

    def folded(sae: Any, scale: float) -> None:
        scales.append(scale)
        trained.append({name: x.detach().clone() for name, x in sae.named_parameters()})
        fold(sae, scale)

    monkeypatch.setattr(BatchTopKTrainingSAE, "fold_activation_norm_scaling_factor", folded)
    train_saes(RECIPE, toy, rows, tmp_path, [site], "toy")
    folder = tmp_path / "1-res"
    raw = next(batches(RECIPE, toy, rows, [site]))[hook_name(toy, site)]
    (scale,), (weights,) = scales, trained
    assert scale * raw.norm(dim=-1).mean().item() == pytest.approx(math.sqrt(toys.D_MODEL))
    saved = SAE.load_from_disk(folder)
    assert (saved.cfg.architecture(), saved.cfg.normalize_activations) == ("jumprelu", "none")
    assert saved.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert saved.cfg.metadata.model_name == "toy"
    stored = load_file(folder / "sae_weights.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert torch.allclose(saved.W_dec.norm(dim=1), torch.ones(24), atol=1e-3)
    norms = weights["W_dec"].norm(dim=1)
    with torch.no_grad():
        before = (scale * raw - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        codes = before * norms / scale  # what the feature adds along its unit direction
        found = saved.encode(raw)
        active = found > 0
        assert 0.02 < active.float().mean() < 0.6
        assert torch.allclose(found[active], codes[active], rtol=2e-2, atol=2e-2)
        expected = (found / norms * scale) @ weights["W_dec"] / scale + weights["b_dec"] / scale
        assert torch.allclose(saved.decode(found), expected, atol=2e-2)
    sae = toys.load_folder(folder, site, toys.D_MODEL)
    cosines = torch.cosine_similarity(sae.directions, weights["W_dec"], dim=-1)
    assert torch.allclose(cosines, torch.ones(24), atol=1e-5)


def test_a_killed_training_ends_as_one_that_was_not(
    toy: Model, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from sae_lens.training.sae_trainer import SAETrainer

    steps: list[Any] = []
    true_step = SAETrainer.step

    def step(trainer: Any, batch: Any) -> Any:
        steps.append(trainer.n_training_steps)
        if len(steps) == 12 * 3 + 8 * 3:  # within the eighth step of the second training
            raise InterruptedError
        return true_step(trainer, batch)

    monkeypatch.setattr(SAETrainer, "step", step)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_saes(RECIPE, toy, rows, whole, SITES, "toy", 3)
    with pytest.raises(InterruptedError):
        train_saes(RECIPE, toy, rows, killed, SITES, "toy", 3)
    (last,) = (killed / "0-att.checkpoints").iterdir()
    assert last.name == "6"
    (last.with_name("9.part") / "1-res").mkdir(parents=True)  # a checkpoint that was cut off
    steps.clear()
    train_saes(RECIPE, toy, rows, killed, SITES, "toy", 3)
    assert steps == [n for n in range(6, 12) for _ in SITES]
    names = {"0-att", "1-mlp", "1-res"}
    assert {path.name for path in killed.iterdir()} == names
    for name in names:
        one, two = (load_file(at / name / "sae_weights.safetensors") for at in (whole, killed))
        assert one.keys() == two.keys()
        for key in one:  # to a rounding of float16: where memory lies may decide the last bit
            torch.testing.assert_close(one[key], two[key], rtol=2e-3, atol=1e-3)
        configs = [(at / name / "cfg.json").read_text() for at in (whole, killed)]
        assert configs[0] == configs[1]
    steps.clear()
    train_saes(RECIPE, toy, rows, killed, SITES, "toy")
    assert not steps


def test_a_loss_that_is_not_finite_is_an_error_at_its_step(
    toy: Model, rows: np.ndarray, tmp_path: Path
):
    recipe = RECIPE.model_copy(update={"lr": math.inf})
    with pytest.raises(FloatingPointError, match=r"not finite at step 1: {'1-res': nan}"):
        train_saes(recipe, toy, rows, tmp_path, [Site(1, "res")], "toy")
    assert not (tmp_path / "1-res").exists()


def test_training_lowers_the_error(toy: Model, rows: np.ndarray, tmp_path: Path):
    site = Site(1, "res")
    change = {"features": 64, "k": 6, "tokens": 16 * 150, "warmup": 5}
    train_saes(RECIPE.model_copy(update=change), toy, rows, tmp_path, [site], "toy")
    sae = toys.load_folder(tmp_path / "1-res", site, toys.D_MODEL)
    _, read = run_model(toy, torch.from_numpy(rows[:2].astype(np.int64)), read=[site])
    x = read[site][:, 1:].flatten(0, 1)
    codes = sae.encode(x)
    left = (x - sae.decode(codes)).square().sum() / (x - x.mean(0)).square().sum()
    assert left < 0.5
    assert 1 < (codes > 0).sum(1).float().mean() < 20


@pytest.mark.parametrize("how", [{}, {"l0_coefficient": 0.1}, {"l0_coefficient": 10.0}])
def test_a_jumprelu_sae_of_attention_is_sparse_and_explains(
    toy: Model, rows: np.ndarray, tmp_path: Path, how: dict[str, float]
):
    """By default it comes to k active features; a larger weight of the L0 loss leaves fewer."""
    site = Site(0, "att")
    change = {"features": 64, "k": 6, "tokens": 16 * 400, "warmup": 5, "architecture": "jumprelu"}
    train_saes(RECIPE.model_copy(update=change | how), toy, rows, tmp_path, [site], "toy")
    sae = toys.load_folder(tmp_path / "0-att", site, toys.D_MODEL)
    assert sae.lens_sae.cfg.architecture() == "jumprelu"
    assert sae.lens_sae.cfg.metadata.hook_name == "blocks.0.hook_attn_out"
    assert sae.input_site == site  # behind W_O, where attention comes into the stream
    assert sae.thresholds is not None
    assert (sae.thresholds > 0).all()
    assert torch.allclose(sae.norms, torch.ones(64), atol=1e-3)
    _, read = run_model(toy, torch.from_numpy(rows[:2].astype(np.int64)), read=[site])
    x = read[site][:, 1:].flatten(0, 1)
    codes = sae.encode(x)
    l0 = (codes > 0).sum(1).float().mean().item()
    left = (x - sae.decode(codes)).square().sum() / (x - x.mean(0)).square().sum()
    low, high = {None: (3, 12), 0.1: (6, 64), 10.0: (0, 6)}[how.get("l0_coefficient")]
    assert low < l0 < high
    assert left < 1


def test_sites_that_do_not_fit_together_are_trained_in_parts_and_come_out_the_same(
    toy: Model, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The memory is that of weights, gradients and moments, and of the activations in hand."""
    each = RECIPE.memory(toys.D_MODEL, CONTEXT)
    weights = sum(p.numel() for p in new_sae(RECIPE, toy, SITES[0], "toy").parameters())
    more = 4 * (4 * CONTEXT * toys.D_MODEL + 2 * 16 * 24)
    assert each == pytest.approx(16 * weights + more, rel=0.05)
    together, parted = tmp_path / "together", tmp_path / "parted"
    train_saes(RECIPE, toy, rows, together, SITES, "toy")
    calls: list[int] = []
    true_new = saes.new_sae
    monkeypatch.setattr(saes, "free_memory", lambda device: int(2.5 * each))
    monkeypatch.setattr(saes, "new_sae", lambda *a: calls.append(len(calls)) or true_new(*a))
    train_saes(RECIPE, toy, rows, parted, SITES, "toy")
    assert len(calls) == 3
    for name in ("0-att", "1-mlp", "1-res"):
        one, two = (load_file(at / name / "sae_weights.safetensors") for at in (together, parted))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=2e-3, atol=1e-3)
    monkeypatch.setattr(saes, "free_memory", lambda device: each - 1)
    message = "one SAE of 24 features at width .* takes 0.0 GiB on cpu .* fewer features or rows"
    with pytest.raises(MemoryError, match=message):
        train_saes(RECIPE, toy, rows, tmp_path / "none", SITES, "toy")


def test_tokens_are_mixed_over_more_rows_than_one_pass_reads(
    toy: Model, rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    wide, hook = RECIPE.model_copy(update={"rows": 12}), hook_name(toy, SITES[2])
    whole = list(islice(batches(wide, toy, rows, SITES), 9))
    monkeypatch.setattr(saes, "PASS", 5)
    for one, two in zip(whole, islice(batches(wide, toy, rows, SITES), 9), strict=True):
        assert torch.allclose(one[hook], two[hook], atol=1e-5)
    _, read = run_model(toy, torch.from_numpy(rows[:12].astype(np.int64)), read=[SITES[2]])
    of_row = read[SITES[2]].flatten(0, 1)
    near = torch.cdist(whole[0][hook], of_row).argmin(1) // CONTEXT
    assert len(near.unique()) > 6  # one batch holds tokens of many rows
