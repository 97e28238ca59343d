"""Documents are held out by what they are, and never trained on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub

from flowhelpers.activations import corpora
from flowhelpers.activations.corpora import (
    HELD_OUT_PERCENT,
    digests,
    is_held_out,
    load_source,
    pydoc_topics,
    stdlib_modules,
    stream_documents,
    take_documents,
)

TEXTS = [f"Document {i} is about {i * i} and nothing else." for i in range(500)]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_seed_order_or_budget_brings_a_held_out_text_into_training(seed: int):
    texts = TEXTS + TEXTS[::-2]
    train, held = (
        take_documents(lambda: iter(zip(texts, texts, strict=True)), seed, 10**9, held)
        for held in (False, True)
    )
    assert set(train).isdisjoint(held)
    assert sorted(train + held) == sorted(texts)
    assert 0 < len(held) < 0.05 * len(texts)
    many = sum(is_held_out(f"{i}") for i in range(20_000)) / 20_000
    assert many == pytest.approx(HELD_OUT_PERCENT / 100, abs=0.004)


def test_the_order_is_seeded_and_a_larger_budget_only_adds():
    def take(seed: int, budget: int) -> list[str]:
        return take_documents(lambda: iter(zip(TEXTS, TEXTS, strict=True)), seed, budget)

    whole = take(3, 10**9)
    assert take(3, 10**9) == whole
    assert take(4, 10**9) != whole
    assert whole != [text for text in TEXTS if not is_held_out(text)]
    for budget in (0, 100, 5_000):
        assert "".join(take(3, budget)) == "".join(whole)[:budget]


def test_a_source_is_looked_up_in_the_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "a.txt").write_text("outside")
    (tmp_path / "texts" / "a.txt").write_text("inside")
    assert next(load_source("a.txt")())[0] == "outside"
    assert next(load_source("a.txt", tmp_path / "texts")())[0] == "inside"
    with pytest.raises(FileNotFoundError, match=r"no text source 'b\.txt'.*mean 'a\.txt'"):
        load_source("b.txt", tmp_path / "texts")


def test_a_dataset_of_the_hub_is_a_source(hub_here: Hub, paper_datasets: dict[str, list[str]]):
    source = load_source("roneneldan/TinyStories")
    assert {text for _, text in source()} == set(paper_datasets["tinystories"])


def test_a_dataset_of_the_hub_is_read_no_further_than_the_budget(monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []

    def documents(name: str) -> Iterator[tuple[str, str]]:
        for i in range(10**9):  # more than any memory holds
            read.append(f"document {i}")
            yield read[-1], read[-1]

    monkeypatch.setattr(corpora, "hub_documents", documents)
    source = load_source("some/thing")
    train, held = ("".join(stream_documents(source, 0, 5_000, held)) for held in (False, True))
    assert len(train) == len(held) == 5_000
    assert len(read) < 50 * 5_000 / 10
    texts = list(stream_documents(source, 0, 5_000))
    assert not any(map(is_held_out, texts[:-1]))
    assert texts[0] == next(text for text in read if not is_held_out(text))


def test_the_digest_of_a_source_hangs_on_its_content_alone(tmp_path: Path):
    for place in ("here", "there"):
        (tmp_path / place / "folder").mkdir(parents=True)
        (tmp_path / place / "a.txt").write_text("one")
        (tmp_path / place / "folder" / "b.txt").write_text("two")
    names = ["a.txt", "folder", "stdlib", "owner/name"]
    here, there = (digests(names, tmp_path / place) for place in ("here", "there"))
    assert here == there
    assert set(here) == {"a.txt", "folder"}
    (tmp_path / "there" / "folder" / "b.txt").rename(tmp_path / "there" / "folder" / "c.txt")
    (tmp_path / "there" / "a.txt").write_text("six")
    changed = digests(names, tmp_path / "there")
    assert changed["folder"] != here["folder"]
    assert changed["a.txt"] != here["a.txt"]


def test_training_and_digests_leave_out_what_is_hidden_as_evaluation_does(tmp_path: Path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("\ufefftext\n", encoding="utf-8")
    before = digests(["corpus"], tmp_path)
    for name in (".DS_Store", ".git/index", ".ipynb_checkpoints/a-checkpoint.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"old\xff")
    assert list(load_source("corpus", tmp_path)()) == [("text", "text")]
    assert digests(["corpus"], tmp_path) == before
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.txt").write_text("given")
    assert list(load_source(".hidden", tmp_path)()) == [("given", "given")]


def test_the_interpreters_own_texts_have_keys_and_no_tests():
    modules = dict(stdlib_modules())
    assert "json/decoder.py" in modules
    assert "class JSONDecoder" in modules["json/decoder.py"]
    skipped = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not [key for key in modules if skipped & set(key.split("/"))]
    assert load_source("stdlib") is stdlib_modules
    topics = dict(pydoc_topics())
    assert "lambda" in topics["lambda"].lower()
    assert load_source("pydoc") is pydoc_topics
