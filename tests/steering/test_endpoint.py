"""The endpoint judge asks in the paper's words, loses no reply and makes no score up."""

import hashlib
import json
import logging
import re
import sqlite3
import ssl
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from judge_server import ALL, Fault, JudgeServer, scores

from flowhelpers.steering import judge_endpoint as endpoint
from flowhelpers.steering.judge_endpoint import (
    PROBE,
    STOP_AFTER,
    TASKS,
    EndpointJudge,
    endpoint_judge,
    read_reply,
)

ROOT = Path(__file__).parents[2]
KEY = "sk-Secret-0123456789-abcdefXYZ"
GOOD = '{"coherence": 4, "behavioral": 3}'
# SHA-256 of what stands between the outer quotes in the paper's listings: the system prompts of
# B.1 (suppress) and B.2 (promote), and the input formats below them with \"\"\" read as quotes.
PAPER = {
    "suppress": (
        "b206b02d4c9cf89afff2235d07ab0ccd753c925443f813f0f8259b90ec15dd9f",
        "414a454263810215184d19db2d7f5c61d9b1bc599be0c057a99e3f6fb17f4f8e",
    ),
    "promote": (
        "f805f49a051382d33303ed2c130c8fbf6929f417daaa22429d16dd7d06672484",
        "6ea36bb6095279ef3f5443b4978ba7a036b43fc37a0f88c8534bdfb6a464f922",
    ),
}
# One a kind: whatever is wrong with the reply, or with the transport.
UNREADABLE = {
    "prose": Fault(content="I would give it a 4."),
    "cut short": Fault(content='{"coherence": 4, "behav'),
    "prose around": Fault(content=f"Here it is: {GOOD}"),
    "wrong keys": Fault(content='{"coherence": 4, "behaviour": 3}'),
    "above the range": Fault(content='{"coherence": 4, "behavioral": 6}'),
    "below the range": Fault(content='{"coherence": -1, "behavioral": 3}'),
    "a string": Fault(content='{"coherence": "4", "behavioral": 3}'),
    "a float": Fault(content='{"coherence": 4.0, "behavioral": 3}'),
    "a bool": Fault(content='{"coherence": true, "behavioral": 3}'),
    "no text": Fault(content=None, body='{"choices": [{"message": {"content": null}}]}'),
    "an empty text": Fault(content=""),
}
TRANSPORT = {
    "too many requests": Fault(status=429, headers={"Retry-After": "0.05"}),
    "server error": Fault(status=500),
    "unavailable": Fault(status=503),
    "slow": Fault(delay=1.2),
    "cut half way": Fault(keep=60),
    "no answer": Fault(keep=-1),
}


@pytest.fixture(scope="module")
def running() -> Iterator[JudgeServer]:
    with JudgeServer(KEY) as server:
        yield server


