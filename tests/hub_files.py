"""Small repositories of the true formats, for the loopback hub.

Names, folders, file formats and configuration keys are those of the real repositories; only the
sizes and the content are not. Nothing heavy is imported before it is needed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hub_families
from hub_families import (
    HOOKS,
    model_weights,
    sae_arrays,
    unit_rows,
    write_byte_tokenizer,
    write_json,
    write_sae,
    write_tensors,
)

if TYPE_CHECKING:
    import pytest

PYTHIA = "EleutherAI/pythia-70m-deduped"
D_MODEL, D_SAE, VOCABULARY = 64, 96, 384
WRONG = "this text is of another split or configuration"

FINEWEB_CARD = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# FineWeb
"""

TINYSTORIES_CARD = """---
license: cdla-sharing-1.0
dataset_info:
  features:
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: 2000
    num_examples: {train}
  - name: validation
    num_bytes: 50
    num_examples: 1
---
"""

AUTOMATHTEXT_CARD = """---
license: cc-by-sa-4.0
configs:
- config_name: web-0.50-to-1.00
  data_files:
  - split: train
    path:
    - data/web/0.95-1.00.jsonl
    - data/web/0.90-0.95.jsonl
    - data/web/0.85-0.90.jsonl
    - data/web/0.80-0.85.jsonl
    - data/web/0.75-0.80.jsonl
  default: true
- config_name: web-0.80-to-1.00
  data_files:
  - split: train
    path:
    - data/web/0.95-1.00.jsonl
    - data/web/0.90-0.95.jsonl
    - data/web/0.85-0.90.jsonl
    - data/web/0.80-0.85.jsonl
---
# AutoMathText
"""


def write_datasets(root: Path, texts: int = 24) -> dict[str, list[str]]:
    """The paper's four datasets, tiny; returns the different texts of each by the corpus's name.

    Other splits and configurations hold the text `WRONG`; every fourth text stands there twice.
    """
    planted = {
        "fineweb": [f"Web page {i} is about the number {i}." for i in range(texts)],
        "tinystories": [f"Once upon a time {i} cats met {i + 1} dogs." for i in range(texts)],
        "automathtext": [f"The sum of {i} and {i} is {2 * i}." for i in range(texts)],
        "python-github-code": [f"def f{i}(x):\n    return x + {i}" for i in range(texts)],
    }
    fineweb = root / "datasets" / "HuggingFaceFW" / "fineweb"
    _write(fineweb / "README.md", FINEWEB_CARD)
    dumps = ("CC-MAIN-2013-20", "CC-MAIN-2024-10")
    for dump, part in zip(dumps, _parts(planted["fineweb"], 2), strict=True):
        columns = {
            "text": part,
            "id": [f"<urn:uuid:{i}>" for i in range(len(part))],
            "dump": [dump] * len(part),
        }
        _write_parquet(fineweb / "data" / dump / "000_00000.parquet", columns)
    _write_parquet(
        fineweb / "sample" / "10BT" / "000_00000.parquet", columns | {"text": [WRONG] * len(part)}
    )

    stories = root / "datasets" / "roneneldan" / "TinyStories"
    parts = _parts(planted["tinystories"], 4)
    _write(stories / "README.md", TINYSTORIES_CARD.format(train=sum(map(len, parts))))
    _write(stories / "TinyStories-train.txt", WRONG)
    shards = ("2d5a1467fff1081b", "5852b56a2bd28fd9", "a26307300439e943", "d243063613e5a057")
    for i, (shard, part) in enumerate(zip(shards, parts, strict=True)):
        _write_parquet(stories / "data" / f"train-0000{i}-of-00004-{shard}.parquet", {"text": part})
    validation = stories / "data" / "validation-00000-of-00001-869c898b519ad725.parquet"
    _write_parquet(validation, {"text": [WRONG]})

    maths = root / "datasets" / "math-ai" / "AutoMathText"
    _write(maths / "README.md", AUTOMATHTEXT_CARD)
    scores = ("0.95-1.00", "0.90-0.95", "0.85-0.90", "0.80-0.85")
    scored = dict(zip(scores, _parts(planted["automathtext"], 4), strict=True))
    for score, part in (scored | {"0.75-0.80": [WRONG]}).items():
        meta = {"domain": "example.org", "lm_q1q2_score": float(score[:4])}
        rows = [{"url": "http://example.org", "text": text, "meta": meta} for text in part]
        _write(maths / "data" / "web" / f"{score}.jsonl", "\n".join(map(json.dumps, rows)) + "\n")

    # This one has no card: only the description that old versions of `push_to_hub` wrote.
    code = root / "datasets" / "tomekkorbak" / "python-github-code"
    info = {
        "features": {
            "text": {"dtype": "string", "id": None, "_type": "Value"},
            "license": {"dtype": "string", "id": None, "_type": "Value"},
        },
        "splits": {"train": {"name": "train"}, "test": {"name": "test"}},
    }
    _write(code / "dataset_infos.json", json.dumps({"tomekkorbak--python-github-code": info}))
    for i, part in enumerate(_parts(planted["python-github-code"], 2)):
        columns = {"text": part, "license": ["mit"] * len(part)}
        _write_parquet(code / "data" / f"train-0000{i}-of-00002.parquet", columns)
    test = code / "data" / "test-00000-of-00001.parquet"
    _write_parquet(test, {"text": [WRONG], "license": ["mit"]})
    return planted


