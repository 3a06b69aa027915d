"""`dskd judge`: a language model behind an OpenAI-compatible address scores the answers of an evaluation. No torch."""

import hashlib
import json
import re
import statistics
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from string import Template
from threading import Event
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import cattrs
import stamina

from dskd.config.errors import UserError, one_line
from dskd.evaluation.scores import over_seeds
from dskd.rundir.evaluations import Answer
from dskd.rundir.files import append_json, as_user_error, read_json, read_json_lines, write_json
from dskd.rundir.layout import ANSWERS, JUDGED, RESULTS

PROMPT = Template(files("dskd.evaluation").joinpath("judge.txt").read_text(encoding="utf-8"))
KEY = "DSKD_JUDGE_KEY"
"""Variable of the environment that holds the key. It is sent to the address, and written nowhere."""
SCORE = re.compile(r"^\W*score\W*(10|[1-9])\b", re.IGNORECASE | re.MULTILINE)
ATTEMPTS, SECONDS = 6, 120.0
"""Of one question; and how long a reply may take."""
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Judge:
    address: str
    """Up to /v1."""
    model: str
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        place = urlsplit(self.address)
        if place.scheme not in ("http", "https") or not place.hostname or place.username is not None:
            raise UserError("--address: http(s)://HOST[:PORT]/v1 is expected, without a name or password in it")
        if self.key and place.scheme == "http" and not is_loopback(place.hostname):
            raise UserError(f"--address: {self.address}: {KEY} would be sent unencrypted; https is expected")

    def question(self, answer: Answer) -> dict[str, Any]:
        """The request on one answer."""
        text = PROMPT.substitute(prompt=answer.prompt, reference=answer.references[0], answer=answer.answer)
        return {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}

    def reply(self, question: Mapping[str, Any]) -> "Reply":
        """Ask; what may pass is waited for. Raises `UserError` with what the server says, without the key."""
        for attempt in stamina.retry_context(on=may_pass, attempts=ATTEMPTS, timeout=None, wait_max=30.0):
            with attempt:
                try:
                    return self.ask(question)
                except HTTPError as error:
                    if error.code in PASSING:
                        raise
                    said = f"HTTP {error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
                    raise UserError(f"--address: {self.address}: {self.without_key(said)}") from None
        raise AssertionError("not reached: the last attempt raises")

    def ask(self, question: Mapping[str, Any]) -> "Reply":
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        url = self.address.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(question).encode(), headers)
        with urllib.request.build_opener(NoRedirect).open(request, timeout=SECONDS) as response:
            body = response.read()
        try:
            value = json.loads(body)
            text, used = value["choices"][0]["message"]["content"], value.get("usage") or {}
            found = SCORE.findall(text)
            tokens = (int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
            return Reply(sum_of(question), int(found[-1]) if found else None, self.without_key(text), *tokens)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            said = self.without_key(body[:200].decode(errors="replace"))
            raise UserError(f"--address: {url}: no chat completion: {said}") from None

    def without_key(self, text: str) -> str:
        return one_line(text.replace(self.key, "***") if self.key else text, 2000)


@dataclass(frozen=True)
class Reply:
    question: str
    """Sum of the request, by which it is not asked again."""
    score: int | None
    """From 1 to 10; None where the reply names none."""
    text: str
    prompt_tokens: int
    completion_tokens: int


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *unused: Any) -> None:
        return None


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def may_pass(error: Exception) -> bool:
    return error.code in PASSING if isinstance(error, HTTPError) else isinstance(error, (URLError, OSError))


def sum_of(question: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def judge_evaluation(folder: Path, judge: Judge, parallel: int) -> dict[str, Any]:
    """Score the answers of a finished evaluation, and add "judge" to its results.json; returns that.

    Replies are kept in judge.jsonl as they come, and no question is asked twice. Raises `UserError` where the folder
    holds no evaluation, the server refuses, or no reply has a score.
    """
    results, answers = read_json(folder / RESULTS), list(read_answers(folder / ANSWERS))
    if results is None or not answers:
        raise UserError(f"{folder}: no {RESULTS} and {ANSWERS}: a finished evaluation, MODEL/eval/DATA, is expected")
    questions = {sum_of(question): question for question in map(judge.question, answers)}
    replies = {key: reply for key, reply in kept(folder / JUDGED).items() if key in questions}
    missing = [question for key, question in questions.items() if key not in replies]
    with as_user_error(folder, "judge"):
        for reply in asked(judge, missing, parallel):
            append_json(folder / JUDGED, asdict(reply))
            replies[reply.question] = reply
        found = summary(judge, answers, replies, list(results.get("seeds", []))) | {"asked": len(missing)}
        write_json(folder / RESULTS, results | {"judge": found})
    return found


def asked(judge: Judge, questions: Sequence[Mapping[str, Any]], parallel: int) -> Iterator[Reply]:
    """Replies as they come; after an error nothing more is asked."""
    failed = Event()

    def ask(question: Mapping[str, Any]) -> Reply | None:
        if failed.is_set():
            return None
        try:
            return judge.reply(question)
        except BaseException:
            failed.set()
            raise

    error: Exception | None = None
    with ThreadPoolExecutor(parallel) as pool:
        try:
            for done in as_completed([pool.submit(ask, question) for question in questions]):
                try:
                    reply = done.result()
                except (UserError, OSError) as problem:  # what else was replied is kept before it is told
                    error = error or problem
                    continue
                if reply is not None:
                    yield reply
        finally:
            failed.set()
    if isinstance(error, OSError):
        raise UserError(f"--address: {judge.address}: {judge.without_key(str(error))}")
    if error is not None:
        raise error


def summary(
    judge: Judge, answers: Sequence[Answer], replies: Mapping[str, Reply], seeds: Sequence[int]
) -> dict[str, Any]:
    """Mean score by seed, and what it took."""
    by_seed: dict[int, list[int]] = {seed: [] for seed in seeds}
    for answer in answers:
        score = replies[sum_of(judge.question(answer))].score
        if score is not None and answer.seed in by_seed:
            by_seed[answer.seed].append(score)
    if not by_seed or not all(by_seed.values()):
        raise UserError(f"judge: {judge.model} gives no score from 1 to 10; its replies are in {JUDGED}")
    tokens = {name: sum(getattr(r, name) for r in replies.values()) for name in ("prompt_tokens", "completion_tokens")}
    judged = sum(map(len, by_seed.values()))
    counts = {"model": judge.model, "judged": judged, "without_score": len(answers) - judged}
    return over_seeds([statistics.fmean(scores) for scores in by_seed.values()]) | counts | tokens


def read_answers(file: Path) -> Iterator[Answer]:
    for line in read_json_lines(file):
        try:
            answer = cattrs.structure(line, Answer)
            answer.references[0]
        except (cattrs.BaseValidationError, TypeError, ValueError, LookupError):
            raise UserError(f"{file}: is damaged: a line holds no answer") from None
        yield answer


def kept(file: Path) -> dict[str, Reply]:
    """Replies of earlier calls; a damaged line is none."""
    found = {}
    for line in read_json_lines(file):
        try:
            reply = cattrs.structure(line, Reply)
        except (cattrs.BaseValidationError, TypeError, ValueError, KeyError):
            continue
        found[reply.question] = reply
    return found
