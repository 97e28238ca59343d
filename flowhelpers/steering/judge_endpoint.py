"""A judge of texts behind any OpenAI-compatible endpoint, with the paper's prompts (B.1, B.2).

Each text is asked about by itself. A readable reply is kept on disk as it comes, so that a call
that was stopped goes on from there, and no reply is paid for twice.
"""

import json
import os
import re
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from flowhelpers.core.cache import DiskCache, cache_folder, key_of
from flowhelpers.core.features import suggestion
from flowhelpers.core.files import DATA
from flowhelpers.core.progress_bar import progress

if TYPE_CHECKING:
    import pandas as pd

PROMPTS = DATA / "judge"
OPENAI = "https://api.openai.com/v1"
NO_KEY = "no-key-needed"  # what servers are sent that need none
KEYS = r"[!#-%(-;=?-\[\]-~]*"  # what no server writes in another way, when it repeats a key
BEST = 5  # the highest score
AGAIN = 1.0  # temperature from the second attempt on: at 0 the same reply would come again
RETRIES = 5  # of one request that the server is too busy for, or whose connection breaks
PROBE_RETRIES = 2  # of the first, so that a mistake shows soon
STOP_AFTER = 8  # texts in a row whose requests failed
HOPELESS = (401, 403, 404)  # statuses that are of no one text, and that no later try would change
PROBE = "The sun rose over the quiet harbour, and the first boats went out to sea."
PRICES = {"gpt-4o-mini": (0.15, 0.60)}  # dollars per million tokens, in and out
CHARACTERS = 4  # of a token of English, about
REPLY_TOKENS = 25  # of a reply as asked for, about


@dataclass(frozen=True)
class Task:
    """What the paper asks a judge, word for word.

    Attributes:
        name: `promote` or `suppress`.
        system: The system prompt.
        input: The message for one text, with places for `{text}` and, to promote, `{theme}`.
        subjects: What the behavioural scores of one reply are about, by letter; empty where there
            is one score, of the theme.
    """

    name: str
    system: str
    input: str
    subjects: Mapping[str, str] = field(default_factory=dict)


def _task(name: str, subjects: Mapping[str, str]) -> Task:
    system, user = (
        (PROMPTS / f"{name}-{part}.txt").read_text(encoding="utf-8") for part in ("system", "input")
    )
    return Task(name, system, user, subjects)


TASKS = {
    "suppress": _task(  # B.1
        "suppress",
        {
            "a": "Personalities, their influence and achievements",
            "b": "Scientific concepts and entities",
            "c": "Research methodology and experimentation",
        },
    ),
    "promote": _task("promote", {}),  # B.2
}


@dataclass(frozen=True)
class _Reply:
    """What came of asking: an answer, or why there is none.

    Attributes:
        answer: The scores, as the task's prompt has them.
        problem: In a few words; "" with an answer.
        failed: The HTTP status of a request that failed, 0 where there was no whole reply; None if
            a reply came, readable or not.
    """

    answer: dict[str, Any] | None = None
    problem: str = ""
    failed: int | None = None


