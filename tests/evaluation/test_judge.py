"""A judge behind a real HTTP server on loopback: what is asked, what is kept, what may pass, and where the key goes."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import stamina

from dskd.config.errors import UserError
from dskd.evaluation.judge import PROMPT, Judge, judge_evaluation
from dskd.rundir.evaluations import evaluations_in

KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Answers as `replies` say, (status, headers, content) for the n-th request; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None, dict]] = []
        self.replies: Callable[[int, str], tuple[int, dict, str]] = lambda number, text: chat("Score: 7")
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        status, headers, text = self.server.replies(len(self.server.asked), body["messages"][0]["content"])
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *unused: object) -> None:
        pass


def chat(text: str) -> tuple[int, dict, str]:
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage})


@pytest.fixture
def server():
    with stamina.set_testing(True, attempts=4):  # no waits
        server = Server()
        yield server
        server.shutdown()
        server.server_close()


@pytest.fixture
def evaluation(tmp_path):
    """Three records with two seeds; the second record has one answer with both."""
    folder = tmp_path / "model" / "eval" / "dev"
    folder.mkdir(parents=True)
    lines = [
        {
            "index": i,
            "seed": seed,
            "prompt": f"Prompt {i} $reference",
            "answer": "same" if i == 1 else f"answer {i} of {seed}",
        }
        | {"references": [f"first {i}", "second"], "rougel": 1.0, "exact_match": 0.0}
        for seed in (10, 20)
        for i in range(3)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"mean": 1.0, "deviation": 0.0, "by_seed": [1.0, 1.0]}
    (folder / "results.json").write_text(json.dumps({"records": 3, "seeds": [10, 20], "rougel": scores}))
    return folder


def test_scores_are_added_to_the_results_and_no_question_is_asked_twice(server, evaluation):
    server.replies = lambda number, text: chat(
        "It is right.\n**Score: 9**" if "of 10\n" in text else "Score: 4\nscore: 5"
    )
    judge = Judge(server.address, "some/judge", KEY)
    found = judge_evaluation(evaluation, judge, parallel=3)
    assert found["by_seed"] == [pytest.approx((9 + 5 + 9) / 3), 5.0]
    assert (found["judged"], found["without_score"], found["asked"]) == (6, 0, 5)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (500, 50)
    results = json.loads((evaluation / "results.json").read_text())
    assert results["judge"] == found
    assert results["rougel"]["mean"] == 1.0
    again = judge_evaluation(evaluation, judge, parallel=3)
    assert again == found | {"asked": 0}
    assert len(server.asked) == 5
    judge_evaluation(evaluation, Judge(server.address, "another/judge"), parallel=3)
    assert len(server.asked) == 10
    (report,) = evaluations_in(evaluation.parents[1])
    assert report.scores["judge"] == tuple(found["by_seed"])


def test_what_is_asked(server, evaluation):
    judge_evaluation(evaluation, Judge(server.address, "some/judge", KEY), parallel=1)
    path, authorization, body = server.asked[0]
    assert (path, authorization, body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "some/judge")
    text = PROMPT.substitute(prompt="Prompt 0 $reference", reference="first 0", answer="answer 0 of 10")
    assert body["messages"] == [{"role": "user", "content": text}]
    assert "Prompt 0 $reference\n" in text
    judge_evaluation(evaluation, Judge(server.address, "keyless"), parallel=1)
    assert server.asked[-1][1] is None


def test_what_may_pass_is_asked_again(server, evaluation):
    server.replies = lambda number, text: chat("Score: 3") if number > 3 else ((500, 429, 503)[number - 1], {}, "busy")
    assert judge_evaluation(evaluation, Judge(server.address, "judge"), parallel=1)["mean"] == 3.0
    assert len(server.asked) == 5 + 3


@pytest.mark.parametrize(
    ("reply", "words", "requests"),
    [
        ((401, {}, f"no such key: {KEY}"), "HTTP 401 Unauthorized: no such key: ***", 1),
        ((503, {}, "busy"), "HTTP Error 503: Service Unavailable", 4),
        ((302, {"Location": "http://127.0.0.1:9/v1"}, ""), "HTTP 302 Found", 1),
        ((200, {}, f"<html>{KEY}"), "no chat completion: <html>***", 1),
        ((200, {}, '{"choices": []}'), 'no chat completion: {"choices": []}', 1),
    ],
)
def test_what_does_not_pass_is_one_line_without_the_key(server, evaluation, reply, words, requests):
    server.replies = lambda number, text: reply
    before = (evaluation / "results.json").read_bytes()
    with pytest.raises(UserError) as told:
        judge_evaluation(evaluation, Judge(server.address, "judge", KEY), parallel=1)
    assert words in str(told.value)
    assert KEY not in str(told.value)
    assert len(server.asked) == requests
    assert (evaluation / "results.json").read_bytes() == before


def test_replies_before_an_error_are_kept(server, evaluation):
    server.replies = lambda number, text: chat(f"Score: 2 {KEY}") if number < 3 else (400, {}, "no")
    judge = Judge(server.address, "judge", KEY)
    with pytest.raises(UserError, match="HTTP 400"):
        judge_evaluation(evaluation, judge, parallel=1)
    kept = (evaluation / "judge.jsonl").read_text().splitlines()
    assert len(kept) == 2
    server.replies = lambda number, text: chat("Score: 2")
    assert judge_evaluation(evaluation, judge, parallel=1)["asked"] == 3
    written = "".join(path.read_text() for path in evaluation.iterdir())
    assert KEY not in written
    assert KEY not in repr(judge)


def test_a_reply_without_a_score_is_counted_and_a_judge_without_any_is_told(server, evaluation):
    server.replies = lambda number, text: chat("Score: 8" if "answer 0" in text else "I cannot say. Score: 11")
    found = judge_evaluation(evaluation, Judge(server.address, "judge"), parallel=2)
    assert (found["mean"], found["judged"], found["without_score"]) == (8.0, 2, 4)
    server.replies = lambda number, text: chat("no")
    with pytest.raises(UserError, match="mute gives no score from 1 to 10"):
        judge_evaluation(evaluation, Judge(server.address, "mute"), parallel=2)


def test_a_key_goes_to_another_machine_encrypted_alone():
    for address in ("http://example.org/v1", "http://10.0.0.1:8000/v1", "http://localhost.example.org/v1"):
        Judge(address, "judge")
        with pytest.raises(UserError, match="would be sent unencrypted; https is expected"):
            Judge(address, "judge", KEY)
    for address in ("https://example.org/v1", "http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:80/v1"):
        Judge(address, "judge", KEY)
