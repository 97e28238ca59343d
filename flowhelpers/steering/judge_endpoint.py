"""A judge of texts behind any OpenAI-compatible endpoint, with the paper's prompts (B.1, B.2)."""

import json
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field

from flowhelpers.core.cache import DiskCache, cache_folder, key_of
from flowhelpers.core.features import check_choice
from flowhelpers.core.files import DATA
from flowhelpers.core.progress_bar import progress

if TYPE_CHECKING:
    import pandas as pd

OPENAI = "https://api.openai.com/v1"
NO_KEY = "no-key-needed"  # sent to servers that need none
KEY = r"[!#-%(-;=?-\[\]-~]+"  # of characters that no server escapes when it repeats a key
BEST = 5  # the highest score
CONCURRENCY = 8  # requests at a time
ATTEMPTS, AGAIN = 3, 1.0  # at a readable reply; at temperature 0 the same one would come again
RETRIES, TIMEOUT = 5, 60.0  # of one request; seconds
STOP_AFTER = 8  # failed requests in a row, or unreadable replies to the first texts
PROBE = "The sun rose over the quiet harbour, and the first boats went out to sea."


Score = Annotated[int, BeforeValidator(str), Field(ge=0, le=BEST)]  # 4, 4.0 or "4", and not true


class _Promotion(BaseModel):
    coherence: Score
    behavioral: Score


class _Suppression(BaseModel):
    coherence: Score
    behavioral: tuple[Score, Score, Score]  # of the subjects a, b and c


# Where servers put a reply: those that part reasoning from it may put all of it there.
PLACES = ("content", "reasoning_content", "reasoning", "refusal")
REPLIES = {"promote": _Promotion, "suppress": _Suppression}  # what the prompts ask for
SUBJECTS = "abc"
# How reasoning is marked by servers that do not part it from the reply.
THINKS = r"(?i)\[think\]|[<◁][|\w:]*(?:think|thought|reason)[^>▷]*[>▷]"
THOUGHT = r"(?i)[<◁[]/[|\w:]*(?:think|thought|reason)\w*[>▷\]]|<\|(?:end_of_thought|message)\|>"
PROMPTS = {
    task: [(DATA / "judge" / f"{task}-{x}.txt").read_text("utf-8") for x in ("system", "input")]
    for task in REPLIES
}


def read_reply(reply: str, task: str) -> BaseModel:
    """The scores of a reply: its last JSON object that has them, whatever words stand around it.

    What is thought aloud, up to `</think>`, does not count, nor a draft before an object that
    cannot be read. A ValueError if none is left, or if its values are no scores.
    """
    said, kind = re.split(THOUGHT, reply)[-1], REPLIES[task]
    said = "" if re.search(THINKS, said) else said
    found: list[Any] = []
    decoder, end = json.JSONDecoder(object_hook=lambda each: found.append(each) or each), 0
    for brace in re.finditer(r"""\{(\s*(?:["'“‘]|\w+\s*:))?""", said):
        try:  # unless it lies within another
            end = decoder.raw_decode(said, brace.start())[1] if brace.start() >= end else end
        except ValueError:
            found = [] if brace[1] else found
    with_scores = [each for each in found if kind.model_fields.keys() <= each.keys()]
    return kind.model_validate((with_scores or [None])[-1])


class _RequestError(Exception):
    """Status and problem. It holds no error of the client, whose request has the key."""


