"""The notebooks: their form, and what one execution of each wrote, against the method by hand."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import toys
import yaml
from answers import NOTEBOOKS as FOLDER
from answers import write_answered
from hub import Hub
from hub_families import write_gpt2
from hub_files import shrink
from judge_server import JudgeServer, scores
from torch import Tensor

from flowhelpers import activations
from flowhelpers.activations.corpora import PAPER_DATASETS, load_texts, passages
from flowhelpers.core.features import MODULES, FeatureId, Site, parse_feature
from flowhelpers.paper import TABLE_5_MLP, TABLE_5_RES
from flowhelpers.runs.parameters import inspect, plan
from flowhelpers.suites.registry import find_suite

FLOWLET = Path(__file__).parent.parent / "flowhelpers/data/flowlet"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Tables that flowlet has no use for.
OF_OTHER_SUITES = {"table_5", "named_nodes", "cosine_check", "transcoders"}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
Change = Callable[[Tensor], Tensor]


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def defaults(path: Path) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect(path).items()}


def named(path: Path, kind: str) -> set[str]:
    """The tables or figures that a notebook names, those that its own `show…` writes included."""
    source = "\n".join(cell.source for cell in code_cells(path))
    calls = rf"run\.{kind}" if kind == "table" else r"(?:run\.figure|\bshow\w*)"
    return set(re.findall(rf'{calls}\(\s*"([^"]+)"', source))


# What every notebook is to be like.


@each_notebook
def test_parameters_have_a_comment_and_the_quick_preset_is_their_defaults(path: Path) -> None:
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert all(parameter.help for parameter in inspect(path).values())
    presets = yaml.safe_load((FOLDER / "presets.yaml").read_text("utf-8"))
    assert set(presets) == {path.stem for path in NOTEBOOKS}
    assert set(presets[path.stem]) == {"quick", "paper"}
    assert presets[path.stem]["quick"] == defaults(path)
    for suite in ("mine", *presets[path.stem]["paper"].get("by_suite", ())):
        given = {"suite": suite}
        assert list(plan([path.stem], given, "paper")) == [path]  # checks names and types


@each_notebook
def test_notebook_holds_no_outputs_and_nothing_of_a_machine_and_its_cells_are_named(
    path: Path,
) -> None:
    book, cells = read(path), code_cells(path)
    assert [cell.execution_count for cell in cells] == [None] * len(cells)
    assert not any(cell.outputs for cell in cells)
    assert book.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell.id for cell in book.cells]
    assert len(set(ids)) == len(ids)
    assert not any(re.fullmatch(r"[0-9a-f]{8}", one) for one in ids)  # as made at random
    firsts = [cell.source.splitlines()[0] for cell in cells]
    assert all(re.fullmatch(r"# papermill_description=(\w+)", first) for first in firsts)
    assert len(set(firsts)) == len(firsts)
    assert "environment()" in cells[0].source


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


def execute(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Executes notebooks by the command line, without a network; runs lie in `o`."""
    return subprocess.run(
        [sys.executable, "-m", "flowhelpers", "run", "--out", str(root / "o"), *arguments],
        env=os.environ
        | {"FLOWHELPERS_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
        | environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Executed]:
    """Every notebook, executed; by the manifest in `FLOWHELPERS_EXECUTED`, where that is set."""
    manifest = os.environ.get("FLOWHELPERS_EXECUTED")
    if not manifest:
        root = tmp_path_factory.mktemp("executed")
        write_answered(root / "notebooks")
        done = execute(root, FLOWHELPERS_NOTEBOOKS=str(root / "notebooks"))
        assert done.returncode == 0, done.stderr[-3000:]
        manifest = next((root / "o").glob("*.json"))
    jobs, runs = json.loads(Path(manifest).read_text("utf-8"))["jobs"], Path(manifest).parent
    return {Path(job["notebook"]).stem: Executed(runs / job["folder"]) for job in jobs}


def execution_of(notebook: str) -> Any:
    """A fixture: what the execution of one notebook wrote."""

    @pytest.fixture(scope="module")
    def execution(executed: dict[str, Executed]) -> Executed:
        return executed[notebook]

    return execution


start, matching, flows, groups, removed, suppressed, promoted, across, bridges, beside = (
    execution_of(path.stem) for path in NOTEBOOKS
)


@each_notebook
def test_every_table_figure_result_and_setting_is_kept_and_pages_need_no_network(
    path: Path, executed: dict[str, Executed]
) -> None:
    folder, results = executed[path.stem].folder, executed[path.stem].results
    for kind, ending in (("table", "parquet"), ("table", "csv"), ("figure", "html")):
        written = {file.stem for file in folder.glob(f"{kind}s/*.{ending}")}
        assert named(path, kind) - OF_OTHER_SUITES == written
    outputs = [each for cell in code_cells(folder / "notebook.ipynb") for each in cell.outputs]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    figures = len(named(path, "figure")) + path.read_text("utf-8").count('"explore(')  # its still
    assert shown.count("application/vnd.plotly.v1+json") == figures > 0
    assert "application/vnd.jupyter.widget-view+json" not in shown  # they are for a person
    for page in [folder / "notebook.html", *folder.glob("figures/*.html")]:
        loads = r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']([^\"']*)"
        loaded = re.findall(loads, page.read_text("utf-8"))
        assert not [address for address in loaded if not address.endswith("plotly.min.js")]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["parameters"] == defaults(path)
    assert config["choices"]
    assert results
    assert "feature" not in results or parse_feature(results["feature"]).module == "res"


@each_notebook
def test_it_ends_with_findings_in_whole_sentences(
    path: Path, executed: dict[str, Executed]
) -> None:
    findings = executed[path.stem].results["findings"]
    assert 3 <= len(findings) <= 8
    for finding in findings:
        parts = [finding[part] for part in ("claim", "ours", "control")]
        assert finding["verdict"] == "not asked here" or all(parts)
        for part in filter(None, parts):
            assert re.match(r"[A-Z0-9'\"`√][^\n]*\.$", part), part
            assert not re.search(r"\b(nan|None|inf|True|False)\b|\d\.\d{5}|\.\.", part), part
            assert not re.search(r"-0\.?0*%?(?![\d.])", part), part  # no zero has a sign
    heads = [cell.source for cell in read(path).cells if cell.source.startswith("#")]
    assert "arxiv.org/abs/2502.03032" in heads[0]


@each_notebook
def test_every_prediction_is_answered_below_a_fold_before_the_next(
    path: Path, executed: dict[str, Executed]
) -> None:
    cells = read(executed[path.stem].folder / "notebook.ipynb").cells
    asked = [i for i, cell in enumerate(cells) if "**Predict:**" in cell.source]
    assert asked
    for start, end in zip(asked, [*asked[1:], len(cells)], strict=True):
        told = {
            output.data["text/markdown"]: cell
            for cell in cells[start:end]
            for output in cell.get("outputs", [])
            if "What came out" in output.get("data", {}).get("text/markdown", "")
        }
        by_exercise = re.search(r"\*\*Predict:\*\*[^\n]*(\n.+)*[Ee]xercise", cells[start].source)
        assert by_exercise or any(re.search(r"\d", text) for text in told), cells[start].source
        for text, cell in told.items():
            assert not re.search(r"\b(nan|None|inf)\b", text), text
            assert cell.metadata["jupyter"]["source_hidden"]


def test_findings_bear_the_numbers_of_the_tables(
    start: Executed, matching: Executed, flows: Executed
) -> None:
    def ours(run: Executed, word: str) -> str:
        return next(f["ours"] + f["control"] for f in run.results["findings"] if word in f["claim"])

    without = start.results["activation_left_without_predecessors"]
    assert f"{without:.0%} of the activation is left" in ours(start, "Without its predecessors")
    arithmetic = start.results["of_which_by_arithmetic"]
    assert f"would be {arithmetic:.0%}" in ours(start, "Without its predecessors")
    chance, data = (matching.table(t).query("layer > 0") for t in ("classes", "classes_by_data"))
    told = ours(matching, "translated")
    for table in (chance, data):
        assert f"{(table['class'] == 'translated').mean():.0%} translated" in told
    changed = (chance["class"].to_numpy() != data["class"].to_numpy()).mean()
    assert f"{changed:.0%} of the features change their class" in told
    for cut, verdict in (("0.5", "holds here"), ("0.15", "not seen here")):
        (found,) = [f for f in matching.results["findings"] if f"cosine of {cut} is" in f["claim"]]
        assert found["verdict"] == verdict
    removed = 1 - flows.table("far_removed")[["chain_end", "direct"]].fillna(1.0).mean()
    told = ours(flows, "far apart")
    assert f"{removed['chain_end']:.0%} and {removed['direct']:.0%} of it" in told


@each_notebook
def test_the_folded_answers_are_right(path: Path, executed: dict[str, Executed]) -> None:
    cells = {cell.id: cell for cell in read(executed[path.stem].folder / "notebook.ipynb").cells}
    coded = [name for name, cell in cells.items() if re.search(r"(?m)^my_\w+ = ", cell.source)]
    answers = [name for name in coded if name.startswith("answer-")]
    outputs = [cells[name.replace("answer", "exercise")].outputs for name in answers]
    told = [[o.get("text") or o.data["text/plain"] for o in some] for some in outputs]
    checked = ["".join(some).strip().strip("'") for some in told]
    assert checked == ["right"] * len(answers) != []


# The model by plain hooks, as Hugging Face has it, and its SAEs as sae-lens has them.


@cache
def plain_model() -> Any:
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(FLOWLET / "model", **options).eval()


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FLOWLET / "model")


@cache
def lens_sae(site: Site) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(FLOWLET / f"saes/{site.layer}-{site.module}", device="cpu")


def ids_of(text: str) -> Tensor:
    plain = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([[tokenizer().bos_token_id, *plain]])


