"""SAEs are trained on text alone, resumed as if never killed, and saved for raw streams."""

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from safetensors.torch import load_file
from torch import Tensor

from flowhelpers.core.features import Site
from flowhelpers.suites.model import Model, run_model
from flowhelpers.suites.saes import load_folder
from flowhelpers.training import saes as training
from flowhelpers.training.language_model import token_rows
from flowhelpers.training.saes import (
    SAERecipe,
    batches,
    save_sae,
    steps_per_chunk,
    train_saes,
)

CONTEXT = 17
SITES = [Site(0, "att"), Site(1, "mlp"), Site(1, "res")]
RECIPE = SAERecipe(
    features=24, k=3, tokens=16 * 12, batch=16, rows=4, lr=0.01, warmup=2, dead_after=64
)


@pytest.fixture(scope="module")
def rows(toy: Model) -> np.ndarray:
    """Rows of text with the ends of documents in them, and one of special tokens alone."""
    found = token_rows(toys.TEXTS * 9, toy.tokenizer, CONTEXT).astype(np.uint32)
    found[2, 1:] = toy.tokenizer.eos_token_id
    return found[:14]


def trainer_at(toy: Model, site: Site, recipe: SAERecipe = RECIPE) -> Any:
    return training._trainer(recipe, toy, site, None)


def trained(toy: Model, rows: np.ndarray, site: Site, steps: int = 9) -> Any:
    """A trainer after a few steps."""
    stream = batches(RECIPE, toy, rows, [site])
    trainer = trainer_at(toy, site)
    training._set_scales({site: trainer}, next(stream))
    for _ in range(steps):
        training._step(trainer, next(stream)[site])
    return trainer


def test_a_chunk_feeds_whole_batches(toy: Model):
    assert steps_per_chunk(RECIPE, CONTEXT) == int(0.94 * 4 * 16) // 16 == 3
    with pytest.raises(
        ValueError, match="4 rows of 17 tokens do not fill one batch of 640 tokens, but"
    ):
        steps_per_chunk(replace(RECIPE, batch=640), CONTEXT)


def test_batches_hold_text_alone_and_each_token_about_once(toy: Model, rows: np.ndarray):
    site = Site(1, "res")
    special = torch.tensor(toy.tokenizer.all_special_ids)
    stream = batches(RECIPE, toy, rows, [site])
    drawn = 0
    for chunk in range(2):
        picked = torch.from_numpy(rows[4 * chunk : 4 * chunk + 4].astype(np.int64))
        _, read = run_model(toy, picked, read=[site])
        text = ~torch.isin(picked, special)
        allowed = {tuple(v.tolist()) for v in read[site][text]}
        refused = {tuple(v.tolist()) for v in read[site][~text]}
        assert refused - allowed
        found = [tuple(v.tolist()) for _ in range(3) for v in next(stream)[site]]
        assert set(found) <= allowed
        assert len(found) == 48
        if len(allowed) >= 48:
            assert len(set(found)) == 48
            drawn += 1
    assert drawn


def test_batches_are_seeded_shuffled_and_start_at_any_chunk(toy: Model, rows: np.ndarray):
    def read(recipe: SAERecipe, chunk: int, count: int) -> list[dict[Site, Tensor]]:
        stream = batches(recipe, toy, rows, SITES, chunk)
        return [next(stream) for _ in range(count)]

    whole = read(RECIPE, 0, 9)
    for one, two in zip(whole[3:], read(RECIPE, 1, 6), strict=True):
        assert all(torch.equal(one[site], two[site]) for site in SITES)
    other = read(replace(RECIPE, seed=1), 0, 1)[0]
    assert not torch.equal(other[SITES[0]], whole[0][SITES[0]])
    # Row 0 is read again after the last row: 14 rows, so chunk 3 reads 12, 13, 0 and 1.
    _, first = run_model(toy, torch.from_numpy(rows[[12, 13, 0, 1]].astype(np.int64)), read=SITES)
    known = {tuple(v.tolist()) for v in first[SITES[0]].flatten(0, 1)}
    assert {tuple(v.tolist()) for v in read(RECIPE, 3, 1)[0][SITES[0]]} <= known
    # One token is the same place of the batch at every site.
    _, here = run_model(toy, torch.from_numpy(rows[:4].astype(np.int64)), read=SITES)
    flat = {site: here[site].flatten(0, 1) for site in SITES}
    places = [
        [(flat[site] == v).all(-1).nonzero().flatten().tolist() for v in whole[0][site]]
        for site in SITES[1:]
    ]
    assert places[0] == places[1]


