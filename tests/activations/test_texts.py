"""Corpora: planted texts come back, samples are seeded and without repetition, errors help."""

import gzip
import json
from pathlib import Path

import pytest
from hub import Hub, Process
from hub_files import WRONG

from flowhelpers.activations import corpora as texts
from flowhelpers.activations.corpora import (
    PAPER_DATASETS,
    is_held_out,
    load_texts,
    passages,
    python_pieces,
    subjects,
)

LOCAL = ("fiction", "science", "maths", "python")


@pytest.fixture
def planted_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Passages of the package replaced by ten of fiction, four of science and one of maths."""
    rows = [("fiction", f"Tale {i}.", f"subject {i % 2}") for i in range(10)]
    rows += [("science", f"Fact {i}.", "stars") for i in range(4)] + [("maths", "Sum.", "sums")]
    for name, part in {"b": rows[:6], "a": rows[6:]}.items():
        lines = [json.dumps({"subject": s, "domain": d, "text": t}) for d, t, s in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(texts, "PASSAGES", tmp_path)
    monkeypatch.setattr(texts, "_passages", texts._passages.__wrapped__)
    return {name: [t for d, t, _ in rows if d == name] for name in LOCAL[:3]}


def test_passages_of_a_domain_are_sampled_once_each_by_seed(planted_passages: dict[str, list[str]]):
    assert sorted(load_texts("fiction", 10)) == sorted(planted_passages["fiction"])
    assert sorted(load_texts("science", None)) == planted_passages["science"]
    assert load_texts("maths", 1) == ["Sum."]
    first = load_texts("fiction", 5, seed=3)
    assert first == load_texts("fiction", 5, seed=3)
    assert load_texts("fiction", 8, seed=3)[:5] == first
    assert load_texts("fiction", None, seed=3)[:5] == first
    assert len({tuple(load_texts("fiction", 5, seed=seed)) for seed in range(5)}) == 5


def test_passages_keep_their_order(planted_passages: dict[str, list[str]]):
    table = passages()
    assert list(table.columns) == ["subject", "domain", "text"]
    files_in_order = ["Tale 6.", "Tale 7.", "Tale 8.", "Tale 9.", "Fact 0.", "Fact 1.", "Fact 2."]
    files_in_order += ["Fact 3.", "Sum."] + [f"Tale {i}." for i in range(6)]
    assert list(table["text"]) == files_in_order
    assert subjects() == ["subject 0", "subject 1", "stars", "sums"]


def test_the_passages_of_the_package_are_whole_and_different():
    table = passages()
    assert set(table["domain"]) == {*LOCAL[:3], "reference"}
    assert table["text"].is_unique
    assert table["text"].str.strip().eq(table["text"]).all()
    assert table.groupby("subject")["domain"].nunique().eq(1).all()


def test_python_is_cut_from_held_out_modules_alone(monkeypatch: pytest.MonkeyPatch):
    code = {
        path: f"def {path[:-3]}(x):\n" + "    x = x + 1  # one more\n" * 12
        for path in (f"module{i}.py" for i in range(400))
    }
    tables = {f"encodings/{path}": source for path, source in code.items()}
    monkeypatch.setattr(texts, "stdlib_modules", lambda: iter((code | tables).items()))
    monkeypatch.setattr(texts, "_held_out_python", texts._held_out_python.__wrapped__)
    found = load_texts("python", None)
    expected = [source.strip("\n") for path, source in code.items() if is_held_out(path)]
    assert sorted(found) == sorted(expected)
    assert 0 < len(expected) < 40


def test_pieces_end_where_a_function_begins_or_before_they_are_too_long():
    short = "def short():\n" + "    a = b + c\n" * 4  # 22 words: too short to stand alone
    whole = "@decorated\ndef whole():\n" + "    a = b + c\n" * 14  # 73 words
    long = "class Long:\n" + "    a = b + c\n" * 40  # 202 words: cut at 147
    assert python_pieces(short + whole) == [(short + whole).strip("\n")]
    assert python_pieces(whole + short) == [whole.strip("\n")]
    assert python_pieces(whole + "\n\n" + whole) == [whole.strip("\n")] * 2
    first = "class Long:\n" + "    a = b + c\n" * 29
    assert python_pieces(long) == [first.strip("\n")]
    assert python_pieces("x " * 500) == []
    assert python_pieces("x\n" * 151) == ["x\n" * 149 + "x"]
    begun = "x\n" * 59 + "def f():\n" + "x\n" * 70
    assert python_pieces(begun) == [begun.strip("\n")]
    assert python_pieces("x\n" + begun) == ["x\n" * 59 + "x", begun[118:].strip("\n")]
    assert python_pieces(whole.replace("c\n", "c\x0c\n")) == [
        whole.replace("c\n", "c\x0c\n").strip("\n")
    ]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown corpus 'scince'; did you mean 'science'\?"):
        load_texts("scince", 1)
    with pytest.raises(ValueError, match=r"valid: fineweb, tinystories, .*, python"):
        load_texts("qqqq", 1)
    with pytest.raises(ValueError, match="n=0 texts: expected at least 1"):
        load_texts("science", 0)
    with pytest.raises(ValueError, match=r"n=None .*'automathtext' is on the hub, give n"):
        load_texts("automathtext", None)
    with pytest.raises(FileNotFoundError, match=r"no file, folder or corpus 'notes/mine\.txt'"):
        load_texts("notes/mine.txt", 1)


def test_a_file_is_parted_by_separators_and_a_folder_gives_the_texts_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "own.txt"
    content = "\ufeffone\r\n<|endoftext|>\ntwo \n<|endoftext|>\n<|endoftext|>\ntwo\n"
    file.write_text(content, encoding="utf-8")
    assert sorted(load_texts(file, None)) == ["one", "two"]
    assert sorted(load_texts(str(file), 2)) == ["one", "two"]
    with pytest.raises(ValueError, match="has 2 different texts, 3 were asked for"):
        load_texts(file, 3)
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="is an empty folder"):
        load_texts(tmp_path / "sub", 1)
    (tmp_path / "sub" / "two.md").write_text("zwei: schön", encoding="utf-8")
    (tmp_path / "three.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / ".DS_Store").write_bytes(b"\x00\xff")
    assert sorted(load_texts(tmp_path, None)) == ["one", "three", "two", "zwei: schön"]
    # One that is named as a corpus is still a path.
    (tmp_path / "python").write_text("of my own", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_texts(Path("python"), None) == load_texts("./python", 1) == ["of my own"]
    assert load_texts("python", 1) != ["of my own"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("blank.txt", b" \n\n", "is empty"),
        ("latin.txt", "schön".encode("latin-1"), "is not UTF-8 text.*Latin-1, has to be saved as"),
        ("wide.txt", "schön".encode("utf-16"), "is not UTF-8 text.*such as UTF-16"),
        ("bare.txt", "plain".encode("utf-16-le"), "is UTF-16: it holds zero bytes"),
        ("zeros.bin", bytes(100), "holds zero bytes"),
        ("not.txt.gz", b"plain text", "is not UTF-8 text"),
        ("rows.jsonl", b'{"text": "plain"}\n', "a record a line .JSON Lines."),
        ("rows.NDJSON.gz", b"", "save the texts alone, parted by lines <.endoftext.>"),
        ("cut.txt.gz", gzip.compress(b"text" * 100, mtime=0)[:20], "is cut"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            load_texts(path, 1)


def test_what_is_hidden_in_a_folder_is_no_text_of_it_and_read_if_it_is_given(tmp_path: Path):
    hidden = [
        ".ipynb_checkpoints/a.txt",
        "more/.git/HEAD",
        ".DS_Store",
        "__MACOSX/._a.txt",
        "b.txt~",
        "desktop.ini",
        "more/Thumbs.db",
    ]
    for name in ("a.txt", "more/b.txt", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "more/.git/index").write_bytes(b"DIRC\xff\xfe")
    assert sorted(load_texts(tmp_path, None)) == ["a.txt", "more/b.txt"]
    assert load_texts(tmp_path / ".DS_Store", None) == [".DS_Store"]
    given = tmp_path / ".ipynb_checkpoints"
    assert load_texts(given, None) == [".ipynb_checkpoints/a.txt"]
    (given / "inside" / ".cache").mkdir(parents=True)
    (given / "inside" / "c.txt").write_text("c")
    (given / "inside" / ".cache" / "d.txt").write_text("d")
    assert load_texts(given / "inside", None) == ["c"]
    with pytest.raises(ValueError, match="__MACOSX is an empty folder, or all is hidden"):
        load_texts(tmp_path / "__MACOSX", None)


def test_links_are_followed_and_circles_end(tmp_path: Path):
    for name in ("here/a.txt", "there/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    for name, to in {"here/more": "there", "there/back": "here", "here/self": "here"}.items():
        (tmp_path / name).symlink_to(tmp_path / to)
    (tmp_path / "here/c.txt").symlink_to(tmp_path / "there/b.txt")
    assert sorted(load_texts(tmp_path / "here", None)) == ["here/a.txt", "there/b.txt"]
    assert sorted(load_texts(tmp_path / "there/back", None)) == ["here/a.txt", "there/b.txt"]
    (tmp_path / "there/gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"more/gone\.txt"):
        load_texts(tmp_path / "here", None)


def test_local_corpora_are_light_and_never_touch_the_network(run_python: Process):
    done = run_python(
        "import sys, flowhelpers.activations.corpora as t\n"
        f"for name in {LOCAL}: t.load_texts(name, 1)\n"
        "print({'torch', 'pandas', 'datasets', 'huggingface_hub', 'socket'} & set(sys.modules))"
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("name", PAPER_DATASETS)
def test_a_hub_corpus_gives_its_texts_once_each_by_seed(
    name: str, hub_here: Hub, paper_datasets: dict[str, list[str]]
):
    planted = paper_datasets[name]
    assert sorted(load_texts(name, len(planted))) == sorted(planted)
    assert WRONG not in planted
    sample = load_texts(name, 6, seed=1)
    assert sample == load_texts(name, 6, seed=1)
    assert load_texts(name, 9, seed=1)[:6] == sample
    assert sample != load_texts(name, 6, seed=2)
    assert all(PAPER_DATASETS[name][0] in path for path in hub_here.fetched())


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_a_hub_that_refuses_is_quoted(
    status: int, hub_here: Hub, paper_datasets: dict[str, list[str]]
):
    hub_here.fail("/api/datasets/roneneldan", status)
    with pytest.raises(ConnectionError, match=f"dataset roneneldan/TinyStories.*{status}"):
        load_texts("tinystories", 1)
    assert len(hub_here.requests) == 1


def test_files_that_are_refused_or_cut_are_an_error(
    hub_here: Hub, paper_datasets: dict[str, list[str]]
):
    commit = hub_here.commit("datasets", "roneneldan/TinyStories")
    files = f"/datasets/roneneldan/TinyStories/resolve/{commit}/data"
    hub_here.fail(files, 403, times=None)
    with pytest.raises(ConnectionError, match=r"dataset roneneldan/TinyStories.*403"):
        load_texts("tinystories", 24)
    hub_here.reset()
    hub_here.truncate(files, keep=100, declared=True, times=None)
    with pytest.raises(ConnectionError, match=r"dataset roneneldan/TinyStories.*Parquet"):
        load_texts("tinystories", 24)


def test_no_network_says_what_to_fetch_and_what_needs_none(
    hub_here: Hub, paper_datasets: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # no one's
    message = "HuggingFaceFW/fineweb default .* needed for fiction, science, maths, python"
    with pytest.raises(ConnectionError, match=message):
        load_texts("fineweb", 1)


def test_offline_a_cached_copy_is_read_and_a_missing_one_is_named(
    run_python: Process, hub: Hub, paper_datasets: dict[str, list[str]]
):
    fetch = "from datasets import load_dataset; load_dataset('roneneldan/TinyStories')"
    assert run_python(fetch).returncode == 0
    hub.reset()
    offline = run_python(
        "import datasets; datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0\n"
        "from flowhelpers.activations.corpora import load_texts\n"
        "import json; print(json.dumps(load_texts('tinystories', 24)))\n"
        "load_texts('automathtext', 1)",
        HF_HUB_OFFLINE="1",
    )
    assert sorted(json.loads(offline.stdout)) == sorted(paper_datasets["tinystories"])
    assert "ConnectionError: cannot read the dataset math-ai/AutoMathText" in offline.stderr
    assert hub.requests == []
