"""The endpoint judge asks in the paper's words, loses no reply and makes no score up."""

import hashlib
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pandas as pd
import pytest
from judge_server import ALL, Fault, JudgeServer, scores

from flowhelpers.steering import judge_endpoint
from flowhelpers.steering.judge_endpoint import (
    ATTEMPTS,
    PROBE,
    PROMPTS,
    STOP_AFTER,
    EndpointJudge,
    read_reply,
)

Make = Callable[..., EndpointJudge]
KEY = "sk-Secret-0123456789-abcdefXYZ"
GOOD = '{"coherence": 4, "behavioral": 3}'
# SHA-256 of what stands between the outer quotes in the paper's listings: the system prompts of
# B.1 (suppress) and B.2 (promote), and the input formats below them with \"\"\" read as quotes.
PAPER = {
    "suppress": [
        "b206b02d4c9cf89afff2235d07ab0ccd753c925443f813f0f8259b90ec15dd9f",
        "414a454263810215184d19db2d7f5c61d9b1bc599be0c057a99e3f6fb17f4f8e",
    ],
    "promote": [
        "f805f49a051382d33303ed2c130c8fbf6929f417daaa22429d16dd7d06672484",
        "6ea36bb6095279ef3f5443b4978ba7a036b43fc37a0f88c8534bdfb6a464f922",
    ],
}
DRAFT = '{"coherence": 1, "behavioral": 0}'
READABLE = [
    f"```json\n{GOOD}\n```",
    f'Here it is, {{as asked}}:\n```JSON\n{GOOD}\n```\nThe "coherence" is that of a book {{x}}.',
    f"<think>\nOf {{physics}}? Perhaps {DRAFT}.\n</think>\n\n{GOOD}",
    f"It is.\n</think>\n{GOOD}",
    f"[THINK]Perhaps {DRAFT}.[/THINK] {GOOD}",
    f"The format is {{coherence: 0, behavioral: 0}}. First {DRAFT}, but no: {GOOD}",
    '{"coherence": 4.0, "behavioral": "3"}',
    '{"coherence": "4.0", "behavioral": 3, "is_sure": true}',
    '{"reasoning": "the set {1} and {\\"coherence\\": 1}", "coherence": 4, "behavioral": 3}',
    f'{{"scores": {GOOD}, "draft": {{"coherence": 2}}}}',
]
UNREADABLE = [
    "I would give it a 4.",
    " ",
    "null",
    "{" * 2000,
    '{"a": ' * 9000,
    f"<think>\nPerhaps {DRAFT}. The text",
    f"<think>\nPerhaps {DRAFT}.\n</think>\n\nI cannot judge this.",
    f'First {DRAFT}. On reflection: {{"coherence": 4, "beha',
    f"{DRAFT}\n<think>\nNo, it is",
    f"<thinking>{DRAFT}</thinking> I cannot judge this.",
    f"[THINK]{DRAFT}[/THINK] I cannot judge this.",
    f"◁think▷{DRAFT}◁/think▷ I cannot judge this.",
    f"<seed:think>{DRAFT}</seed:think> No score.",
    f"<|begin_of_thought|>{DRAFT}<|end_of_thought|> none",
    f"<|begin_of_thought|>{DRAFT} or",
    f"<Reasoning>{DRAFT}</Reasoning> none",
    f'<think lang="en">{DRAFT} and',
    f"<|channel|>analysis<|message|>{DRAFT}<|end|><|channel|>final<|message|>I cannot.",
    f"{DRAFT} Better: {{coherence: 4, behavioral: 3}}",
    f"{DRAFT} Better: {{“coherence”: 4, “behavioral”: 3}}",
    f'First {DRAFT}. On reflection: {{"coherence": 4, "behavioral": 7}}',
    f"First {DRAFT}. On reflection: {{'reasoning': 'it",
    '{"coherence": 4, "behaviour": 3}',
    '{"coherence": 4, "behavioral": 6}',
    '{"coherence": -1, "behavioral": 3}',
    '{"coherence": 4.5, "behavioral": 3}',
    '{"coherence": "four", "behavioral": 3}',
    '{"coherence": null, "behavioral": 3}',
    '{"coherence": true, "behavioral": 3}',
    '{"coherence": 4, "behavioral": [3, 3, 3]}',
]
TRANSPORT = [Fault(status=429, headers={"Retry-After": "0.05"}), Fault(status=500), Fault(cut=True)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    with JudgeServer(KEY) as server:
        yield server


@pytest.fixture
def make(server: JudgeServer, tmp_path: Path) -> Make:
    """Makes a judge at the server with a cache of its own; the server then forgets the probe."""

    def make(theme: str = "space", task: str = "promote", **options: Any) -> EndpointJudge:
        given: dict[str, Any] = {"base_url": server.url, "api_key": KEY}
        given |= {"cache": tmp_path / "judge.sqlite"} | options
        judge = EndpointJudge(theme, task, **given)
        server.requests.clear()
        return judge

    return make


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowhelpers.steering.judge_endpoint.CONCURRENCY", 1)


def expected(texts: list[str]) -> list[list[float]]:
    """Behavioral and coherence as the server's rule has them, to promote."""
    return [[scores(text)[1][0] / 5, scores(text)[0] / 5] for text in texts]


def values(frame: pd.DataFrame) -> list[list[float]]:
    return frame[["behavioral", "coherence"]].to_numpy(float).tolist()


def some(n: int) -> list[str]:
    return [f"Text number {number} about the stars." for number in range(n)]


def test_the_prompts_are_the_papers_word_for_word():
    for task, parts in PROMPTS.items():
        assert [hashlib.sha256(part.encode()).hexdigest() for part in parts] == PAPER[task]
        assert parts[0].endswith("}\n\n")  # the empty line before the listing's closing quotes
    assert PROMPTS["suppress"][1] == '\nText:\n"""\n{text}\n"""\n'
    assert PROMPTS["promote"][1] == 'Subject: {theme}\nText:\n"""\n{text}\n"""\n'


@pytest.mark.parametrize("text", ["One.", ' {text} {theme} """ ', "Größe\n\n"])
def test_a_request_is_the_prompt_and_the_text_and_nothing_else(
    make: Make, server: JudgeServer, text: str
):
    theme = "the {text} of {theme} and Rome"
    starts = {"promote": f'Subject: {theme}\nText:\n"""\n', "suppress": '\nText:\n"""\n'}
    for task, start in starts.items():
        make(theme, task, subject="b" if task == "suppress" else None).judge([text])
        asked = server.requests[-1]
        assert asked.body == {
            "model": "gpt-4o-mini",
            "temperature": 0.0,
            "messages": [
                {"role": "system", "content": PROMPTS[task][0]},
                {"role": "user", "content": start + text + '\n"""\n'},
            ],
        }
        assert (asked.path, asked.key) == ("/v1/chat/completions", KEY)


def test_scores_from_0_to_1_land_on_their_texts_whatever_order_replies_come_in(
    make: Make, server: JudgeServer
):
    texts = some(40)
    for place, text in enumerate(texts[:8]):  # the first to be asked come last
        server.faults[text] = [Fault(delay=0.3 - 0.03 * place)]
    judge = make()
    frame = judge.judge(texts)
    assert values(frame) == expected(texts)
    assert (frame["problem"] == "").all()
    assert {np.min(values(frame)), np.max(values(frame))} == {0.0, 1.0}  # 5 is 1: scores by 5
    # Nothing is asked about twice, by this judge or by another with the same cache.
    assert values(make().judge(texts[::-1])) == expected(texts[::-1])
    assert values(judge.judge(texts)) == expected(texts)
    assert server.requests == []


def test_judges_that_ask_otherwise_do_not_share_replies(make: Make, server: JudgeServer):
    for options in ({}, {"theme": "sea"}, {"temperature": 0.5}, {"base_url": f"{server.url}/"}):
        judge = make(**options)
        judge.judge(["One."])
        assert len(server.requests) == (0 if "base_url" in options else 1), options
    assert judge.temperature == 0


def test_to_suppress_one_of_three_scores_counts_and_replies_are_shared(
    make: Make, server: JudgeServer
):
    texts = some(12)
    for place, letter in enumerate("abc"):
        judge = make("science", "suppress", subject=letter)
        frame = judge.judge(texts)
        assert list(frame["behavioral"]) == [scores(text)[1][place] / 5 for text in texts]
        assert list(frame["coherence"]) == [scores(text)[0] / 5 for text in texts]
        all_three = frame[["behavioral_a", "behavioral_b", "behavioral_c"]].to_numpy()
        assert (5 * all_three).tolist() == [scores(text)[1] for text in texts]
        assert len(server.requests) == (12 if letter == "a" else 0)
        for reply in ("[1, 2]", "[1, 2, 6]", "3", "[1, 2, 3, 4]"):
            server.faults["One."] = [Fault(f'{{"coherence": 4, "behavioral": {reply}}}')] * ATTEMPTS
            assert np.isnan(values(judge.judge(["One."]))).all()


def test_an_empty_text_has_0_unasked_and_equal_texts_are_asked_about_once(
    make: Make, server: JudgeServer
):
    judge = make()
    frame = judge.judge(["Twice.", "", "Once.", " \n\t", "Twice.", "half \ud83d a character"])
    rows = expected(["Twice.", "Once.", "Twice."])
    assert values(frame)[:5] == [rows[0], [0, 0], rows[1], [0, 0], rows[2]]
    assert np.isnan(values(frame)[5]).all()  # it cannot be sent
    assert sorted(server.asked()) == ["Once.", "Twice."]
    assert judge.judge([]).dtypes.equals(frame.dtypes)


@pytest.mark.parametrize("reply", [GOOD, *READABLE])
def test_the_last_object_with_scores_counts_whatever_stands_around_it(reply: str):
    assert read_reply(reply, "promote").model_dump() == {"coherence": 4, "behavioral": 3}
    three = reply.replace(': "3"', ": 3").replace('"behavioral": 3', '"behavioral": ["3", 2, 1.0]')
    expected = {"coherence": 4, "behavioral": (3, 2, 1)}
    assert read_reply(three, "suppress").model_dump() == expected


def completion(end: str | None = "stop", **message: Any) -> Fault:
    """A whole completion, as servers give that part reasoning from the reply."""
    choice = {"index": 0, "finish_reason": end, "message": {"role": "assistant", **message}}
    return Fault(body=json.dumps({"id": "0", "object": "chat.completion", "choices": [choice]}))


def test_replies_are_found_where_servers_put_them(make: Make, server: JudgeServer):
    parts = [{"type": "thinking", "thinking": [{"text": DRAFT}]}, {"type": "text", "text": GOOD}]
    told: list[dict[str, Any]] = [
        {"content": GOOD, "reasoning_content": DRAFT},
        {"content": None, "reasoning_content": f"Perhaps {DRAFT}. No: {GOOD}"},
        {"content": "", "reasoning": GOOD},
        {"content": parts},
        {"content": [parts[1], {"type": "reasoning", "text": DRAFT}]},
    ]
    texts = some(len(told))
    for text, message in zip(texts, told, strict=True):
        server.faults[text] = [completion(**message)]
    assert values(make().judge(texts)) == [[0.6, 0.8]] * len(texts)
    assert len(server.requests) == len(texts)


def test_refusals_and_replies_that_are_cut_are_missing(make: Make, server: JudgeServer):
    refusal = completion(content=None, refusal="I cannot judge that.")
    cut = completion("length", content=None, reasoning_content=f"The format is {DRAFT}, and")
    server.faults = {"One.": [refusal] * ATTEMPTS, "Two.": [cut] * ATTEMPTS}
    frame = make().judge(["One.", "Two.", "Three."])
    assert frame["behavioral"].isna().tolist() == [True, True, False]
    assert frame["problem"][0] == "no readable reply in 3: 'I cannot judge that.'"
    assert frame["problem"][1].startswith("no readable reply in 3 (the last cut at the server's")


def test_a_judge_none_of_whose_first_replies_can_be_read_is_stopped(
    make: Make, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
):
    judge, texts = make(), some(400)
    texts[0] = "A fault of its own."
    server.faults = {ALL: [Fault(content="It is fine.")] * 10_000, texts[0]: [Fault(status=400)]}
    with pytest.raises(ValueError, match=r"theme 'space': none of the first 8 texts .* is fine\.'"):
        judge.judge(texts)
    assert len(server.requests) < 200
    # Of texts that are left of an earlier call all may be such.
    server.faults = {text: [Fault(content="No.")] * ATTEMPTS for text in texts[1:13]}
    with monkeypatch.context() as late:  # all have ended, and the unread are looked at first
        order = {"key": lambda ended: ended.result(), "reverse": True}
        late.setattr(
            judge_endpoint, "as_completed", lambda asked: sorted(wait(asked).done, **order)
        )
        assert judge.judge(texts[:40])["behavioral"].isna().sum() == 12
    server.faults = {ALL: [Fault(content="No.")] * 10_000}
    assert judge.judge(texts[:40])["behavioral"].isna().sum() == 12


def test_a_temperature_that_is_refused_can_be_left_out(make: Make, server: JudgeServer):
    message = "Unsupported value: 'temperature' does not support 0.0 with this model."
    server.faults[ALL] = [Fault(status=400, message=message)]
    with pytest.raises(
        ValueError, match=r"support 0\.0 .* Leave it out: temperature=None, or of a"
    ):
        make()
    judge = make(temperature=None)
    server.faults["One."] = [Fault(content="prose")]
    assert values(judge.judge(["One."])) == expected(["One."])
    assert [set(asked.body) for asked in server.requests] == [{"model", "messages"}] * 2


@pytest.mark.parametrize("reply", UNREADABLE)
def test_an_unreadable_reply_is_asked_for_again_and_then_missing(
    make: Make, server: JudgeServer, reply: str
):
    judge = make()
    server.faults["One."] = [Fault(content=reply)] * (ATTEMPTS - 1)
    assert values(judge.judge(["One."])) == expected(["One."])
    asked = [request.body["temperature"] for request in server.requests]
    assert asked == [0.0, *[1.0] * (ATTEMPTS - 1)]  # at 0 the same reply would come again
    server.faults["Two."] = [Fault(content=reply)] * ATTEMPTS
    frame = judge.judge(["One.", "Two."])
    assert values(frame)[0] == expected(["One."])[0]
    assert np.isnan(values(frame)[1]).all()
    assert frame["problem"][1].startswith("no readable reply in 3")
    assert values(judge.judge(["Two."])) == expected(["Two."])  # a later call asks anew


@pytest.mark.parametrize("fault", TRANSPORT)
def test_a_request_that_fails_is_sent_again(make: Make, server: JudgeServer, fault: Fault):
    judge, texts = make(), some(3)
    for text in texts:
        server.faults[text] = [fault] * 2
    assert values(judge.judge(texts)) == expected(texts)
    assert len(server.requests) == 9


def test_a_text_whose_request_keeps_failing_is_missing_and_asked_about_next_time(
    make: Make, server: JudgeServer
):
    judge, texts = make(), some(10)
    server.faults[texts[3]] = [Fault(status=500)] * 6
    server.faults[texts[5]] = [Fault(status=400, message="not this one")]
    frame = judge.judge(texts)
    assert frame["behavioral"].isna().to_numpy().nonzero()[0].tolist() == [3, 5]
    assert frame["problem"][5].startswith("the server answers 400: ")
    assert values(judge.judge(texts)) == expected(texts)


def test_a_server_that_dies_stops_it_and_the_same_call_goes_on(
    make: Make, server: JudgeServer, one_at_a_time: None
):
    judge, texts = make(), some(30)
    for text in texts[10:]:
        server.faults[text] = [Fault(status=500)] * 6
    with pytest.raises(ConnectionError, match=r"answers 500.*Replies so far are kept in .*sqlite"):
        judge.judge(texts)
    assert set(server.asked()) <= set(texts[: 12 + STOP_AFTER])
    server.requests.clear()
    server.faults.clear()
    assert values(judge.judge(texts)) == expected(texts)
    assert server.asked() == texts[10:]
    server.faults[ALL] = [Fault(status=500)] * 12
    with pytest.raises(ConnectionError, match="the server answers 500"):
        judge.judge(["One.", "Two."])  # all of a few


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_not_get_better_stops_at_once(
    make: Make, server: JudgeServer, one_at_a_time: None, status: int
):
    judge = make()
    server.faults[some(5)[4]] = [Fault(status=status)]
    with pytest.raises((PermissionError, ValueError), match=f"the server answers {status}"):
        judge.judge(some(40))
    assert len(server.requests) <= 6
    assert values(judge.judge(some(40))) == expected(some(40))


def test_the_first_request_shows_what_is_wrong(make: Make, server: JudgeServer):
    with pytest.raises(PermissionError, match="It refuses the key: give another"):
        make(api_key="sk-another")
    assert server.asked() == [PROBE]
    with pytest.raises(ValueError, match="Is 'gtp-4o' a model there"):
        make(model="gtp-4o")
    with pytest.raises(ValueError, match="Ends base_url in /v1"):
        make(base_url=f"{server.address}/v2")
    with pytest.raises(ConnectionError, match=r"^127\.0\.0\.1:9: the connection failed"):
        make(base_url="http://127.0.0.1:9/v1")
    server.faults[ALL] = [Fault(body="<html>welcome</html>")]
    with pytest.raises(ValueError, match="the reply is no chat completion"):
        make()
    server.faults[ALL] = [Fault(content="prose")] * ATTEMPTS
    with pytest.warns(UserWarning, match="space.*no readable reply in 3: 'prose'"):
        make()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_the_key_is_nowhere(
    make: Make,
    server: JudgeServer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    status: int,
):
    caplog.set_level(logging.DEBUG)
    judge = make()
    for message in ("the key {key} is bad", f"Bearer {KEY.upper()}", "x" * 185 + " key {key} "):
        server.faults[ALL] = [Fault(status=status, message=message)] * 6
        with pytest.raises((PermissionError, ValueError, ConnectionError)) as error:
            make()
        shown = "".join(traceback.format_exception(error.value)) + repr(error.value)
        assert KEY.lower() not in shown.lower()
    server.faults = {"One.": [Fault(content=f'{{"key": "{KEY}"}}')] * ATTEMPTS}
    frame = judge.judge(["One.", "Two."])
    assert "[key]" in frame["problem"][0]
    out, err = capfd.readouterr()
    assert caplog.records
    shown = caplog.text + out + err + repr(judge) + judge.about + frame.to_csv()
    assert KEY not in shown
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) > 1000
    assert KEY.encode() not in files


