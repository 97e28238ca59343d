"""The notebooks: their form, and what one execution of each wrote, against the method by hand."""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from answers import NOTEBOOKS as FOLDER, write_answered
from judge_server import JudgeServer, scores

from flowhelpers.core.features import FeatureId, parse_feature
from flowhelpers.runs.notebooks import plan
from flowhelpers.runs.parameters import inspect

FLOWLET = Path(__file__).parent.parent / "flowhelpers/data/flowlet"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
OF_OTHER_SUITES = {"table_5", "cosine_check"}  # tables that flowlet has no use for
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def named(path: Path, kind: str) -> set[str]:
    """The tables or figures that a notebook names."""
    source = "\n".join(cell.source for cell in code_cells(path))
    return set(re.findall(rf'run\.{kind}\(\s*"([^"]+)"', source))


# What every notebook is to be like.


@each_notebook
def test_parameters_are_literals_with_a_type_and_a_comment(path: Path) -> None:
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in ast.parse(tagged[0].source).body:
        assert isinstance(line, ast.AnnAssign)
        assert line.value is not None
        ast.literal_eval(line.value)
    assert all(parameter.help for parameter in inspect(path).values())


@each_notebook
def test_notebook_holds_no_outputs_and_nothing_of_a_machine(path: Path) -> None:
    book = read(path)
    assert [cell.execution_count for cell in code_cells(path)] == [None] * len(code_cells(path))
    assert not any(cell.outputs for cell in code_cells(path))
    assert book.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell.id for cell in book.cells]
    assert len(set(ids)) == len(ids)
    assert not any(re.fullmatch(r"[0-9a-f]{8}", one) for one in ids)  # as made at random


@each_notebook
def test_cells_are_named_and_short(path: Path) -> None:
    names = []
    for cell in code_cells(path):
        first, *rest = cell.source.splitlines()
        found = re.fullmatch(r"# papermill_description=(\w+)", first)
        assert found, first
        names.append(found[1])
        most = 10 if path.stem == "00_start_here" else 18
        free = found[1] in ("Versions", "Parameters")
        assert len(rest) <= most or free, f"{found[1]} has {len(rest)} lines"
    assert len(set(names)) == len(names)
    assert "environment()" in code_cells(path)[0].source


@each_notebook
def test_widgets_are_only_for_a_person(path: Path) -> None:
    for cell in code_cells(path):
        tree = ast.parse(cell.source)
        guarded = [
            node
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and ast.unparse(branch.test) == "live()"
            for node in ast.walk(branch)
        ]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "interactive_output":
                assert call in guarded


@each_notebook
def test_every_exercise_has_a_folded_answer(path: Path) -> None:
    book = read(path)
    ids = [cell.id for cell in book.cells]
    exercises = [one for one in ids if one.startswith("exercise-")]
    assert 2 <= len(exercises) <= 5
    for one in exercises:
        answer = book.cells[ids.index(one) + 1]
        assert answer.id == one.replace("exercise", "answer")
        assert answer.source.lstrip().startswith("<details><summary>")
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert text.count("<details>") == text.count("</details>")


def test_presets_name_what_there_is_and_quick_is_the_default() -> None:
    presets = yaml.safe_load((FOLDER / "presets.yaml").read_text("utf-8"))
    assert set(presets) == {path.stem for path in NOTEBOOKS}
    for path in NOTEBOOKS:
        assert set(presets[path.stem]) == {"quick", "paper"}
        defaults = {name: parameter.default for name, parameter in inspect(path).items()}
        assert presets[path.stem]["quick"] == defaults
    assert set(plan(preset="paper")) == set(NOTEBOOKS)  # names and types are checked there


# One execution of each, with the folded answers put in place.


@dataclass(frozen=True)
class Executed:
    """The run's folder of one notebook."""

    folder: Path

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.folder / f"tables/{name}.parquet")

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Executed]:
    """Every notebook executed by the command line, without a network.

    The execution is that of the manifest in `FLOWHELPERS_EXECUTED`, where that is set.
    """
    manifest = Path(os.environ.get("FLOWHELPERS_EXECUTED") or execute(tmp_path_factory))
    jobs = json.loads(manifest.read_text("utf-8"))["jobs"]
    return {Path(job["notebook"]).stem: Executed(manifest.parent / job["folder"]) for job in jobs}


def execute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Executes every notebook; returns the manifest."""
    root = tmp_path_factory.mktemp("executed")
    write_answered(root / "notebooks")
    done = subprocess.run(
        [sys.executable, "-m", "flowhelpers", "run", "--out", str(root / "o")],
        env=os.environ
        | {
            "FLOWHELPERS_NOTEBOOKS": str(root / "notebooks"),
            "FLOWHELPERS_CACHE": str(root / "cache"),
            "HF_HUB_OFFLINE": "1",
        },
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next((root / "o").glob("*.json"))


@each_notebook
def test_every_table_and_figure_is_written(path: Path, executed: dict[str, Executed]) -> None:
    folder = executed[path.stem].folder
    for kind, ending in (("table", "parquet"), ("table", "csv"), ("figure", "html")):
        written = {file.stem for file in folder.glob(f"{kind}s/*.{ending}")}
        assert named(path, kind) - OF_OTHER_SUITES == written
    shown = [
        output
        for cell in code_cells(folder / "notebook.ipynb")
        for output in cell.outputs
        if PLOTLY in output.get("data", {})
    ]
    assert len(shown) == len(named(path, "figure")) > 0


@each_notebook
def test_the_page_needs_no_network(path: Path, executed: dict[str, Executed]) -> None:
    pages = [
        executed[path.stem].folder / "notebook.html",
        *(executed[path.stem].folder / "figures").glob("*.html"),
    ]
    for page in pages:
        html = page.read_text("utf-8")
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']([^\"']*)", html
        )
        assert not [address for address in loaded if not address.endswith("plotly.min.js")]


@each_notebook
def test_results_and_settings_are_kept(path: Path, executed: dict[str, Executed]) -> None:
    config = json.loads((executed[path.stem].folder / "config.json").read_text("utf-8"))
    assert config["parameters"] == {n: p.default for n, p in inspect(path).items()}
    assert config["choices"]
    results = executed[path.stem].results
    if "feature" in results:
        assert parse_feature(results["feature"]).module == "res"
    assert results


@each_notebook
def test_the_folded_answers_are_right(path: Path, executed: dict[str, Executed]) -> None:
    cells = {cell.id: cell for cell in read(executed[path.stem].folder / "notebook.ipynb").cells}
    checked = [
        "".join(
            o.text
            for o in cells[name.replace("answer", "exercise")].outputs
            if o.get("name") == "stdout"
        )
        for name, cell in cells.items()
        if name.startswith("answer-") and re.search(r"(?m)^my_\w+ = ", cell.source)
    ]
    assert checked == ["right\n"] * len(checked) != []


# The model by plain hooks, as Hugging Face has it.


@dataclass(frozen=True)
class ByHand:
    """The model of the suite as Hugging Face has it, and its SAEs as sae-lens has them."""

    model: Any
    tokenizer: Any

    def ids(self, text: str) -> torch.Tensor:
        plain = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([[self.tokenizer.bos_token_id, *plain]])

    def part(self, feature: FeatureId) -> Any:
        layer = self.model.model.layers[feature.layer]
        return {
            "res": layer,
            "mlp": layer.post_feedforward_layernorm,
            "att": layer.post_attention_layernorm,
        }[feature.module]

    @contextmanager
    def hooked(self, part: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        handle = part.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def activations(self, name: str, ids: torch.Tensor, without: str = "", at: int = 0) -> Any:
        """One feature at every token, after another was taken away at one position."""
        feature = parse_feature(name)
        kept: list[torch.Tensor] = []

        def keep(values: torch.Tensor) -> torch.Tensor:
            kept.append(values.clone())
            return values

        def take_away(values: torch.Tensor) -> torch.Tensor:
            changed = values.clone()
            changed[0, at] -= theirs.encode(values[0, at])[other.index] * theirs.W_dec[other.index]
            return changed

        with torch.no_grad():
            if without:
                other = parse_feature(without)
                theirs = lens_sae(other.layer, other.module)
                with (
                    self.hooked(self.part(other), take_away),
                    self.hooked(self.part(feature), keep),
                ):
                    self.model(input_ids=ids)
            else:
                with self.hooked(self.part(feature), keep):
                    self.model(input_ids=ids)
            codes = lens_sae(feature.layer, feature.module).encode(kept[0][0])
            return codes[:, feature.index].numpy()

    def codes(self, layer: int, module: str, texts: Sequence[str]) -> np.ndarray:
        """Activations at all tokens of texts, BOS and other special tokens left out."""
        return codes_of(self, layer, module, tuple(texts))


@cache
def codes_of(by_hand: ByHand, layer: int, module: str, texts: tuple[str, ...]) -> np.ndarray:
    kept: list[torch.Tensor] = []

    def keep(values: torch.Tensor) -> torch.Tensor:
        kept.append(values[0].clone())
        return values

    special = torch.tensor(by_hand.tokenizer.all_special_ids)
    rows = []
    part = by_hand.part(FeatureId(layer, module, 0))
    with torch.no_grad(), by_hand.hooked(part, keep):
        for text in texts:
            ids = by_hand.ids(text)[:, :128]
            by_hand.model.model(input_ids=ids)
            rows.append(kept.pop()[~torch.isin(ids[0], special)])
        return lens_sae(layer, module).encode(torch.cat(rows)).numpy()


def sample_of_01() -> list[str]:
    """The texts that 01 reads."""
    from flowhelpers.activations.corpora import load_texts

    return [t for name in ("fiction", "science", "maths", "python") for t in load_texts(name, 15)]


def sample_of_02() -> list[str]:
    """The passages that 02 reads."""
    from flowhelpers.activations.corpora import passages

    return passages().groupby("subject").head(12)["text"].tolist()


@pytest.fixture(scope="module")
def by_hand() -> ByHand:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = FLOWLET / "model"
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return ByHand(model, AutoTokenizer.from_pretrained(folder))


# The method by hand: decoders that sae-lens loads, products in double precision, nothing else.


@cache
def decoder(layer: int, module: str) -> torch.Tensor:
    """Decoder rows as sae-lens has them, made unit in double precision."""
    rows = lens_sae(layer, module).W_dec.detach().double()
    return rows / rows.norm(dim=1, keepdim=True)


@cache
def lens_sae(layer: int, module: str) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(FLOWLET / f"saes/{layer}-{module}", device="cpu")


@cache
def cosines(layer: int, module: str) -> torch.Tensor:
    """Of all residual features of a layer with those of a place before it, `[targets, sources]`."""
    return decoder(layer, "res") @ decoder(layer - (module == "res"), module).T


@cache
def turned(rows: int) -> list[torch.Tensor]:
    """The rotations of the null: as many as give 8,192 best cosines of so many rows."""
    found = []
    for number in range(8192 // rows):
        noise = torch.randn(
            192, 192, generator=torch.Generator().manual_seed(number), dtype=torch.double
        )
        q, r = torch.linalg.qr(noise)
        found.append(q * r.diagonal().sign())
    return found


@cache
def chance(layer: int, module: str, direction: str = "backward") -> np.ndarray:
    """Best cosines by chance, of targets that look for a source or the other way round."""
    ours, theirs = decoder(layer, "res"), decoder(layer - (module == "res"), module)
    if direction == "forward":
        ours, theirs = theirs, ours
    best = [(ours @ q @ theirs.T).max(dim=1).values for q in turned(len(ours))]
    return torch.cat(best).numpy()


def null(layer: int, module: str, direction: str = "backward") -> float:
    return float(np.quantile(chance(layer, module, direction), 0.999))


def best_back(layer: int, module: str) -> tuple[np.ndarray, np.ndarray]:
    """The best source of every residual feature of a layer, and its cosine."""
    best = cosines(layer, module).max(dim=1)
    return best.indices.numpy(), best.values.numpy()


def best_on(layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The feature of the next layer whose cosine with each of this one is highest."""
    best = cosines(layer + 1, "res").max(dim=0)
    return best.indices.numpy(), best.values.numpy()