def test_every_site_starts_from_weights_of_its_own(toy: Model):
    one, two = (trainer_at(toy, site).sae for site in SITES[:2])
    again = trainer_at(toy, SITES[0]).sae
    other = trainer_at(toy, SITES[0], replace(RECIPE, seed=1)).sae
    assert torch.equal(one.W_dec, again.W_dec)
    for lens_sae in (two, other):
        cosines = torch.cosine_similarity(one.W_dec[:, None], lens_sae.W_dec[None], dim=-1)
        assert cosines.max() < 0.9
    assert torch.allclose(one.W_dec.norm(dim=1), torch.ones(24), atol=1e-5)


def test_activations_are_scaled_to_the_root_of_the_width(toy: Model, rows: np.ndarray):
    batch = next(batches(RECIPE, toy, rows, SITES))
    trainers = {site: trainer_at(toy, site) for site in SITES}
    training._set_scales(trainers, batch)
    for site in SITES:
        scaled = trainers[site].activation_scaler(batch[site])
        assert scaled.norm(dim=-1).mean().item() == pytest.approx(math.sqrt(toys.D_MODEL))


def test_a_saved_sae_reads_raw_activations_as_the_trainer_read_scaled_ones(
    toy: Model, rows: np.ndarray, tmp_path: Path
):
    from sae_lens import SAE

    site = Site(1, "res")
    trainer = trained(toy, rows, site)
    lens_sae, scale = trainer.sae, trainer.activation_scaler.scaling_factor
    assert abs(scale - 1) > 0.1
    with torch.no_grad():
        lens_sae.W_dec *= torch.linspace(0.5, 2, 24)[
            :, None
        ]  # rows that training left at other norms
        lens_sae.topk_threshold.fill_(0.4)
        raw = torch.cat([b[site] for b in islice(batches(RECIPE, toy, rows, [site]), 6)])
        norms = lens_sae.W_dec.norm(dim=1)
        before = ((scale * raw - lens_sae.b_dec) @ lens_sae.W_enc + lens_sae.b_enc) * norms
        codes = torch.where(before > 0.4, before.relu(), torch.zeros(()))
        expected = ((codes / norms) @ lens_sae.W_dec + lens_sae.b_dec) / scale
    save_sae(trainer, tmp_path / "1-res")
    saved = SAE.load_from_disk(tmp_path / "1-res")
    assert saved.cfg.architecture() == "jumprelu"
    assert saved.cfg.normalize_activations == "none"
    assert saved.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert saved.W_dec.dtype == torch.float32
    weights = load_file(tmp_path / "1-res" / "sae_weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert torch.allclose(saved.W_dec.norm(dim=1), torch.ones(24), atol=1e-3)
    clear = ((before - 0.4).abs() > 0.02).all(-1)  # not at the threshold, where rounding decides
    assert clear.sum() > 20
    with torch.no_grad():
        found = saved.encode(raw)
        assert torch.equal(found[clear] > 0, codes[clear] > 0)
        assert 0.05 < (codes[clear] > 0).float().mean() < 0.6
        assert torch.allclose(found[clear], codes[clear] / scale, atol=2e-2)
        assert torch.allclose(saved.decode(found)[clear], expected[clear], atol=2e-2)
    sae = load_folder(tmp_path / "1-res", site, toys.D_MODEL, "cpu", "float32")
    cosines = torch.cosine_similarity(sae.directions, lens_sae.W_dec.detach(), dim=-1)
    assert torch.allclose(cosines, torch.ones(24), atol=1e-5)


class Killed(Exception):
    """Stands for a kill."""


def test_a_killed_run_ends_as_one_that_was_not(
    toy: Model, rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = train_saes(RECIPE, toy, rows, tmp_path / "whole", SITES)
    true_checkpoint, true_step = training._checkpoint, training._step
    marks: list[int] = []
    steps: list[Any] = []

    def checkpoint(trainers: Any, folder: Path, step: int) -> None:
        true_checkpoint(trainers, folder, step)
        marks.append(step)
        if marks == [3, 6]:
            raise Killed

    def counted(trainer: Any, batch: Tensor) -> float:
        steps.append(trainer)
        return true_step(trainer, batch)

    monkeypatch.setattr(training, "_checkpoint", checkpoint)
    monkeypatch.setattr(training, "_step", counted)
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        train_saes(RECIPE, toy, rows, killed, SITES, checkpoint_every=0.0)
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint-6", "recipe.json"]
    with pytest.raises(
        ValueError, match=r"killed was begun with another recipe: lr was 0\.01, now 1"
    ):
        train_saes(replace(RECIPE, lr=1.0), toy, rows, killed, SITES)
    assert len(steps) == 6 * len(SITES)
    resumed = train_saes(RECIPE, toy, rows, killed, SITES, checkpoint_every=0.0)
    assert len(steps) == 12 * len(SITES)
    assert sorted(path.name for path in killed.iterdir()) == ["recipe.json", "saes"]
    names = {f"{site.layer}-{site.module}" for site in SITES}
    assert {path.name for path in resumed.iterdir()} == names
    for name in names:
        one, two = (load_file(at / name / "sae_weights.safetensors") for at in (whole, resumed))
        assert one.keys() == two.keys()
        for key in one:  # to a rounding of float16: where memory lies may decide the last bit
            torch.testing.assert_close(
                one[key], two[key], rtol=2e-3, atol=1e-3, msg=f"{name} {key}"
            )
        configs = [json.loads((at / name / "cfg.json").read_text()) for at in (whole, resumed)]
        assert configs[0] == configs[1]
    assert train_saes(RECIPE, toy, rows, killed, SITES[::-1]) == resumed
    assert len(steps) == 12 * len(SITES)
    for changed, message in (
        (dict(recipe=replace(RECIPE, k=4, seed=1)), "k was 3, now 4; seed was 0, now 1"),
        (dict(sites=SITES[:1]), r"sites was .*, now \['0/att'\]"),
        (dict(origin={"model": "b"}), r"origin\.model was None, now b"),
    ):
        asked: dict[str, Any] = dict(recipe=RECIPE, sites=SITES) | changed
        with pytest.raises(ValueError, match=f"killed was begun with another recipe: {message}"):
            train_saes(model=toy, rows=rows, folder=killed, **asked)
    (killed / "recipe.json").unlink()
    with pytest.raises(ValueError, match=r"was begun, and no recipe\.json says with what recipe"):
        train_saes(RECIPE, toy, rows, killed, SITES)


def test_training_lowers_the_error(toy: Model, rows: np.ndarray, tmp_path: Path):
    site = Site(1, "res")
    recipe = replace(RECIPE, features=64, k=6, tokens=16 * 150, warmup=5)
    folder = train_saes(recipe, toy, rows, tmp_path, [site], model_name="toy")
    sae = load_folder(folder / "1-res", site, toys.D_MODEL, "cpu", "float32")
    assert sae.lens_sae.cfg.metadata.model_name == "toy"
    _, read = run_model(toy, torch.from_numpy(rows[:2].astype(np.int64)), read=[site])
    x = read[site][:, 1:].flatten(0, 1)
    codes = sae.encode(x)
    left = (x - sae.decode(codes)).square().sum() / (x - x.mean(0)).square().sum()
    assert left < 0.5
    assert 1 < (codes > 0).sum(1).float().mean() < 20