def hooked(site: Site, change: Change) -> Any:
    """A hook that puts what is written at a site through a function, for a `with` statement."""
    layer = plain_model().model.layers[site.layer]
    norms = {"mlp": layer.post_feedforward_layernorm, "att": layer.post_attention_layernorm}

    def hook(_: Any, inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return norms.get(site.module, layer).register_forward_hook(hook)


@torch.no_grad()
def plain_logits(ids: Tensor, changes: Mapping[Site, Change]) -> Tensor:
    """Logits at each token where what is written at these sites is changed."""
    with ExitStack() as stack:
        for site, change in changes.items():
            stack.enter_context(hooked(site, change))
        return plain_model()(input_ids=ids).logits[0]


def plain_pass(
    ids: Tensor, site: Site, changes: Mapping[Site, Change] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits at each token, and what is written at one site, where others are changed."""
    kept: list[Tensor] = []

    def keep(values: Tensor) -> Tensor:
        kept.append(values[0])
        return values

    return plain_logits(ids, {site: keep} | dict(changes or {})), kept[0]


@cache
def codes_of(site: Site, *texts: str) -> np.ndarray:
    """Activations at all tokens of texts, BOS and other special tokens left out."""
    special, rows = torch.tensor(tokenizer().all_special_ids), []
    for ids in (ids_of(text)[:, :128] for text in texts):
        rows.append(plain_pass(ids, site)[1][~torch.isin(ids[0], special)])
    return lens_sae(site).encode(torch.cat(rows)).detach().numpy()


# The method by hand: decoders that sae-lens loads, products in double precision, nothing else.


@cache
def decoder(site: Site) -> Tensor:
    """Decoder rows as sae-lens has them, made unit in double precision."""
    rows = lens_sae(site).W_dec.detach().double()
    return rows / rows.norm(dim=1, keepdim=True)


def site_before(layer: int, module: str) -> Site:
    return Site(layer - (module == "res"), module)


@cache
def cosines(layer: int, module: str) -> Tensor:
    """Of all residual features of a layer with those of a place before it, `[targets, sources]`."""
    return decoder(Site(layer, "res")) @ decoder(site_before(layer, module)).T


@cache
def chance(layer: int, module: str, direction: str = "backward") -> np.ndarray:
    """Best cosines of 4,096 random directions with the SAE that is chosen from."""
    other = decoder(site_before(layer, module) if direction == "backward" else Site(layer, "res"))
    noise = torch.randn(4096, 192, generator=torch.Generator().manual_seed(2**31)).double()
    drawn = noise / noise.norm(dim=1, keepdim=True)
    return (drawn @ other.double().T).max(dim=1).values.numpy()


@cache
def null(layer: int, module: str, direction: str = "backward") -> float:
    return float(np.quantile(chance(layer, module, direction), 0.999, method="weibull"))


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


def modules_of(layer: int) -> tuple[str, ...]:
    """Where a residual feature of a layer has predecessors."""
    return MODULES if layer else ("mlp", "att")


def chain_through(name: str) -> list[int]:
    chosen = parse_feature(name)
    return chain_of(chosen.layer, chosen.index)


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
    high = {m: best_back(layer, m)[1][feature] > null(layer, m) for m in modules_of(layer)}
    if high.get("res"):
        return "processed" if high["mlp"] or high["att"] else "translated"
    return "newborn" if high["mlp"] or high["att"] else "unexplained"


@pytest.mark.parametrize("direction", ["backward", "forward"])
@pytest.mark.parametrize(("module", "seen_from"), [("res", 17), ("mlp", 500), ("att", 300)])
def test_matches_are_the_five_highest_cosines(
    matching: Executed, direction: str, module: str, seen_from: int
) -> None:
    """Seen from a feature of layer 4, or from a source of such features."""
    table = cosines(4, module) if direction == "backward" else cosines(4, module).T
    own, other = ("feature", "source") if direction == "backward" else ("source", "feature")
    rows = matching.table("matches").query("direction == @direction and module == @module")
    assert rows.groupby(own).size().tolist() == [5] * len(table)
    limits = np.full(len(rows), null(4, module, direction))
    assert rows["null"].to_numpy() == pytest.approx(limits, abs=1e-6)
    rows, best = rows[rows[own] == seen_from].sort_values("rank"), table[seen_from].topk(6)
    assert rows["rank"].tolist() == [1, 2, 3, 4, 5]
    assert rows[other].tolist() == best.indices[:5].tolist()
    for column in ("cosine", "score"):
        assert rows[column].to_numpy() == pytest.approx(best.values[:5].numpy(), abs=1e-6)
    assert rows["margin"].to_numpy() == pytest.approx(-best.values.diff().numpy(), abs=1e-6)
    back = table[:, best.indices[:5]].argmax(dim=0)
    assert rows["mutual"].tolist() == [bool(back[0] == seen_from), *[False] * 4]
    by_chance = np.sort(chance(4, module, direction))
    below = np.searchsorted(by_chance, best.values[:5].numpy()) / len(by_chance)
    assert rows["null_quantile"].to_numpy() == pytest.approx(below, abs=2 / 4096)


def test_scores_are_the_best_cosines_and_classes_the_four_readings(matching: Executed) -> None:
    scores, classes = matching.table("scores"), matching.table("classes")
    of_stream = scores[["s_res", "source_res", "null_res"]]
    assert of_stream[scores["layer"] == 0].isna().all(axis=None)
    assert scores[scores["layer"] > 0].notna().all(axis=None)
    for layer in range(8):
        part = scores[scores["layer"] == layer].sort_values("feature")
        assert part["feature"].tolist() == list(range(1024))
        for module in modules_of(layer):
            sources, values = best_back(layer, module)
            assert part[f"s_{module}"].to_numpy() == pytest.approx(values, abs=1e-6)
            assert (part[f"source_{module}"].to_numpy() == sources).all()
            limits = classes.loc[classes["layer"] == layer, f"high_{module}"].to_numpy()
            assert limits == pytest.approx(np.full(1024, null(layer, module)), abs=1e-6)
    some = classes[classes["feature"] % 16 == 0]
    expected = [reading(layer, f) for layer, f in zip(some["layer"], some["feature"], strict=True)]
    assert some["class"].tolist() == expected
    assert set(expected) == {"translated", "processed", "newborn", "unexplained"}


def test_the_permutation_is_the_best_pairing(matching: Executed) -> None:
    from scipy.optimize import linear_sum_assignment

    compare = matching.table("matchers").set_index(["method", "module"])
    for module, layers in {"res": (2, 4, 6), "att": (0, 2, 4, 6)}.items():
        tables = [cosines(layer, module).numpy() for layer in layers]
        pairs = [table[linear_sum_assignment(table, maximize=True)] for table in tables]
        values = np.concatenate(pairs)
        row = compare.loc[("permutation", module)]
        assert row["mean cosine"] == pytest.approx(values.mean(), abs=1e-5)
        assert row["matched"] == pytest.approx(len(values) / (1024 * len(layers)))
        assert row["mutual"] == row["matched"]  # one to one by its making


def test_pearson_is_the_highest_correlation_over_the_texts(matching: Executed) -> None:
    own = matching.table("own").set_index(["method", "module"])
    chosen = parse_feature(matching.results["feature"])
    names = ("fiction", "science", "maths", "python")
    texts = [text for name in names for text in load_texts(name, 15)]
    ours = codes_of(chosen.site, *texts)[:, chosen.index].astype(float)
    for site in (Site(3, "res"), Site(4, "mlp")):
        theirs = codes_of(site, *texts).astype(float)
        spread = theirs.std(axis=0) * ours.std()
        products = ((theirs - theirs.mean(axis=0)) * (ours - ours.mean())[:, None]).mean(axis=0)
        found = np.where(spread > 0, products / np.where(spread > 0, spread, 1), 0)
        row = own.loc[("pearson", site.module)]
        assert row["source"] == f"{site}/{found.argmax()}"
        assert row["score"] == pytest.approx(found.max(), abs=1e-4)


def test_correlation_agrees_with_cosine_as_the_results_say(matching: Executed) -> None:
    agreed = matching.table("agreement").query("first == 'cosine' and second == 'pearson'")
    found = matching.results["pearson_as_cosine"]
    assert found == pytest.approx(agreed.set_index("module")["same"].to_dict())
    assert found["res"] > 2 * max(found["mlp"], found["att"])  # as in C.4, for another model


def test_methods_are_compared_at_the_paper_s_layers_and_a_shipped_suite_needs_no_hub() -> None:
    def asked(suite: str) -> dict[str, Any]:
        (values,) = plan(["01_matching"], {"suite": suite}, "paper").values()
        return values

    for suite in ("gemma-2-2b", "gemma-2-2b@res+mlp"):
        assert asked(suite)["layers"] == [*range(2, 25, 2)]
        assert (asked(suite)["pearson_corpus"], asked(suite)["corpora"]) == ("fineweb", ["fineweb"])
    assert asked("pythia-70m-deduped")["layers"] == [*range(6)]
    assert asked("gpt2-small")["layers"] == [*range(12)]
    for suite in ("flowlet", "flowlet-mini"):
        assert asked(suite)["pearson_corpus"] is None
        assert not set(asked(suite)["corpora"]) & set(PAPER_DATASETS)


def test_a_sae_at_z_comes_back_by_both_steps_and_by_no_fewer(matching: Executed) -> None:
    table = matching.table("attention_at_z").set_index("step")
    both, one, none = (table.loc[step] for step in ("W_O and gain", "W_O, no gain", "z as it is"))
    assert both["cosine to the true direction"] == pytest.approx(1, abs=1e-5)
    assert both["lowest"] == pytest.approx(1, abs=1e-4)
    assert both["same best match"] == 1.0
    assert one["same best match"] < 0.9
    assert none["same best match"] < 0.01
    assert none["above chance"] < 0.01


# Flow graphs, walked by hand.


def test_the_chain_is_walked_by_best_matches_and_read_layer_by_layer(flows: Executed) -> None:
    chain = chain_through(flows.results["feature"])
    table = flows.table("layer_by_layer")
    assert table["feature"].tolist() == [f"{layer}/res/{i}" for layer, i in enumerate(chain)]
    for layer, row in enumerate(table.to_dict("records")):
        places = modules_of(layer)
        for module in places:
            sources, values = best_back(layer, module)
            assert row[f"s_{module}"] == pytest.approx(values[chain[layer]], abs=1e-6)
            named = f"{layer}/{module}/{sources[chain[layer]]}: writes "
            high = values[chain[layer]] > null(layer, module)
            assert (named in row["adds"]) == (high and module != "res")
        assert row["class"] == reading(layer, chain[layer])
        shown = [f"{null(layer, m):.3f}" if m in places else "–" for m in MODULES]
        assert row["high above"] == " / ".join(shown)
        if layer:
            step = float(cosines(layer, "res")[chain[layer], chain[layer - 1]])
            assert row["step"] == pytest.approx(step, abs=1e-6)


def test_the_saved_graph_has_these_nodes_and_edges(flows: Executed) -> None:
    chain, seed = chain_through(flows.results["feature"]), parse_feature(flows.results["feature"])
    saved = json.loads((flows.folder / "graph.json").read_text("utf-8"))
    expected = {}
    for layer, i in enumerate(chain):
        for module in modules_of(layer):
            j = chain[layer - 1] if module == "res" else int(best_back(layer, module)[0][i])
            source = f"{site_before(layer, module)}/{j}"
            expected[source, f"{layer}/res/{i}"] = float(cosines(layer, module)[i, j])
    edges = {(edge["source"], edge["target"]): edge for edge in saved["edges"]}
    assert set(edges) == set(expected)
    assert {n["feature"] for n in saved["nodes"]} == {end for pair in expected for end in pair}
    for (source, target), edge in edges.items():
        assert edge["cosine"] == pytest.approx(expected[source, target], abs=1e-6)
        here, there = parse_feature(target).layer, parse_feature(source).module
        forward = there == "res" and here > seed.layer
        assert edge["direction"] == ("forward" if forward else "backward")
        assert edge["null"] == pytest.approx(null(here, there, edge["direction"]), abs=1e-6)
    assert saved["seeds"] == [flows.results["feature"]]


def words_of(subject: str, kept: pd.DataFrame) -> set[str]:
    """Tokens of which two thirds of the passages that hold them are on a subject."""
    held: dict[str, list[str]] = {}
    for topic, text in zip(kept["subject"], kept["text"], strict=True):
        for token in {tokenizer().decode([i]) for i in ids_of(text)[0, 1:128].tolist()}:
            held.setdefault(token, []).append(topic)
    return {token for token, on in held.items() if 3 * on.count(subject) >= 2 * len(on)}


def test_the_seed_is_active_at_words_of_its_subject_on_both_halves(flows: Executed) -> None:
    kept = passages().groupby("subject").head(24).reset_index(drop=True)
    half = kept.groupby("subject").cumcount() % 2 == 0
    chosen, words = parse_feature(flows.results["feature"]), words_of("illness", kept)
    row = flows.table("candidates").query("subject == 'illness' and passes").iloc[0]
    assert row["feature"] == str(chosen)
    for some, counted in ((half, "contexts"), (~half, "contexts_other")):
        peaks = []
        for topic, text in kept.loc[some, ["subject", "text"]].to_numpy():
            codes = codes_of(chosen.site, text)[:, chosen.index]
            token = tokenizer().decode([int(ids_of(text)[0, 1 + codes.argmax()])])
            peaks.append((codes.max(), topic == "illness" and token in words))
        strongest = sorted(peaks, reverse=True)[:8]
        assert row[counted] == sum(counts for _, counts in strongest) >= 4


def test_the_far_match_is_the_highest_cosine_and_the_chain_its_best_matches(
    flows: Executed,
) -> None:
    far = flows.table("far")
    straight = (decoder(Site(7, "res")) @ decoder(Site(0, "res")).T).max(dim=1)
    assert far["direct"].tolist() == straight.indices.tolist()
    assert far["direct_cosine"].to_numpy() == pytest.approx(straight.values.numpy(), abs=1e-6)
    ends = np.arange(1024)
    for layer in range(7, 0, -1):
        ends = best_back(layer, "res")[0][ends]
    assert far["chain_end"].tolist() == ends.tolist()
    assert far["direct_null"].iloc[0] == pytest.approx(null(1, "res"), abs=1e-6)
    assert flows.results["chain_end_is_direct_match"] == (ends == straight.indices.numpy()).mean()


def test_what_a_far_match_takes_is_what_plain_hooks_give(flows: Executed) -> None:
    kept = passages().groupby("subject").head(24)["text"].tolist()
    apart = flows.table("far_apart").set_index("feature")
    removed = flows.table("far_removed").dropna(subset="chain_end").iloc[0]
    feature = int(removed["feature"])
    codes = [codes_of(Site(7, "res"), text)[:, feature] for text in kept]
    text = int(np.argmax([each.max() for each in codes]))
    at, end = int(codes[text].argmax()), int(apart.loc[feature, "chain_end"])
    own = float(codes_of(Site(0, "res"), kept[text])[at, end])
    ids = ids_of(kept[text])[:, : at + 2]
    gone = {FeatureId(0, "res", end): -own}
    old, new, _ = rescaled(FeatureId(7, "res", feature), at + 1, gone, ids)
    assert removed["before"] == pytest.approx(old, rel=1e-3)
    assert removed["chain_end"] == pytest.approx(new / old, abs=1e-2)


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


def write_stand_in(folder: Path) -> None:
    """A suite named as the paper's, with chains through the features that the paper prints.

    It has 26 layers, SAEs as wide as the paper's indices ask for, and the four scores of Table 5;
    what else its SAEs hold is at right angles to the chains.
    """
    axes = torch.eye(toys.D_MODEL)
    second = 0.30 * axes[0] + 0.82 * axes[1] + (1 - 0.30**2 - 0.82**2) ** 0.5 * axes[2]
    third = 0.48 * second + 0.79 * axes[3] + (1 - 0.48**2 - 0.79**2) ** 0.5 * axes[4]
    generator, saes = torch.Generator().manual_seed(0), {}
    for layer, index in enumerate(TABLE_5_RES):
        chain = axes[0] if layer < 7 else second if layer < 17 else third
        others = {12: (14455, 4230), 17: (9260, 1), 18: (2010, 1)}.get(layer, (0, 1))
        rows = {"res": dict(zip([index, *others], [chain, *axes[5:7]], strict=True))}
        written = {7: axes[1], 17: axes[3]}.get(layer, chain)
        at_mlp = {TABLE_5_MLP[layer]: written} if layer in TABLE_5_MLP else {0: axes[7]}
        rows |= {"mlp": at_mlp, "att": {0: axes[8]}}
        for module, planted in rows.items():
            decoder = torch.randn(max(planted) + 1, toys.D_MODEL, generator=generator)
            decoder[:, :16] = 0
            decoder[[*planted]] = torch.stack([*planted.values()])
            unit = torch.nn.functional.normalize(decoder)
            saes[Site(layer, module)] = toys.write_lens_sae(unit, Site(layer, module), 3.0)
    toys.write_model(folder / "model", layers=26)
    file = toys.write_suite(folder, saes) / "suite.yaml"
    file.write_text("name: gemma-2-2b\n" + file.read_text("utf-8"), "utf-8")


@pytest.mark.slow
def test_the_papers_graphs_are_drawn_labelled_and_checked_on_the_suite_of_its_name(tmp_path: Path):
    write_stand_in(tmp_path / "suite")
    preset = yaml.safe_load((FOLDER / "presets.yaml").read_text("utf-8"))["02_flow_graphs"]["paper"]
    seeds = preset["by_suite"]["gemma-2-2b"]["seeds"]
    given = (f"suite={tmp_path / 'suite'}", f"seeds={json.dumps(seeds)}", "texts=2")
    options = [word for each in given for word in ("-p", each)]
    done = execute(tmp_path, "02", "--preset", "paper", *options)
    assert "[1/1] finished" in done.stderr, done.stderr[-3000:]
    run = Executed(next((tmp_path / "o").glob("*-02_flow_graphs")))
    table = run.table("table_5")
    assert table["same"].tolist() == [True] * 35
    assert table["difference"].dropna().tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert run.table("named_nodes")["verdict"].tolist() == ["same"] * 11
    drawn = {path.stem: path.read_text("utf-8") for path in run.folder.glob("figures/figure_*.svg")}
    assert set(drawn) == {"figure_2", "figure_20", "figure_21"}
    assert all(f'"{layer}/res/' in drawn["figure_20"] for layer in range(26))
    assert "mentions of London" in drawn["figure_20"]
    assert run.table("spans").loc[0, ["first", "last"]].tolist() == [17, 25]  # 0.48 leads to 17


# Group statistics, counted from matches and activations by plain loops over sets.


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The tokens of the run's sample, and whether each feature is active there, by site."""
    from flowhelpers import activations, load_suite

    suite, given = load_suite("flowlet"), defaults(FOLDER / "03_group_statistics.ipynb")
    names, seed = activations.datasets_for(suite.row), given["seed"]
    texts = activations.texts_of(names, given["n_texts"], seed)
    sample = activations.draw_sample(suite.model, texts, given["tokens_per_text"], seed=seed)
    found = activations.read_sample(suite, sample, tmp_path_factory.mktemp("activations"))
    return found.tokens, {str(s): c.toarray() > 0 for s, c in found.by_site.items()}


def test_the_sample_has_its_tokens_and_the_saes_see_them_so(
    groups: Executed, sampled: tuple[pd.DataFrame, dict[str, np.ndarray]]
) -> None:
    tokens, active = sampled
    sizes = groups.table("sample").set_index("dataset")
    assert sizes["texts"].to_dict() == {"fiction": 100, "science": 100, "maths": 96, "python": 100}
    assert tokens.groupby("dataset").size().to_dict() == sizes["tokens"].to_dict()
    texts = [t for name in sizes.index for t in load_texts(name, int(sizes.loc[name, "texts"]))]
    for text in (0, 150, 390):
        mine = tokens[tokens["text"] == text]
        assert len(mine) == 5
        for site in (Site(4, "res"), Site(4, "att"), Site(7, "mlp")):
            codes = codes_of(site, texts[text])  # BOS is left out there
            expected = codes[mine["position"].to_numpy() - 1] > 0
            assert (
                active[str(site)][mine.index] == expected
            ).mean() > 0.9995  # noise at a threshold


def test_groups_are_counted_right_and_active_in_one_is_above_in_neither(
    groups: Executed, sampled: tuple[pd.DataFrame, dict[str, np.ndarray]]
) -> None:
    active, parts = sampled[1], []
    for layer in range(1, 8):  # every occurrence, and which of its predecessors are active
        token, feature = np.nonzero(active[f"{layer}/res"])
        sources = {m: best_back(layer, m)[0][feature] for m in MODULES}
        parts.append({m: active[str(site_before(layer, m))][token, sources[m]] for m in MODULES})
    there = pd.concat(map(pd.DataFrame, parts))
    found = groups.results
    assert found["occurrences"] == len(there)
    names = (" & ".join(there.columns[row].str.upper()) for row in there.to_numpy())
    shares = pd.Series("From " + (name or "nowhere") for name in names)
    shares = shares.value_counts(normalize=True)
    assert found["shares"] == pytest.approx(shares.to_dict())
    assert found["predecessor_active"] == pytest.approx(there.mean().to_dict())
    assert all(share < there[m].mean() for m, share in found["active_elsewhere"].items())
    for unit in found["ao_above_ib"].values():
        assert unit == {"s_res": True, "s_mlp": True, "s_att": True}


def test_pearson_reads_other_texts_and_loses_more_than_cosine_on_python(
    groups: Executed, sampled: tuple[pd.DataFrame, dict[str, np.ndarray]]
) -> None:
    from flowhelpers import load_suite, match_table

    tokens, active = sampled
    scored = {*load_texts("fiction", 100)}
    other = [text for text in load_texts("fiction", None) if text not in scored]
    by = {"method": "pearson", "k": 1, "texts": other, "layers": [4]}
    matches = match_table(load_suite("flowlet"), **by)
    matches = matches[matches["direction"] == "backward"].set_index(["module", "feature"])["source"]
    token, feature = np.nonzero(active["4/res"][tokens["dataset"] == "fiction"])
    there = np.zeros(len(token), bool)
    for module in MODULES:
        sources = matches[module].sort_index().to_numpy()[feature]
        there |= active[str(site_before(4, module))][token, sources] & (sources >= 0)
    shares = groups.table("figure_18").set_index(["method", "dataset", "layer", "group"])
    assert [*shares[shares["pearson_read_it"]].index.unique("dataset")] == ["fiction"]
    row = shares.loc[("pearson top-1", "fiction", 4, "From nowhere")]
    assert (row["n"], row["share"]) == ((~there).sum(), pytest.approx(1 - there.mean()))
    gaps = groups.table("dataset_gaps").set_index(["method", "dataset"])["beyond_low"]
    assert gaps["pearson top-1"].idxmax() == "python"
    assert gaps["pearson top-1", "python"] > 0.1


def finding(run: Executed, claim: str) -> dict[str, str]:
    """The one finding whose claim has these words."""
    (found,) = [each for each in run.results["findings"] if claim in each["claim"]]
    return found


def spread_of(row: Any, digits: str, name: str = "difference") -> str:
    value, low, high = (f"{row[name + end]:+z{digits}}" for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})".replace("%", " points", 1).replace("%", "")


def verdict_by(low: float, high: float) -> str:
    return "holds here" if low > 0 else "not seen here" if high < 0 else "cannot be told here"


def test_counting_each_feature_once_takes_most_significant_tests_away(groups: Executed) -> None:
    shares = []
    for name in ("tests", "tests_of_unique_features"):
        tests = groups.table(name)
        tests = tests[tests["score"] == "s_res"]
        active = sum(tests[side].str.contains("RES").astype(int) for side in ("first", "second"))
        by_pair = tests[active == 1].groupby(["first", "second"])["significant"].mean()
        shares.append(by_pair.mean())
    assert shares[0] > 0.9
    assert shares[1] < 0.5
    found = finding(groups, "differ in $s^{(R)}$")
    assert f"By occurrences {shares[0]:.1%} of these tests are significant" in found["ours"]
    assert f"Each feature counted once, {shares[1]:.1%} are" in found["control"]
    assert found["verdict"] == "not seen here"
    classes = finding(groups, "where it is active in one of them")
    rows = groups.table("ao_against_ib")
    for row in rows.itertuples():
        part = classes["ours" if row.unit == "occurrences" else "control"]
        assert f"`{row.score}` {row.AO:.0%} against {row.IB:.0%}" in part
    once = rows[rows["unit"] == "unique features"]
    assert once["difference"].to_numpy() == pytest.approx((once["AO"] - once["IB"]).to_numpy())
    low, high = once["difference_low"].min(), once["difference_high"].min()
    assert classes["verdict"] == verdict_by(low, high)


def test_what_the_groups_say_is_in_their_tables(groups: Executed) -> None:
    row = groups.table("nowhere_less_chance").iloc[0]
    shares = groups.table("shares_overall").set_index("group").loc["From nowhere"]
    assert row["mean"] == pytest.approx(shares["share"])
    assert row["base"] == pytest.approx(shares["by_chance"])
    nowhere = finding(groups, "Most active features")
    assert f"{shares['share']:.1%} are 'From nowhere'" in nowhere["ours"]
    assert spread_of(row, ".1%") in nowhere["control"]
    assert nowhere["verdict"] == verdict_by(-row["difference_high"], -row["difference_low"])
    matchers = groups.table("matchers")
    gaps = matchers["from nowhere by chance"] - matchers["from nowhere"]
    assert matchers["below chance"].to_numpy() == pytest.approx(gaps.to_numpy())
    assert (
        matchers["below chance"]
        .between(matchers["below chance_low"], matchers["below chance_high"])
        .all()
    )
    gaps_away = groups.table("dataset_gaps").set_index(["method", "dataset"])
    python = gaps_away.loc[("pearson top-1", "python")]
    pearson = finding(groups, "worse on Python code")
    assert spread_of(python, ".1%", "beyond") in pearson["control"]
    assert pearson["verdict"] == verdict_by(python["beyond_low"], python["beyond_high"])


SMALL = {"n_texts": 4, "pearson_texts": 4, "resamples": 5}


@pytest.mark.parametrize(
    ("number", "given"),
    [
        (1, {"texts": 4, "pearson_texts": 4}),
        (3, SMALL),
        (4, SMALL | {"sweep_targets": 9}),
        (5, {"n_samples": 2, "max_new_tokens": 3, "r_values": [0, -2]}),
        (6, {"n_samples": 2, "max_new_tokens": 3, "candidates": 1, "strengths": [2]}),
        (7, {"others": [], "n_texts": 4, "pearson_texts": 4, "shuffles": 9, "resamples": 9}),
        (8, {"texts": 2, "fit_texts": 2, "ks": [1, 2]}),
    ],
)
def test_a_suite_of_one_s_own_is_read_to_the_end_and_every_cell_again(
    number: int,
    given: dict[str, Any],
    planted_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLOWHELPERS_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    cells, names = code_cells(NOTEBOOKS[number]), {"In": []}
    for cell in cells:
        exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []):
            names |= given | {"suite": str(planted_folder)}
    assert len(Executed(tmp_path).results["findings"]) >= 5
    before = {path.name: path.read_bytes() for path in tmp_path.glob("tables/*.csv")}
    results = (tmp_path / "results.json").read_text()
    for cell in reversed(cells):
        exec(cell.source, dict(names))  # by itself, after all others
    assert {path.name: path.read_bytes() for path in tmp_path.glob("tables/*.csv")} == before
    assert (tmp_path / "results.json").read_text() == results


@pytest.mark.parametrize(
    ("book", "given", "message"),
    [
        ("03", "layers=[3, 8]", r"layers=\[3, 8\]: expected some of \[1, 2, .*, 7\], each once"),
        ("03", "pearson_corpus=fictoin", "unknown corpus 'fictoin'; did you mean 'fiction'"),
        ("04", "layers=[0]", r"layers=\[0\]: expected some of \[1, 2, .*, 7\], each once"),
        ("04", "search_layers=[3]", r"search_layers=\[3\]: expected some of \[2, 4, 6\]"),
        ("04", "max_tokens=1", "max_tokens of 2 or more, BOS included"),
        ("04", "r_values=[0, 0]", "expected one or more, each once"),
        ("04", "datasets=[fictoin]", "unknown corpus 'fictoin'; did you mean 'fiction'"),
        ("05", "advanced={'phases': ['promt']}", "unknown phase 'promt'; did you mean 'prompt'"),
    ],
)
def test_what_fits_no_suite_is_refused_at_the_door(
    tmp_path: Path, book: str, given: str, message: str
) -> None:
    done = execute(tmp_path, book, "-p", given)
    assert done.returncode
    assert re.search(message, done.stderr)
    assert not [*tmp_path.rglob("sample.parquet"), *tmp_path.rglob("targets.parquet")]


def test_the_paper_s_own_settings_are_those_of_its_suites_and_flowlet_needs_no_hub() -> None:
    def of(notebook: str, suite: str) -> dict[str, Any]:
        return next(iter(plan([notebook], {"suite": suite}, "paper").values()))

    for name, layers, texts in (
        ("gemma-2-2b@l0=70", [8, 18], 250),
        ("llama-3.1-8b", [8, 16, 24], 250),
        ("gpt2-small", None, 500),
        ("pythia-70m-deduped", None, 500),
    ):
        given = of("03", name)
        assert (given.get("layers"), given["n_texts"]) == (layers, texts)
        assert given["pearson_corpus"] == of("04", name)["pearson_corpus"] == "fineweb"
        assert given["pearson_texts"] * 127 == pytest.approx(100_000, rel=0.02)
        assert of("04", name)["dtype"] == "float32"
    assert len(of("04", "gemma-2-2b")["search_layers"]) == 2
    assert all(of(book, "flowlet")["pearson_corpus"] == "fiction" for book in ("03", "04"))


# Deactivation, by plain hooks over whole texts.


def rescaled(
    target: FeatureId, at: int, edits: dict[FeatureId, float], ids: Tensor
) -> tuple[float, float, Tensor]:
    """A feature without and with amounts of others added at its token, and the logits with them."""

    def push(feature: FeatureId, amount: float) -> Change:
        pushed = torch.zeros(ids.shape[1], 192)
        pushed[at] = amount * lens_sae(feature.site).W_dec[feature.index].detach()
        return lambda values: values + pushed

    changes = {feature.site: push(feature, amount) for feature, amount in edits.items()}
    before, (logits, after) = plain_pass(ids, target.site)[1], plain_pass(ids, target.site, changes)
    old, new = (lens_sae(target.site).encode(read[at])[target.index] for read in (before, after))
    return old.item(), new.item(), logits


def active_by_hand(target: FeatureId, at: int, text: str) -> dict[str, tuple[FeatureId, float]]:
    """The best matches by cosine that are active at the token, and their activations."""
    found = {}
    for module in MODULES:
        site = site_before(target.layer, module)
        source = int(best_back(target.layer, module)[0][target.index])
        activation = float(codes_of(site, text)[at - 1, source])
        if activation > 0:
            found[module] = FeatureId(site.layer, module, source), activation
    return found


def test_the_one_edit_is_what_plain_hooks_give(removed: Executed) -> None:
    text = defaults(FOLDER / "04_deactivation.ipynb")["sentence"]
    target = parse_feature(removed.results["feature"])
    codes, ids = codes_of(target.site, text)[:, target.index], ids_of(text)
    at = int(codes.argmax()) + 1  # after BOS
    predecessors = active_by_hand(target, at, text)
    assert list(predecessors) == ["res"]
    source, activation = predecessors["res"]
    assert removed.results["predecessor"] == str(source)
    old, new, logits = rescaled(target, at, {source: -activation}, ids)
    assert old == pytest.approx(codes[at - 1], rel=1e-4)
    row = removed.table("neighbours").set_index("name").loc[str(target)]
    assert row["before"] == pytest.approx(old, rel=1e-4)
    assert row["after"] == pytest.approx(new, rel=1e-3, abs=1e-4)
    table, likely = removed.table("next_tokens"), plain_logits(ids, {})[at].softmax(-1).topk(8)
    assert table["before"].to_numpy() == pytest.approx(likely.values.numpy(), rel=1e-3)
    after = logits[at].softmax(-1)[likely.indices]
    assert table["after"].to_numpy() == pytest.approx(after.numpy(), rel=1e-3, abs=1e-5)
    assert table["next token"].tolist() == [tokenizer().decode([i]) for i in likely.indices]


@pytest.mark.parametrize("name", ["outcomes", "subsets", "sweep"])
def test_cases_are_what_plain_hooks_over_the_whole_text_give(removed: Executed, name: str) -> None:
    texts, targets = load_texts("fiction", 35), removed.table("targets")
    table = removed.table(name)
    if name == "outcomes":
        table = table[table["method"] == "top-1"]
    for case in table.sample(12, random_state=7).itertuples():
        own = targets.loc[case.target]
        target, at = FeatureId(int(own["layer"]), "res", int(own["feature"])), int(own["position"])
        text = texts[int(own["text"])]
        active = active_by_hand(target, at, text)
        assert case.group == "From " + " & ".join(m.upper() for m in active)
        chosen = [m for m in active if m.upper() in case.removed]
        assert case.removed == "From " + " & ".join(m.upper() for m in chosen)
        amounts = {active[m][0]: (case.r - 1) * active[m][1] for m in chosen}
        ids = ids_of(text)[:, :128]
        old, new, logits = rescaled(target, at, amounts, ids)
        assert case.old == pytest.approx(old, rel=1e-3, abs=1e-4)
        assert case.new == pytest.approx(new, rel=1e-3, abs=1e-3)
        assert case.change == pytest.approx(1 - new / old, abs=1e-3)
        assert case.success == (case.new == 0)
        reads = lens_sae(target.site).W_enc[:, target.index].detach()
        written = sum(
            -amount * float(lens_sae(f.site).W_dec[f.index].detach() @ reads)
            for f, amount in amounts.items()
        )
        assert case.linear == pytest.approx(written / old, rel=1e-3, abs=1e-4)
        if name == "sweep":
            losses = [
                float(torch.nn.functional.cross_entropy(some[:-1].double(), ids[0, 1:]))
                for some in (plain_logits(ids, {}), logits)
            ]
            expected = (losses[1] - losses[0]) / losses[0]
            assert case.loss_change == pytest.approx(expected, rel=0.02, abs=2e-6)


def test_removing_the_match_in_the_stream_removes_the_feature(removed: Executed) -> None:
    # What flowlet was built to show, at every layer, with its interval.
    rates = removed.table("control").set_index(["method", "layer"])
    assert set(rates.index.get_level_values("layer")) == {2, 4, 6}
    for layer in (2, 4, 6):
        methods = ("top-1", "random", "another active feature")
        match, random, other = (rates.loc[(method, layer)] for method in methods)
        assert match["success_low"] >= 0.50
        assert match["change_low"] >= 0.70
        assert match["success_low"] > random["success_high"]
        assert match["change_low"] > random["change_high"]
        assert other["change_high"] <= 0.12
        assert match["n"] > 500


def test_most_of_what_goes_is_plain_arithmetic(removed: Executed) -> None:
    subsets = removed.table("subsets")
    alone = subsets[subsets["removed"] == "From RES"].dropna(subset=["linear", "change"])
    gone, written = alone["change"].mean(), alone["linear"].mean()
    assert written > 0.9 * gone > 0.7
    row = removed.table("response").set_index("removed").loc["From RES"]
    assert (row["mean"], row["base"]) == pytest.approx((gone, written))
    found = finding(removed, "Most of the effect is the layer's own computation")
    assert f"in the stream {gone:.2f} of the activation goes" in found["ours"]
    assert f"from a sum, it would be {written:.2f}." in found["ours"]
    assert spread_of(row, ".2f") in found["control"]
    assert found["verdict"] == "not seen here"


def test_what_deactivation_finds_is_in_its_tables(removed: Executed) -> None:
    controlled = removed.table("controlled")
    means = controlled.groupby("method")[["success", "change"]].mean()
    above = removed.table("above_control").set_index(["measure", "method"])
    for (measure, method), row in above.iterrows():
        assert row["mean"] == pytest.approx(means.loc[method, measure])
        assert row["base"] == pytest.approx(means.loc["another active feature", measure])
    cause, row = finding(removed, "it is a cause"), above.loc[("success", "top-1")]
    assert spread_of(row, ".0%") in cause["control"]
    assert cause["verdict"] == verdict_by(row["difference_low"], row["difference_high"])
    best = removed.table("searched").groupby("method")["change"].mean()
    found = finding(removed, "nearly the best single match")
    share = best["top-1 cosine"] / best["exhaustive"]
    assert f"Cosine changes {best['top-1 cosine']:.2f}" in found["ours"]
    assert f"{share:.0%} of what the search" in found["ours"]
    assert found["verdict"] == ("holds here" if share >= 0.8 else "not seen here")
    upward = removed.table("further")
    lowest = upward[(upward["method"] == "top-1") & (upward["layer"] == 2)]
    by_above = lowest.groupby("above")["change"].mean()
    repair = removed.table("repair").set_index("above")
    assert repair["mean"].to_dict() == pytest.approx(by_above.drop(0).to_dict())
    assert repair["base"].unique() == pytest.approx([by_above[0]])
    ends = upward[(upward["layer"] == 2) & upward["above"].isin([0, 5])]
    wide = ends.pivot(index="target", columns=["above", "method"], values="change").dropna()
    falls = (wide[5] - wide[0]).mean()
    fade = removed.table("fade").iloc[0]
    beyond = falls["top-1"] - falls["another active feature"]
    assert fade["difference"] == pytest.approx(beyond)
    assert falls["another active feature"] > 0  # the control grows, which must be taken off
    faded = finding(removed, "the effect fades")
    assert spread_of(fade, ".2f") in faded["control"]
    assert faded["verdict"] == verdict_by(-fade["difference_high"], -fade["difference_low"])


def test_what_comes_before_an_edit_is_never_lost_or_won_by_it(removed: Executed) -> None:
    shares = removed.table("figure_15b")
    total = shares.groupby(["group", "removed"])["share"].sum()
    assert total.to_numpy() == pytest.approx(1)
    assert len(total) == 3 * 1 + 3 * 3 + 7
    before = {"From MLP": ("RES", "ATT"), "From ATT": ("RES",)}
    for row in shares[shares["after"] != "Deactivated"].itertuples():
        for place in before.get(row.removed, ()):
            assert (place in row.group) == (place in row.after)


def test_the_sweep_does_nothing_at_one_and_more_the_farther(removed: Executed) -> None:
    sweep, means = removed.table("sweep"), removed.table("sweep_by_r")
    same = sweep.loc[sweep["r"] == 1, ["change", "success", "loss_change"]]
    assert (same == 0).all(axis=None)
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


def test_the_search_is_of_the_layers_and_sites_that_are_asked_for(tmp_path: Path) -> None:
    given = {"n_texts": 2, "layers": "[2,4]", "search_layers": "[4]", "all_sites": "true"}
    given |= {"methods": "top-1", "r_values": "0,1", "sweep_targets": 5, "max_tokens": 40}
    pairs = [text for name, value in given.items() for text in ("-p", f"{name}={value}")]
    done = execute(tmp_path, "04", *pairs)
    assert done.returncode == 0, done.stderr[-3000:]
    made = Executed(next((tmp_path / "o").glob("*/config.json")).parent)
    targets, best = made.table("targets"), made.table("searched")
    assert set(targets["layer"]) == {2, 4}
    assert set(best["layer"]) == {4}
    assert targets["position"].max() < 40
    row = best[best["method"] == "exhaustive"].iloc[0]
    own = targets.loc[row["target"]]
    text, at = load_texts("fiction", 2)[own["text"]], int(own["position"]) - 1
    sites = [site_before(4, module) for module in MODULES]
    assert row["tried"] == sum((codes_of(site, text)[at] > 0).sum() for site in sites)


# Themes suppressed and promoted.


def middle_95(values: list[float]) -> tuple[float, float]:
    """The interval of a mean, by samples drawn anew."""
    drawn = np.random.default_rng(9).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(np.array(values)[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def written_by_hand(changes: dict[Site, Change], prompt: str, sample: int) -> str:
    """24 tokens sampled with plain hooks, one pass over the whole text for each."""
    ids = ids_of(prompt)
    start = ids.shape[1]
    for share in torch.rand(24, generator=torch.Generator().manual_seed(sample)).tolist():
        chances = (plain_logits(ids, changes)[-1] / 1.27).softmax(-1).numpy()
        order = np.argsort(-chances, kind="stable")
        nucleus = order[: int((chances[order].cumsum() < 0.7).sum()) + 1]
        kept = np.zeros(len(chances))
        kept[nucleus] = chances[nucleus]
        token = int(np.searchsorted(kept.cumsum(), share * kept.sum(), side="right"))
        if token == tokenizer().eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return tokenizer().decode(ids[0, start:].tolist())


def changes_of(features: pd.DataFrame, change: Callable[..., Change]) -> dict[Site, Change]:
    """The change at each site of a table of features, from the site and its features' indices."""
    return {
        Site(int(layer), module): change(
            Site(int(layer), module), [parse_feature(name).index for name in part["feature"]]
        )
        for (layer, module), part in features.groupby(["layer", "module"])
    }


def test_suppressed_texts_are_what_plain_hooks_give(suppressed: Executed) -> None:
    texts, features = suppressed.table("texts"), suppressed.table("features")
    for strategy, layer, r in (("single", 3, -4), ("cumulative", 5, -2), ("unsteered", -1, 0)):
        cell = texts[texts["strategy"] == strategy]
        if strategy != "unsteered":
            cell = cell[(cell["layer"] == layer) & (cell["strength"] == r)]

        def take(site: Site, rows: list[int], r: float = r) -> Change:
            sae = lens_sae(site)
            return lambda x: x + (r - 1) * sae.encode(x)[..., rows] @ sae.W_dec[rows]

        first = layer if strategy == "single" else 0
        changes = changes_of(features[features["layer"].between(first, layer)], take)
        assert len(cell) == 32
        for sample in (0, 5):
            prompt = "In physics, the energy of a particle is"
            expected = written_by_hand(changes, prompt, sample)
            assert cell.set_index("sample")["text"][sample] == expected, (strategy, sample)


def test_promoted_texts_are_what_plain_hooks_give(promoted: Executed) -> None:
    texts, features = promoted.table("texts"), promoted.table("features")
    wide = features.groupby("theme")["layer"].agg(["min", "max"])
    theme = (wide["max"] - wide["min"]).idxmax()
    low, high = wide.loc[theme]
    texts = texts.query("theme == @theme and layer == @high and strength == 4")
    schedule = {
        "single": lambda layer: 4,
        "exponential": lambda layer: 4 * np.exp(-0.05 * layer),
        "linear": lambda layer: 4 + (1 - 4) * (layer - low) / (high - low),
    }
    for strategy, strength in schedule.items():

        def push(site: Site, rows: list[int], strength: Any = strength) -> Change:
            sae = lens_sae(site)
            vector = (sae.threshold[rows, None] * sae.W_dec[rows]).sum(0)
            return lambda x: x + strength(site.layer) * vector

        first = high if strategy == "single" else low
        mine = features[(features["theme"] == theme) & (features["layer"] >= first)]
        changes = changes_of(mine, push)
        cell = texts[texts["strategy"] == strategy].set_index("sample")
        for sample in (1, 7):
            expected = written_by_hand(changes, "I think", sample)
            assert cell["text"][sample] == expected, (strategy, sample)


def test_scores_are_products_and_samples_that_choose_are_not_reported(
    suppressed: Executed, promoted: Executed
) -> None:
    for run, wanted in ((suppressed, lambda score: 1 - score), (promoted, lambda score: score)):
        texts, reported = run.table("texts"), run.table("texts_reported")
        for table in (texts, reported):
            product = wanted(table["behavioral"]) * table["coherence"]
            assert np.allclose(table["score"], product)
        assert set(texts["sample"]).isdisjoint(reported["sample"])
    figure, reported = suppressed.table("figure_10"), suppressed.table("texts_reported")
    for row in figure[figure["strategy"].isin(["single", "cumulative"])].itertuples():
        own = reported.query("strategy == @row.strategy and strength == @row.strength")["score"]
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
    same = control.loc["random, same norm", "norm"]
    assert same.to_numpy() == pytest.approx(top["norm"], rel=0.1)
    assert (suppressed.table("against_seeds")["difference_low"] > 0).any()


def test_seeds_that_write_pieces_of_words_are_counted(suppressed: Executed) -> None:
    words = {*re.findall(r"\w+", " ".join(activations.passages()["text"]).lower())}
    written = suppressed.table("seeds")["writes"].str.lower().str.split(", ")
    pieces = sum(words.isdisjoint(tokens) for tokens in written)
    page = (suppressed.folder / "notebook.html").read_text("utf-8")
    assert f"<caption>{pieces} of {len(written)} seeds write pieces of words only" in page


def test_what_suppression_finds_are_differences_sample_by_sample(suppressed: Executed) -> None:
    reported = suppressed.table("texts_reported")
    scores = reported.groupby(["strategy", "strength", "sample"])["score"].mean()
    gap = scores["cumulative"] - scores["single"]
    table = suppressed.table("cumulative_less_single").set_index("r")
    each = table.loc["each r"].set_index("strength")["difference"]
    assert each.to_dict() == pytest.approx(gap.groupby("strength").mean().to_dict())
    by_sample = gap.loc[[0, -1, -2, -4]].groupby("sample").mean()
    row = table.loc["small |r|"]
    assert row["difference"] == pytest.approx(by_sample.mean())
    ends = row["difference_low"], row["difference_high"]
    assert middle_95(by_sample.tolist()) == pytest.approx(ends, abs=0.03)
    found = finding(suppressed, "At small |r|")
    assert spread_of(row, ".3f") in found["ours"]
    assert found["verdict"] == verdict_by(*ends)
    graph, duel = (
        finding(suppressed, "what its seeds alone lack"),
        suppressed.table("at_their_best"),
    )
    for row in duel[duel["strategy"].isin(["single", "cumulative"])].to_dict("records"):
        assert (
            f"{row['strategy']} (r = {row['strength']:g}) {spread_of(row, '.2f')}" in graph["ours"]
        )
    luck, ends = suppressed.results["luck"], suppressed.results["luck_interval"]
    told = finding(suppressed, "partly luck")
    assert f"luck {luck:+.3f} ({ends[0]:+.3f} to {ends[1]:+.3f})" in told["ours"]
    assert told["verdict"] == verdict_by(*ends)


def test_the_judge_s_limits_stand_beside_the_scores(suppressed: Executed) -> None:
    limits = suppressed.table("judge_limits").set_index("text")["coherence"]
    note = f"human text {limits['human, other subjects']:.2f}"
    assert limits["halves of two of these"] > 0.6 > 3 * limits["their words shuffled"]
    for name in ("figure_9", "figure_10", "score_against_norm", "side_effects"):
        assert note in (suppressed.folder / f"figures/{name}.json").read_text("utf-8")
    found = finding(suppressed, "high coherence makes sense")
    assert f"{limits['halves of two of these']:.2f}" in found["ours"]
    assert found["verdict"] == "not seen here"
    book = read(suppressed.folder / "notebook.ipynb")
    (shown,) = [c for c in book.cells if c.id == "read-it"]
    texts = suppressed.table("generations")["steered"]
    page = shown.outputs[0].data["text/html"].replace("&#x27;", "'").replace("&#39;", "'")
    assert note in page
    assert max(texts, key=len)[-30:].replace("&", "&amp;").replace("<", "&lt;") in page  # not cut


def test_promotion_beats_no_steering_and_random_features_for_three_themes_of_four(
    promoted: Executed,
) -> None:
    reported, verdicts = promoted.table("texts_reported"), promoted.table("verdicts")
    scores = reported.groupby(["theme", "strategy"])["score"].agg(list)
    beaten = 0
    bests = verdicts.drop_duplicates("theme")
    for row in bests.itertuples():
        low = middle_95(scores[row.theme, row.strategy])[0]
        controls = (scores[row.theme, name] for name in ("unsteered", "random features"))
        beaten += all(low > middle_95(control)[1] for control in controls)
    assert len(bests) == 4
    assert beaten >= 3


def test_removing_more_costs_more_and_at_equal_norm_the_norms_are_equal(
    suppressed: Executed, promoted: Executed
) -> None:
    tables = []
    for run in (suppressed, promoted):
        means = run.table("means")
        plain = means["strategy"] == "unsteered"
        assert (means.loc[plain, ["norm", "kl"]] == 0).all(axis=None)
        tables.append(means[~plain])
    by_r = tables[0].groupby(["strategy", "strength"])[["norm", "kl"]].mean().unstack("strategy")
    assert (by_r.sort_index(ascending=False).diff().iloc[1:] > 0).all(axis=None)
    single = tables[1][tables[1]["strategy"] == "single"]
    best = single.loc[single.groupby("theme")["score"].idxmax()].set_index("theme")["norm"]
    equal = promoted.table("equal_norm")
    others = equal[~equal["strategy"].isin(["unsteered", "single"])]
    assert others["norm"].to_numpy() == pytest.approx(others["theme"].map(best), rel=1e-3)


def said(run: Executed, claim: str) -> dict[str, str]:
    """The one finding whose claim has these words."""
    (finding,) = [each for each in run.results["findings"] if claim in each["claim"]]
    return finding


def within(row: Any, digits: int = 2, name: str = "difference") -> str:
    ends = (f"{row[f'{name}{end}']:.{digits}f}" for end in ("", "_low", "_high"))
    value, low, high = (re.sub(r"^-(0\.0*)$", r"\1", end) for end in ends)
    return f"{value} ({low} to {high})"


def told_by(low: float, high: float) -> str:
    return "holds here" if low > 0 else "not seen here" if high < 0 else "cannot be told here"


def test_what_promotion_finds_are_differences_sample_by_sample(promoted: Executed) -> None:
    verdicts, pooled = promoted.table("verdicts"), promoted.table("pooled")
    pooled = pooled.set_index("comparison")
    best = verdicts.drop_duplicates("theme").set_index("theme")["strategy"]
    keys = ["theme", "strategy", "sample"]
    scores = promoted.table("texts_reported").groupby(keys)["score"].mean()
    for rival, claim, part in (
        ("random features", "brings the theme", "control"),
        ("seeds only", "than the feature that it starts from", "ours"),
    ):
        gaps = {theme: scores[theme, way] - scores[theme, rival] for theme, way in best.items()}
        by_theme = verdicts[verdicts["rival"] == rival].set_index("theme")
        for theme, gap in gaps.items():
            assert by_theme.loc[theme, "difference"] == pytest.approx(gap.mean())
            assert middle_95(gap.tolist()) == pytest.approx(
                tuple(by_theme.loc[theme, ["difference_low", "difference_high"]]), abs=0.03
            )
        row = pooled.loc[f"best, above {rival}"]
        together = pd.concat(gaps).groupby("sample").mean()
        assert row["difference"] == pytest.approx(together.mean())
        ends = row["difference_low"], row["difference_high"]
        assert middle_95(together.tolist()) == pytest.approx(ends, abs=0.02)
        finding = said(promoted, claim)
        assert within(row) in finding[part]
        assert finding["verdict"] == told_by(*ends)
        won = by_theme.index[by_theme["difference_low"] > 0]
        assert f"{len(won)} of 4 themes ({', '.join(won) or 'none'})" in finding[part]


def test_spreading_is_compared_where_a_plan_has_several_layers(promoted: Executed) -> None:
    above, cells = promoted.table("equal_norm_differences"), promoted.table("equal_norm")
    last = cells.set_index(["theme", "strategy"])["layer"]
    in_graph = promoted.table("features").groupby("theme")["layer"].agg(lambda x: sorted({*x}))
    for row in above.itertuples():
        if row.strategy in ("constant", "exponential", "linear"):
            steered = [x for x in in_graph[row.theme] if x <= last[row.theme, row.strategy]]
            assert row.layers == len(steered)
        else:
            assert row.layers == 1
    spread = above[above["layers"] > 1]
    finding = said(promoted, "spreading")
    counts = spread["verdict"].value_counts()
    assert f"above in {counts.get('above', 0)} of {len(spread)} comparisons" in finding["ours"]
    assert f"below in {counts.get('below', 0)}, undecided" in finding["ours"]
    row = promoted.table("pooled").set_index("comparison").loc["many layers, same norm"]
    assert row["difference"] == pytest.approx(spread["difference"].mean())
    assert within(row) in finding["ours"]
    assert finding["verdict"] == told_by(row["difference_low"], row["difference_high"])
    # Few texts: unsteered text of both halves, and what differs from it in the same samples.
    graphs = said(promoted, "ten seeds")
    halves = promoted.table("figure_17_differences")
    for row in halves[halves["half"] == "reported"].to_dict("records"):
        assert f"{row['strategy']} {within(row)}" in graphs["ours"]
    chosen, reported = promoted.table("figure_17"), promoted.table("figure_17_reported")
    plain = [t.loc[t["strategy"] == "unsteered", "score"].item() for t in (chosen, reported)]
    assert f"{plain[0]:.2f} and {plain[1]:.2f} on the two halves" in graphs["control"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hand_picked": {"seas": ["4/res/1"]}}, "unknown theme 'seas'; did you mean 'sea'"),
        (
            {"themes": ["sea"], "hand_picked": {"war": ["4/res/1"]}},
            r"features for \['war'\]: expected some of \['sea', 'Research",
        ),
        ({"themes": ["sea", "war"], "seeds": {"sea": "4/res/3"}}, r"no seed for \['war'\]"),
        ({"seeds": {"sea": "4/res/1024"}}, "no feature 4/res/1024"),
        ({"layers": [99]}, "no layer 99 in suite flowlet: it has layers 0 to 7"),
        ({"judge": "embeded"}, "unknown judge 'embeded'; did you mean 'embedded'"),
        ({"unit": "thta"}, "unknown unit 'thta'; did you mean 'theta'"),
        ({"strategies": ["singel"]}, "unknown strategy 'singel'; did you mean 'single'"),
    ],
)
def test_wrong_names_of_promotion_are_refused_before_the_first_pass(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWHELPERS_RUN_DIR", str(tmp_path))
    cells = code_cells(NOTEBOOKS[6])
    early = cells[: [cell.id for cell in cells].index("preflight")]

    def run_early() -> None:
        names: dict[str, Any] = {"In": []}
        for cell in early:
            exec(cell.source, names)
            names |= given if "parameters" in cell.metadata.get("tags", []) else {}

    with pytest.raises(ValueError, match=message):
        run_early()


def test_promotion_takes_its_themes_from_the_features_that_are_given() -> None:
    cells = {cell.id: cell.source for cell in code_cells(NOTEBOOKS[6])}
    from flowhelpers import steering

    for given, themes in (
        ({"seeds": {"sea": "4/res/3"}}, ["sea"]),
        ({"hand_picked": {"war": ["4/res/3"]}}, ["war"]),
        ({"themes": ["money"]}, ["money"]),
        ({}, []),
    ):
        names = {"themes": None, "seeds": None, "hand_picked": None, "steering": steering} | given
        exec(cells["themes-asked-for"], names)
        assert names["asked_for"] == themes


PICKED = ["0/mlp/5", "1/res/7"]


@pytest.mark.parametrize(
    ("number", "given"),
    [
        (5, {"r_values": [-2], "seeds": ["0/res/3"], "hand_picked": PICKED}),
        (6, {}),
        (6, {"seeds": {"sea": "0/res/3"}, "hand_picked": {"sea": PICKED}}),
    ],
)
def test_saes_without_thresholds_and_features_picked_by_hand_are_steered(
    number: int,
    given: dict[str, Any],
    hub_here: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_gpt2(hub_here.root)
    shrink(monkeypatch, "gpt2-small", layers=2, d_model=64, model_parameters=100_000)
    monkeypatch.setenv("FLOWHELPERS_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    given = {"suite": "gpt2-small", "n_samples": 2, "max_new_tokens": 3, "layers": "all"} | given
    given |= {"strengths": [0.5], "candidates": 1, "themes": ["sea"], "t_res": -1.0}
    names: dict[str, Any] = {"In": []}
    for cell in code_cells(NOTEBOOKS[number]):
        exec(cell.source, names)
        names |= given if "parameters" in cell.metadata.get("tags", []) else {}
    ours = Executed(tmp_path)
    assert {0, 1} <= {*ours.table("texts")["layer"]}
    alone = [cell.plan for cell in names["cells"] if cell.strategy == "seeds only"]
    assert len(alone) == (2 if number == 6 else 1)  # in 06 at the greatest strength twice over too
    (step,), *_ = [plan.steps for plan in alone]
    if number == 6:
        assert names["of_unit"]["unit"] == "max"
        greatest = names["on_passages"].of(parse_feature(step.feature)).max()
        assert step.scale == pytest.approx(greatest)
        assert (
            ours.table("trial")["score"].isna().all() == ("seeds" in given) != bool(names["tries"])
        )
    if "seeds" in given:
        assert step.feature == "0/res/3"
        assert sorted(ours.table("features")["feature"]) == PICKED


# A judge behind an endpoint.

KEY = "sk-this-is-the-key-of-nobody-5f21"


def run_with_endpoint(
    server: JudgeServer, root: Path, *parameters: str
) -> subprocess.CompletedProcess[str]:
    """Suppression with few texts and this judge; the key is in nothing that was written or said."""
    given = ["n_samples=2", "max_new_tokens=6", "judge=endpoint", f"judge_url={server.url}"]
    options = [part for each in [*given, *parameters] for part in ("-p", each)]
    done = execute(root, "05_theme_suppression", *options, OPENAI_API_KEY=KEY, NO_PROXY="127.0.0.1")
    files = [path for path in root.rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in done.stdout + done.stderr
    return done


def test_a_judge_behind_an_endpoint_serves_and_its_key_is_written_nowhere(tmp_path: Path) -> None:
    with JudgeServer(KEY) as server:
        done = run_with_endpoint(server, tmp_path, "r_values=[-2]", "layers=[3]")
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(server.asked()) > 8
        assert {asked.key for asked in server.requests} == {KEY}
    ours = Executed(next((tmp_path / "o").glob("*-05_theme_suppression")))
    texts = ours.table("texts_reported")
    assert ours.results["missing"] == 0
    for row in texts[texts["text"].str.strip() != ""].itertuples():
        coherence, behavioral = scores(str(row.text))
        assert (row.coherence, row.behavioral) == (coherence / 5, behavioral[1] / 5)
        all_three = [row.behavioral_a, row.behavioral_b, row.behavioral_c]
        assert all_three == [each / 5 for each in behavioral]


def test_a_wrong_key_is_an_error_before_any_text_is_written(tmp_path: Path) -> None:
    with JudgeServer("another") as server:
        done = run_with_endpoint(server, tmp_path)
    assert done.returncode != 0
    assert "It refuses the key" in done.stderr
    assert not list((tmp_path / "o").glob("*-05_theme_suppression/texts.sqlite"))


# The first notebook, and many suites.


def test_the_chosen_feature_and_its_predecessors_are_those_of_the_scores(start: Executed) -> None:
    flow = start.table("flow")
    seed = flow[flow["is_seed"]].iloc[0]
    assert seed["feature"] == start.results["feature"]
    chosen = parse_feature(seed["feature"])
    for module in MODULES:
        sources, values = best_back(chosen.layer, module)
        assert seed[f"s_{module}"] == pytest.approx(values[chosen.index])
        if isinstance(seed[f"from_{module}"], str):
            assert parse_feature(seed[f"from_{module}"]).index == sources[chosen.index]
    expected = [f"{layer}/res/{i}" for layer, i in enumerate(chain_through(str(chosen)))]
    assert flow["feature"].tolist() == expected


def test_switching_off_is_what_plain_hooks_give(start: Executed) -> None:
    trials, chosen = start.table("deactivation"), parse_feature(start.results["feature"])
    sentence = start.results["sentence"]
    assert any(sentence in text for text in passages()["text"])
    codes = codes_of(chosen.site, sentence)[:, chosen.index]
    at = int(codes.argmax()) + 1  # after BOS
    assert trials["before"].to_numpy() == pytest.approx(np.full(len(trials), codes.max()), rel=1e-3)
    others = trials[trials["trial"].str.startswith("others")].head(3)
    single = pd.concat([trials[trials["trial"].str.startswith("match")], others])
    for row in single.to_dict("records"):
        off = parse_feature(row["switched_off"])
        own = float(codes_of(off.site, sentence)[at - 1, off.index])
        after = rescaled(chosen, at, {off: -own}, ids_of(sentence))[1]
        assert row["after"] == pytest.approx(after, rel=1e-3, abs=1e-4), row["switched_off"]
        assert row["own_after"] == 0
    assert single["own_before"].max() > 0  # no table of zeros
    left = trials.groupby("trial")["after"].mean()["all matches"] / codes.max()
    assert start.results["activation_left_without_predecessors"] == pytest.approx(left, rel=1e-3)


def test_strength_0_gives_the_texts_and_chances_of_the_unedited_model_and_others_do_not(
    start: Executed,
) -> None:
    steered = start.table("steering").sort_values("sample")
    texts = {key: part["text"].tolist() for key, part in steered.groupby(["way", "strength"])}
    assert len(set(texts["no edit", 0.0])) == 4
    assert texts["feature", 0.0] == texts["no edit", 0.0]
    assert texts["feature", 1.0] != texts["no edit", 0.0]
    assert texts["feature", 1.0] != texts["random direction", 1.0] != texts["no edit", 0.0]
    table = start.table("next_tokens").pivot(index="what", columns="condition", values="value")
    ids = ids_of(defaults(FOLDER / "00_start_here.ipynb")["prompt"])
    best = plain_logits(ids, {})[-1].softmax(-1).topk(4)
    names = [repr(tokenizer().decode([token])) for token in best.indices]
    assert table.loc[names, "no edit"].tolist() == pytest.approx(best.values.tolist(), rel=1e-4)
    assert (table["feature"] - table["no edit"]).abs().max() > 1e-4


def test_a_suite_among_others_is_what_it_is_by_itself(
    across: Executed, groups: Executed, flows: Executed
) -> None:
    row = across.table("across").set_index("suite").loc["flowlet"]
    for module in MODULES:
        best = [best_back(layer, module)[1] for layer in range(1, 8)]
        high = [best_back(layer, module)[1] > null(layer, module) for layer in range(1, 8)]
        median = np.median(np.concatenate(best).clip(min=0))
        assert row[f"median_{module}"] == pytest.approx(median, abs=1e-5)
        assert row[f"above_{module}"] == pytest.approx(np.concatenate(high).mean(), abs=1e-3)
    shares = groups.table("shares_overall").set_index("group")["share"]  # the same sample
    assert row[shares.index].tolist() == pytest.approx(shares.tolist())
    lives = flows.table("lives_of_all").set_index("steps")["mean layers"]
    assert row["mean_life"] == pytest.approx(lives["above chance"])


def test_what_suites_share_is_told_in_differences_of_the_same_texts(across: Executed) -> None:
    groups, told = across.table("groups"), across.table("differences")
    both = groups[(groups["dataset"] == "all texts") & (groups["layer"] > 0)]
    counts = both[both["method"] == "cosine"]

    def share(some: pd.DataFrame, group: str) -> float:
        return some.loc[some["group"] == group, "n"].sum() / some["n"].sum()

    for suite, part in counts.groupby("suite"):
        last, first = part[part["depth"] > 2 / 3], part[part["depth"] <= 1 / 3]
        row = told[(told["suite"] == suite) & (told["comparison"] == "RES rises")].iloc[0]
        rise = share(last, "From RES") - share(first, "From RES")
        assert row["difference"] == pytest.approx(rise)
        assert row["difference_low"] < rise < row["difference_high"]
        assert f"{suite} {spread_of(row, '.3f')}" in said(across, "From RES")["ours"]
        by_chance = told[(told["suite"] == suite) & (told["comparison"] == "nowhere, above chance")]
        assert by_chance["difference"].item() < -0.3
        att = told[(told["suite"] == suite) & (told["comparison"] == "ATT rises")]
        rise = share(last, "From ATT") - share(first, "From ATT")
        assert att["difference"].item() == pytest.approx(rise)
        of_res = both[(both["suite"] == suite) & (both["group"] == "From RES")]
        of_res = of_res.pivot(index="layer", columns="method", values="share")
        shapes = across.table("same_shape").set_index(["suite", "group"])["correlation"]
        assert shapes[suite, "From RES"] == pytest.approx(of_res.corr().iloc[0, 1])
    rising = told[told["comparison"] == "RES rises"]
    ends = rising["difference_low"].min(), rising["difference_high"].max()
    assert said(across, "From RES")["verdict"] == told_by(*ends)
    assert said(across, 'From nowhere" less often')["verdict"] == "holds here"
    assert said(across, "main picture")["verdict"] == "cannot be told here"


def test_one_suite_by_itself_and_among_others_says_the_same_of_its_thirds(
    across: Executed, groups: Executed
) -> None:
    told = across.table("differences").set_index(["suite", "comparison"])
    row, ends = told.loc[("flowlet", "RES rises")], ["difference_low", "difference_high"]
    first = groups.table("depth").set_index("layers").loc["layers 1 to 2"]
    assert first["difference"] == pytest.approx(-row["difference"])
    assert first[ends].tolist() == pytest.approx((-row[ends[::-1]]).tolist(), abs=1e-6)
    verdict = verdict_by(row["difference_low"], row["difference_high"])
    assert finding(groups, "in the last part of the layers")["verdict"] == verdict


def test_phases_are_told_beside_the_least_that_few_layers_allow(across: Executed) -> None:
    phases = across.table("phases").drop_duplicates(["suite", "of"]).set_index(["suite", "of"])
    finding = said(across, "three parts")
    for (suite, of), row in phases.iterrows():
        said_of = f"{suite}, by {of}, {row['as_good']:.0%} (a perfect division: {row['least']:.0%})"
        assert said_of in finding["control"]
    by_groups = phases.xs("groups", level="of")
    assert by_groups.loc["flowlet-mini", "least"] >= 0.1  # of five layers
    told = phases[phases["least"] < 0.05]["as_good"] < 0.05
    agreed = "holds here" if told.all() else "not seen here"
    assert finding["verdict"] == (agreed if told.nunique() == 1 else "cannot be told here")
    assert [*told.index] == [("flowlet", "groups"), ("flowlet", "classes")]


def test_pearson_reads_other_texts_than_those_that_are_scored() -> None:
    path = FOLDER / "07_across_models.ipynb"
    cells = {cell.id: cell.source for cell in code_cells(path)}
    names: dict[str, Any] = defaults(path) | {"rows": {"flowlet": find_suite("flowlet")}}
    names |= {"activations": activations, "n_texts": 90, "pearson_texts": 40}
    exec(cells["texts"] + "\n" + cells["other-texts"], names)
    assert len(names["correlated"]) == 40
    assert not {*names["correlated"]} & {*names["everything"]}


# Matches as bridges between layers, by plain hooks and what sae-lens loads.


def explained_by_hand(bridge: np.ndarray | None, folded: bool) -> float:
    """Of layer 4's stream, by layer 3's features or all but its MLP, over the notebook's texts."""
    first, last = lens_sae(Site(3, "res")), lens_sae(Site(4, "res"))
    texts = [
        text
        for name in ("fiction", "science", "maths", "python")
        for text in load_texts(name, 50, or_fewer=True)
    ][::2]
    x, y, added = (
        np.concatenate([streams_of(site, text) for text in texts]).astype(float)
        for site in (Site(3, "res"), Site(4, "res"), Site(4, "mlp"))
    )
    if bridge is None:
        return 1 - (added**2).sum() / ((y - y.mean(0)) ** 2).sum()
    codes = first.encode(torch.from_numpy(x).float()).detach().double().numpy()
    rows = last.W_dec.detach().double().numpy()
    if folded:
        codes = codes / first.threshold.detach().double().numpy()
        rows = rows * last.threshold.detach().double().numpy()[:, None]
    else:  # what each feature writes has the norm of its row, which is 1 but for rounding
        codes = codes * first.W_dec.detach().double().norm(dim=1).numpy()
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    told = codes @ bridge @ rows + last.b_dec.detach().double().numpy()
    return 1 - ((y - told) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()


@cache
def streams_of(site: Site, text: str) -> np.ndarray:
    ids = ids_of(text)[:, :128]
    special = torch.isin(ids[0], torch.tensor(tokenizer().all_special_ids))
    return plain_pass(ids, site)[1][~special].numpy()


def test_a_bridge_explains_what_plain_hooks_and_its_permutation_give(bridges: Executed) -> None:
    from scipy.optimize import linear_sum_assignment

    best = np.zeros((1024, 1024))
    best[np.arange(1024), best_on(3)[0]] = best_on(3)[1] > 0
    one_pair = bridges.table("one_pair").set_index("prediction")["explained"]
    assert one_pair["matches"] == pytest.approx(explained_by_hand(best, False), abs=1e-4)
    no_mlp = bridges.table("without_mlp").set_index("layer")["explained"]
    assert no_mlp[4] == pytest.approx(explained_by_hand(None, False), abs=1e-4)
    near = bridges.table("neighbours").set_index("prediction")["explained"]
    assert near["4 folded"] == pytest.approx(explained_by_hand(best, True), abs=1e-4)
    paired = np.zeros((1024, 1024))
    targets, sources = linear_sum_assignment(cosines(4, "res").numpy(), maximize=True)
    paired[sources, targets] = 1
    figure_23 = bridges.table("figure_23").set_index("prediction")["explained"]
    assert figure_23["decoder no"] == pytest.approx(explained_by_hand(paired, False), abs=1e-3)
    # Figure 24: the two highest virtual weights of each feature as they are.
    reads = lens_sae(Site(4, "res")).W_enc.detach().double().T
    virtual = (decoder(Site(3, "res")) @ (reads / reads.norm(dim=1, keepdim=True)).T).numpy()
    low = np.sort(virtual, axis=1)[:, [-2]]
    kept = np.where((virtual >= low) & (virtual > 0), virtual, 0)
    raw = bridges.table("figure_24").set_index("prediction")["explained"]
    by_hand = explained_by_hand(kept, False)
    assert raw["decoder-encoder 2 False"] == pytest.approx(by_hand, abs=1e-4)


def test_what_bridges_find_is_their_lead_over_the_same_texts(bridges: Executed) -> None:
    near = bridges.table("neighbours")
    own = near[near["kind"] == "matches"].set_index("layer")["explained"]
    assert near["ahead"].to_numpy() == pytest.approx(near["layer"].map(own) - near["explained"])
    by_kind = near.groupby("kind")
    means, lows, highs = (
        by_kind[c].agg(f)
        for c, f in (("explained", "mean"), ("ahead_low", "min"), ("ahead_high", "max"))
    )
    for kind, claim in (("shuffled", "carry"), ("copied SAE", "own (our control)")):
        finding = said(bridges, claim)
        assert finding["verdict"] == told_by(lows[kind], highs[kind])
        assert f"{means[kind]:.2f} (the matches are ahead of it in" in " ".join(finding.values())
    for name, claim in (("figure_23", "every permutation"), ("figure_24", "all raw products")):
        table = bridges.table(name)
        best = table.loc[table["explained"].idxmax()]
        assert best["ahead"] == pytest.approx(own[4] - best["explained"])
        finding = said(bridges, claim)
        assert f"{best['explained']:.3f}" in finding["ours"]
        assert spread_of(best, ".3f", "ahead") in finding["ours"]
        assert finding["verdict"] == told_by(best["ahead_low"], best["ahead_high"])


# The neighbours, judged alike.


def test_the_cosine_s_edges_are_the_highest_at_every_hop(beside: Executed) -> None:
    edges = beside.table("edges")
    assert beside.results["hops"] == [1, 2, 4, 7]
    for hop, rows in edges[edges["method"] == "cosine"].groupby("hop"):
        features = torch.tensor(rows["feature"].to_numpy())
        own = decoder(Site(7, "res"))[features] @ decoder(Site(7 - int(hop), "res")).T
        assert rows["source"].to_numpy() == pytest.approx(own.argmax(dim=1).numpy())
        assert rows["score"].to_numpy() == pytest.approx(own.max(dim=1).values.numpy(), abs=1e-5)
    wide = edges.pivot(index=["hop", "feature"], columns="method", values="source")
    table = beside.table("agreement").rename(columns={"by chance": "chance"})
    for row in table.itertuples():
        both = wide.loc[row.hop, [row.first, row.second]]
        both = both[(both >= 0).all(axis=1)]
        assert row.features == len(both)
        assert row.same == pytest.approx((both[row.first] == both[row.second]).mean())
        assert row.chance < 0.2


def test_removing_a_source_takes_what_plain_hooks_give_however_far_below(beside: Executed) -> None:
    texts, targets = load_texts("fiction", 40), beside.table("targets")
    edges = beside.table("edges").set_index(["method", "hop", "feature"])["source"]
    outcomes = beside.table("outcomes")
    found = outcomes[outcomes["found"] == 1].groupby(["hop", "method"]).head(1)
    assert set(found["hop"]) == {1, 2, 4, 7}
    assert found["method"].nunique() == 6
    for case in found.itertuples():
        own = targets.loc[case.target]
        target, at = FeatureId(7, "res", int(own["feature"])), int(own["position"])
        site = Site(7 - case.hop, "res")
        source = int(edges[case.method, case.hop, target.index])
        codes = codes_of(site, texts[int(own["text"])])[at - 1, source]
        ids = ids_of(texts[int(own["text"])])[:, :128]
        amounts = {FeatureId(site.layer, "res", source): -codes}
        old, new, _ = rescaled(target, at, amounts, ids)
        assert case.change == pytest.approx(1 - new / old, abs=2e-3)
        assert case.beyond == pytest.approx(case.change - case.control)
    nothing = outcomes[outcomes["found"] == 0]
    assert not nothing[["change", "control", "beyond", "success"]].any(axis=None)


def test_what_neighbours_find_is_in_their_tables(beside: Executed) -> None:
    rates = beside.table("rates").set_index(["hop", "method"])
    means = (
        beside.table("outcomes").groupby(["hop", "method"])[["found", "change", "beyond"]].mean()
    )
    for column in means:
        assert rates[column].to_numpy() == pytest.approx(means[column].to_numpy())
        assert rates[f"{column}_low"].le(rates[column]).all()
    nearest = rates.loc[(1, "cosine")]
    assert said(beside, "One layer below, the source by cosine")["verdict"] == told_by(
        nearest["beyond_low"], nearest["beyond_high"]
    )
    ahead = beside.table("against_cosine").set_index(["hop", "method"])
    for (hop, method), claim in (
        ((1, "attribution"), "attribution finds sources"),
        ((7, "transport"), "Over long hops semantic transport"),
    ):
        row, finding = ahead.loc[(hop, method)], said(beside, claim)
        gap = means.loc[(hop, method), "beyond"] - means.loc[(hop, "cosine"), "beyond"]
        assert row["difference"] == pytest.approx(gap, abs=1e-6)
        assert spread_of(row, ".2f") in finding["ours"]
        assert finding["verdict"] == told_by(row["difference_low"], row["difference_high"])


def test_methods_that_name_one_source_have_one_control_and_chains_of_a_step_are_the_cosine(
    beside: Executed,
) -> None:
    edges, outcomes = beside.table("edges"), beside.table("outcomes")
    feature = beside.table("targets")["feature"]
    rows = outcomes.assign(feature=outcomes["target"].map(feature))
    rows = rows.merge(edges, on=["method", "hop", "feature"])
    same = rows.groupby(["hop", "target", "source"])[["change", "control"]]
    assert (same.size() > 1).any()
    assert (same.max() - same.min()).max().to_numpy() == pytest.approx(0, abs=1e-5)
    chain = beside.table("chain").set_index("hop")
    assert [*chain.index] == [1, 2, 4, 7]
    assert chain.loc[1, "difference"] == pytest.approx(0, abs=1e-6)
    by_cosine = outcomes[outcomes["method"] == "cosine"].groupby("hop")["beyond"].mean()
    assert chain["base"].to_numpy() == pytest.approx(by_cosine.to_numpy(), abs=1e-6)


def test_what_the_others_lead_by_over_the_longest_hop(beside: Executed) -> None:
    (row,) = beside.table("others_against_cosine").to_dict("records")
    rows = beside.table("outcomes").query("hop == 7")
    is_cosine = rows["method"] == "cosine"
    gap = rows["beyond"][~is_cosine].mean() - rows["beyond"][is_cosine].mean()
    assert row["difference"] == pytest.approx(gap, abs=1e-6)
    finding = said(beside, "Over long hops the highest cosine loses")
    assert finding["verdict"] == told_by(row["difference_low"], row["difference_high"])


def test_vectors_are_of_one_norm_and_their_scores_those_of_the_reported_texts(
    beside: Executed,
) -> None:
    reported, steered = beside.table("texts_reported"), beside.table("steered")
    assert set(reported["sample"]) == {*range(32, 64)}
    assert set(beside.table("texts")["sample"]) == {*range(32)}
    assert (reported["score"] == reported["behavioral"] * reported["coherence"]).all()
    own = reported.groupby(["theme", "strategy"])["score"].mean()
    keyed = steered.set_index(["theme", "strategy"])
    assert keyed["score"].to_dict() == pytest.approx(own.to_dict())
    chosen = reported[reported["strategy"] != "random features"]
    shares = chosen.groupby(["theme", "strategy"])["strength"].first().dropna()
    units = keyed["norm"].loc[shares.index] / shares
    assert units.to_numpy() == pytest.approx(units.iloc[0], rel=1e-3)  # one unit for all
    together = beside.table("together").iloc[0]
    means = own.unstack("strategy")
    ahead = means[["STA", "SpARE", "SAE-RSV"]].mean(axis=1) - means["difference of means"]
    assert together["difference"] == pytest.approx(ahead.mean())
    finding = said(beside, "Vectors made of an SAE's features")
    assert finding["verdict"] == told_by(together["difference_low"], together["difference_high"])