def chain_of(layer: int, feature: int) -> list[int]:
    """The residual chain through a feature, from layer 0 to 7."""
    chain = [feature]
    for at in range(layer, 0, -1):
        chain.insert(0, int(best_back(at, "res")[0][chain[0]]))
    for at in range(layer, 7):
        chain.append(int(best_on(at)[0][chain[-1]]))
    return chain


def reading(layer: int, feature: int) -> str:
    """The class of the paper's 3.3."""
    places = ("res", "mlp", "att") if layer else ("mlp", "att")
    high = {m: best_back(layer, m)[1][feature] > null(layer, m) for m in places}
    if high.get("res"):
        return "processed" if high["mlp"] or high["att"] else "translated"
    return "newborn" if high["mlp"] or high["att"] else "unexplained"


@pytest.fixture(scope="module")
def matches(executed: dict[str, Executed]) -> pd.DataFrame:
    return executed["01_matching"].table("matches")


@pytest.mark.parametrize(("module", "feature"), [("res", 17), ("mlp", 500), ("att", 1023)])
def test_matches_back_are_the_five_highest_cosines(
    matches: pd.DataFrame, module: str, feature: int
) -> None:
    best = cosines(4, module)[feature].topk(6)
    rows = matches.query("direction == 'backward' and module == @module and feature == @feature")
    rows = rows.sort_values("rank")
    assert rows["rank"].tolist() == [1, 2, 3, 4, 5]
    assert rows["source"].tolist() == best.indices[:5].tolist()
    for column in ("cosine", "score"):
        assert rows[column].to_numpy() == pytest.approx(best.values[:5].numpy(), abs=1e-6)
    assert rows["margin"].to_numpy() == pytest.approx(-best.values.diff().numpy(), abs=1e-6)
    assert (rows["source_layer"] == 4 - (module == "res")).all()
    back = cosines(4, module)[:, best.indices[:5]].argmax(dim=0)
    assert rows["mutual"].tolist() == [bool(back[0] == feature), *[False] * 4]
    below = np.searchsorted(np.sort(chance(4, module)), best.values[:5].numpy()) / 8192
    assert rows["null_quantile"].to_numpy() == pytest.approx(below, abs=2 / 8192)


@pytest.mark.parametrize(("module", "source"), [("res", 5), ("mlp", 900), ("att", 300)])
def test_matches_on_are_the_five_highest_cosines_seen_from_the_source(
    matches: pd.DataFrame, module: str, source: int
) -> None:
    best = cosines(4, module)[:, source].topk(6)
    rows = matches.query("direction == 'forward' and module == @module and source == @source")
    rows = rows.sort_values("rank")
    assert rows["feature"].tolist() == best.indices[:5].tolist()
    assert rows["cosine"].to_numpy() == pytest.approx(best.values[:5].numpy(), abs=1e-6)
    assert rows["margin"].to_numpy() == pytest.approx(-best.values.diff().numpy(), abs=1e-6)
    back = cosines(4, module)[best.indices[:5]].argmax(dim=1)
    assert rows["mutual"].tolist() == [bool(back[0] == source), *[False] * 4]


def test_matches_cover_every_feature_and_place(matches: pd.DataFrame) -> None:
    counts = matches.groupby(["direction", "module"], observed=True).size().to_dict()
    back = {("backward", module): 1024 * 5 for module in ("res", "mlp", "att")}
    on = {("forward", "res"): 1024 * 5, ("forward", "mlp"): 1024 * 5, ("forward", "att"): 512 * 5}
    assert counts == back | on


@pytest.mark.parametrize("module", ["res", "mlp", "att"])
@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_the_null_is_the_quantile_of_best_cosines_into_turned_saes(
    matches: pd.DataFrame, module: str, direction: str
) -> None:
    found = matches.query("direction == @direction and module == @module")["null"]
    expected = null(4, module, direction)
    assert found.to_numpy() == pytest.approx(np.full(len(found), expected), abs=1e-6)


def test_the_first_feature_by_hand_is_what_double_precision_gives(
    executed: dict[str, Executed],
) -> None:
    for row in executed["01_matching"].table("by_hand").itertuples():
        best = cosines(4, str(row.module))[0].topk(2)
        assert parse_feature(str(row.match)).index == best.indices[0]
        assert (row.score, row.second) == pytest.approx(best.values.tolist(), abs=1e-6)
        assert row.margin == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-6)


def test_scores_are_the_best_cosines_and_layer_0_has_none_in_the_stream(
    executed: dict[str, Executed],
) -> None:
    table = executed["01_matching"].table("scores")
    assert table.loc[table["layer"] == 0, ["s_res", "source_res", "null_res"]].isna().all(axis=None)
    assert table.loc[table["layer"] > 0].notna().all(axis=None)
    for layer, part in table.groupby("layer"):
        part = part.sort_values("feature")
        assert part["feature"].tolist() == list(range(1024))
        for module in ("res", "mlp", "att") if layer else ("mlp", "att"):
            sources, values = best_back(int(str(layer)), module)
            assert part[f"s_{module}"].to_numpy() == pytest.approx(values, abs=1e-6)
            assert (part[f"source_{module}"].to_numpy() == sources).all()


def test_classes_are_the_four_readings_and_their_thresholds_stand_beside_them(
    executed: dict[str, Executed],
) -> None:
    table = executed["01_matching"].table("classes")
    for layer, part in table.groupby("layer"):
        for module in ("res", "mlp", "att") if layer else ("mlp", "att"):
            expected = np.full(len(part), null(int(str(layer)), module))
            assert part[f"high_{module}"].to_numpy() == pytest.approx(expected, abs=1e-6)
    some = table[table["feature"] % 16 == 0]
    expected = [reading(layer, f) for layer, f in zip(some["layer"], some["feature"], strict=True)]
    assert some["class"].tolist() == expected
    assert set(expected) == {"translated", "processed", "newborn", "unexplained"}


def test_summary_counts_what_lies_above_the_null(executed: dict[str, Executed]) -> None:
    summary = executed["01_matching"].table("summary").set_index("layer")
    for layer in range(1, 8):
        for module in ("res", "mlp", "att"):
            share = (best_back(layer, module)[1] > null(layer, module)).mean()
            assert summary.loc[layer, f"above_{module}"] == pytest.approx(share)
    assert np.isnan(summary.loc[0, "above_res"])
    classes = summary[["translated", "processed", "newborn", "unexplained"]]
    assert classes.loc[0].isna().all()
    assert classes.loc[1:].sum(axis=1).to_numpy() == pytest.approx(np.ones(7))
    assert classes.loc[1:, ["translated", "processed"]].sum(axis=1).to_numpy() == pytest.approx(
        summary.loc[1:, "above_res"].to_numpy()
    )


def test_bare_cut_offs_are_held_against_what_chance_passes(executed: dict[str, Executed]) -> None:
    table = executed["01_matching"].table("cut_offs")
    assert table["name"].nunique() == 4
    for row in table.itertuples():
        found = (best_back(4, str(row.module))[1] > row.cut_off).mean()
        assert row.found_above == pytest.approx(found, abs=1.1 / 1024)
        by_chance = (chance(4, str(row.module)) > row.cut_off).mean()
        assert row.chance_above == pytest.approx(by_chance, abs=1.1 / 8192)


def test_a_steadier_line_is_drawn_by_pooled_turns(executed: dict[str, Executed]) -> None:
    lines = executed["01_matching"].table("other_rotations")
    assert lines["pooled"].iloc[0] == pytest.approx(null(4, "res"), abs=1e-6)
    assert lines["pooled"].std() < lines["one turn"].std()
    both = executed["01_matching"].table("chance")
    first = (decoder(4, "res") @ turned(1024)[0] @ decoder(3, "res").T).max(dim=1).values
    assert np.sort(both["chance"]) == pytest.approx(np.sort(first.numpy()), abs=1e-6)
    assert both["found"].to_numpy() == pytest.approx(best_back(4, "res")[1], abs=1e-6)


def test_thresholds_by_the_data_part_active_from_inactive_predecessors_best(
    executed: dict[str, Executed], by_hand: ByHand
) -> None:
    # Layer 4 and its predecessors in the stream, token by token.
    codes = {layer: by_hand.codes(layer, "res", sample_of_01()) for layer in (3, 4)}
    table = executed["01_matching"].table("classes_by_data")
    rows = table[table["layer"] == 4].sort_values("feature")
    tokens, features = np.nonzero(codes[4])
    active = codes[3][tokens, best_back(4, "res")[0][features]] > 0
    score = rows["s_res"].to_numpy()[features]

    def youden(cut: float) -> float:
        return float((score[active] > cut).mean() - (score[~active] > cut).mean())

    best = max(youden(cut) for cut in np.unique(score) - 1e-9)
    assert youden(float(rows["high_res"].iloc[0])) == pytest.approx(best, abs=1e-3)
    assert rows["high_res"].iloc[0] != pytest.approx(null(4, "res"), abs=1e-2)


# The other ways to match.


