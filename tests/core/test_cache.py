"""What is kept is there for the next process, and for several at a time."""

import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flowhelpers.core.cache import DiskCache, key_of

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=-1, text=True
    )


@pytest.mark.filterwarnings("error")  # no connection stays open
def test_what_was_put_is_found_by_its_key(tmp_path: Path):
    kept = DiskCache(tmp_path / "new" / "answers.sqlite")
    assert kept.get(["a"]) == {}
    assert not kept.path.parent.exists(), "asking makes no file"
    values = {"a": {"x": [1, 2.5, None]}, "b": "ü ☃ \ud83d", "c": 0}
    kept.put(values)
    assert kept.get(["c", "missing", "a", "b"]) == values
    assert DiskCache(kept.path).get(["a"]) == {"a": values["a"]}
    kept.put({"a": 7})
    assert kept.get(["a", "c"]) == {"a": 7, "c": 0}
    many = {str(number): number for number in range(5000)}
    kept.put(many)
    assert kept.get(many) == many
    assert [path.name for path in kept.path.parent.iterdir()] == ["answers.sqlite"], "one file"


def test_a_put_is_whole_or_not_at_all(tmp_path: Path):
    kept = DiskCache(tmp_path / "answers.sqlite")
    kept.put({"a": 1})
    with pytest.raises(TypeError):
        kept.put({"b": 2, "c": object()})
    assert kept.get(["a", "b"]) == {"a": 1}

    with sqlite3.connect(kept.path) as database:
        database.execute(
            "CREATE TRIGGER t BEFORE INSERT ON kept WHEN NEW.key = 'd'"
            " BEGIN SELECT RAISE(ABORT, 'no d'); END"
        )
    database.close()
    with pytest.raises(ValueError, match="no d"):
        kept.put({"b": 2, "d": 4})
    assert kept.get(["a", "b"]) == {"a": 1}


@pytest.mark.parametrize("damaged", [True, False])
def test_a_file_that_is_no_store_is_an_error_and_is_left(tmp_path: Path, damaged: bool):
    kept = DiskCache(tmp_path / "answers.sqlite")
    kept.put(dict.fromkeys(map(str, range(1000)), "x" * 100))
    content = kept.path.read_bytes()[:4096] + bytes(2**16) if damaged else b"my notes, " * 500
    kept.path.write_bytes(content)
    for use in (lambda: kept.get(map(str, range(1000))), lambda: kept.put({"a": 1})):
        with pytest.raises(ValueError, match=rf"{re.escape(str(kept.path))} is no store of answ"):
            use()
    assert kept.path.read_bytes() == content


def test_a_folder_in_the_way_says_so(tmp_path: Path):
    with pytest.raises(OSError, match="cannot use the answers kept in"):
        DiskCache(tmp_path).get(["a"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot make the folder"):
        DiskCache(tmp_path / "file" / "answers.sqlite").put({"a": 1})


def test_processes_share_it_and_lose_nothing(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    code = """if True:
        import sys
        from pathlib import Path
        from flowhelpers.core.cache import DiskCache
        for number in range(40):
            DiskCache(Path(sys.argv[1])).put({f"{sys.argv[2]}-{number}": number})
    """
    processes = [python(code, path, name) for name in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    keys = [f"{name}-{number}" for name in range(3) for number in range(40)]
    assert len(DiskCache(path).get(keys)) == 120


def test_a_killed_process_loses_nothing_that_it_had(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    code = """if True:
        import itertools, sys
        from pathlib import Path
        from flowhelpers.core.cache import DiskCache
        for number in itertools.count():
            DiskCache(Path(sys.argv[1])).put({str(number): number})
            print(number, flush=True)
    """
    process = python(code, path)
    assert process.stdout
    for _ in range(20):
        process.stdout.readline()
    process.kill()
    last = 19 + len(process.stdout.read().splitlines())
    process.wait()
    assert len(DiskCache(path).get(map(str, range(last + 1)))) == last + 1
    DiskCache(path).put({"next": 1})


def test_a_key_is_of_the_content_whatever_the_order():
    key = key_of({"a": 1, "b": [{"c": "ü", "d": None}]})
    assert key == key_of({"b": [{"d": None, "c": "ü"}], "a": 1})
    assert re.fullmatch(r"[0-9a-f]{32}", key)
    others = [{}, {"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": [1]}, {"a": "\ud83d"}, {"A": 1}]
    assert len({key_of(other) for other in others}) == len(others)
