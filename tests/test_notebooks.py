"""The notebooks: their form, and what one execution of each wrote, against the method by hand."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from flowhelpers.features import FeatureId, parse_feature
from flowhelpers.notebooks import plan
from flowhelpers.parameters import inspect

FOLDER = Path(__file__).parent.parent / "notebooks"
FLOWLET = Path(__file__).parent.parent / "flowhelpers/data/flowlet"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
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
        assert len(rest) <= 18 or names == ["Versions"], f"{found[1]} has {len(rest)} lines"
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
    assert len(exercises) >= 2
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


def answered(path: Path, folder: Path) -> int:
    """Copies a notebook with the code of its answers in its exercises; returns how many."""
    book = read(path)
    cells = {cell.id: cell for cell in book.cells}
    count = 0
    for name, cell in cells.items():
        code = re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)
        if re.fullmatch(r"answer-\d+", name) and code:
            exercise = cells[name.replace("answer", "exercise")]
            exercise.source, put = re.subn(
                r"(?m)^my_\w+:.*= None$", lambda _, code=code: code[1], exercise.source, count=1
            )
            count += put
    nbformat.write(book, folder / path.name)
    return count


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Executed]:
    """Every notebook executed by the command line, without a network."""
    root = tmp_path_factory.mktemp("executed")
    (root / "notebooks").mkdir()
    shutil.copy(FOLDER / "presets.yaml", root / "notebooks")
    for path in NOTEBOOKS:
        assert answered(path, root / "notebooks")
    done = subprocess.run(
        [sys.executable, "-m", "flowhelpers", "run", "--preset", "quick", "--out", str(root / "o")],
        env=os.environ | {"FLOWHELPERS_NOTEBOOKS": str(root / "notebooks"), "HF_HUB_OFFLINE": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    jobs = json.loads(next((root / "o").glob("*.json")).read_text("utf-8"))["jobs"]
    return {Path(job["notebook"]).stem: Executed(root / "o" / job["folder"]) for job in jobs}


@each_notebook
def test_every_table_and_figure_is_written(path: Path, executed: dict[str, Executed]) -> None:
    folder = executed[path.stem].folder
    for kind, ending in (("table", "parquet"), ("table", "csv"), ("figure", "html")):
        written = {file.stem for file in folder.glob(f"{kind}s/*.{ending}")}
        assert named(path, kind) == written
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
    assert parse_feature(executed[path.stem].results["feature"]).module == "res"


@each_notebook
def test_the_folded_answers_are_right(path: Path, executed: dict[str, Executed]) -> None:
    cells = {cell.id: cell for cell in read(executed[path.stem].folder / "notebook.ipynb").cells}
    checked = [
        cells[name.replace("answer", "exercise")].outputs[0].text
        for name, cell in cells.items()
        if name.startswith("answer-") and re.search(r"(?m)^my_\w+ = ", cell.source)
    ]
    assert checked == ["right\n"] * len(checked) != []


# The matches, from the decoders that sae-lens loads.


def decoder(layer: int, module: str) -> torch.Tensor:
    """Decoder rows as sae-lens has them, made unit in double precision."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(FLOWLET / f"dictionaries/{layer}-{module}", device="cpu")
    rows = sae.W_dec.detach().double()
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.fixture(scope="module")
def matches(executed: dict[str, Executed]) -> pd.DataFrame:
    return executed["01_matching"].table("matches")


@pytest.mark.parametrize(
    ("layer", "module", "feature"), [(4, "res", 17), (1, "mlp", 500), (7, "att", 1023)]
)
def test_matches_are_the_five_highest_cosines(
    matches: pd.DataFrame, layer: int, module: str, feature: int
) -> None:
    sources = decoder(layer - (module == "res"), module)
    cosines = sources @ decoder(layer, "res")[feature]
    best = cosines.topk(6)
    rows = matches.query("layer == @layer and module == @module and feature == @feature")
    rows = rows.sort_values("rank")
    assert rows["rank"].tolist() == [1, 2, 3, 4, 5]
    assert rows["source"].tolist() == best.indices[:5].tolist()
    assert rows["cosine"].to_numpy() == pytest.approx(best.values[:5].numpy(), abs=1e-5)
    assert rows["margin"].to_numpy() == pytest.approx(-best.values.diff().numpy(), abs=1e-5)
    assert (rows["source_layer"] == layer - (module == "res")).all()
    back = (sources[best.indices[:5]] @ decoder(layer, "res").T).argmax(dim=1)
    assert rows["mutual"].tolist() == (back == feature).tolist()