def permuted(layer: int, module: str) -> dict[int, int]:
    from scipy.optimize import linear_sum_assignment

    ends, starts = linear_sum_assignment(cosines(layer, module).numpy(), maximize=True)
    return dict(zip(ends.tolist(), starts.tolist(), strict=True))


def test_the_permutation_is_the_best_pairing_and_agreement_counts_it(
    executed: dict[str, Executed],
) -> None:
    compare = executed["01_matching"].table("matchers").set_index(["method", "module"])
    agreed = executed["01_matching"].table("agreement")
    layers = {"res": (2, 4, 6), "att": (0, 2, 4, 6)}
    for module, at in layers.items():
        pairs = [(layer, target, source) for layer in at for target, source in
                 permuted(layer, module).items()]  # fmt: skip
        values = [float(cosines(layer, module)[t, s]) for layer, t, s in pairs]
        row = compare.loc[("permutation", module)]
        assert row["mean cosine"] == pytest.approx(np.mean(values), abs=1e-5)
        assert row["matched"] == pytest.approx(len(pairs) / (1024 * len(at)))
        same = np.mean([best_back(layer, module)[0][t] == s for layer, t, s in pairs])
        both = agreed.query("first == 'cosine' and second == 'permutation' and module == @module")
        assert both["features"].item() == len(pairs)
        assert both["same"].item() == pytest.approx(same, abs=2e-3)  # pairings may tie
        assert row["mutual"] == row["matched"]  # one to one by its making
    for method in ("permutation", "folded", "all_weights"):
        assert compare.loc[(method, "res"), "sources used"] == 1.0


def test_mutual_matches_stand_beside_chance_at_every_place(executed: dict[str, Executed]) -> None:
    table = executed["01_matching"].table("trust_by_chance")
    assert table["matches"].tolist() == ["found", "chance"] * 3
    found = table[table["matches"] == "found"].set_index("place")
    chance = table[table["matches"] == "chance"].set_index("place")
    for layer, module in ((3, "res"), (4, "mlp"), (4, "att")):
        cosines = decoder(4, "res") @ decoder(layer, module).T
        on, back = cosines.argmax(dim=0), cosines.argmax(dim=1)
        mutual = (on[back] == torch.arange(len(back))).double().mean().item()
        best = cosines.topk(2, dim=1).values
        margin = (best[:, 0] - best[:, 1]).quantile(0.5, interpolation="lower").item()
        row = found.loc[f"{layer}/{module}"]
        assert row["mutual"] == pytest.approx(mutual, abs=0.002)
        assert row["median margin"] == pytest.approx(margin, abs=1e-5)
        n, m = cosines.shape
        assert row["features"] == m
        assert chance.loc[f"{layer}/{module}", "mutual"] == pytest.approx(m / (n + m - 1), abs=0.1)


def test_matchers_are_compared_by_what_each_found(executed: dict[str, Executed]) -> None:
    compare = executed["01_matching"].table("matchers").set_index(["method", "module"])
    for module in ("res", "mlp", "att"):
        at = [layer for layer in (0, 2, 4, 6) if layer or module != "res"]
        values = np.concatenate([best_back(layer, module)[1] for layer in at])
        above = [best_back(layer, module)[1] > null(layer, module) for layer in at]
        mutual = [
            cosines(layer, module).argmax(dim=0).numpy()[best_back(layer, module)[0]]
            == np.arange(1024)
            for layer in at
        ]
        used = sum(len(set(best_back(layer, module)[0].tolist())) for layer in at)
        row = compare.loc[("cosine", module)]
        assert row["mean cosine"] == pytest.approx(values.mean(), abs=1e-6)
        assert row["above chance"] == pytest.approx(np.mean(above))
        assert row["mutual"] == pytest.approx(np.mean(mutual))
        assert row["sources used"] == pytest.approx(used / (len(at) * cosines(4, module).shape[1]))
        # Drawn from five: the mean of their cosines, and the best of them one time in five.
        five = np.mean([cosines(layer, module).topk(5).values.mean() for layer in at])
        # A draw of some thousand, whose mean is off by .003 as a rule.
        assert compare.loc[("random", module), "mean cosine"] == pytest.approx(five, abs=0.015)
    drawn = executed["01_matching"].table("agreement").query("second == 'random'")
    assert drawn["same"].to_numpy() == pytest.approx(np.full(3, 0.2), abs=0.03)


def test_pearson_is_the_highest_correlation_over_the_texts(
    executed: dict[str, Executed], by_hand: ByHand
) -> None:
    own = executed["01_matching"].table("own").set_index(["method", "module"])
    chosen = parse_feature(executed["01_matching"].results["feature"])
    texts = sample_of_01()
    ours = by_hand.codes(4, "res", texts)[:, chosen.index].astype(float)
    for layer, module in ((3, "res"), (4, "mlp")):
        theirs = by_hand.codes(layer, module, texts).astype(float)
        spread = theirs.std(axis=0) * ours.std()
        products = ((theirs - theirs.mean(axis=0)) * (ours - ours.mean())[:, None]).mean(axis=0)
        found = np.where(spread > 0, products / np.where(spread > 0, spread, 1), 0)
        row = own.loc[("pearson", module)]
        assert row["source"] == f"{layer}/{module}/{found.argmax()}"
        assert row["score"] == pytest.approx(found.max(), abs=1e-4)


def test_the_matrix_has_a_one_for_each_match(executed: dict[str, Executed]) -> None:
    table = executed["01_matching"].table("transition").set_index(["matches", "k"])
    for k in (1, 5):
        columns = np.bincount(cosines(4, "res").topk(k).indices.flatten().numpy(), minlength=1024)
        row = table.loc[("found", k)]
        assert row["ones"] == 1024 * k
        assert row["most in a row"] == k
        assert row["nobody's source"] == (columns == 0).mean()
        assert row["most in a column"] == columns.max()
        assert row["shared by several"] == (columns > 1).mean()


def test_a_sae_at_z_comes_back_by_both_steps_and_by_no_fewer(
    executed: dict[str, Executed], by_hand: ByHand
) -> None:
    table = executed["01_matching"].table("attention_at_z").set_index("step")
    layer = by_hand.model.model.layers[4]
    W_O = layer.self_attn.o_proj.weight.detach().double().T
    gain = 1 + layer.post_attention_layernorm.weight.detach().double()
    truth = decoder(4, "att")
    z = truth @ torch.linalg.inv(W_O * gain)
    for name, moved in (("W_O and gain", z @ W_O * gain), ("W_O, no gain", z @ W_O)):
        moved = moved / moved.norm(dim=1, keepdim=True)
        cosine = (moved * truth).sum(dim=1)
        same = (decoder(4, "res") @ moved.T).argmax(dim=1) == cosines(4, "att").argmax(dim=1)
        row = table.loc[name]
        assert row["cosine to the true direction"] == pytest.approx(float(cosine.mean()), abs=1e-5)
        assert row["lowest"] == pytest.approx(float(cosine.min()), abs=1e-4)
        assert row["same best match"] == pytest.approx(float(same.double().mean()), abs=3 / 1024)
    assert table.loc["W_O and gain", "same best match"] == 1.0
    assert table.loc["W_O, no gain", "same best match"] < 0.9
    assert table.loc["z as it is", "same best match"] < 0.01
    assert table.loc["z as it is", "above chance"] < 0.01


# Flow graphs, walked by hand.


@pytest.fixture(scope="module")
def flows(executed: dict[str, Executed]) -> Executed:
    return executed["02_flow_graphs"]


@pytest.fixture(scope="module")
def chain(flows: Executed) -> list[int]:
    return chain_of(4, parse_feature(flows.results["feature"]).index)


def test_the_chain_is_walked_by_best_matches_and_read_layer_by_layer(
    flows: Executed, chain: list[int]
) -> None:
    table = flows.table("layer_by_layer")
    assert table["feature"].tolist() == [f"{layer}/res/{i}" for layer, i in enumerate(chain)]
    for layer, row in enumerate(table.to_dict("records")):
        places = ("res", "mlp", "att") if layer else ("mlp", "att")
        for module in places:
            sources, values = best_back(layer, module)
            assert row[f"s_{module}"] == pytest.approx(values[chain[layer]], abs=1e-6)
            named = f"{layer}/{module}/{sources[chain[layer]]}: writes "
            high = values[chain[layer]] > null(layer, module)
            assert (named in row["adds"]) == (high and module != "res")
        assert row["class"] == reading(layer, chain[layer])
        shown = [f"{null(layer, m):.3f}" if m in places else "–" for m in ("res", "mlp", "att")]
        assert row["high above"] == " / ".join(shown)
        if layer:
            step = float(cosines(layer, "res")[chain[layer], chain[layer - 1]])
            assert row["step"] == pytest.approx(step, abs=1e-6)
    turned = [
        f"{layer}/res/{i}"
        for layer, i in enumerate(chain)
        if layer
        and any(
            best_back(layer, m)[1][i] > max(null(layer, m), best_back(layer, "res")[1][i])
            for m in ("mlp", "att")
        )
    ]
    assert flows.results["turns"] == turned


def test_the_saved_graph_has_these_nodes_and_edges(flows: Executed, chain: list[int]) -> None:
    saved = json.loads((flows.folder / "graph.json").read_text("utf-8"))
    expected = {}
    for layer, i in enumerate(chain):
        for module in ("mlp", "att"):
            j = best_back(layer, module)[0][i]
            expected[f"{layer}/{module}/{j}", f"{layer}/res/{i}"] = float(
                cosines(layer, module)[i, j]
            )
        if layer:
            pair = f"{layer - 1}/res/{chain[layer - 1]}", f"{layer}/res/{i}"
            expected[pair] = float(cosines(layer, "res")[i, chain[layer - 1]])
    edges = {(edge["source"], edge["target"]): edge for edge in saved["edges"]}
    assert set(edges) == set(expected)
    assert {n["feature"] for n in saved["nodes"]} == {end for pair in expected for end in pair}
    for (source, target), edge in edges.items():
        assert edge["cosine"] == pytest.approx(expected[source, target], abs=1e-6)
        here, there = parse_feature(target).layer, parse_feature(source).module
        forward = there == "res" and here > 4
        assert edge["direction"] == ("forward" if forward else "backward")
        assert edge["null"] == pytest.approx(null(here, there, edge["direction"]), abs=1e-6)
    assert saved["seeds"] == [flows.results["feature"]]
    exported = json.loads((flows.folder / "graph-neuronpedia.json").read_text("utf-8"))
    weights = {(link["source"], link["target"]): link["weight"] for link in exported["links"]}
    lanes = {"att": 0, "res": 1, "mlp": 2}

    def node(name: str) -> str:
        feature = parse_feature(name)
        return f"{feature.layer}_{feature.index}_{lanes[feature.module]}"

    assert weights == {
        (node(source), node(target)): pytest.approx(cosine, abs=1e-6)
        for (source, target), cosine in expected.items()
    }
    name, *members = exported["qParams"]["supernodes"][0]
    assert name == flows.results["feature"]
    assert members == [node(f"{layer}/res/{i}") for layer, i in enumerate(chain)]
    assert all(one["clerp"].startswith("writes ") for one in exported["nodes"])