def test_the_key_and_the_address_may_come_from_the_environment(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("FLOWHELPERS_CACHE", str(tmp_path))
    judge = EndpointJudge("space")
    assert server.requests[0].key == KEY
    assert judge.cache.path == tmp_path / "judge.sqlite"
    monkeypatch.delenv("OPENAI_API_KEY")
    server.key = None
    EndpointJudge("space")  # a server that needs none
    with pytest.raises(openai.OpenAIError, match="OPENAI_API_KEY"):
        EndpointJudge("space", base_url="https://api.openai.com/v1")
    with_password = server.url.replace("//", "//secret:secret@")
    assert "secret" not in EndpointJudge("space", base_url=with_password).about


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "supress"}, "unknown task 'supress'; did you mean 'suppress'"),
        ({"task": "suppress", "subject": "d"}, "subject 'd': expected a, b, c"),
        ({"subject": "a"}, "subject 'a': .*none to promote"),
        *(({"api_key": k}, "the key has a space") for k in ("sk-two words", "sk-ü", "a\nb", "a'")),
    ],
)
def test_wrong_arguments_say_what_is_expected(
    make: Make, server: JudgeServer, given: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message) as error:
        make(**given)
    assert given.get("api_key", KEY) not in str(error.value)
    assert server.requests == []
