"""The notebooks: their form, and what one execution of each wrote, against the method by hand."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from answers import NOTEBOOKS as FOLDER
from answers import write_answered
from judge_server import JudgeServer, scores

from flowhelpers.core.features import FeatureId, parse_feature
from flowhelpers.runs.parameters import inspect, plan

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
    """The tables or figures that a notebook names, those that its own `show…` writes included."""
    source = "\n".join(cell.source for cell in code_cells(path))
    calls = rf"run\.{kind}" if kind == "table" else r"(?:run\.figure|\bshow\w*)"
    return set(re.findall(rf'{calls}\(\s*"([^"]+)"', source))


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
def test_cells_are_named(path: Path) -> None:
    firsts = [cell.source.splitlines()[0] for cell in code_cells(path)]
    assert all(re.fullmatch(r"# papermill_description=(\w+)", first) for first in firsts)
    assert len(set(firsts)) == len(firsts)
    assert "environment()" in code_cells(path)[0].source


@each_notebook
def test_widgets_are_only_for_a_person(path: Path) -> None:
    for cell in code_cells(path):
        tree = ast.parse(cell.source)
        guarded = [
            node
            for branch in ast.walk(tree)
            if isinstance(branch, ast.If) and ast.unparse(branch.test) in ("live()", "core.live()")
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


@cache
def null(layer: int, module: str, direction: str = "backward") -> float:
    return float(np.quantile(chance(layer, module, direction), 0.999))


@cache
def best_back(layer: int, module: str) -> tuple[np.ndarray, np.ndarray]:
    """The best source of every residual feature of a layer, and its cosine."""
    best = cosines(layer, module).max(dim=1)
    return best.indices.numpy(), best.values.numpy()


@cache
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


@pytest.mark.parametrize("direction", ["backward", "forward"])
@pytest.mark.parametrize(("module", "seen_from"), [("res", 17), ("mlp", 500), ("att", 300)])
def test_matches_are_the_five_highest_cosines(
    matches: pd.DataFrame, direction: str, module: str, seen_from: int
) -> None:
    """Seen from a feature of layer 4, or from a source of such features."""
    table = cosines(4, module) if direction == "backward" else cosines(4, module).T
    own, other = ("feature", "source") if direction == "backward" else ("source", "feature")
    best = table[seen_from].topk(6)
    rows = matches[(matches["direction"] == direction) & (matches["module"] == module)]
    rows = rows[rows[own] == seen_from].sort_values("rank")
    assert rows["rank"].tolist() == [1, 2, 3, 4, 5]
    assert rows[other].tolist() == best.indices[:5].tolist()
    for column in ("cosine", "score"):
        assert rows[column].to_numpy() == pytest.approx(best.values[:5].numpy(), abs=1e-6)
    assert rows["margin"].to_numpy() == pytest.approx(-best.values.diff().numpy(), abs=1e-6)
    back = table[:, best.indices[:5]].argmax(dim=0)
    assert rows["mutual"].tolist() == [bool(back[0] == seen_from), *[False] * 4]
    by_chance = np.sort(chance(4, module, direction))
    below = np.searchsorted(by_chance, best.values[:5].numpy()) / len(by_chance)
    assert rows["null_quantile"].to_numpy() == pytest.approx(below, abs=2 / 8192)


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


# The other ways to match.


def permuted(layer: int, module: str) -> dict[int, int]:
    from scipy.optimize import linear_sum_assignment

    ends, starts = linear_sum_assignment(cosines(layer, module).numpy(), maximize=True)
    return dict(zip(ends.tolist(), starts.tolist(), strict=True))


def test_the_permutation_is_the_best_pairing(executed: dict[str, Executed]) -> None:
    compare = executed["01_matching"].table("matchers").set_index(["method", "module"])
    for module, layers in {"res": (2, 4, 6), "att": (0, 2, 4, 6)}.items():
        values = [float(cosines(layer, module)[target, source]) for layer in layers
                  for target, source in permuted(layer, module).items()]  # fmt: skip
        row = compare.loc[("permutation", module)]
        assert row["mean cosine"] == pytest.approx(np.mean(values), abs=1e-5)
        assert row["matched"] == pytest.approx(len(values) / (1024 * len(layers)))
        assert row["mutual"] == row["matched"]  # one to one by its making


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
    table = flows.table("lifespans").sort_values(["layer", "feature"])
    back = {layer: best_back(layer, "res") for layer in range(1, 8)}
    on = {layer: best_on(layer) for layer in range(7)}
    spans = []
    for layer in range(8):
        for feature in range(1024):
            first, at = layer, feature
            while first > 0 and back[first][1][at] > null(first, "res"):
                first, at = first - 1, int(back[first][0][at])
            last, at = layer, feature
            while last < 7 and on[last][1][at] > null(last + 1, "res", "forward"):
                last, at = last + 1, int(on[last][0][at])
            spans.append([first, last])
    assert table[["first", "last"]].to_numpy().tolist() == spans
    layers = np.diff(spans, axis=1) + 1
    lives = flows.table("lives_of_all").set_index("steps").loc["above chance"]
    assert lives["mean layers"] == pytest.approx(layers.mean())
    assert lives["live through all"] == pytest.approx((layers == 8).mean())


def test_the_whole_model_s_flow_counts_births_deaths_and_funnels(flows: Executed) -> None:
    table = flows.table("flow_by_layer").set_index("layer")
    for layer in range(1, 8):
        sources, values = best_back(layer, "res")
        module = np.stack([best_back(layer, m)[1] for m in ("mlp", "att")])
        limits = np.array([null(layer, m) for m in ("mlp", "att")])[:, None]
        new = (values <= null(layer, "res")) & (module > limits).any(axis=0)
        assert table.loc[layer, "newborn"] == pytest.approx(new.mean())
        assert table.loc[layer, "largest_funnel"] == np.bincount(sources).max()
        back = best_on(layer - 1)[0][sources] == np.arange(1024)
        assert table.loc[layer, "mutual"] == pytest.approx(back.mean())
        ends = best_on(layer - 1)[1] <= null(layer, "res", "forward")
        assert table.loc[layer - 1, "dies"] == pytest.approx(ends.mean())


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


def test_groups_are_counted_right(groups: Executed, grouped: pd.DataFrame) -> None:
    assert groups.results["occurrences"] == len(grouped)
    shares = grouped["group"].value_counts(normalize=True)
    assert groups.results["shares"] == pytest.approx(shares.to_dict())
    for module in ("res", "mlp", "att"):
        assert groups.results["predecessor_active"][module] == pytest.approx(grouped[module].mean())
        assert groups.results["active_elsewhere"][module] < grouped[module].mean()


def test_tests_are_scipys_and_active_in_one_is_above_in_neither(
    groups: Executed, grouped: pd.DataFrame
) -> None:
    from scipy.stats import mannwhitneyu

    tests = groups.table("tests")
    for row in tests[tests["p"].notna()].sample(25, random_state=0).itertuples():
        here = grouped[(grouped["dataset"] == row.dataset) & (grouped["layer"] == row.layer)]
        a, b = (here.loc[here["group"] == g, row.score] for g in (row.first, row.second))
        assert row.p == pytest.approx(mannwhitneyu(a, b).pvalue, rel=1e-6, abs=1e-300)
    for unit in groups.results["ao_above_ib"].values():
        assert unit == {"s_res": True, "s_mlp": True, "s_att": True}


def test_transition_is_that_of_the_features_seen(groups: Executed, grouped: pd.DataFrame) -> None:
    seen = grouped.groupby("group")[["layer", "feature"]].apply(
        lambda part: set(part.itertuples(index=False, name=None))
    )
    for row in groups.table("figure_13").itertuples():
        share = len(seen[row.first] & seen[row.second]) / len(seen[row.first])
        assert row.share == pytest.approx(share)


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
        assert best["tried"].sum() > 5 * own["tried"].sum()
    everywhere = removed.table("table_1").set_index(["targets", "method"]).loc["all of them"]
    assert everywhere["n"].nunique() == 1
    counted = cases.groupby("method")["change"].mean()
    assert everywhere["change"].to_dict() == pytest.approx(counted.to_dict())
    assert everywhere["paper_change"].tolist() == [0.75, 0.74, 0.83]
    assert everywhere["paper_success"].tolist() == [0.65, 0.65, 0.73]


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


def test_suppression_is_chosen_on_texts_of_its_own(suppressed: Executed) -> None:
    texts, reported = suppressed.table("texts"), suppressed.table("texts_reported")
    for table in (texts, reported):
        product = (1 - table["behavioral"]) * table["coherence"]
        assert np.allclose(table["score"], product)
    assert set(texts["sample"]).isdisjoint(reported["sample"])
    figure = suppressed.table("figure_10")
    for row in figure[figure["strategy"].isin(["single", "cumulative"])].itertuples():
        own = reported[reported["strategy"] == row.strategy]
        own = own[own["strength"] == row.strength]["score"]
        assert own.mean() == pytest.approx(row.score)
        assert middle_95(own.tolist()) == pytest.approx((row.score_low, row.score_high), abs=0.03)


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
    assert (suppressed.table("against_seeds")["difference_low"] > 0).any()


def test_removing_more_costs_more(suppressed: Executed) -> None:
    means = suppressed.table("means")
    plain = means[means["strategy"] == "unsteered"].iloc[0]
    assert plain["norm"] == plain["kl"] == 0
    steered = means[means["strategy"] != "unsteered"]
    by_r = steered.groupby(["strategy", "strength"])[["norm", "kl"]].mean().unstack("strategy")
    assert (by_r.sort_index(ascending=False).diff().iloc[1:] > 0).all(axis=None)


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
    scores = reported.groupby(["theme", "strategy"])["score"].agg(list)
    beaten = 0
    for row in verdicts.itertuples():
        low = middle_95(scores[row.theme, row.strategy])[0]
        controls = (scores[row.theme, name] for name in ("unsteered", "random features"))
        beaten += all(low > middle_95(control)[1] for control in controls)
    assert len(verdicts) == 4
    assert beaten >= 3


def test_at_equal_norm_the_norms_are_equal(promoted: Executed) -> None:
    means, equal = promoted.table("means"), promoted.table("equal_norm")
    assert (means[means["strategy"] == "unsteered"][["norm", "kl"]] == 0).all(axis=None)
    single = means[means["strategy"] == "single"]
    best = single.loc[single.groupby("theme")["score"].idxmax()].set_index("theme")["norm"]
    others = equal[~equal["strategy"].isin(["unsteered", "single"])]
    assert others["norm"].to_numpy() == pytest.approx(others["theme"].map(best), rel=1e-3)


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
    trials, chosen = start.table("deactivation"), parse_feature(start.results["feature"])
    codes = by_hand.codes(chosen.layer, "res", [sentence()])[:, chosen.index]
    at = int(codes.argmax()) + 1  # after BOS
    assert trials["before"].to_numpy() == pytest.approx(np.full(len(trials), codes.max()), rel=1e-3)
    single = trials[trials["trial"] != "all matches"]
    others = single[single["trial"].str.startswith("others")]
    single = pd.concat([single[single["trial"].str.startswith("match")], others.head(3)])
    for row in single.to_dict("records"):
        off = parse_feature(row["switched_off"])
        own = float(by_hand.codes(off.layer, off.module, [sentence()])[at - 1, off.index])
        _, after, _ = rescaled(by_hand, chosen, at, {off: -own}, by_hand.ids(sentence()))
        assert row["after"] == pytest.approx(after, rel=1e-3, abs=1e-4), row["switched_off"]
        assert row["own_after"] == 0


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
    lives = flows.table("lives_of_all").set_index("steps")["mean layers"]
    assert row["mean_life"] == pytest.approx(lives["above chance"])