def test_the_path_is_the_chain_and_its_ends_are_compared(flows: Executed, chain: list[int]) -> None:
    way = flows.table("path")
    ends = list(zip(way["source"], way["target"], strict=True))
    names = [f"{layer}/res/{i}" for layer, i in enumerate(chain)]
    assert ends == list(pairwise(names))
    steps = [float(cosines(layer, "res")[chain[layer], chain[layer - 1]]) for layer in range(1, 8)]
    assert way["cosine"].prod() == pytest.approx(np.prod(steps), abs=1e-6)


def test_thresholds_cut_the_graph_where_they_say(flows: Executed, chain: list[int]) -> None:
    table = flows.table("variants").set_index("graph")
    at = list(enumerate(chain))
    scores = {m: [best_back(layer, m)[1][i] for layer, i in at] for m in ("mlp", "att")}
    steps = [float(cosines(layer, "res")[chain[layer], chain[layer - 1]]) for layer in range(1, 8)]
    assert table.loc["uncut", ["res", "mlp", "att"]].tolist() == [8, 8, 8]
    assert table.loc["uncut", "edges"] == 7 + 8 + 8
    left = [layer for layer in range(8) if all(s >= 0.5 for s in between(steps, 4, layer))]
    cut = table.loc["as in B.2"]
    assert cut["layers"] == f"{left[0]} to {left[-1]}"
    assert cut["res"] == len(left)
    for module in ("mlp", "att"):
        assert cut[module] == sum(scores[module][layer] >= 0.15 for layer in left)
    poor = [
        scores[m][layer] <= null(layer, m)
        for m in ("mlp", "att") for layer in left if scores[m][layer] >= 0.15
    ]  # fmt: skip
    assert (cut["module edges"], cut["no better than chance"]) == (len(poor), sum(poor))
    loose = table.loc["as in Table 5"]
    assert loose[["res", "mlp", "att"]].tolist() == [8, sum(np.array(scores["mlp"]) >= 0.25), 8]
    assert (table.loc["above chance", "no better than chance"]) == 0
    assert table.loc["wide", "res"] >= table.loc["above chance", "res"]


def between(steps: list[float], start: int, end: int) -> list[float]:
    """The steps of a chain from one layer to another."""
    return steps[min(start, end) : max(start, end)]


def test_the_three_other_lives_are_what_their_rules_ask_for(
    flows: Executed, by_hand: ByHand
) -> None:
    table, lives = flows.table("features"), flows.table("lives").set_index("life")
    for layer in range(8):  # first, what the rules go by
        part = table[table["layer"] == layer].sort_values("feature")
        for module in ("res", "mlp", "att") if layer else ("mlp", "att"):
            values = best_back(layer, module)[1]
            assert part[f"s_{module}"].to_numpy() == pytest.approx(values, abs=1e-6)
        if layer < 7:
            assert part["s_on"].to_numpy() == pytest.approx(best_on(layer)[1], abs=1e-6)
            limit = null(layer + 1, "res", "forward")
            assert part["null_on"].to_numpy() == pytest.approx(np.full(1024, limit), abs=1e-6)
    rates = (by_hand.codes(4, "res", sample_of_02()) > 0).mean(axis=0)
    found = table[table["layer"] == 4].sort_values("feature")["active"]
    assert found.to_numpy() == pytest.approx(rates, abs=2e-4)  # float noise at a threshold
    usual = table[(table["layer"] > 0) & (table["active"] >= 0.001) & (table["active"] <= 0.05)]
    over = {
        m: usual[f"s_{m}"].where(usual[f"s_{m}"] > usual[f"null_{m}"], -1) for m in ("mlp", "att")
    }
    usual = usual.assign(best=np.maximum(over["mlp"], over["att"]))
    processed = usual[(usual["class"] == "processed") & (over["mlp"] >= over["att"])]
    newborn = usual[usual["class"] == "newborn"]
    dies = usual[(usual["s_res"] > usual["null_res"]) & (usual["s_on"] <= usual["null_on"])]
    for life, (candidates, score) in {
        "processed": (processed, "s_mlp"),
        "newborn": (newborn, "best"),
        "dies": (dies, "s_res"),
    }.items():
        row = candidates.loc[candidates[score].idxmax()]
        name = f"{int(row['layer'])}/res/{int(row['feature'])}"
        assert lives.loc[life, "feature"] == name == flows.results["found"][life]
        assert lives.loc[life, "candidates"] == len(candidates)
        if life != "dies":
            assert reading(int(row["layer"]), int(row["feature"])) == life


def test_several_seeds_share_the_features_where_their_chains_meet(flows: Executed) -> None:
    seeds = [parse_feature(name) for name in flows.results["together"]]
    assert len(seeds) == 4
    assert str(seeds[0]) == flows.results["feature"]
    lines = [chain_of(4, seed.index) for seed in seeds]
    counts = Counter(f"{layer}/res/{i}" for line in lines for layer, i in enumerate(line))
    table = flows.table("shared")
    assert dict(zip(table["feature"], table["chains"], strict=True)) == {
        name: count for name, count in counts.items() if count > 1
    }


def test_the_seed_is_the_feature_that_tells_its_subject_best(
    flows: Executed, by_hand: ByHand
) -> None:
    from sklearn.metrics import roc_auc_score

    from flowhelpers.activations.corpora import passages

    kept = passages().groupby("subject").head(12)
    mine = (kept["subject"] == "illness").to_numpy()
    first = (kept.groupby("subject").cumcount() % 2 == 0).to_numpy()
    means = np.stack([by_hand.codes(4, "res", [text]).mean(axis=0) for text in kept["text"]])
    aucs = np.array([roc_auc_score(mine[first], means[first, i]) for i in range(1024)])
    chosen = parse_feature(flows.results["feature"]).index
    assert aucs[chosen] == pytest.approx(aucs.max(), abs=1e-3)


def test_lifespans_are_the_runs_of_steps_above_chance(flows: Executed) -> None:
    table = flows.table("lifespans")
    spans = {key: walked(lambda c, limit: c > limit) for key in ("above chance",)}
    spans["at least 0.5"] = walked(lambda c, limit: c >= 0.5)
    spans["above chance and mutual"] = walked(lambda c, limit: c > limit, mutual=True)
    ordered = table.sort_values(["layer", "feature"])
    assert ordered[["first", "last"]].to_numpy().tolist() == spans["above chance"].tolist()
    lives = flows.table("lives_of_all").set_index("steps")
    for name, span in spans.items():
        layers = span[:, 1] - span[:, 0] + 1
        assert lives.loc[name, "mean layers"] == pytest.approx(layers.mean())
        assert lives.loc[name, "live through all"] == pytest.approx((layers == 8).mean())
        since = (span[-1024:, 0] == 0).mean()
        assert lives.loc[name, "of the last layer since the first"] == pytest.approx(since)


def walked(is_high: Callable[[float, float], bool], mutual: bool = False) -> np.ndarray:
    """First and last layer of every residual feature's run, feature by feature."""
    back = {layer: best_back(layer, "res") for layer in range(1, 8)}
    on = {layer: best_on(layer) for layer in range(7)}
    spans = []
    for layer in range(8):
        for feature in range(1024):
            first, at = layer, feature
            while first > 0:
                source, cosine = (int(back[first][0][at]), float(back[first][1][at]))
                if not is_high(cosine, null(first, "res")):
                    break
                if mutual and on[first - 1][0][source] != at:
                    break
                first, at = first - 1, source
            last, at = layer, feature
            while last < 7:
                target, cosine = (int(on[last][0][at]), float(on[last][1][at]))
                if not is_high(cosine, null(last + 1, "res", "forward")):
                    break
                if mutual and back[last + 1][0][target] != at:
                    break
                last, at = last + 1, target
            spans.append((first, last))
    return np.array(spans)


def test_the_whole_model_s_flow_counts_births_deaths_and_funnels(flows: Executed) -> None:
    table = flows.table("flow_by_layer").set_index("layer")
    for layer in range(1, 8):
        row = table.loc[layer]
        sources, values = best_back(layer, "res")
        module = np.stack([best_back(layer, m)[1] for m in ("mlp", "att")])
        limits = np.array([null(layer, m) for m in ("mlp", "att")])[:, None]
        new = (values <= null(layer, "res")) & (module > limits).any(axis=0)
        assert row["newborn"] == pytest.approx(new.mean())
        nearer = np.where(module > limits, module, -1).argmax(axis=0)  # of those that are high
        assert row["born_mlp"] == pytest.approx((new & (nearer == 0)).mean())
        assert row["born_att"] == pytest.approx((new & (nearer == 1)).mean())
        counts = np.bincount(sources, minlength=1024)
        assert row["largest_funnel"] == counts.max()
        assert row["sources"] == pytest.approx((counts > 0).mean())
        back = best_on(layer - 1)[0][sources] == np.arange(1024)
        assert row["mutual"] == pytest.approx(back.mean())
        ends = best_on(layer - 1)[1] <= null(layer, "res", "forward")
        assert table.loc[layer - 1, "dies"] == pytest.approx(ends.mean())
    most = flows.table("funnels").iloc[0]
    source = parse_feature(most["source"])
    best, values = best_back(source.layer + 1, "res")
    mine = best == source.index
    assert most["features"] == mine.sum() == table["largest_funnel"].max()
    assert most["score"] == pytest.approx(values[mine].mean(), abs=1e-6)
    assert most["above"] == (values[mine] > null(source.layer + 1, "res")).sum()


# Group statistics, counted from matches and activations by plain loops over sets.


@pytest.fixture(scope="module")
def groups(executed: dict[str, Executed]) -> Executed:
    """Notebook 03, executed."""
    return executed["03_group_statistics"]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The tokens of the run's sample, and whether each feature is active there, by site."""
    from flowhelpers import activations, load_suite

    suite = load_suite("flowlet")
    given = {name: p.default for name, p in inspect(FOLDER / "03_group_statistics.ipynb").items()}
    names = activations.datasets_for(suite.row)
    texts = activations.texts_of(names, given["n_texts"], given["seed"])
    per_text, seed = given["tokens_per_text"], given["seed"]
    sample = activations.draw_sample(suite.model, texts, per_text, seed=seed)
    found = activations.read_sample(suite, sample, tmp_path_factory.mktemp("activations"))
    return found.tokens, {str(s): c.toarray() > 0 for s, c in found.by_site.items()}


