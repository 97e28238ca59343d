"""An SAE has unit rows, a strict threshold, and says what is wrong with it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from flowhelpers.activations.sparse import collect
from flowhelpers.core.features import FeatureId, Site
from flowhelpers.matching.cosine import top_k_cosine
from flowhelpers.matching.matchers import by_permutation
from flowhelpers.suites.attention import attention_output
from flowhelpers.suites.load import Suite
from flowhelpers.suites.model import Edit, Model, Tokens, run_model, tokenize
from flowhelpers.suites.registry import SuiteRow
from flowhelpers.suites.saes import SAE, make_sae

SITE = Site(1, "res")
D = toys.D_MODEL


def sae_of(decoder: torch.Tensor, **more: Any) -> SAE:
    return make_sae(SITE, toys.write_lens_sae(decoder, SITE, **more), D, "planted")


def load(folder: Path) -> SAE:
    return toys.load_folder(folder, SITE, D)


@pytest.fixture
def tokens(toy: Model) -> Tokens:
    return tokenize(toy, toys.TEXTS[:2])


def test_directions_are_the_decoders_rows_at_unit_norm():
    rows = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([0.01, 1.0, 7.0, 100.0, 3.0])
    unit = rows / rows.norm(dim=1, keepdim=True)
    sae = sae_of(unit * sizes[:, None])
    assert torch.allclose(sae.directions, unit, atol=1e-6)
    assert torch.allclose(sae.norms, sizes)
    assert sae.width == 5
    assert torch.equal(sae.direction(FeatureId(1, "res", 3)), sae.directions[3])
    assert torch.allclose(
        sae.contribution(FeatureId(1, "res", 2), torch.tensor([2.0, 0.0])),
        torch.stack([14 * unit[2], 0 * unit[2]]),
        atol=1e-5,
    )


def test_a_feature_at_its_threshold_is_not_active():
    threshold = torch.tensor([0.5, 2.0, 0.0])
    sae = sae_of(torch.eye(3, D), threshold=threshold)
    at = torch.zeros(3, D)
    at[0, :3] = threshold
    at[1, :3] = torch.nextafter(threshold, torch.tensor(9.0))
    at[2, :3] = -threshold - 1
    codes = sae.encode(at)
    assert codes.tolist() == [[0, 0, 0], at[1, :3].tolist(), [0, 0, 0]]


def test_encoding_takes_off_the_decoders_bias_and_decoding_gives_it_back():
    bias = torch.arange(D, dtype=torch.float32)
    sae = sae_of(2 * torch.eye(3, D), encoder=torch.eye(D, 3), b_dec=bias, b_enc=-1.0)
    x = bias.clone()
    x[:3] += torch.tensor([5.0, 0.5, 3.0])
    assert sae.encode(x).tolist() == [4, 0, 2]
    rebuilt = bias.clone()
    rebuilt[:3] += torch.tensor([8.0, 0.0, 4.0])
    assert torch.equal(sae.decode(sae.encode(x)), rebuilt)


@pytest.mark.parametrize(
    ("site", "hook"),
    [
        (SITE, "blocks.0.hook_resid_post"),
        (SITE, "blocks.1.hook_resid_pre"),
        (SITE, "blocks.1.hook_resid"),
        (SITE, "blocks.1.hook_mlp_out"),
        (Site(1, "att"), "blocks.2.attn.hook_z"),
        (Site(1, "mlp"), "blocks.1.attn.hook_z"),
        (Site(1, "mlp"), "blocks.11.hook_mlp_out"),
    ],
)
def test_a_sae_of_another_hook_is_refused(site: Site, hook: str):
    lens_sae = toys.write_lens_sae(torch.eye(3, D), site, hook=hook)
    expected = f"blocks.1.{toys.HOOK_ENDS[site.module]}"
    with pytest.raises(ValueError, match=f"was trained at {hook}: expected {expected}$"):
        make_sae(site, lens_sae, D, "planted")


def test_unusable_rows_are_named_counted_and_match_nothing():
    decoder = torch.eye(6, D)
    decoder[1] = 0
    decoder[3, 4] = torch.nan
    decoder[4, 0] = torch.inf
    with pytest.warns(
        UserWarning, match=r"3 of 6 decoder rows of the SAE for 1/res .*: \[1, 3, 4\]$"
    ):
        sae = sae_of(decoder, encoder=torch.eye(D, 6))
    rebuilt = sae.decode(sae.encode(torch.ones(1, D)))
    assert rebuilt[0, :7].tolist() == [1, 0, 1, 0, 0, 1, 0]
    assert sae.excluded.tolist() == [1, 3, 4]
    assert not sae.directions[[1, 3, 4]].any()
    with pytest.raises(ValueError, match="1/res/3 has no direction"):
        sae.direction(FeatureId(1, "res", 3))
    matches = top_k_cosine(torch.eye(6, D), sae.directions)
    assert matches.indices[:, 0].tolist() == [0, -1, 2, -1, -1, 5]
    back = top_k_cosine(sae.directions, torch.eye(6, D))
    assert back.indices[:, 0].tolist() == [0, -1, 2, -1, -1, 5]


@pytest.mark.parametrize("is_stored", [True, False])
def test_rows_that_are_not_finite_are_told_apart_by_what_they_spoil(
    tmp_path: Path, is_stored: bool
):
    decoder, encoder = torch.eye(7, D), torch.eye(D, 7)
    b_enc, threshold = torch.zeros(7), torch.full((7,), 0.1)
    decoder[1, 3], encoder[2, 3], threshold[4], b_enc[6] = (
        torch.nan,
        torch.nan,
        torch.nan,
        torch.inf,
    )
    lens_sae = toys.write_lens_sae(decoder, SITE, threshold, encoder, b_enc)
    lens_sae.save_model(tmp_path)

    def encoded() -> tuple[SAE, torch.Tensor]:
        sae = load(tmp_path) if is_stored else make_sae(SITE, lens_sae, D, "planted")
        return sae, sae.encode(torch.ones(2, D))

    with pytest.warns(UserWarning, match="not finite") as warned:
        sae, codes = encoded()
    first, second = (str(warning.message) for warning in warned)
    assert re.search(r"1 of 7 decoder rows .* left out of matching: \[1\]$", first)
    said = r"3 features at 1/res .* an encoder that is not finite; .* never active .*: \[3, 4, 6\]$"
    assert re.search(said, second)
    assert sae.excluded.tolist() == [1]
    assert sae.norms.tolist() == [1, 0, 1, 1, 1, 1, 1]
    assert codes.tolist() == [[1, 0, 1, 0, 0, 1, 0]] * 2
    assert torch.isfinite(sae.decode(codes)).all()
    assert torch.equal(sae.decoder_rows(torch.tensor([3, 4])), torch.eye(7, D)[3:5])
    for weights in ("decoder", "all"):
        for folded in (False, True):
            match = by_permutation(sae, sae, weights, folded)
            assert match.backward.indices[:, 0].tolist() == [0, -1, 2, 3, 4, 5, 6]


# SAEs that read z, before W_O.


@pytest.mark.parametrize("layer", [0, 2])
def test_z_through_w_o_and_gain_points_where_attention_writes(
    toy: Model, tokens: Tokens, layer: int
):
    at_z, att = Site(layer, "z"), Site(layer, "att")
    _, read = run_model(toy, tokens.ids, read=[at_z, att])
    z, written = read[at_z].flatten(0, 1), read[att].flatten(0, 1)
    output = attention_output(toy, layer)
    assert torch.cosine_similarity(output.to_residual(z), written).min() > 0.99999
    # Either step left out points elsewhere.
    assert output.gain is not None
    assert torch.cosine_similarity(z @ output.weights, written).max() < 0.99


def test_a_sae_at_z_is_brought_into_the_stream(toy: Model, tokens: Tokens):
    layer, site = 1, Site(1, "att")
    output = attention_output(toy, layer)
    d_z = len(output.weights)
    decoder = torch.randn(5, d_z, generator=torch.Generator().manual_seed(0))
    lens_sae = toys.write_lens_sae(decoder, site, hook="blocks.1.attn.hook_z")
    sae = make_sae(site, lens_sae, D, "planted", lambda: output)
    expected = output.to_residual(decoder)
    expected = expected / expected.norm(dim=1, keepdim=True)
    assert torch.allclose(sae.directions, expected, atol=1e-6)
    assert (sae.site, sae.input_site) == (site, Site(1, "z"))
    _, read = run_model(toy, tokens.ids, read=[Site(1, "z")])
    suite = Suite(SuiteRow("z", "none", {site: "z"}, 0), toy, {site: sae})
    found = collect(suite, tokens).by_site[site].toarray()
    codes = sae.encode(read[Site(1, "z")][tokens.is_text]).numpy()
    assert (codes > 0).any()
    assert found == pytest.approx(codes, abs=1e-5)
    with pytest.raises(ValueError, match="1/att/0 reads 1/z: only its direction"):
        sae.contribution(FeatureId(1, "att", 0), torch.ones(1))


def test_a_sae_at_z_without_its_model_is_refused():
    # Of the same width as the stream, so that only its hook tells (trap 22).
    lens_sae = toys.write_lens_sae(torch.eye(3, D), Site(1, "att"), hook="blocks.1.attn.hook_z")
    with pytest.raises(ValueError, match=r"for 1/att \(planted\) reads z, before W_O: its model"):
        make_sae(Site(1, "att"), lens_sae, D, "planted")


def test_an_edit_at_z_reaches_attention_and_lays_heads_side_by_side(toy: Model, tokens: Tokens):
    at_z, att = Site(1, "z"), Site(1, "att")
    shift = torch.linspace(0, 1, len(attention_output(toy, 1).weights))
    _, clean = run_model(toy, tokens.ids, read=[at_z, att])
    _, edited = run_model(toy, tokens.ids, [at_z, att], [Edit(at_z, lambda z: z + shift)])
    assert torch.allclose(edited[at_z] - clean[at_z], shift.expand_as(clean[at_z]), atol=1e-5)
    expected = attention_output(toy, 1).to_residual(edited[at_z].flatten(0, 1))
    assert torch.cosine_similarity(edited[att].flatten(0, 1), expected).min() > 0.99999
    assert not torch.allclose(edited[att], clean[att], atol=1e-3)


def test_the_fingerprint_is_that_of_the_content():
    first, same, other = (sae_of(torch.eye(3, D), b_enc=b) for b in (0.1, 0.1, 0.2))
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert sae_of(2 * torch.eye(3, D), b_enc=0.1).fingerprint != first.fingerprint


def test_a_sae_without_one_usable_row_is_refused():
    with pytest.raises(ValueError, match="no decoder row that is usable"):
        sae_of(torch.zeros(3, D))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lens_sae = toys.write_lens_sae(torch.eye(3, D), SITE, threshold=0.25)
    lens_sae.save_model(tmp_path / "1-res")
    return tmp_path / "1-res"


def test_a_folder_gives_back_what_was_saved(saved: Path):
    sae = load(saved)
    assert torch.equal(sae.directions, torch.eye(3, D))
    assert sae.source == str(saved)
    assert sae.encode(0.5 * torch.eye(3, D)).tolist() == (0.5 * torch.eye(3)).tolist()


def shorten(folder: Path) -> None:
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def take_threshold(folder: Path) -> None:
    weights = load_file(folder / "sae_weights.safetensors")
    del weights["threshold"]
    save_file(weights, folder / "sae_weights.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shorten, "1-res.* cannot be read"),
        (take_threshold, "1-res.* cannot be read"),
        (lambda folder: (folder / "cfg.json").write_text("{"), r"cfg\.json is not JSON"),
        (lambda folder: (folder / "cfg.json").write_text("[]"), "1-res.* is no configuration"),
        (
            lambda folder: (folder / "cfg.json").write_text('{"architecture": "none such"}'),
            "1-res.* save_inference_model saves them: KeyError: 'none such'",
        ),
    ],
)
def test_a_broken_folder_is_named(saved: Path, spoil: Callable[[Path], Any], message: str):
    spoil(saved)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        assert load(saved).lens_sae


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"1-res/{name}"):
        load(saved)