def write_pythia(root: Path) -> str:
    """`EleutherAI/pythia-70m-deduped` with a width of 64 in float16; returns its name."""
    folder = root / "models" / PYTHIA
    config = {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_size": D_MODEL,
        "intermediate_size": 4 * D_MODEL,
        "model_type": "gpt_neox",
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
        "torch_dtype": "float16",
        "vocab_size": VOCABULARY,
    }
    write_json(folder / "config.json", config)
    weights = model_weights(config, {"embed_in": 1, "": 0.05})
    tensors = {name.replace("lm_head", "embed_out"): array for name, array in weights.items()}
    write_tensors(folder / "model.safetensors", tensors, "float16")
    write_byte_tokenizer(folder, ["<|endoftext|>"], "GPTNeoXTokenizer")
    return PYTHIA


def write_saes(root: Path) -> None:
    """The SAEs at all layers of the three pythia releases of sae-lens, with 96 features."""
    hub_families.write_saes(root, "pythia-70m-deduped-{module}-sm", "{hook}", _write_sae, layers=6)


def _write_sae(folder: Path, module: str, layer: int) -> None:
    """Writes one SAE: unit rows, an encoder near them, and a threshold in the bias."""
    name = f"pythia {module} {layer}"
    arrays = sae_arrays(unit_rows(name, D_SAE, D_MODEL), 0.01, name)
    arrays["W_enc"] += 0.08 * unit_rows(f"{name} encoder", D_MODEL, D_SAE)
    arrays["b_enc"] -= 0.5
    write_sae(
        folder,
        HOOKS[module].format(layer=layer),
        arrays,
        model_name="pythia-70m-deduped",
        activation_fn_str="relu",
        activation_fn_kwargs={},
        dataset_path="EleutherAI/the_pile_deduplicated",
        normalize_activations="none",
    )


def shrink(patch: "pytest.MonkeyPatch", suite: str, **sizes: int) -> None:
    """Make a registered suite as small as its files on the loopback hub: `layers`, `d_model`."""
    from flowhelpers.suites import registry

    rows = registry.registered()  # kept from here on, so that what is put back is the true row
    row = {**registry._table()[suite], **sizes}
    patch.setitem(registry._table(), suite, row)
    patch.setitem(rows, suite, registry._row(suite, row))


def _parts(texts: list[str], count: int) -> list[list[str]]:
    doubled = texts + texts[::4]
    return [doubled[i::count] for i in range(count)]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=4)