@pytest.fixture(scope="module")
def grouped(sampled: tuple[pd.DataFrame, dict[str, np.ndarray]]) -> pd.DataFrame:
    """Every occurrence after layer 0, with the predecessors that are active and its group."""
    tokens, active = sampled
    parts = []
    for layer in range(1, 8):
        token, feature = np.nonzero(active[f"{layer}/res"])
        part = {"dataset": tokens["dataset"].to_numpy()[token], "layer": layer, "feature": feature}
        for module in ("res", "mlp", "att"):
            sources, values = best_back(layer, module)
            there = active[f"{layer - (module == 'res')}/{module}"]
            part[module] = there[token, sources[feature]]
            part[f"s_{module}"] = values[feature]
        parts.append(pd.DataFrame(part))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(group=[group_of(row) for row in table.itertuples()])


def group_of(row: Any) -> str:
    """The group of an occurrence."""
    on = [module.upper() for module in ("res", "mlp", "att") if getattr(row, module)]
    return "From " + (" & ".join(on) or "nowhere")


def test_the_sample_has_its_tokens_and_the_saes_see_them_so(
    groups: Executed, sampled: tuple[pd.DataFrame, dict[str, np.ndarray]], by_hand: ByHand
) -> None:
    from flowhelpers.activations.corpora import load_texts

    tokens, active = sampled
    sizes = groups.table("sample").set_index("dataset")
    assert sizes["texts"].to_dict() == {"fiction": 100, "science": 100, "maths": 96, "python": 100}
    assert tokens.groupby("dataset").size().to_dict() == sizes["tokens"].to_dict()
    texts = [t for name in sizes.index for t in load_texts(name, int(sizes.loc[name, "texts"]))]
    for text in (0, 150, 390):
        mine = tokens[tokens["text"] == text]
        assert len(mine) == 5
        for site in ("4/res", "4/att", "7/mlp"):
            layer, module = site.split("/")
            codes = by_hand.codes(int(layer), module, [texts[text]])  # BOS is left out there
            expected = codes[mine["position"].to_numpy() - 1] > 0
            assert (active[site][mine.index] == expected).mean() > 0.9995  # noise at a threshold


def test_groups_and_shares_are_counted_right(
    groups: Executed,
    grouped: pd.DataFrame,
    sampled: tuple[pd.DataFrame, dict[str, np.ndarray]],
) -> None:
    tokens, active = sampled
    assert groups.results["occurrences"] == len(grouped)
    shares = grouped["group"].value_counts(normalize=True)
    assert groups.results["shares"] == pytest.approx(shares.to_dict())
    table = groups.table("shares").set_index(["dataset", "group"])
    counts = grouped.groupby(["dataset", "group"]).size()
    for place, count in counts.items():
        assert table.loc[place, "n"] == count
        assert table.loc[place, "low"] < table.loc[place, "share"] < table.loc[place, "high"]
    assert (table["n"] == 0).sum() == 32 - len(counts)
    for module in ("res", "mlp", "att"):
        assert groups.results["predecessor_active"][module] == pytest.approx(grouped[module].mean())
        chance = groups.results["active_elsewhere"][module]
        rates = []
        for layer, part in grouped.groupby("layer"):
            sources = best_back(layer, module)[0]
            there = active[f"{layer - (module == 'res')}/{module}"]
            for dataset, rows in part.groupby("dataset"):
                inside = (tokens["dataset"] == dataset).to_numpy()
                rates += there[inside].mean(axis=0)[sources[rows["feature"]]].tolist()
        # Each predecessor is as often active there as in its dataset, whichever token it is.
        assert chance == pytest.approx(np.mean(rates), rel=0.05)


def test_tests_are_scipys_and_active_in_one_is_above_in_neither(
    groups: Executed, grouped: pd.DataFrame
) -> None:
    from scipy.stats import mannwhitneyu

    for name, unit in (("tests", False), ("tests_of_unique_features", True)):
        tests = groups.table(name)
        part = (
            grouped.drop_duplicates(["dataset", "layer", "feature", "group"]) if unit else grouped
        )
        for row in tests[tests["p"].notna()].sample(25, random_state=0).itertuples():
            here = part[(part["dataset"] == row.dataset) & (part["layer"] == row.layer)]
            a, b = (here.loc[here["group"] == g, row.score] for g in (row.first, row.second))
            assert (len(a), len(b)) == (row.n_first, row.n_second)
            assert row.p == pytest.approx(mannwhitneyu(a, b).pvalue, rel=1e-6, abs=1e-300)
    for unit in groups.results["ao_above_ib"].values():
        assert unit == {"s_res": True, "s_mlp": True, "s_att": True}


def test_transition_and_profiles_are_those_of_the_features_seen(
    groups: Executed, grouped: pd.DataFrame
) -> None:
    seen = grouped.groupby("group")[["layer", "feature"]].apply(
        lambda part: set(part.itertuples(index=False, name=None))
    )
    for row in groups.table("figure_13").itertuples():
        share = len(seen[row.first] & seen[row.second]) / len(seen[row.first])
        assert row.share == pytest.approx(share)
    profiles = groups.table("profiles").set_index(["layer", "feature"])
    for place, part in grouped[grouped["layer"] == 4].groupby(["layer", "feature"]):
        shares = part["group"].value_counts(normalize=True)
        assert profiles.loc[place, "n"] == len(part)
        assert profiles.loc[place, "main_share"] == pytest.approx(shares.max())
        assert profiles.loc[place, "entropy"] == pytest.approx(-(shares * np.log2(shares)).sum())


def test_other_matchers_are_counted_on_the_same_sample(
    groups: Executed, sampled: tuple[pd.DataFrame, dict[str, np.ndarray]]
) -> None:
    _, active = sampled
    table = groups.table("matchers").set_index("method")
    on, count = 0, 0
    for layer in range(1, 8):
        best = cosines(layer, "res").topk(5).indices.numpy()
        token, feature = np.nonzero(active[f"{layer}/res"])
        there = active[f"{layer - 1}/res"]
        on += there[token[:, None], best[feature]].any(axis=1).sum()
        count += len(token)
    assert table.loc["cosine top-5", "res"] == pytest.approx(on / count)
    assert table.loc["random top-1", "res"] < table.loc["cosine top-1", "res"]


def test_active_together_is_counted_pair_by_pair(
    groups: Executed, sampled: tuple[pd.DataFrame, dict[str, np.ndarray]]
) -> None:
    _, active = sampled
    table = groups.table("coactivation")
    for row in table[table["jaccard"].notna()].sample(30, random_state=0).itertuples():
        assert row.source == best_back(row.layer, row.module)[0][row.feature]
        target = active[f"{row.layer}/res"][:, row.feature]
        source = active[f"{row.source_layer}/{row.module}"][:, row.source]
        both = (target & source).sum()
        assert (row.n_target, row.n_source) == (target.sum(), source.sum())
        assert min(row.n_target, row.n_source) >= 10
        assert row.jaccard == pytest.approx(both / (target | source).sum())
        assert row.source_given_target == pytest.approx(both / target.sum())
        assert row.target_given_source == pytest.approx(both / source.sum())


# Deactivation, by plain hooks over whole texts.


@pytest.fixture(scope="module")
def removed(executed: dict[str, Executed]) -> Executed:
    """Notebook 04, executed."""
    return executed["04_deactivation"]


def rescaled(
    by_hand: ByHand, target: FeatureId, at: int, edits: dict[FeatureId, float], ids: torch.Tensor
) -> tuple[float, float, torch.Tensor]:
    """A feature without and with amounts of others added at its token, and the logits with them."""
    kept: list[torch.Tensor] = []

    def keep(values: torch.Tensor) -> torch.Tensor:
        kept.append(lens_sae(target.layer, "res").encode(values[0, at])[target.index])
        return values

    def push(feature: FeatureId, amount: float) -> Callable[[torch.Tensor], torch.Tensor]:
        row = lens_sae(feature.layer, feature.module).W_dec[feature.index]

        def change(values: torch.Tensor) -> torch.Tensor:
            changed = values.clone()
            changed[0, at] += amount * row
            return changed

        return change

    with torch.no_grad(), by_hand.hooked(by_hand.part(target), keep):
        by_hand.model(input_ids=ids)
        with ExitStack() as stack:
            for feature, amount in edits.items():
                part = by_hand.part(feature)
                stack.enter_context(by_hand.hooked(part, push(feature, amount)))
            logits = by_hand.model(input_ids=ids).logits
    return float(kept[0]), float(kept[1]), logits[0]


def predecessors_by_hand(
    by_hand: ByHand, target: FeatureId, at: int, text: str
) -> dict[str, tuple[FeatureId, float]]:
    """The best matches by cosine that are active at the token, and their activations."""
    found = {}
    for module in ("res", "mlp", "att"):
        layer = target.layer - (module == "res")
        source = int(best_back(target.layer, module)[0][target.index])
        activation = float(by_hand.codes(layer, module, [text])[at - 1, source])
        if activation > 0:
            found[module] = FeatureId(layer, module, source), activation
    return found


def test_the_one_edit_is_what_plain_hooks_give(removed: Executed, by_hand: ByHand) -> None:
    text = inspect(FOLDER / "04_deactivation.ipynb")["sentence"].default
    target, source = (parse_feature(removed.results[k]) for k in ("feature", "predecessor"))
    assert source.index == best_back(target.layer, "res")[0][target.index]
    codes = by_hand.codes(target.layer, "res", [text])[:, target.index]
    at = int(codes.argmax()) + 1  # after BOS
    assert list(predecessors_by_hand(by_hand, target, at, text)) == ["res"]
    amount = -predecessors_by_hand(by_hand, target, at, text)["res"][1]
    ids = by_hand.ids(text)
    old, new, logits = rescaled(by_hand, target, at, {source: amount}, ids)
    assert old == pytest.approx(codes[at - 1], rel=1e-4)
    row = removed.table("neighbours").set_index("name").loc[str(target)]
    assert row["before"] == pytest.approx(old, rel=1e-4)
    assert row["after"] == pytest.approx(new, rel=1e-3, abs=1e-4)
    with torch.no_grad():
        clean = by_hand.model(input_ids=ids).logits[0]
    table = removed.table("next_tokens")
    likely = clean[at].softmax(-1).topk(8)
    assert table["before"].to_numpy() == pytest.approx(likely.values.numpy(), rel=1e-3)
    after = logits[at].softmax(-1)[likely.indices]
    assert table["after"].to_numpy() == pytest.approx(after.numpy(), rel=1e-3, abs=1e-5)
    names = [by_hand.tokenizer.decode([i]) for i in likely.indices]
    assert table["next token"].tolist() == names