def test_matches_cover_every_feature_and_place(matches: pd.DataFrame) -> None:
    places = matches.groupby("layer")["module"].unique().map(set)
    assert places[0] == {"mlp", "att"}
    assert all(places[layer] == {"res", "mlp", "att"} for layer in range(1, 8))
    assert len(matches) == 1024 * 5 * (2 + 3 * 7)


@pytest.mark.parametrize(("layer", "module"), [(4, "res"), (0, "mlp")])
def test_the_null_is_the_quantile_of_best_cosines_into_a_turned_dictionary(
    matches: pd.DataFrame, layer: int, module: str
) -> None:
    sources = decoder(layer - (module == "res"), module)
    noise = torch.randn(192, 192, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    q, r = torch.linalg.qr(noise)
    best = (decoder(layer, "res") @ (sources @ (q * r.diagonal().sign())).T).max(dim=1).values
    expected = np.quantile(best.numpy(), 0.999)
    null = matches.query("layer == @layer and module == @module")["null"]
    assert null.to_numpy() == pytest.approx(np.full(len(null), expected), abs=1e-5)


def test_scores_are_the_first_matches_and_layer_0_has_none_in_the_stream(
    executed: dict[str, Executed], matches: pd.DataFrame
) -> None:
    table = executed["01_matching"].table("scores")
    assert table.loc[table["layer"] == 0, ["s_res", "source_res", "null_res"]].isna().all(axis=None)
    assert table.loc[table["layer"] > 0].notna().all(axis=None)
    first = matches[(matches["rank"] == 1) & (matches["layer"] == 5)]
    for module, part in first.groupby("module"):
        mine = table[table["layer"] == 5]
        assert mine[f"s_{module}"].tolist() == part.sort_values("feature")["cosine"].tolist()


def test_summary_counts_what_lies_above_the_null(
    executed: dict[str, Executed], matches: pd.DataFrame
) -> None:
    summary = executed["01_matching"].table("summary").set_index("layer")
    first = matches[matches["rank"] == 1]
    above = (first["cosine"] > first["null"]).groupby([first["layer"], first["module"]]).mean()
    for (layer, module), share in above.items():  # pyright: ignore
        assert summary.loc[layer, f"above_{module}"] == pytest.approx(share)
    assert np.isnan(summary.loc[0, "above_res"])
    classes = summary[[f"class_{name}" for name in "ABCD"]]
    assert classes.loc[0].isna().all()
    assert classes.loc[1:].sum(axis=1).to_numpy() == pytest.approx(np.ones(7))
    assert classes.loc[1:, ["class_A", "class_B"]].sum(axis=1).to_numpy() == pytest.approx(
        summary.loc[1:, "above_res"].to_numpy()
    )


# The edits, by plain hooks on the Hugging Face model.


@dataclass(frozen=True)
class ByHand:
    """The model of the suite as Hugging Face has it, and its dictionaries as sae-lens has them."""

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
        from sae_lens import SAE

        feature = parse_feature(name)
        kept: list[torch.Tensor] = []

        def keep(values: torch.Tensor) -> torch.Tensor:
            kept.append(values.clone())
            return values

        def load(one: FeatureId) -> Any:
            folder = FLOWLET / f"dictionaries/{one.layer}-{one.module}"
            return SAE.load_from_disk(folder, device="cpu")

        def take_away(values: torch.Tensor) -> torch.Tensor:
            changed = values.clone()
            changed[0, at] -= sae.encode(values[0, at])[other.index] * sae.W_dec[other.index]
            return changed

        with torch.no_grad():
            if without:
                other = parse_feature(without)
                sae = load(other)
                with (
                    self.hooked(self.part(other), take_away),
                    self.hooked(self.part(feature), keep),
                ):
                    self.model(input_ids=ids)
            else:
                with self.hooked(self.part(feature), keep):
                    self.model(input_ids=ids)
            return load(feature).encode(kept[0][0])[:, feature.index].numpy()


@pytest.fixture(scope="module")
def by_hand() -> ByHand:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = FLOWLET / "model"
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return ByHand(model, AutoTokenizer.from_pretrained(folder))


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
    layers = [parse_feature(name).layer for name in flow["feature"]]
    assert layers == list(range(layers[0], layers[-1] + 1))


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
