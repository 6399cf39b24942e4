"""Ratings by a judge, a real HTTP server here: kept, tried three times, and left out when it babbles."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from personaplex.errors import ConfigError
from personaplex.evaluation.dataset import Dataset, Sample
from personaplex.evaluation.judge import Judge, understood
from personaplex.evaluation.results import results
from personaplex.evaluation.speech import Span

SAMPLE = Sample(
    "synthetic_user_interruption", "0", Path(), marked=Span(6.0, 8.0), texts={"question": "And Oslo?"}
)
RECORD = {"words": [["Before", 5.0, 5.2], ["Rain", 8.5, 8.7], ["again", 8.8, None]]}


class Bench:
    """The judge's side: what it was asked, and what it replies, the last reply again and again."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.replies: list[str | int] = []
        bench = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                bench.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                bench.keys.append(self.headers["Authorization"])
                reply = bench.replies.pop(0) if len(bench.replies) > 1 else bench.replies[0]
                body = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
                self.send_response(reply if isinstance(reply, int) else 200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/"


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    thread = threading.Thread(target=bench.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield bench
    bench.server.shutdown()
    thread.join()
    bench.server.server_close()


def test_a_rating_is_asked_for_once_and_kept(bench: Bench, tmp_path: Path) -> None:
    bench.replies = ['Sure: {"relevance": 4}']
    judge = Judge(bench.url, "some-model", "secret")
    for _ in range(2):
        assert judge.rate(SAMPLE, RECORD, tmp_path) == {"relevance": 4}
    assert len(bench.asked) == 1
    assert bench.keys == ["Bearer secret"]
    question = bench.asked[0]
    assert (question["model"], question["temperature"]) == ("some-model", 0)
    said = question["messages"][-1]["content"]
    assert "And Oslo?" in said
    assert "Rain again" in said
    assert "Before" not in said
    assert "secret" not in (tmp_path / "rating.json").read_text()
    assert Judge(bench.url, "another-model").rate(SAMPLE, RECORD, tmp_path) == {"relevance": 4}
    assert len(bench.asked) == 2


@pytest.mark.parametrize("reply", ["five", '{"relevance": 9}', '{"relevance": true}', "{}", 500, "[" * 5000])
def test_what_cannot_be_understood_is_unrated_after_three_tries(
    reply: str | int, bench: Bench, tmp_path: Path
) -> None:
    bench.replies = [reply]
    assert Judge(bench.url, "m").rate(SAMPLE, RECORD, tmp_path) == {"relevance": None}
    assert len(bench.asked) == 3
    assert not (tmp_path / "rating.json").exists()
    bench.replies = [reply, '{"relevance": 2}']
    assert Judge(bench.url, "m").rate(SAMPLE, RECORD, tmp_path) == {"relevance": 2}


def test_an_unrated_answer_counts_as_taken_over_but_not_in_the_mean() -> None:
    """The benchmark's scripts ask for ever, and count the takeover again each time."""
    official = {"takeover": 1, "latency": 0.5, "clamped": False}
    event = {"spoke": 0, "stop": None, "censored": 0, "response": 0.5, "answered": 1}
    ratings: list[dict[str, Any] | None] = [{"relevance": 4}, {"relevance": None}, None]
    records = [
        {"task": SAMPLE.task, "id": str(n), "repeat": 0, "error": None, "event": event, "rating": rating}
        | {"official": official if n < 2 else {"takeover": 0, "latency": None, "clamped": None}}
        for n, rating in enumerate(ratings)
    ]
    found = results(records, Dataset((), (), {}), {}, "text")["tasks"][SAMPLE.task]["official"]
    assert found["takeover"]["value"] == pytest.approx(2 / 3)
    assert (found["rating"]["value"], found["rating"]["n"]) == (4.0, 1)


def test_nobody_spoke_nobody_is_asked(bench: Bench, tmp_path: Path) -> None:
    assert Judge(bench.url, "m").rate(SAMPLE, {"words": [["Before", 5.0, 5.2]]}, tmp_path) is None
    turn = Sample("candor_turn_taking", "0", Path(), end=1.0)
    assert Judge(bench.url, "m").rate(turn, RECORD, tmp_path) is None
    assert bench.asked == []


def test_a_refusal_ends_the_run(bench: Bench, tmp_path: Path) -> None:
    bench.replies = [401]
    with pytest.raises(ConfigError, match="401"):
        Judge(bench.url, "m").rate(SAMPLE, RECORD, tmp_path)
    assert len(bench.asked) == 1


def test_behaviours() -> None:
    assert understood('{"behaviour": "resume"}', ["behaviour"]) == {"behaviour": "resume"}
    with pytest.raises(ValueError, match="behaviour"):
        understood('{"behaviour": "sing"}', ["behaviour"])