@pytest.mark.parametrize("name", ["outcomes", "subsets", "sweep"])
def test_cases_are_what_plain_hooks_over_the_whole_text_give(
    removed: Executed, by_hand: ByHand, name: str
) -> None:
    from flowhelpers.activations.corpora import load_texts

    texts, targets = load_texts("fiction", 35), removed.table("targets")
    table = removed.table(name)
    if name == "outcomes":
        table = table[table["method"] == "top-1"]
    for case in table.sample(12, random_state=7).itertuples():
        own = targets.loc[case.target]
        target, at = FeatureId(int(own["layer"]), "res", int(own["feature"])), int(own["position"])
        text = texts[int(own["text"])]
        active = predecessors_by_hand(by_hand, target, at, text)
        assert case.group == "From " + " & ".join(m.upper() for m in active)
        chosen = [m for m in active if m.upper() in case.removed]
        assert case.removed == "From " + " & ".join(m.upper() for m in chosen)
        amounts = {active[m][0]: (case.r - 1) * active[m][1] for m in chosen}
        ids = by_hand.ids(text)[:, :128]
        old, new, logits = rescaled(by_hand, target, at, amounts, ids)
        assert case.old == pytest.approx(old, rel=1e-3, abs=1e-4)
        assert case.new == pytest.approx(new, rel=1e-3, abs=1e-3)
        assert case.change == pytest.approx(1 - new / old, abs=1e-3)
        assert case.success == (case.new == 0)
        reads = lens_sae(target.layer, "res").W_enc[:, target.index].detach()
        written = sum(
            -amount * float(lens_sae(f.layer, f.module).W_dec[f.index].detach() @ reads)
            for f, amount in amounts.items()
        )
        assert case.linear == pytest.approx(written / old, rel=1e-3, abs=1e-4)
        if name == "sweep":
            with torch.no_grad():
                clean = by_hand.model(input_ids=ids).logits[0]
            losses = [
                float(torch.nn.functional.cross_entropy(some[:-1].double(), ids[0, 1:]))
                for some in (clean, logits)
            ]
            expected = (losses[1] - losses[0]) / losses[0]
            assert case.loss_change == pytest.approx(expected, rel=0.02, abs=2e-6)


def test_rates_are_counted_from_the_cases(removed: Executed) -> None:
    outcomes, rates = removed.table("outcomes"), removed.table("figure_6")
    per_method = outcomes.groupby("target")["method"].nunique()
    common = outcomes[outcomes["target"].map(per_method) == outcomes["method"].nunique()]
    assert 500 < len(common) < len(outcomes)
    groups = removed.table("targets")["group"]  # those of top-1
    common = common.assign(group=common["target"].map(groups))
    for name, part in (("own denominator", outcomes), ("common set", common)):
        counted = part.groupby(["method", "group"])[["success", "change"]].agg(["mean", "size"])
        mine = rates[rates["set"] == name].set_index(["method", "group"])
        assert len(mine) == len(counted)
        for value in ("success", "change"):
            expected = counted[value].loc[mine.index]
            assert mine[value].to_numpy() == pytest.approx(expected["mean"].to_numpy())
            assert mine["n"].tolist() == expected["size"].tolist()
            assert (mine[f"{value}_low"] <= mine[value] + 1e-9).mean() > 0.95
            assert (mine[f"{value}_high"] >= mine[value] - 1e-9).mean() > 0.95
    shares = removed.table("figure_15a")
    assert shares.groupby("method")["share"].sum().to_numpy() == pytest.approx(1)
    nowhere = shares[shares["group"] == "From nowhere"].set_index("method")["n"]
    cases = outcomes.groupby("method").size()
    assert (nowhere + cases == len(removed.table("targets"))).all()


def test_removing_the_match_in_the_stream_removes_the_feature(removed: Executed) -> None:
    # What flowlet was built to show, at every layer, with its interval.
    rates = removed.table("control").set_index(["method", "layer"])
    assert set(rates.index.get_level_values("layer")) == {2, 4, 6}
    for layer in (2, 4, 6):
        match, random = rates.loc[("top-1", layer)], rates.loc[("random", layer)]
        other = rates.loc[("equal norm, random", layer)]
        assert match["success_low"] >= 0.50
        assert match["change_low"] >= 0.70
        assert match["success_low"] > random["success_high"]
        assert match["change_low"] > random["change_high"]
        assert other["change_high"] <= 0.12
        assert match["n"] > 500


def test_what_comes_before_an_edit_is_never_lost_or_won_by_it(removed: Executed) -> None:
    shares = removed.table("figure_15b")
    total = shares.groupby(["group", "removed"])["share"].sum()
    assert total.to_numpy() == pytest.approx(1)
    assert len(total) == 3 * 1 + 3 * 3 + 7
    before = {"MLP": {"RES", "ATT"}, "ATT": {"RES"}}
    for row in shares[shares["after"] != "Deactivated"].itertuples():
        first = row.removed.removeprefix("From ").split(" & ")
        if len(first) == 1 and first[0] in before:
            for place in before[first[0]]:
                assert (place in row.group) == (place in row.after)


def test_the_sweep_does_nothing_at_one_and_more_the_farther(removed: Executed) -> None:
    sweep = removed.table("sweep")
    same = sweep[sweep["r"] == 1]
    for column in ("change", "success", "loss_change"):
        assert (same[column] == 0).all()
    means = removed.table("sweep_by_r")
    assert (means["change"].diff().dropna() < 0).all()  # falls as r grows
    medians = sweep.groupby("r")["token_loss_change"].median()
    assert means["median_token_loss_change"].to_numpy() == pytest.approx(medians.to_numpy())
    assert (sweep.loc[sweep["r"] > 1, "success"] == 0).mean() > 0.99
    assert sweep["target"].nunique() == 200


def test_the_search_is_no_worse_than_a_single_match(removed: Executed) -> None:
    cases = removed.table("searched").set_index(["method", "target"])
    best = cases.loc["exhaustive"]
    for method in ("top-1 cosine", "top-1 Pearson"):
        own = cases.loc[method]
        assert set(own["tried"]) == {0, 1}
        assert (best["change"] >= own["change"] - 1e-4)[own["tried"] > 0].all()
        assert (own["change"][own["tried"] == 0] == 0).all()
        assert best["tried"].sum() > 5 * own["tried"].sum()
    groups = removed.table("targets")["group"]
    single = groups[groups.isin(["From RES", "From MLP", "From ATT"])]
    assert set(single.index) <= set(best.index)
    assert (cases.loc["top-1 cosine", "tried"].loc[single.index] == 1).all()
    table = removed.table("table_1").set_index(["targets", "method"])
    everywhere = table.loc["all of them"]
    assert everywhere["n"].nunique() == 1
    assert everywhere["paper_change"].tolist() == [0.75, 0.74, 0.83]
    assert everywhere["paper_success"].tolist() == [0.65, 0.65, 0.73]
    for method in ("top-1 cosine", "top-1 Pearson"):
        rows = table.loc[f"where {method} has one"]
        there = cases.loc[method]["tried"] > 0
        for name in (method, "exhaustive"):
            part = cases.loc[name][there]
            assert rows.loc[name, "n"] == len(part) < everywhere["n"].max()
            assert rows.loc[name, "change"] == pytest.approx(part["change"].mean())


def test_layers_above_count_descendants_that_were_active(removed: Executed) -> None:
    cases, targets = removed.table("further"), removed.table("targets")
    assert (cases["old"] > 0).all()
    for row in cases[cases["above"] > 0].sample(200, random_state=0).itertuples():
        own = targets.loc[row.target]
        chain = chain_of(int(own["layer"]), int(own["feature"]))
        assert row.descendant == chain[int(own["layer"]) + row.above]
    sizes = cases.groupby(["method", "layer", "above"]).size().groupby(["method", "layer"])
    assert (sizes.nunique() == 1).all()  # the same targets all the way up
    counted = cases.groupby(["method", "layer", "above"])["change"].mean()
    shown = removed.table("above").set_index(["method", "layer", "above"])["change"]
    assert shown.to_numpy() == pytest.approx(counted.loc[shown.index].to_numpy())


# The edits, by plain hooks on the Hugging Face model.


@pytest.fixture(scope="module")
def suppressed(executed: dict[str, Executed]) -> Executed:
    return executed["05_theme_suppression"]


@pytest.fixture(scope="module")
def promoted(executed: dict[str, Executed]) -> Executed:
    return executed["06_theme_activation"]


def middle_95(scores: Sequence[float]) -> tuple[float, float]:
    """The interval of a mean, by samples drawn anew."""
    values = np.array(scores)
    drawn = np.random.default_rng(9).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def written_by_hand(
    by_hand: ByHand,
    changes: dict[tuple[int, str], Callable[[torch.Tensor], torch.Tensor]],
    prompt: str,
    sample: int,
    tokens: int = 24,
) -> str:
    """A text sampled with plain hooks, one pass over the whole of it for each token."""
    ids = by_hand.ids(prompt)
    start = ids.shape[1]
    uniform = torch.rand(tokens, generator=torch.Generator().manual_seed(sample))
    with ExitStack() as stack, torch.no_grad():
        for (layer, module), change in changes.items():
            part = by_hand.part(FeatureId(layer, module, 0))
            stack.enter_context(by_hand.hooked(part, change))
        for share in uniform.tolist():
            logits = by_hand.model(input_ids=ids).logits[0, -1]
            chances = (logits / 1.27).softmax(-1).numpy()
            order = np.argsort(-chances, kind="stable")
            nucleus = order[: int((chances[order].cumsum() < 0.7).sum()) + 1]
            kept = np.zeros(len(chances))
            kept[nucleus] = chances[nucleus]
            token = int(np.searchsorted(kept.cumsum(), share * kept.sum(), side="right"))
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            if token == by_hand.tokenizer.eos_token_id:
                ids = ids[:, :-1]
                break
    return by_hand.tokenizer.decode(ids[0, start:].tolist())