class EndpointJudge:
    """A language model as judge. Only its `client` holds the key.

    Args:
        theme: What it looks for; to suppress, a name only, as the prompt has its own subjects.
        task: `promote` (paper B.2) or `suppress` (B.1).
        model: The model's name at the endpoint.
        base_url: The endpoint's address; that in OPENAI_BASE_URL, or OpenAI's, unless given.
        api_key: The key; that in OPENAI_API_KEY unless given. It is written nowhere.
        subject: To suppress, the letter of the subject whose score counts: a, b or c.
        cache: The file that keeps replies; `judge.sqlite` in `cache_folder()` unless given.
        temperature: Of the first attempt; later ones have 1. None sends none, as models ask for
            that take their own alone.
    """

    def __init__(
        self,
        theme: str,
        task: str = "promote",
        model: str = "gpt-4o-mini",
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        subject: str | None = None,
        cache: Path | None = None,
        temperature: float | None = 0.0,
    ) -> None:
        """Asks about one small text, to see that it answers.

        A key that the server refuses is a PermissionError, a server that fails a ConnectionError,
        an unknown model or another wrong argument a ValueError.
        """
        import openai

        check_choice("task", task, REPLIES)
        if subject not in ([*SUBJECTS] if task == "suppress" else [None]):
            raise ValueError(f"subject {subject!r}: expected a, b, c to suppress, none to promote")
        self.theme, self.task, self.model, self.subject = theme, task, model, subject
        self.temperature = temperature
        self.cache = DiskCache(Path(cache or cache_folder() / "judge.sqlite"))
        url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        self.address = urlsplit(url).netloc.rpartition("@")[2]  # without a password
        key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        if key and not re.fullmatch(KEY, key):
            raise ValueError("the key has a space, a quote or another character that no key has")
        key = key or (None if self.address.endswith("openai.com") else NO_KEY)
        client = openai.OpenAI(api_key=key, base_url=url, timeout=TIMEOUT, max_retries=RETRIES)
        self.client: Any = client
        if problem := self._ask_all([PROBE]).get(PROBE):
            warnings.warn(f"{self.about}: {problem}", stacklevel=2)

    @property
    def about(self) -> str:
        """Which judge this is, in a line."""
        return f"{self.model} at {self.address}, task {self.task}, theme {self.theme!r}"

    def judge(self, texts: Sequence[str]) -> "pd.DataFrame":
        """Scores from 0 to 1, one row a text: `behavioral`, `coherence`; and `problem`.

        To suppress, `behavioral` is that of the judge's subject, and `behavioral_a`, `behavioral_b`
        and `behavioral_c` are those of all three of which the paper's prompt asks (B.1).

        A text without a readable reply has no scores (NaN, CHOICES 23), and `problem` says why. An
        empty text has 0 in both, unasked. No text is asked about again whose reply is kept: the
        same call goes on where one was stopped. Errors are those of the first request; it is a
        ConnectionError if `STOP_AFTER` requests in a row failed, or all, and a ValueError with one
        reply if none of the first `STOP_AFTER` texts has a readable one.
        """
        import pandas as pd

        keys = {text: self._key(text) for text in texts if text.strip()}
        known = self.cache.get(keys.values())
        unknown = [text for text, key in keys.items() if key not in known]
        problems = self._ask_all(unknown, some_read=bool(known))
        answers = self.cache.get(keys.values())
        letters = [f"behavioral_{letter}" for letter in SUBJECTS] if self.subject else []
        rows = []
        for text in texts:
            row = [0.0 if text not in keys else float("nan")] * (1 + len(letters or "b"))
            if answer := answers.get(keys.get(text, "")):
                row = [answer["coherence"], *np.atleast_1d(answer["behavioral"])]
            rows.append(row)
        table = pd.DataFrame(rows, columns=["coherence", *(letters or ["behavioral"])], dtype=float)
        if letters:
            table["behavioral"] = table[f"behavioral_{self.subject}"]
        told = pd.Series([problems.get(text, "") for text in texts], dtype=object)
        return (table[["behavioral", "coherence", *letters]] / BEST).assign(problem=told)

    def _ask_all(self, texts: Sequence[str], some_read: bool = False) -> dict[str, str]:
        """What is wrong with the texts that got no readable reply; an error if none can be read."""
        problems, failures = {}, 0
        pool = ThreadPoolExecutor(CONCURRENCY)
        futures = {pool.submit(self._ask, text): text for text in texts}
        try:
            for future in progress(as_completed(futures), "judge", len(futures)):
                try:
                    problem, failures = future.result(), 0
                except _RequestError as error:
                    (status, problem), failures = error.args, failures + 1
                    is_hopeless = status in (401, 403, 404)  # whatever the text
                    if is_hopeless or failures == min(STOP_AFTER, len(texts)):
                        raise self._error(status, problem) from None
                if problem:
                    problems[futures[future]] = problem
                stop = not some_read and len(problems) == STOP_AFTER
                if stop and not self.cache.get(map(self._key, texts)):  # in whatever order told
                    told = f"none of the first {STOP_AFTER} texts got scores of 0 to {BEST}"
                    raise ValueError(f"{self.about}: {told}: {problem}. Try another model")
        finally:
            pool.shutdown(cancel_futures=True)
        return problems

    def _ask(self, text: str) -> str:
        """Asks until a reply can be read, and keeps it; what is wrong with the last, or ""."""
        reply = cut = ""
        for attempt in range(ATTEMPTS):
            reply, end = self._request(text, self.temperature if attempt == 0 else AGAIN)
            cut = " (the last cut at the server's limit of tokens)" if end == "length" else ""
            try:
                answer = read_reply("" if cut else reply, self.task)
            except (ValueError, RecursionError):
                continue
            self.cache.put({self._key(text): answer.model_dump(mode="json")})
            return ""
        return f"no readable reply in {ATTEMPTS}{cut}: {self._quote(reply)!r}"

    def _request(self, text: str, temperature: float | None) -> tuple[str, str | None]:
        """The text of one reply, and why it ends there."""
        import openai

        options = {} if self.temperature is None else {"temperature": temperature}
        try:
            reply = self.client.chat.completions.create(
                model=self.model, messages=self._messages(text), **options
            )
            choice = reply.choices[0]
            said = next(filter(None, (getattr(choice.message, at, None) for at in PLACES)), "")
            if isinstance(said, list):  # parts, of which reasoning is no text
                kinds = (None, "text", "output_text")
                said = "".join(p.get("text") or "" for p in said if p.get("type") in kinds)
            return str(said), choice.finish_reason
        except openai.APIStatusError as error:  # one that refuses a key may repeat a part of it
            status = error.status_code
            said = "" if status in (401, 403) else f": {self._quote(error.message)}"
            problem = f"the server answers {status}{said}"
        except openai.APIConnectionError as error:
            said = self._quote(str(error.__cause__ or error))
            status, problem = 0, f"the connection failed: {said}"
        except (openai.OpenAIError, ValueError, AttributeError, LookupError, TypeError):
            status, problem = 200, "the reply is no chat completion"
        raise _RequestError(status, problem)

    def _error(self, status: int, problem: str) -> Exception:
        kind, hint = ConnectionError, f"Replies so far are kept in {self.cache.path}"
        if status in (401, 403):
            kind, hint = PermissionError, "It refuses the key: give another"
        elif status in (400, 422) and "temperature" in problem:
            option = "-p 'advanced={\"judge_temperature\": null}'"
            kind, hint = ValueError, f"Leave it out: temperature=None, or of a notebook {option}"
        elif status in (200, 400, 404, 422):
            kind, hint = ValueError, f"Is {self.model!r} a model there? Ends base_url in /v1?"
        return kind(f"{self.address}: {problem}. {hint}")

    def _quote(self, said: str) -> str:
        said = re.sub(re.escape(self.client.api_key), "[key]", said, flags=re.IGNORECASE)
        return shorten(said, 200, placeholder=" …")

    def _key(self, text: str) -> str:
        asked = {"model": self.model, "base_url": str(self.client.base_url)}
        return key_of(asked | {"temperature": self.temperature, "messages": self._messages(text)})

    def _messages(self, text: str) -> list[dict[str, str]]:
        system, template = PROMPTS[self.task]
        before, after = template.split("{text}")  # whatever braces are in the text stay
        user = before.replace("{theme}", self.theme) + text + after
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]
