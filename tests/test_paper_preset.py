"""The preset `paper`, executed: the hub's texts, a judge behind an endpoint, a small suite."""

import shutil
from pathlib import Path

import pandas as pd
import yaml
from hub import Hub
from hub_files import write_datasets
from judge_server import JudgeServer
from test_notebooks import NOTEBOOKS, execute

from flowhelpers.core.files import DATA, read_json
from flowhelpers.paper_page import findings

KEY = "sk-a-key"
SMALL = [  # sizes alone: what is read, compared and judged is as the preset has it
    *("samples=2", "texts=6", "fit_texts=6", "n_texts=6", "tokens_per_text=2", "resamples=20"),
    *("pearson_texts=6", "shuffles=20", "sweep_targets=4", "features_per_token=4", "n_samples=2"),
    *("max_new_tokens=6", "candidates=1", "strengths=[8]"),
]


def test_the_paper_s_preset_runs_through_to_its_page(tmp_path: Path) -> None:
    suite = shutil.copytree(DATA / "flowlet-mini", tmp_path / "mine")
    given = [f"suite={suite}", *SMALL]
    with Hub(tmp_path / "hub") as hub, JudgeServer(KEY) as judge:
        write_datasets(hub.root)
        options = [part for each in [*given, f"judge_url={judge.url}"] for part in ("-p", each)]
        environment = hub.environment(tmp_path / "home") | {"OPENAI_API_KEY": KEY}
        done = execute(tmp_path, "--preset", "paper", *options, **environment, HF_HUB_OFFLINE="0")
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.fetched("HuggingFaceFW/fineweb")
        assert judge.asked()
    runs = tmp_path / "o"
    assert done.stdout.splitlines()[-1] == str(runs / "paper.html")
    configs = [read_json(path) for path in sorted(runs.glob("*/config.json"))]
    presets = yaml.safe_load((NOTEBOOKS[0].parent / "presets.yaml").read_text("utf-8"))
    assert [config["notebook"] for config in configs] == [path.stem for path in NOTEBOOKS]
    asked = {assignment.split("=")[0] for assignment in given}
    for config in configs:
        settings = presets[config["notebook"]]["paper"]
        left = {k: v for k, v in settings.items() if k not in asked | {"by_suite"}}
        assert config["parameters"] | left == config["parameters"]
    numbers = pd.read_csv(runs / "paper.csv")
    assert set(numbers["verdict"]) == {"another model"}
    found = numbers.groupby("where")["ours"].any()
    assert set(found[~found].index) == {"Table 5", "Appendix E", "5.1, appendix D"}
    told = findings(runs).set_index("where")["verdict"]
    assert told[told == "not run"].index.tolist() == ["C.4"]  # fineweb is none of its datasets