def test_suppressed_texts_are_what_plain_hooks_give(suppressed: Executed, by_hand: ByHand) -> None:
    texts, features = suppressed.table("texts"), suppressed.table("features")
    prompt = "In physics, the energy of a particle is"

    def take(layer: int, module: str, r: float) -> Callable[[torch.Tensor], torch.Tensor]:
        here = features[(features["layer"] == layer) & (features["module"] == module)]
        rows = torch.tensor([parse_feature(name).index for name in here["feature"]])
        sae = lens_sae(layer, module)

        def change(values: torch.Tensor) -> torch.Tensor:
            codes = sae.encode(values)[..., rows]
            return values + (r - 1) * codes @ sae.W_dec[rows]

        return change

    for strategy, layer, r in (("single", 3, -4), ("cumulative", 5, -2), ("unsteered", -1, 0)):
        cell = texts[texts["strategy"] == strategy]
        if strategy != "unsteered":
            cell = cell[(cell["layer"] == layer) & (cell["strength"] == r)]
        first = layer if strategy == "single" else 0
        sites = features.loc[features["layer"].between(first, layer), ["layer", "module"]]
        changes = {
            (at, module): take(at, module, r)
            for at, module in sites.drop_duplicates().itertuples(index=False)
        }
        assert len(cell) == 32
        for sample in (0, 5):
            expected = written_by_hand(by_hand, changes, prompt, sample)
            assert cell.set_index("sample")["text"][sample] == expected, (strategy, sample)


def test_suppression_is_scored_and_chosen_as_it_says(suppressed: Executed) -> None:
    texts, reported = suppressed.table("texts"), suppressed.table("texts_reported")
    for table in (texts, reported):
        product = (1 - table["behavioral"]) * table["coherence"]
        assert np.allclose(table["score"], product)
        assert (table.groupby("cell").size() == 32).all()
    assert set(texts["sample"]).isdisjoint(reported["sample"])
    means = texts.groupby(["strategy", "layer", "strength"])["score"].mean()
    figure = suppressed.table("figure_10")
    for row in figure[figure["strategy"].isin(["single", "cumulative"])].itertuples():
        of_r = means[row.strategy].unstack("strength")[row.strength]
        assert of_r.idxmax() == row.layer
        assert of_r.max() == pytest.approx(row.chosen_on)
        mine = reported[reported["strategy"] == row.strategy]
        mine = mine[mine["strength"] == row.strength]["score"]
        assert mine.mean() == pytest.approx(row.score)
        assert middle_95(mine.tolist()) == pytest.approx((row.score_low, row.score_high), abs=0.03)


def test_seeds_are_those_that_tell_the_theme_best_and_the_filter_is_its_rule(
    suppressed: Executed,
) -> None:
    seeds, features = suppressed.table("seeds"), suppressed.table("features")
    assert seeds["auc"].is_monotonic_decreasing
    assert len(seeds) == 10
    assert (features.loc[~features["is_seed"], "auc"] >= 0.8).all()
    assert set(seeds["feature"]) == set(features.loc[features["is_seed"], "feature"])
    assert {"mlp", "att"} <= set(features["module"])


def test_suppression_beats_no_steering_random_features_and_at_some_r_the_seeds(
    suppressed: Executed,
) -> None:
    figure = suppressed.table("figure_10").set_index("strategy")
    plain = figure.loc["unsteered", "score_high"]
    for strategy in ("single", "cumulative", "seeds only"):
        assert figure.loc[[strategy], "score_low"].max() > plain
    control = suppressed.table("random_features").set_index("strategy")
    randoms = ["random features", "random, same norm"]
    top = control.drop(index=["unsteered", *randoms]).iloc[0]
    assert top["score"] > control.loc[randoms, "score"].max()
    assert control.loc["random, same norm", "norm"].to_numpy() == pytest.approx(
        top["norm"], rel=0.1
    )
    own = suppressed.table("at_their_best").set_index("strategy")
    best = suppressed.results["best"]
    chosen = suppressed.table("figure_10").groupby("strategy")["chosen_on"].max()
    for strategy in ("single", "cumulative"):
        assert best[strategy]["chosen_on"] == pytest.approx(chosen[strategy])
        gap = best[strategy]["score"] - best["seeds only"]["score"]
        assert own.loc[strategy, "difference"] == pytest.approx(gap)
    versus = suppressed.table("against_seeds")
    reported = suppressed.table("texts_reported").set_index("sample")
    for row in versus.itertuples():
        pair = [
            reported[(reported["strategy"] == name) & (reported["strength"] == row.strength)]
            for name in (row.strategy, "seeds only")
        ]
        assert row.difference == pytest.approx((pair[0]["score"] - pair[1]["score"]).mean())
    assert (versus["difference_low"] > 0).any()


def test_removing_more_costs_more(suppressed: Executed) -> None:
    means = suppressed.table("means")
    plain = means[means["strategy"] == "unsteered"].iloc[0]
    assert plain["norm"] == plain["kl"] == 0
    steered = means[means["strategy"] != "unsteered"]
    by_r = steered.groupby(["strategy", "strength"])[["norm", "kl"]].mean().unstack("strategy")
    assert (by_r.sort_index(ascending=False).diff().iloc[1:] > 0).all(axis=None)
    alike = suppressed.table("planted").set_index("what")
    assert alike["behavioral"].idxmin() == "off the theme"
    assert alike.loc["on the theme", "coherence"] > 2 * alike.loc["on it, backwards", "coherence"]
    assert alike.loc["one word", "coherence"] == 0


def test_promoted_texts_are_what_plain_hooks_give(promoted: Executed, by_hand: ByHand) -> None:
    texts, features = promoted.table("texts"), promoted.table("features")
    schedule = {
        "single": lambda s, layer, span: s,
        "exponential": lambda s, layer, span: s * np.exp(-0.05 * layer),
        "linear": lambda s, layer, span: s + (1 - s) * (layer - span[0]) / (span[1] - span[0]),
    }

    def push(here: pd.DataFrame, s: float) -> Callable[[torch.Tensor], torch.Tensor]:
        layer, module = int(here["layer"].iloc[0]), str(here["module"].iloc[0])
        sae = lens_sae(layer, module)
        rows = [parse_feature(name).index for name in here["feature"]]
        vector = s * (sae.threshold[rows, None] * sae.W_dec[rows]).sum(0)
        return lambda values: values + vector

    wide = features.groupby("theme")["layer"].agg(["min", "max"])
    theme = str((wide["max"] - wide["min"]).idxmax())
    mine = features[features["theme"] == theme]
    span = int(mine["layer"].min()), int(mine["layer"].max())
    for strategy, rule in schedule.items():
        first = span[1] if strategy == "single" else span[0]
        steered = mine[mine["layer"] >= first].groupby(["layer", "module"])
        changes = {
            (int(layer), str(module)): push(here, rule(4, layer, span))
            for (layer, module), here in steered
        }
        cell = texts[(texts["theme"] == theme) & (texts["strategy"] == strategy)]
        cell = cell[(cell["layer"] == span[1]) & (cell["strength"] == 4)].set_index("sample")
        for sample in (1, 7):
            expected = written_by_hand(by_hand, changes, "I think", sample)
            assert cell["text"][sample] == expected, (strategy, sample)


def test_promotion_beats_no_steering_and_random_features_for_three_themes_of_four(
    promoted: Executed,
) -> None:
    reported, verdicts = promoted.table("texts_reported"), promoted.table("verdicts")
    assert np.allclose(reported["score"], reported["behavioral"] * reported["coherence"])
    assert set(reported["sample"]).isdisjoint(promoted.table("texts")["sample"])
    beaten = 0
    for row in verdicts.itertuples():
        of_theme = reported[reported["theme"] == row.theme]
        ends = {
            name: middle_95(of_theme.loc[of_theme["strategy"] == name, "score"].tolist())
            for name in (row.strategy, "unsteered", "random features")
        }
        sizes = of_theme.groupby("strategy")["score"].size()
        assert sizes.min() >= 32
        low = ends[str(row.strategy)][0]
        beaten += low > ends["unsteered"][1] and low > ends["random features"][1]
    assert len(verdicts) == 4
    assert beaten >= 3
    both = verdicts[["unsteered", "random features"]] == "above"
    assert both.all(axis=1).sum() >= 3


def test_the_best_cell_of_a_strategy_is_chosen_on_the_other_half(promoted: Executed) -> None:
    texts, figure = promoted.table("texts"), promoted.table("figure_11")
    cells = ["theme", "strategy", "layer", "strength"]
    means = texts.groupby(cells, dropna=False)["score"].mean().reset_index()
    for row in figure[figure["strategy"] != "random features"].itertuples():
        mine = means[(means["theme"] == row.theme) & (means["strategy"] == row.strategy)]
        assert mine["score"].max() == pytest.approx(row.chosen_on)
    layers = promoted.table("figure_16")
    for row in layers[layers["strategy"] == "single"].itertuples():
        mine = means[(means["theme"] == row.theme) & (means["strategy"] == "single")]
        assert mine[mine["layer"] == row.layer]["score"].max() == pytest.approx(row.score)


def test_seeds_did_best_in_a_trial_of_other_samples(promoted: Executed) -> None:
    trial, results = promoted.table("trial"), promoted.results
    best = trial.loc[trial.groupby("theme")["score"].idxmax()].set_index("theme")["feature"]
    assert results["seeds"] == best.to_dict()
    assert trial["output_score"].between(0, 1).all()
    assert (trial.groupby("theme").size() == 8).all()
    shares = promoted.table("subjects")
    assert shares["share"].is_monotonic_decreasing
    assert shares["subject"].head(4).tolist() == results["themes"]


def test_at_equal_norm_the_norms_are_equal(promoted: Executed) -> None:
    means, equal = promoted.table("means"), promoted.table("equal_norm")
    assert (means[means["strategy"] == "unsteered"][["norm", "kl"]] == 0).all(axis=None)
    by = ["theme", "layer", "strength"]
    for row in equal.itertuples():
        if row.strategy in ("unsteered", "single"):
            assert row.norm == pytest.approx(0 if row.strategy == "unsteered" else row.norm)
            continue
        of_theme = means[means["theme"] == row.theme]
        single = of_theme[of_theme["strategy"] == "single"]
        budget = single.loc[single["score"].idxmax(), "norm"]
        assert row.norm == pytest.approx(budget, rel=1e-3)
        mine = of_theme[(of_theme["strategy"] == row.strategy) & (of_theme["layer"] == row.layer)]
        best = of_theme[of_theme["strategy"] == row.strategy]
        best = best.loc[best["score"].idxmax()]
        assert row.strength == pytest.approx(best["strength"] * budget / best["norm"])
        assert len(mine)
    wide = means.pivot_table(index=by, columns="strategy", values="norm").dropna()
    assert (wide["constant"] >= wide["single"] - 1e-6).all()


KEY = "sk-this-is-the-key-of-nobody-5f21"
FEW = {"n_samples": 2, "max_new_tokens": 6, "judge": "endpoint"}