@dataclass(frozen=True)
class EndpointJudge:
    """A judge that is a language model behind an OpenAI-compatible endpoint.

    Attributes:
        theme: What it looks for in texts.
        task: `promote` or `suppress`.
        model: The model's name at the endpoint.
        address: The endpoint's host, and port.
        store: Where replies are kept.
        subject: The letter of the subject whose score counts; None to promote.
        concurrency: Requests at a time.
        attempts: How often a text is asked about at most, until a reply can be read.
        timeout: Seconds to wait for a reply.
        temperature: Of the first attempt; None leaves every one to the server.
        prices: Dollars per million tokens, in and out; None if unknown.
        client: The openai package's; it has the key, which nothing else here has.
    """

    theme: str
    task: str
    model: str
    address: str
    store: DiskCache
    subject: str | None = None
    concurrency: int = 8
    attempts: int = 3
    timeout: float = 60.0
    temperature: float | None = 0.0
    prices: tuple[float, float] | None = None
    client: Any = field(default=None, repr=False, compare=False)

    @property
    def about(self) -> str:
        """Which judge this is, in a line for people and records."""
        subject = f", subject {self.subject}" if self.subject else ""
        return f"{self.model} at {self.address}, task {self.task}, theme {self.theme!r}{subject}"

    def judge(self, texts: Sequence[str]) -> "pd.DataFrame":
        """Scores from 0 to 1, one row a text: `behavioral`, `coherence`; and `problem`.

        A text of which there is no readable reply has no scores (NaN, CHOICES 23), and `problem`
        says why. An empty text has 0 in both, unasked. Equal texts are asked about once.

        Raises:
            PermissionError: If the server comes to refuse the key.
            ValueError: If it refuses the request as such, or does not know the model any more.
            ConnectionError: If `STOP_AFTER` requests in a row failed, or all of them. Whichever
                it is, the replies so far are kept, and the same call goes on from there.
        """
        import pandas as pd

        keys = self._keys(texts)
        answers = self.store.get(keys.values())
        replies = {text: _Reply(answers[key]) for text, key in keys.items() if key in answers}
        replies |= self._replies([text for text in keys if text not in replies])
        rows = [
            (*self._scores(replies[text].answer), replies[text].problem)
            if text in replies
            else (0.0, 0.0, "")
            for text in texts
        ]
        kinds = {"behavioral": float, "coherence": float, "problem": object}
        return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)

    def plan(self, texts: Sequence[str] | int, tokens_each: int | None = None) -> str:
        """What `judge` would send and cost, to be said before it starts.

        Args:
            texts: The texts; or only how many, all of them taken for new.
            tokens_each: Tokens of a text; estimated from the texts unless given.

        Raises:
            ValueError: If there is only a number of texts, and no `tokens_each`.
        """
        if isinstance(texts, int):
            if tokens_each is None:
                raise ValueError("how long the texts are is not known: give tokens_each as well")
            count, n, tokens = texts, texts, texts * tokens_each
        else:
            keys = self._keys(texts)
            known = self.store.get(keys.values())
            new = [text for text in keys if keys[text] not in known]
            count, n = len(texts), len(new)
            tokens = n * tokens_each if tokens_each else sum(map(len, new)) // CHARACTERS
        prompt = TASKS[self.task].system + _fill(self.task, self.theme, "")
        into, out = tokens + n * len(prompt) // CHARACTERS, n * REPLY_TOKENS
        cost = "price unknown"
        if self.prices:
            dollars = (into * self.prices[0] + out * self.prices[1]) / 1e6
            cost = f"${dollars:,.4f} (at most ${dollars * self.attempts:,.4f})"
        return (
            f"{self.about}: {count:,} texts, {count - n:,} of them empty, equal to others or"
            f" judged before; {n:,} requests (at most {n * self.attempts:,}, for replies that"
            f" cannot be read), {self.concurrency} at a time. Estimated: {into:,} tokens in,"
            f" {out:,} out, {cost}"
        )

    def _keys(self, texts: Sequence[str]) -> dict[str, str]:
        """Each text that is to be asked about, once, with its key in the store."""
        asked = {
            "model": self.model,
            "base_url": str(self.client.base_url),
            "temperature": self.temperature,
        }
        return {
            text: key_of(asked | {"messages": self._messages(text)})
            for text in dict.fromkeys(texts)
            if text.strip()
        }

    def _messages(self, text: str) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": TASKS[self.task].system},
            {"role": "user", "content": _fill(self.task, self.theme, text)},
        ]

    def _scores(self, answer: Mapping[str, Any] | None) -> tuple[float, float]:
        """Behavioral and coherence from 0 to 1 (CHOICES 22)."""
        if answer is None:
            return float("nan"), float("nan")
        found = answer["behavioral"]
        if self.subject:
            found = found[list(TASKS[self.task].subjects).index(self.subject)]
        return found / BEST, answer["coherence"] / BEST

    def _replies(self, texts: Sequence[str]) -> dict[str, _Reply]:
        """Asks about each, several at a time; answers are kept as they come."""
        keys = self._keys(texts)
        todo = iter(texts)
        waiting: dict[Future[_Reply], str] = {}
        came: list[tuple[str, _Reply]] = []
        replies: dict[str, _Reply] = {}
        kept = failures = 0
        stop = None

        def keep(futures: Iterable[Future[_Reply]]) -> None:
            nonlocal kept
            done = {waiting[future]: future.result() for future in futures}
            answers = {keys[text]: reply.answer for text, reply in done.items() if reply.answer}
            self.store.put(answers)
            kept += len(answers)
            came.extend(done.items())

        stopped = threading.Event()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for _ in progress(range(len(texts)), "judge"):
                if not came:
                    for text in islice(todo, self.concurrency - len(waiting)):
                        waiting[pool.submit(self._ask, text, stopped)] = text
                    done = wait(waiting, return_when=FIRST_COMPLETED).done
                    keep(done)
                    for future in done:
                        del waiting[future]
                text, reply = came.pop()
                replies[text] = reply
                failures = 0 if reply.failed is None else failures + 1
                if reply.failed in HOPELESS or failures == min(STOP_AFTER, len(texts)):
                    stop = reply
                    break
        finally:  # whatever ends it, what has come is kept and nothing more is asked
            stopped.set()
            pool.shutdown(wait=False)
            keep([each for each in waiting if each.done() and not each.exception()])
        if stop:
            raise self._error(
                stop,
                f". The judge stops: {kept} new replies are kept in {self.store.path},"
                " and the same call goes on from there",
            )
        return replies

    def _ask(self, text: str, stopped: threading.Event) -> _Reply:
        """Asks about a text until a reply can be read, or none may be had."""
        try:
            text.encode()
        except UnicodeEncodeError:
            return _Reply(problem="not valid Unicode, which cannot be sent")
        reply = _Reply()
        for attempt in range(self.attempts):
            again = attempt > 0 and self.temperature is not None
            reply = self._request(text, AGAIN if again else self.temperature)
            if reply.answer or reply.failed is not None or stopped.is_set():
                return reply
        return replace(reply, problem=f"no readable reply in {self.attempts}: {reply.problem}")

    def _request(self, text: str, temperature: float | None) -> _Reply:
        """One request. No error leaves it, for those of the client hold the key."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        options = {} if temperature is None else {"temperature": temperature}
        try:
            reply = self.client.chat.completions.create(
                model=self.model, messages=self._messages(text), **options
            )
            content = reply.choices[0].message.content
        except APIStatusError as error:
            return _Reply(problem=self._words(error), failed=error.status_code)
        except APITimeoutError:
            return _Reply(problem=f"no reply within {self.timeout:g} s", failed=0)
        except APIConnectionError as error:
            cause = self._quote(str(error.__cause__ or error))
            return _Reply(problem=f"the connection failed: {cause}", failed=0)
        except (OpenAIError, ValueError, AttributeError, LookupError, TypeError):
            return _Reply(problem="the reply is no chat completion", failed=200)
        if not isinstance(content, str):
            return _Reply(problem="the reply has no text")
        try:
            return _Reply(read_reply(content, TASKS[self.task]))
        except ValueError as error:
            return _Reply(problem=self._quote(str(error)))

    def _words(self, error: Any) -> str:
        """What a server said with an error status.

        Where it refuses a key, it may repeat a part of it: only its short code is told.
        """
        body = error.body if isinstance(error.body, dict) else {}
        said = body.get("message") or error.body or ""
        if error.status_code in (401, 403):
            said = body.get("code") or ""
        said = self._quote(str(said))
        return f"the server answers {error.status_code}" + (f": {said}" if said else "")

    def _quote(self, said: str) -> str:
        """What others said, in short and without the key."""
        said = re.sub(re.escape(self.client.api_key), "[key]", said, flags=re.IGNORECASE)
        return shorten(said, 200, placeholder=" …")

    def _error(self, reply: _Reply, end: str = "") -> Exception:
        """The error that a failed request is reported by."""
        start = f"{self.address}: {reply.problem}"
        match reply.failed:
            case 401 | 403:
                hint = ". It refuses the key: give another, as api_key or in OPENAI_API_KEY"
                return PermissionError(start + hint + end)
            case 404:
                hint = (
                    f". Has it a model {self.model!r}? Does base_url end as it should, as in /v1?"
                )
                return ValueError(start + hint + end)
            case 200:
                hint = ". Is base_url that of an OpenAI-compatible endpoint, as http://host/v1?"
                return ValueError(start + hint + end)
            case 400 | 422:
                return ValueError(start + end)
        return ConnectionError(start + end)


def endpoint_judge(
    theme: str,
    task: str = "promote",
    model: str = "gpt-4o-mini",
    base_url: str | None = None,
    api_key: str | None = None,
    *,
    subject: str | None = None,
    store: Path | None = None,
    concurrency: int = 8,
    attempts: int = 3,
    timeout: float = 60.0,
    temperature: float | None = 0.0,
    prices: tuple[float, float] | None = None,
) -> EndpointJudge:
    """Makes a judge, and asks it about one small text to see that it answers.

    Args:
        theme: What it looks for. To promote, the prompt names it; to suppress, the prompt has three
            subjects of its own (`TASKS`), and this is a name only.
        task: `promote` (paper B.2) or `suppress` (B.1).
        model: The model's name at the endpoint.
        base_url: The endpoint's address; that in OPENAI_BASE_URL, or OpenAI's, unless given.
        api_key: The key; that in OPENAI_API_KEY unless given. Servers other than OpenAI's may need
            none. It is written nowhere.
        subject: To suppress, the letter of the subject whose score counts.
        store: The file where replies are kept; `judge.sqlite` in `tables.cache_folder()` unless
            given. Judges may share it.
        concurrency: Requests at a time.
        attempts: How often a text is asked about at most, until a reply can be read.
        timeout: Seconds to wait for a reply.
        temperature: Of the first attempt; later ones have 1. None sends none, for models that
            refuse it.
        prices: Dollars per million tokens, in and out; from `PRICES` unless given.

    Raises:
        ValueError: If there is no such task, subject or model, no key for OpenAI, or the address is
            no such endpoint's.
        PermissionError: If the server refuses the key.
        ConnectionError: If the server cannot be reached, or fails.
    """
    import openai

    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}{suggestion(task, TASKS)}")
    subjects = TASKS[task].subjects
    if subject not in (subjects or (None,)):
        known = ", ".join(f"{letter} ({name})" for letter, name in subjects.items())
        expected = f"give one of {known}" if known else "it has none, only the theme"
        raise ValueError(f"subject {subject!r} for the task {task!r}: {expected}")
    if not theme.strip():
        raise ValueError(f"the theme is {theme!r}: give a few words that name it")
    if min(concurrency, attempts) < 1 or timeout <= 0:
        raise ValueError(
            f"concurrency is {concurrency}, attempts {attempts}, timeout {timeout}:"
            " expected at least 1, at least 1, and more than 0"
        )
    url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    address = _address(url)
    key = _key(api_key or os.environ.get("OPENAI_API_KEY") or "", address)
    client = openai.OpenAI(api_key=key, base_url=url, timeout=timeout, max_retries=RETRIES)
    judge = EndpointJudge(
        theme=theme,
        task=task,
        model=model,
        address=address,
        store=DiskCache(Path(store or cache_folder() / "judge.sqlite")),
        subject=subject,
        concurrency=concurrency,
        attempts=attempts,
        timeout=timeout,
        temperature=None if temperature is None else float(temperature),
        prices=prices or PRICES.get(model),
        client=client,
    )
    probing = replace(judge, client=client.with_options(max_retries=PROBE_RETRIES))
    reply = probing._request(PROBE, judge.temperature)
    if reply.failed is not None:
        raise judge._error(reply)
    if reply.answer:
        judge.store.put({judge._keys([PROBE])[PROBE]: reply.answer})
    else:
        warnings.warn(
            f"{judge.about}: its first reply cannot be read, {reply.problem}", stacklevel=2
        )
    return judge


def read_reply(reply: str, task: Task) -> dict[str, Any]:
    """The scores of a reply, which is one JSON object as the prompt asks for and nothing else.

    A Markdown fence around it is taken off.

    Raises:
        ValueError: If it is anything else; it says what.
    """
    fenced = re.fullmatch(r"\s*```(?:json)?\s(.*)```\s*", reply, re.DOTALL | re.IGNORECASE)
    brief = repr(shorten(reply, 80, placeholder=" …"))
    try:  # an object as a tuple of pairs, so that a key given twice is seen
        found = json.loads(fenced[1] if fenced else reply, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON: {brief}") from None
    keys = sorted(key for key, _ in found) if isinstance(found, tuple) else []
    if keys != ["behavioral", "coherence"]:
        raise ValueError(f"not an object of coherence and behavioral alone: {brief}")
    answer = dict(found)
    scores = [answer["behavioral"]]
    if task.subjects:
        scores = answer["behavioral"]
        if not isinstance(scores, list) or len(scores) != len(task.subjects):
            raise ValueError(f"behavioral is not a list of {len(task.subjects)}: {brief}")
    if not all(
        type(score) is int and 0 <= score <= BEST for score in (answer["coherence"], *scores)
    ):
        raise ValueError(f"a score is not an integer from 0 to {BEST}: {brief}")
    return answer


def _fill(task: str, theme: str, text: str) -> str:
    """The message for a text; whatever braces are in it stay."""
    before, after = TASKS[task].input.split("{text}")
    return before.replace("{theme}", theme) + text + after


def _address(url: str) -> str:
    """The host, and port, of an address. An address that is wrong is not quoted: it may hold a key.

    Raises:
        ValueError: If it is none, or has more in it.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        known = False
    if not known:
        raise ValueError("base_url is no address: expected one such as http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "base_url has a user name, a query or a fragment: expected an address alone, such as"
            f" http://{parts.hostname}/v1, and a key as api_key or in OPENAI_API_KEY"
        )
    return parts.netloc


def _key(given: str, address: str) -> str:
    """The key to send.

    Raises:
        ValueError: If there is none and OpenAI is asked, or it cannot be one.
    """
    key = given.strip()
    if not key and re.search(r"(^|\.)openai\.com(:\d+)?$", address):
        raise ValueError(
            f"no key for {address}: give it as api_key or in the environment variable"
            " OPENAI_API_KEY, or give the base_url of a server that needs none"
        )
    if not re.fullmatch(KEYS, key):
        raise ValueError("the key has a space, a quote or another character that no key has")
    return key or NO_KEY