@pytest.fixture
def server(running: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> JudgeServer:
    running.reset()
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr("sqlite3.connect", unsynced)
    # Every client reads all certificates, for nothing here.
    monkeypatch.setattr("httpx2._transports.default.create_ssl_context", certificates)
    return running


@cache
def certificates(**options: Any) -> ssl.SSLContext:
    return ssl.create_default_context()


def unsynced(*given: Any, connect: Any = sqlite3.connect, **options: Any) -> sqlite3.Connection:
    """A connection that does not wait for the disk, which only a power cut would tell."""
    database = connect(*given, **options)
    database.execute("PRAGMA synchronous = OFF")
    return database


@pytest.fixture
def make(server: JudgeServer, tmp_path: Path) -> Callable[..., EndpointJudge]:
    """Makes a judge at the server with a store of its own; the server then forgets the probe."""

    def make(theme: str = "space", task: str = "promote", **options: Any) -> EndpointJudge:
        given: dict[str, Any] = {"base_url": server.url, "api_key": KEY, "timeout": 1.0}
        given |= {"store": tmp_path / "judge.sqlite"}
        judge = endpoint_judge(theme, task, **(given | options))
        server.requests.clear()
        return judge

    return make


def expected(texts: list[str]) -> np.ndarray:
    """Behavioral and coherence as the server's rule has them, to promote."""
    return np.array([(scores(text)[1][0] / 5, scores(text)[0] / 5) for text in texts])


def found(frame: pd.DataFrame) -> np.ndarray:
    return frame[["behavioral", "coherence"]].to_numpy(float)


def some(n: int) -> list[str]:
    return [f"Text number {number} about the stars." for number in range(n)]


# What is asked


def test_the_prompts_are_the_papers_word_for_word():
    digests = {
        name: tuple(hashlib.sha256(part.encode()).hexdigest() for part in (task.system, task.input))
        for name, task in TASKS.items()
    }
    assert digests == PAPER


@pytest.mark.parametrize(
    "text",
    [
        "Plain words.",
        '{text} {theme} {0} {} {{x}} """ \\"\\"\\" % %s ${text}',
        'ünï ☃ 星 \N{GRINNING FACE} "quoted"\n\n\tand lines\r\n',
        "  spaces before and after  ",
        f"an example of a reply: {GOOD}",
    ],
)
def test_a_request_is_the_prompt_and_the_text_and_nothing_else(
    make: Callable[..., EndpointJudge], server: JudgeServer, text: str
):
    theme = "the {text} of {theme} and Rome"
    head = f'Subject: {theme}\nText:\n"""\n'
    for judge, start in (
        (make(theme), head),
        (make("science", "suppress", subject="b"), '\nText:\n"""\n'),
    ):
        server.requests.clear()
        judge.judge([text])
        (asked,) = server.requests
        assert asked.body == {
            "model": "gpt-4o-mini",
            "temperature": 0.0,
            "messages": [
                {"role": "system", "content": TASKS[judge.task].system},
                {"role": "user", "content": start + text + '\n"""\n'},
            ],
        }
        assert (asked.path, asked.key) == ("/v1/chat/completions", KEY)


def test_the_model_and_the_temperature_are_as_given(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    server.models.add("llama")
    make(model="llama", temperature=0.3).judge(["One."])
    make(temperature=None).judge(["One."])
    server.misbehave("Two.", UNREADABLE["prose"])
    make(temperature=None).judge(["Two."])
    bodies = [request.body for request in server.requests]
    assert ["temperature" in body for body in bodies] == [False, False], "later attempts neither"
    judge = make(model="llama", temperature=0.3)
    server.misbehave("Two.", UNREADABLE["prose"])
    judge.judge(["Two."])
    assert [(r.body["model"], r.body["temperature"]) for r in server.requests] == [
        ("llama", 0.3),
        ("llama", 1.0),
    ]


# What comes of it


def test_scores_from_0_to_1_land_on_their_texts(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    texts = some(60)
    assert len({str(scores(text)) for text in texts}) > 40, "or a mix-up might not show"
    judge = make()
    frame = judge.judge(texts)
    assert list(frame.columns) == ["behavioral", "coherence", "problem"]
    assert (frame["problem"] == "").all()
    assert np.array_equal(found(frame), expected(texts))
    assert {found(frame).min(), found(frame).max()} == {0.0, 1.0}
    assert 1 < server.most <= 8
    assert np.array_equal(found(judge.judge(texts[::-1])), expected(texts[::-1]))
    assert len(server.requests) == 60


def test_whatever_order_replies_come_in(make: Callable[..., EndpointJudge], server: JudgeServer):
    texts = some(16)
    for place, text in enumerate(texts):  # the first to be asked come last
        server.misbehave(text, Fault(delay=0.3 - 0.018 * place))
    judge = make(concurrency=16)
    assert np.array_equal(found(judge.judge(texts)), expected(texts))
    assert server.most > 8


def test_to_suppress_the_subject_chosen_is_scored_and_replies_are_shared(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    texts = some(12)
    for place, letter in enumerate("abc"):
        frame = make("science", "suppress", subject=letter).judge(texts)
        assert list(frame["behavioral"]) == [scores(text)[1][place] / 5 for text in texts]
        assert list(frame["coherence"]) == [scores(text)[0] / 5 for text in texts]
        assert len(server.requests) == (12 if letter == "a" else 0)


def test_an_empty_text_has_no_score_unasked_and_equal_texts_are_asked_about_once(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    judge = make()
    texts = ["Twice.", "", "Once.", " \n\t", "Twice."]
    frame = judge.judge(texts)
    assert (found(frame)[[1, 3]] == 0).all()
    assert np.array_equal(found(frame)[[0, 2, 4]], expected(["Twice.", "Once.", "Twice."]))
    assert (frame["problem"] == "").all()
    assert sorted(server.asked()) == ["Once.", "Twice."]
    empty = judge.judge([])
    assert list(empty.columns) == list(frame.columns)
    assert list(empty.dtypes) == list(frame.dtypes)
    assert empty.empty
    assert (found(judge.judge(["", ""])) == 0).all()
    assert len(server.requests) == 2


def test_a_text_that_cannot_be_sent_is_missing_and_the_rest_is_not(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    frame = make().judge(["half \ud83d a character", "Whole."])
    assert np.isnan(found(frame)[0]).all()
    assert frame["problem"][0] == "not valid Unicode, which cannot be sent"
    assert np.array_equal(found(frame)[1:], expected(["Whole."]))
    assert server.asked() == ["Whole."]


# What is readable


def test_readable_replies():
    promote, suppress = TASKS["promote"], TASKS["suppress"]
    wanted = {"coherence": 4, "behavioral": 3}
    for reply in (
        GOOD,
        f"\n {GOOD}\n\n",
        f"```json\n{GOOD}\n```",
        f"```\n{GOOD}```",
        f"  ```JSON\n{GOOD}\n```\n",
        '{"behavioral":3,"coherence":4}',
    ):
        assert read_reply(reply, promote) == wanted
    for score in range(6):
        reply = json.dumps({"coherence": score, "behavioral": [score, 5 - score, 0]})
        assert read_reply(reply, suppress) == json.loads(reply)


@pytest.mark.parametrize(
    "reply",
    [
        *(fault.content for fault in UNREADABLE.values() if fault.content is not None),
        '{"coherence": 4, "behavioral": null}',
        '{"coherence": 4, "behavioral": 1e0}',
        '{"coherence": 4, "behavioral": NaN}',
        '{"coherence": 4, "behavioral": [3]}',
        '{"coherence": 4, "behavioral": [3, 3, 3]}',
        '{"coherence": 4, "behavioral": {"score": 3}}',
        '{"coherence": 4}',
        '{"coherence": 4, "behavioral": 3, "why": ""}',
        '{"coherence": 4, "behavioral": 3, "behavioral": 2}',
        '{"Coherence": 4, "behavioral": 3}',
        "{}",
        "[]",
        "[4, 3]",
        '[["coherence", 4], ["behavioral", 3]]',
        "4",
        "null",
        f"[{GOOD}]",
        f"{GOOD}\n{GOOD}",
        f"`{GOOD}`",
        f"```python\n{GOOD}\n```",
        f"Sure:\n```json\n{GOOD}\n```",
        f"```json\n{GOOD}\n```\nI hope so.",
        f"```json\n{GOOD}",
        f"<think>well</think>{GOOD}",
        "{'coherence': 4, 'behavioral': 3}",
        "[" * 100_000,
        '{"coherence": ' + "9" * 5000 + ', "behavioral": 3}',
    ],
)
def test_nothing_else_is_readable_to_promote(reply: str):
    with pytest.raises(ValueError, match=r"^(not|a score is not|behavioral is not) ") as error:
        read_reply(reply, TASKS["promote"])
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "told", ["3", "[3, 3]", "[3, 3, 3, 3]", "[3, 3, 6]", "[3, true, 3]", '["3", 3, 3]', "[]", "{}"]
)
def test_to_suppress_three_integers_are_readable(told: str):
    three = {"a": 1, "b": 2, "c": 3}
    for behavioral in (told, json.dumps(three), "[3, 3, 3.0]", "[[3], 3, 3]"):
        with pytest.raises(ValueError, match=r"integer from 0 to 5|behavioral is not a list of 3"):
            read_reply(f'{{"coherence": 4, "behavioral": {behavioral}}}', TASKS["suppress"])


# What goes wrong, alone


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_reply_is_asked_for_again(
    make: Callable[..., EndpointJudge], server: JudgeServer, kind: str
):
    judge = make()
    server.misbehave("Odd.", UNREADABLE[kind], UNREADABLE[kind])
    frame = judge.judge(["Odd.", "Even."])
    assert np.array_equal(found(frame), expected(["Odd.", "Even."]))
    assert (frame["problem"] == "").all()
    odd = [request.body for request in server.requests if request.text == "Odd."]
    assert [body["temperature"] for body in odd] == [0.0, 1.0, 1.0]
    assert odd[0]["messages"] == odd[1]["messages"] == odd[2]["messages"]


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_text_without_a_readable_reply_is_missing_and_asked_about_next_time(
    make: Callable[..., EndpointJudge], server: JudgeServer, kind: str
):
    judge = make(attempts=2)
    server.misbehave("Odd.", UNREADABLE[kind], UNREADABLE[kind])
    frame = judge.judge(["Odd.", "Even."])
    assert np.isnan(found(frame)[0]).all()
    assert frame["problem"][0].startswith("no readable reply in 2: ")
    assert np.array_equal(found(frame)[1:], expected(["Even."]))
    assert frame["problem"][1] == ""
    assert sorted(server.asked()) == ["Even.", "Odd.", "Odd."]
    server.requests.clear()
    frame = judge.judge(["Odd.", "Even."])
    assert server.asked() == ["Odd."]
    assert np.array_equal(found(frame), expected(["Odd.", "Even."]))


@pytest.mark.parametrize("kind", TRANSPORT)
def test_a_request_that_fails_is_sent_again(
    make: Callable[..., EndpointJudge], server: JudgeServer, kind: str
):
    judge = make(timeout=0.4, attempts=1)
    server.misbehave("Odd.", TRANSPORT[kind], TRANSPORT[kind])
    frame = judge.judge(["Odd.", "Even."])
    assert np.array_equal(found(frame), expected(["Odd.", "Even."]))
    assert (frame["problem"] == "").all()
    assert sorted(server.asked()) == ["Even.", "Odd.", "Odd.", "Odd."]
    assert {request.body["temperature"] for request in server.requests} == {0.0}


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("too many requests", "the server answers 429: out of order"),
        ("server error", "the server answers 500: out of order"),
        ("slow", "no reply within 0.1 s"),
        ("cut half way", "the connection failed: "),
        ("no answer", "the connection failed: "),
    ],
)
def test_a_text_whose_request_keeps_failing_is_missing_and_asked_about_next_time(
    make: Callable[..., EndpointJudge],
    server: JudgeServer,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    problem: str,
):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    judge = make(timeout=0.1 if kind == "slow" else 5.0)
    server.misbehave("Odd.", TRANSPORT[kind], TRANSPORT[kind])
    frame = judge.judge(["Odd.", "Even."])
    assert np.isnan(found(frame)[0]).all()
    assert frame["problem"][0].startswith(problem)
    assert np.array_equal(found(frame)[1:], expected(["Even."]))
    server.requests.clear()
    frame = judge.judge(["Odd.", "Even."])
    assert np.array_equal(found(frame), expected(["Odd.", "Even."]))
    assert server.asked() == ["Odd."]


def test_retry_after_is_waited_for(make: Callable[..., EndpointJudge], server: JudgeServer):
    judge = make(timeout=5.0)
    server.misbehave("Odd.", Fault(status=429, headers={"Retry-After": "1"}))
    assert np.array_equal(found(judge.judge(["Odd."])), expected(["Odd."]))
    first, second = (request.time for request in server.requests)
    assert 0.95 < second - first < 3


# What goes wrong, all together


def test_all_faults_together_lose_nothing_and_make_nothing_up(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    judge = make(timeout=0.5, concurrency=8)
    texts = some(90)
    faults = list({**UNREADABLE, **TRANSPORT}.values())
    missing = set()
    for place, text in enumerate(texts):
        one, other = faults[place % len(faults)], faults[(place * 7 + 3) % len(faults)]
        if place % 9 == 0:  # no attempt of this one can be read
            server.misbehave(text, *([list(UNREADABLE.values())[place % 11]] * 3))
            missing.add(text)
        elif place % 4:
            server.misbehave(text, *([one, other] if place % 2 else [one]))
    shuffled = list(np.random.default_rng(0).permutation(texts * 2))
    frame = judge.judge(shuffled)
    lost = np.array([text in missing for text in shuffled])
    assert np.isnan(found(frame)[lost]).all()
    assert frame["problem"][lost].str.startswith("no readable reply in 3: ").all()
    assert np.array_equal(found(frame)[~lost], expected(shuffled)[~lost])
    assert (frame["problem"][~lost] == "").all()
    server.requests.clear()
    frame = judge.judge(texts)
    assert sorted(server.asked()) == sorted(missing)
    assert np.array_equal(found(frame), expected(texts))


# What stops it, and going on


def test_a_server_that_dies_half_way_stops_it_and_the_same_call_goes_on(
    make: Callable[..., EndpointJudge], server: JudgeServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    judge, texts = make(concurrency=4), some(100)
    server.alive = 40
    with pytest.raises(ConnectionError, match=r"40 new replies .* in .*judge\.sqlite") as error:
        judge.judge(texts)
    assert "the connection failed" in str(error.value)
    assert "the same call goes on from there" in str(error.value)
    answered = server.asked()[:40]
    time.sleep(0.2)
    assert len(server.requests) <= 40 + 2 * (STOP_AFTER + 4), "what was queued is not sent"
    server.reset()
    frame = judge.judge(texts)
    assert np.array_equal(found(frame), expected(texts))
    assert sorted(server.asked()) == sorted(set(texts) - set(answered))


def test_failures_are_counted_in_a_row(
    make: Callable[..., EndpointJudge], server: JudgeServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    judge, texts = make(concurrency=1), some(30)
    for place, text in enumerate(texts):
        if place % STOP_AFTER:  # seven in a row, then one that is answered
            server.misbehave(text, Fault(status=500))
    frame = judge.judge(texts)
    answered = np.arange(30) % STOP_AFTER == 0
    assert np.array_equal(found(frame)[answered], expected(texts)[answered])
    assert np.isnan(found(frame)[~answered]).all()

    server.reset()
    judge = make("another", concurrency=1)
    for text in texts[2:]:
        server.misbehave(text, Fault(status=500))
    with pytest.raises(
        ConnectionError, match=r"answers 500: out of order.* 2 new replies are kept"
    ):
        judge.judge(texts)
    assert server.asked() == texts[: 2 + STOP_AFTER]


def test_if_all_of_a_few_fail_it_says_so(
    make: Callable[..., EndpointJudge], server: JudgeServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    judge = make()
    server.misbehave(ALL, *[Fault(status=500)] * 3)
    with pytest.raises(ConnectionError, match="0 new replies are kept"):
        judge.judge(some(3))
    assert np.array_equal(found(judge.judge(some(3))), expected(some(3)))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, PermissionError),
        (403, PermissionError),
        (404, ValueError),
    ],
)
def test_what_will_not_get_better_stops_at_once(
    make: Callable[..., EndpointJudge], server: JudgeServer, status: int, kind: type[Exception]
):
    judge, texts = make(concurrency=1), some(20)
    server.misbehave(texts[5], Fault(status=status, message="your key is {key}!"))
    with pytest.raises(kind, match=rf"answers {status}.* 5 new replies are kept") as error:
        judge.judge(texts)
    assert_no_key(error.value)
    assert server.asked() == texts[:6]
    server.requests.clear()
    assert np.array_equal(found(judge.judge(texts)), expected(texts))
    assert server.asked() == texts[5:]


@pytest.mark.parametrize("status", [400, 422])
def test_a_text_that_is_refused_for_itself_is_missing_and_the_others_are_judged(
    make: Callable[..., EndpointJudge], server: JudgeServer, status: int
):
    judge, texts = make(concurrency=1), some(20)
    server.misbehave(texts[5], Fault(status=status, message="filtered"))
    frame = judge.judge(texts)
    assert frame["behavioral"].isna().tolist() == [i == 5 for i in range(20)]
    assert str(status) in frame["problem"][5]
    server.requests.clear()
    judge.judge(texts)
    assert server.asked() == [texts[5]]


def test_stopped_by_a_person_it_keeps_what_has_come(
    make: Callable[..., EndpointJudge], server: JudgeServer, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(iterable: Any, desc: str) -> Iterator[Any]:
        for number, item in enumerate(iterable):
            if number == 10:
                time.sleep(0.2)  # meanwhile others come, that nobody has looked at
                raise KeyboardInterrupt
            yield item

    judge, texts = make(concurrency=3), some(60)
    for text in texts:
        server.misbehave(text, Fault(delay=0.02))
    with monkeypatch.context() as patch:
        patch.setattr(endpoint, "progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            judge.judge(texts)
    before = server.asked()
    assert 10 < len(before) <= 15
    time.sleep(0.1)
    assert server.asked() == before, "nothing more is sent"
    server.reset()
    assert np.array_equal(found(judge.judge(texts)), expected(texts))
    assert sorted(server.asked() + before) == sorted(texts), "each of them once"


def test_stopped_by_a_person_it_waits_for_nobody(
    make: Callable[..., EndpointJudge], server: JudgeServer, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(iterable: Any, desc: str) -> Iterator[Any]:
        yield 0
        raise KeyboardInterrupt

    judge, texts = make(concurrency=2, timeout=5.0), some(2)
    server.misbehave(texts[1], Fault(delay=1.0, content="unreadable"))
    monkeypatch.setattr(endpoint, "progress", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judge.judge(texts)
    assert time.monotonic() - began < 0.8
    time.sleep(1.1)
    assert len(server.requests) == 2, "nor is the reply that came too late asked for again"


def test_killed_it_keeps_what_has_come(
    make: Callable[..., EndpointJudge], server: JudgeServer, tmp_path: Path
):
    judge, texts = make(concurrency=2), some(60)
    for text in texts:
        server.misbehave(text, Fault(delay=0.02))
    code = """if True:
        import sys
        from pathlib import Path
        from flowhelpers.steering.judge_endpoint import endpoint_judge
        judge = endpoint_judge(
            "space", base_url=sys.argv[1], store=Path(sys.argv[2]), concurrency=2
        )
        judge.judge([f"Text number {number} about the stars." for number in range(60)])
    """
    environment = {"OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url, str(tmp_path / "judge.sqlite")],
        cwd=ROOT,
        env=environment,
    )
    while len(server.requests) < 25 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = set(server.asked()) - {PROBE}
    server.reset()
    assert np.array_equal(found(judge.judge(texts)), expected(texts))
    assert 20 < len(before) < 60
    assert len(set(server.asked()) & before) <= 4, "two on their way, two just come"


# The cache


def test_judges_that_ask_otherwise_do_not_share_replies(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    server.models.add("llama")
    texts = some(3)
    others: list[dict[str, Any]] = [
        {},
        {"theme": "sea"},
        {"task": "suppress", "subject": "a"},
        {"model": "llama"},
        {"temperature": None},
        {"temperature": 0.5},
        {"base_url": server.url.replace("127.0.0.1", "localhost")},
    ]
    for options in others:
        frame = make(**options).judge(texts)
        assert len(server.requests) == 3, options
        assert np.array_equal(found(frame), expected(texts))
    for options in [*others, {"temperature": 0}, {"base_url": server.url + "/"}]:
        frame = make(**options).judge(texts)
        assert server.requests == [], options
        assert np.array_equal(found(frame), expected(texts))


def test_another_prompt_is_asked_anew(
    make: Callable[..., EndpointJudge], server: JudgeServer, monkeypatch: pytest.MonkeyPatch
):
    judge = make()
    judge.judge(some(1))
    monkeypatch.setitem(TASKS, "promote", replace(TASKS["promote"], system="Be kind."))
    judge.judge(some(1))
    assert [request.body["messages"][0]["content"] for request in server.requests][1:] == [
        "Be kind."
    ]


def test_the_store_is_in_the_cache_folder_unless_given(
    make: Callable[..., EndpointJudge], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("FLOWHELPERS_CACHE", str(tmp_path / "cache"))
    make(store=None).judge(["One."])
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["judge.sqlite"]


# The first request


def test_the_first_request_is_one_and_always_sent_and_kept(server: JudgeServer, tmp_path: Path):
    for _ in range(2):
        judge = endpoint_judge("space", base_url=server.url, api_key=KEY, store=tmp_path / "s")
    assert server.asked() == [PROBE, PROBE]
    assert server.requests[0].body["messages"][0]["content"] == TASKS["promote"].system
    assert np.array_equal(found(judge.judge([PROBE])), expected([PROBE]))
    assert len(server.requests) == 2
    with pytest.raises(PermissionError):
        endpoint_judge("space", base_url=server.url, api_key="other", store=tmp_path / "s")


def test_a_first_reply_that_cannot_be_read_is_warned_of(server: JudgeServer, tmp_path: Path):
    server.misbehave(PROBE, Fault(content="Lovely!"))
    with pytest.warns(UserWarning, match="its first reply cannot be read, not JSON: 'Lovely!'"):
        judge = endpoint_judge("space", base_url=server.url, api_key=KEY, store=tmp_path / "s")
    assert np.array_equal(found(judge.judge([PROBE])), expected([PROBE]))
    assert server.asked() == [PROBE, PROBE]


def test_an_unknown_model_or_address_is_an_error_at_once(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    with pytest.raises(ValueError, match=r"404: The model 'gpt-9' does not exist.*model 'gpt-9'\?"):
        make(model="gpt-9")
    assert len(server.requests) == 1
    with pytest.raises(ValueError, match=r"404: no /chat/completions here.*as in /v1\?"):
        make(base_url=server.url.removesuffix("/v1"))
    for body in ("<html>Welcome</html>", "{}", "[]", '{"choices": []}', '"x"', "null"):
        server.misbehave(ALL, Fault(body=body))
        with pytest.raises(ValueError, match=r"no chat completion.* as http://host/v1"):
            make()


def test_no_server_is_an_error_at_once(make: Callable[..., EndpointJudge]):
    with JudgeServer() as gone:
        url = gone.url
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:\d+: the connection failed: .*refus"):
        make(base_url=url)
    assert time.monotonic() - began < 2


def test_a_first_request_is_tried_again_and_then_an_error(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    server.misbehave(ALL, Fault(status=503), Fault(keep=20))
    make()
    server.misbehave(ALL, *[Fault(status=503, message="loading")] * 3)
    with pytest.raises(ConnectionError, match="answers 503: loading"):
        make()


# The key


def assert_no_key(error: BaseException) -> None:
    """The key is nowhere in an error, in what it came from, or in what would be printed."""
    shown = str(error) + repr(error.args) + "".join(traceback.format_exception(error))
    assert KEY.lower() not in shown.lower()
    assert KEY[:8] not in str(error)
    chained = (error.__cause__, error.__context__)
    assert chained == (None, None), "the client's errors hold the request, with its headers"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 500])
def test_the_key_is_in_no_error(
    make: Callable[..., EndpointJudge],
    server: JudgeServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    status: int,
):
    caplog.set_level(logging.DEBUG)
    cut = "x" * 185 + " key {key} "
    for message in ("the key {key} is bad", f"Bearer {KEY.upper()}", f"({KEY.lower()})", cut):
        server.misbehave(ALL, *[Fault(status=status, message=message)] * 3)
        with pytest.raises((PermissionError, ValueError, ConnectionError)) as error:
            make()
        assert_no_key(error.value)
        server.reset()
    out, err = capfd.readouterr()
    assert len(caplog.records) > 3
    assert KEY not in caplog.text + out + err
    assert not (tmp_path / "judge.sqlite").exists()


def test_the_key_is_nowhere_else(
    make: Callable[..., EndpointJudge],
    server: JudgeServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    caplog.set_level(logging.DEBUG)
    judge, texts = make(), some(9)
    echo = f'{{"coherence": 4, "behavioral": "{KEY}"}}'
    server.misbehave(texts[0], *[Fault(content=echo)] * 3)
    server.misbehave(texts[1], *[Fault(status=500, message="the key {key} is bad")] * 2)
    frame = judge.judge(texts)
    assert frame["problem"][0].endswith(
        """a score is not an integer from 0 to 5: '{"coherence": 4, "behavioral": "[key]"}'"""
    )
    assert frame["problem"][1] == "the server answers 500: the key [key] is bad"
    out, err = capfd.readouterr()
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) > 1000
    assert KEY.encode() not in files
    shown = repr(judge) + str(judge) + judge.about + judge.plan(texts) + frame.to_csv()
    assert KEY not in shown + caplog.text + out + err
    assert "OpenAI" not in repr(judge), "the client, which has it"


def test_a_wrong_key_says_so_before_any_text(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    wrong = KEY.swapcase()
    with pytest.raises(PermissionError, match=r"answers 401: e401\. It refuses the key") as error:
        make(api_key=wrong)
    assert wrong not in repr(error.value) + "".join(traceback.format_exception(error.value))
    assert server.asked() == [PROBE]


def test_the_key_and_the_address_may_come_from_the_environment(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    endpoint_judge("space", store=tmp_path / "s")
    assert server.requests[0].key == KEY
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    endpoint_judge("space", base_url=server.url, api_key=KEY, store=tmp_path / "s")
    assert server.requests[1].key == KEY


@pytest.mark.parametrize("address", [None, "https://api.openai.com/v1/", "https://eu.openai.com"])
def test_openai_is_not_asked_without_a_key(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, address: str | None
):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"no key for .*openai\.com: give it as .*KEY"):
        endpoint_judge("space", base_url=address)
    assert time.monotonic() - began < 1


def test_another_server_needs_no_key(tmp_path: Path, server: JudgeServer):
    with JudgeServer() as open_to_all:
        judge = endpoint_judge("space", base_url=open_to_all.url, store=tmp_path / "s")
        assert np.array_equal(found(judge.judge(["One."])), expected(["One."]))
        assert {request.key for request in open_to_all.requests} == {"no-key-needed"}


@pytest.mark.parametrize("key", ["sk-two words", "sk-ünï", "sk-a\nb", 'sk-"', "sk-\\"])
def test_what_cannot_be_a_key_is_not_sent(
    make: Callable[..., EndpointJudge], server: JudgeServer, key: str
):
    with pytest.raises(ValueError, match="the key has a space") as error:
        make(api_key=key)
    assert "sk-" not in str(error.value)
    assert server.requests == []


# What else is given


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000/v1", "is no address: expected one such as http://localhost:8000/v1"),
        (KEY, "is no address"),
        ("ftp://127.0.0.1/v1", "is no address"),
        (f"http://host:{KEY}/v1", "is no address"),
        (f"http://user:{KEY}@127.0.0.1:1/v1", "has a user name, a query or a fragment"),
        (f"http://127.0.0.1:1/v1?key={KEY}", "has a user name, a query or a fragment"),
    ],
)
def test_an_address_that_is_none_is_an_error_without_what_it_may_hide(
    make: Callable[..., EndpointJudge], url: str, words: str
):
    with pytest.raises(ValueError, match=f"base_url {words}") as error:
        make(base_url=url, api_key="other")
    assert_no_key(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "supress"}, "unknown task 'supress'; did you mean 'suppress'"),
        ({"task": "suppress"}, r"subject None .*give one of a \(Personalities.*c \(Research"),
        ({"task": "suppress", "subject": "d"}, r"subject 'd' .* b \(Scientific concepts"),
        ({"subject": "b"}, "subject 'b' for the task 'promote': it has none"),
        ({"theme": " "}, "the theme is ' '"),
        ({"concurrency": 0}, "concurrency is 0, attempts 3, timeout 1.0: expected"),
        ({"attempts": 0}, "attempts 0"),
        ({"timeout": 0.0}, "timeout 0.0"),
    ],
)
def test_wrong_arguments_say_what_is_expected(
    make: Callable[..., EndpointJudge], server: JudgeServer, options: dict[str, Any], words: str
):
    with pytest.raises(ValueError, match=words):
        make(**options)
    assert server.requests == []


def test_about_says_which_judge_it_is(make: Callable[..., EndpointJudge], server: JudgeServer):
    host = server.url.removeprefix("http://").removesuffix("/v1")
    assert make().about == f"gpt-4o-mini at {host}, task promote, theme 'space'"
    suppress = make("science", "suppress", subject="c").about
    assert suppress == f"gpt-4o-mini at {host}, task suppress, theme 'science', subject c"


def test_the_plan_counts_what_is_not_known_yet(
    make: Callable[..., EndpointJudge], server: JudgeServer
):
    judge = make(attempts=3, concurrency=5)
    texts = [*some(20), "", *some(2)]
    judge.judge(some(5))
    server.requests.clear()
    plan = judge.plan(texts)
    assert server.requests == []
    assert plan.startswith(judge.about)
    assert "23 texts, 8 of them empty, equal to others or judged before; 15 requests" in plan
    assert "(at most 45, for replies that cannot be read), 5 at a time" in plan
    fixed = len(TASKS["promote"].system + TASKS["promote"].input) + len("space") - 13
    into = sum(len(text) for text in texts[5:20]) // 4 + 15 * fixed // 4
    dollars = (into * 0.15 + 15 * 25 * 0.60) / 1e6
    assert f"Estimated: {into:,} tokens in, 375 out" in plan
    assert plan.endswith(f"${dollars:.4f} (at most ${3 * dollars:.4f})")


def test_the_plan_of_a_number_of_texts(make: Callable[..., EndpointJudge], server: JudgeServer):
    server.models.add("llama")
    judge = make(prices=(100.0, 1000.0), attempts=2)
    fixed = len(TASKS["promote"].system + TASKS["promote"].input) + len("space") - 13
    into = 2000 * 36 + 2000 * fixed // 4
    dollars = (into * 100 + 2000 * 25 * 1000) / 1e6
    plan = judge.plan(2000, 36)
    assert "2,000 texts, 0 of them" in plan
    assert "2,000 requests (at most 4,000, " in plan
    assert f"{into:,} tokens in, 50,000 out, ${dollars:,.4f} (at most ${2 * dollars:,.4f})" in plan
    assert make(model="llama").plan(3, 10).endswith("75 out, price unknown")
    assert re.search(r"price unknown$", make(model="llama").plan(some(3)))
    with pytest.raises(ValueError, match="give tokens_each"):
        judge.plan(2000)


def test_progress_is_over_the_replies(
    make: Callable[..., EndpointJudge], monkeypatch: pytest.MonkeyPatch
):
    shown = []

    def progress(iterable: Any, desc: str) -> Iterator[Any]:
        for item in iterable:
            shown.append((desc, len(iterable)))
            yield item

    monkeypatch.setattr(endpoint, "progress", progress)
    judge = make()
    judge.judge(some(4))
    judge.judge(some(6))
    assert shown == [("judge", 4)] * 4 + [("judge", 2)] * 2