def run_with_endpoint(
    name: str, server: JudgeServer, root: Path, key: str, **parameters: object
) -> subprocess.CompletedProcess[str]:
    given = FEW | {"judge_url": server.url} | parameters
    options = [part for k, v in given.items() for part in ("-p", f"{k}={v}")]
    return subprocess.run(
        [sys.executable, "-m", "flowhelpers", "run", name, "--out", str(root / "o"), *options],
        env=os.environ
        | {
            "FLOWHELPERS_CACHE": str(root / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OPENAI_API_KEY": key,
            "NO_PROXY": "127.0.0.1",
        },
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )


def holds_key(root: Path, done: subprocess.CompletedProcess[str], key: str) -> list[str]:
    """Where the key stands, of all that a run wrote and said."""
    files = [path for path in root.rglob("*") if path.is_file()]
    found = [str(path) for path in files if key.encode() in path.read_bytes()]
    return found + ["output"] * (key in done.stdout + done.stderr)


def test_a_judge_behind_an_endpoint_serves_and_its_key_is_written_nowhere(tmp_path: Path) -> None:
    name = "05_theme_suppression"
    with JudgeServer(KEY) as server:
        done = run_with_endpoint(name, server, tmp_path, KEY, r_values="[-2]", layers="[3]")
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(server.asked()) > 8
        assert {asked.key for asked in server.requests} == {KEY}
    ours = Executed(next((tmp_path / "o").glob(f"*-{name}")))
    texts = ours.table("texts_reported")
    assert ours.results["missing"] == 0
    assert np.allclose((texts["behavioral"] * 5) % 1, 0)
    for row in texts[texts["text"].str.strip() != ""].itertuples():
        coherence, behavioral = scores(str(row.text))
        assert (row.coherence, row.behavioral) == (coherence / 5, behavioral[1] / 5)
    assert holds_key(tmp_path, done, KEY) == []


def test_a_wrong_key_is_an_error_before_any_text_is_written(tmp_path: Path) -> None:
    with JudgeServer("another") as server:
        done = run_with_endpoint("05_theme_suppression", server, tmp_path, KEY)
    assert done.returncode != 0
    assert "It refuses the key" in done.stderr
    folder = next((tmp_path / "o").glob("*-05_theme_suppression"))
    assert not (folder / "texts.sqlite").exists()
    assert holds_key(tmp_path, done, KEY) == []


@pytest.fixture(scope="module")
def start(executed: dict[str, Executed]) -> Executed:
    return executed["00_start_here"]


def sentence() -> str:
    return inspect(FOLDER / "00_start_here.ipynb")["sentence"].default


def test_the_chosen_feature_and_its_predecessors_are_those_of_the_scores(start: Executed) -> None:
    flow, scores = start.table("flow"), start.table("scores").set_index(["layer", "feature"])
    seed = flow[flow["is_seed"]].iloc[0]
    assert seed["feature"] == start.results["feature"]
    chosen = parse_feature(seed["feature"])
    assert chosen.layer == 4  # the middle of 8
    row = scores.loc[(4, chosen.index)]
    for module in ("res", "mlp", "att"):
        assert seed[f"s_{module}"] == pytest.approx(row[f"s_{module}"])
        if isinstance(seed[f"from_{module}"], str):
            assert parse_feature(seed[f"from_{module}"]).index == row[f"source_{module}"]
    expected = [f"{layer}/res/{i}" for layer, i in enumerate(chain_of(4, chosen.index))]
    assert flow["feature"].tolist() == expected


def test_switching_off_is_what_plain_hooks_give(start: Executed, by_hand: ByHand) -> None:
    trials, chosen = start.table("deactivation"), start.results["feature"]
    ids = by_hand.ids(sentence())
    clean = by_hand.activations(chosen, ids)
    clean[0] = 0  # BOS is no token of the text
    at = int(clean.argmax())
    assert clean[at] > 0
    assert trials["before"].to_numpy() == pytest.approx(np.full(len(trials), clean[at]), rel=1e-3)
    single = trials[trials["trial"] != "all matches"]
    others = single[single["trial"].str.startswith("others")]
    single = pd.concat([single[single["trial"].str.startswith("match")], others.head(3)])
    for row in single.to_dict("records"):
        after = by_hand.activations(chosen, ids, without=row["switched_off"], at=at)[at]
        assert row["after"] == pytest.approx(after, rel=1e-3, abs=1e-4), row["switched_off"]


def test_a_feature_that_is_switched_off_is_off_and_one_that_was_off_changes_nothing(
    start: Executed,
) -> None:
    trials = start.table("deactivation").dropna(subset=["own_before"])
    assert trials["own_after"].tolist() == [0.0] * len(trials)
    idle = trials[trials["own_before"] == 0]
    assert idle["after"].to_numpy() == pytest.approx(idle["before"].to_numpy(), rel=1e-4)
    match = trials[trials["trial"].str.startswith("match")]
    assert (match["own_before"] > 0).any()  # or there was nothing to test


def test_arithmetic_is_what_the_encoder_would_read_less(start: Executed) -> None:
    trials, chosen = start.table("deactivation"), parse_feature(start.results["feature"])
    reads = lens_sae(chosen.layer, "res").W_enc[:, chosen.index].detach().double()
    for row in trials[trials["trial"] != "all matches"].to_dict("records"):
        gone = parse_feature(row["switched_off"])
        writes = lens_sae(gone.layer, gone.module).W_dec[gone.index].detach().double()
        expected = row["before"] - row["own_before"] * writes @ reads
        assert row["by_arithmetic"] == pytest.approx(max(expected.item(), 0), rel=1e-3, abs=1e-3)


def test_controls_are_no_match_and_active_as_near_as_may_be(start: Executed) -> None:
    trials = start.table("deactivation")
    for name in trials.loc[trials["trial"].str.startswith("match"), "switched_off"]:
        site = name.rsplit("/", 1)[0]
        controls = trials[trials["trial"] == f"others at {site}"]
        assert 0 < len(controls) <= 10
        assert name not in set(controls["switched_off"])
        assert controls["switched_off"].is_unique
        assert (controls["own_before"] > 0).all()
        own = trials.set_index("trial").loc[f"match {name}", "own_before"]
        assert (controls["own_before"] - own).abs().is_monotonic_increasing


def test_texts_are_judged_by_the_middle_one_and_by_their_variety(start: Executed) -> None:
    steered, judged = start.table("steering"), start.table("judged").set_index(["way", "strength"])
    for key, part in steered.groupby(["way", "strength"]):
        for column in ("active_at", "distinct"):
            assert judged.loc[key, f"{column}, median"] == part[column].median()
    assert start.results["active_tokens_in_the_median_text"]["feature"] == pytest.approx(
        judged.loc[("feature", 1.0), "active_at, median"]
    )


def test_strength_0_gives_the_texts_of_the_unedited_model_and_others_do_not(
    start: Executed,
) -> None:
    steered = start.table("steering").sort_values("sample")
    texts = {key: part["text"].tolist() for key, part in steered.groupby(["way", "strength"])}
    assert len(set(texts["no edit", 0.0])) == 4
    assert texts["feature", 0.0] == texts["no edit", 0.0]
    assert texts["feature", 1.0] != texts["no edit", 0.0]
    assert texts["feature", 1.0] != texts["random direction", 1.0] != texts["no edit", 0.0]


def test_next_tokens_are_those_of_the_plain_model(start: Executed, by_hand: ByHand) -> None:
    table = start.table("next_tokens")
    ids = by_hand.ids(inspect(FOLDER / "00_start_here.ipynb")["prompt"].default)
    with torch.no_grad():
        expected = by_hand.model(input_ids=ids).logits[0, -1].softmax(-1)
    plain = table[table["condition"] == "no edit"].set_index("what")["value"]
    best = expected.topk(4)
    for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        assert plain[repr(by_hand.tokenizer.decode([token]))] == pytest.approx(value, rel=1e-4)
    changed = table[table["condition"] == "feature"]["value"].to_numpy()
    assert np.abs(changed - plain.to_numpy()).max() > 1e-4


@pytest.fixture(scope="module")
def across(executed: dict[str, Executed]) -> Executed:
    """Notebook 07, executed."""
    return executed["07_across_models"]


def test_a_suite_among_others_is_what_it_is_by_itself(
    across: Executed, groups: Executed, flows: Executed
) -> None:
    row = across.table("across").set_index("suite").loc["flowlet"]
    for module in ("res", "mlp", "att"):
        best = np.concatenate([best_back(layer, module)[1] for layer in range(1, 8)])
        high = [best_back(layer, module)[1] > null(layer, module) for layer in range(1, 8)]
        assert row[f"median_{module}"] == pytest.approx(np.median(best.clip(min=0)), abs=1e-5)
        assert row[f"above_{module}"] == pytest.approx(np.concatenate(high).mean(), abs=1e-3)
    overall = groups.table("shares_overall").set_index("group")  # the same sample
    for group, each in overall.iterrows():
        assert row[str(group)] == pytest.approx(each["share"])
        assert row[f"chance {group}"] == pytest.approx(each["by_chance"])
    lives = flows.table("lives_of_all").set_index("steps")["mean layers"]
    assert row["mean_life"] == pytest.approx(lives["above chance"])
    assert row["mutual_life"] == pytest.approx(lives["above chance and mutual"])
    by_layer = across.table("by_layer")
    mine = by_layer[by_layer["suite"] == "flowlet"].set_index("layer")
    flow = flows.table("flow_by_layer").set_index("layer")
    for column in ("processed", "newborn", "dies"):
        expected = flow[column].where(flow.index > 0) if column != "dies" else flow[column]
        assert mine[column].to_numpy() == pytest.approx(expected.to_numpy(), nan_ok=True)


def test_no_other_division_of_the_layers_is_more_even(across: Executed) -> None:
    table, by_layer = across.table("phases"), across.table("by_layer")
    columns = ["translated", "processed", "newborn", "unexplained"]
    for suite, part in table[table["of"] == "classes"].groupby("suite"):
        mine = by_layer[by_layer["suite"] == suite].set_index("layer")[columns].dropna()

        def left(ends: Sequence[int], mine: pd.DataFrame = mine) -> float:
            runs = [mine.loc[a + 1 : b] for a, b in pairwise([0, *ends, len(mine)])]
            return sum(float(((run - run.mean()) ** 2).sum().sum()) for run in runs)

        least = min(left((a, b)) for b in range(2, len(mine)) for a in range(1, b))
        assert left(part["last"].tolist()[:2]) == pytest.approx(least)
        assert part["explained"].iloc[0] == pytest.approx(1 - least / left(()))
