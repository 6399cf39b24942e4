"""A client whose connection is lost: it comes back, plays nothing twice, knows when to stop."""

from __future__ import annotations

import asyncio
import contextlib
import http
import itertools
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from echo_service import EchoService, echo
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from personaplex import client
from personaplex.audio.wav import write_wav
from personaplex.client_call import Conversation
from personaplex.client_resume import (
    FIRST_PAUSE_S,
    LEAVE_CODE,
    LONGEST_PAUSE_S,
    LOST_CODES,
    Ticket,
    pauses,
    resume_url,
    worth_retrying,
)
from personaplex.config import FRAME_SIZE, Pcm
from personaplex.errors import (
    NoCapacity,
    ProtocolError,
    ResumeRefused,
    SessionLost,
    TooManySessions,
    Unauthorized,
)
from personaplex.session.events import Event, SessionNotice

FRAMES = 12
CUT_AFTER, LOST = 5, 2  # frames heard of the first connection, and that it made without being heard


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    tone = 0.3 * np.sin(np.arange(FRAMES * 1_920) * 0.05)
    write_wav(path, tone.astype(np.float32)[None], 24_000)
    return path


def query_of(socket: ServerConnection) -> dict[str, str]:
    assert socket.request is not None
    return {name: values[-1] for name, values in parse_qs(urlsplit(socket.request.path).query).items()}


class Resumable:
    """A service that gives tokens, whose `end` ends the first connection after CUT_AFTER frames."""

    def __init__(self, end: Callable[[ServerConnection], Event | None]) -> None:
        self.end = end
        self.queries: list[dict[str, str]] = []
        self.close_codes: list[int | None] = []

    async def __call__(self, socket: ServerConnection) -> None:
        self.queries.append(query_of(socket))
        with contextlib.suppress(ConnectionClosed):
            await self._serve(socket, self.queries[-1])
        self.close_codes.append(socket.close_code)

    async def _serve(self, socket: ServerConnection, query: dict[str, str]) -> None:
        if "resume" not in query:
            await echo(socket, after=lambda n: self.end(socket) if n == CUT_AFTER else None, **self.ticket(1))
            return
        frame = int(query["heard"]) + LOST
        resumed = {"frame": frame, "lost_frames": LOST, "lost_text": " [lost]"}
        details = {"resumed": resumed, **self.ticket(2)}
        await echo(socket, frames_before=frame, handshake_delay_s=0.0, **details)

    def ticket(self, number: int) -> dict[str, object]:
        return {"resume": f"token-{number}", "grace_s": 10}


def abort(socket: ServerConnection) -> None:
    socket.transport.abort()


def close_with(code: int) -> Callable[[ServerConnection], None]:
    closing = []

    def close(socket: ServerConnection) -> None:
        closing.append(asyncio.ensure_future(socket.close(code, "words")))

    return close


def move(socket: ServerConnection) -> Event:
    return SessionNotice("reconnect")


def talk(service: EchoService, speech: Path, folder: Path) -> tuple[int, dict[str, object]]:
    report = folder / "report.json"
    options = [
        "--url",
        service.url,
        "--input-wav",
        str(speech),
        "--tail",
        "0.4",
        "--output-json",
        str(report),
    ]
    code = client.main([*options, "--voice", "NATM1"])
    return code, json.loads(report.read_text())


@pytest.mark.parametrize(
    "end",
    [abort, close_with(1012), move],
    ids=["cut", "restart", "move"],
)
def test_a_lost_connection_is_made_again_and_nothing_is_played_twice(
    end: Callable[[ServerConnection], Event | None],
    speech: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = Resumable(end)
    with EchoService(handler) as service:
        code, report = talk(service, speech, tmp_path)
    told = capsys.readouterr()
    assert code == 0, told.err
    first, second = handler.queries
    assert second["resume"] == "token-1"
    heard = int(second["heard"])
    assert 0 < heard <= CUT_AFTER
    assert heard - int(second["read"]) in (0, 1), "the text of the last page may not have come"
    assert {name: second[name] for name in first} == first, "the rest of the query stays"
    assert (report["resumes"], report["frames_lost"]) == (1, LOST)
    assert report["transcript"].count("[lost]") == 1  # type: ignore[attr-defined]
    assert "one moment" in told.err
    assert "the conversation goes on" in told.err
    assert report["frames_sent"] == FRAMES + 5
    assert "resume" not in report["session"], "no token is written anywhere"  # type: ignore[operator]
    assert "token-" not in told.err + told.out + json.dumps(report)
    assert handler.close_codes[-1] == 1000, "the second is closed as ever"
    if end is move:
        assert handler.close_codes[0] == LEAVE_CODE


def test_what_the_agent_says_has_the_time_of_the_frame_it_came_with() -> None:
    async def source() -> AsyncIterator[Pcm]:
        for _ in range(FRAMES):
            yield np.zeros(FRAME_SIZE, np.float32)
            await asyncio.sleep(0.02)

    with EchoService() as service:  # says a word with each frame
        conversation = Conversation(source)
        asyncio.run(conversation.run(f"{service.url}?status=1", {}, None))
    (told,) = json.loads(conversation.transcript.json({}))["segments"]
    starts = [word["start_ms"] for word in told["words"]]
    assert len(starts) >= FRAMES - 2
    assert starts == [80 * frame for frame in range(len(starts))]


def test_a_loss_that_is_told_twice_counts_once() -> None:
    """The connection over which it was told was lost too, before it brought a page."""
    conversation = Conversation(paced_nothing)

    def told(lost: int, frame: int, text: str) -> None:
        conversation._resumed({"frame": frame, "lost_frames": lost, "lost_text": text})

    told(3, 3, " a b c")
    assert conversation._read == 3, "it has that text now, and asks for none of it again"
    told(4, 4, " d")
    assert conversation.report.frames_lost == 4
    assert conversation.report.transcript == " a b c d"
    conversation._next_page = 6  # pages came
    told(2, 8, "")
    assert conversation.report.frames_lost == 6
    assert conversation._read == 8


async def paced_nothing() -> AsyncIterator[Pcm]:
    for frame in ():
        yield frame


def test_after_which_closes_a_session_may_go_on() -> None:
    assert {1001, 1006, 1011, 1012, 1013} == LOST_CODES


@pytest.mark.parametrize("code", [1000, 1002, 1008])
def test_other_ends_are_ends(code: int, speech: Path, tmp_path: Path) -> None:
    handler = Resumable(close_with(code))
    with EchoService(handler) as service:
        assert talk(service, speech, tmp_path)[0] == 1
    assert len(handler.queries) == 1


class Full:
    """A service that lost the replica of its first connection, and closes so many more with 1013 from its
    queue."""

    def __init__(self, more: int, grace_s: float) -> None:
        self.more, self.grace_s = more, grace_s
        self.opened: list[float] = []

    async def __call__(self, socket: ServerConnection) -> None:
        self.opened.append(time.monotonic())
        with contextlib.suppress(ConnectionClosed):
            if "resume" not in query_of(socket):
                ticket = {"resume": "token", "grace_s": self.grace_s}
                await echo(
                    socket, after=lambda n: close_with(1013)(socket) if n == CUT_AFTER else None, **ticket
                )
            elif len(self.opened) <= 1 + self.more:
                await socket.close(1013, "no slot became free in time")
            else:
                resumed = {"frame": CUT_AFTER, "lost_frames": 0, "lost_text": ""}
                await echo(socket, frames_before=CUT_AFTER, handshake_delay_s=0.0, resumed=resumed)


def test_after_a_close_for_want_of_a_slot_it_comes_back_with_pauses(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = Full(2, grace_s=10)
    with EchoService(handler) as service:
        code, report = talk(service, speech, tmp_path)
    told = capsys.readouterr().err
    assert code == 0, told
    assert report["resumes"] == 1
    assert len(handler.opened) == 4
    waits = np.diff(handler.opened)[1:]
    assert min(waits) >= FIRST_PAUSE_S / 2, "never at once"
    assert told.count("one moment: no slot is free") == 3


def test_after_the_grace_a_client_that_is_let_in_and_not_served_gives_up(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The grace counts from when the conversation was lost, not from each connection."""
    handler = Full(1_000, grace_s=0.8)
    with EchoService(handler) as service:
        code, _ = talk(service, speech, tmp_path)
    assert code == 1
    assert 3 <= len(handler.opened) <= 12
    assert "no slot became free in time; the conversation could not be continued" in capsys.readouterr().err


def test_without_a_token_a_loss_is_an_end(speech: Path, tmp_path: Path) -> None:
    async def vanish(socket: ServerConnection) -> None:
        await echo(socket, after=lambda n: abort(socket) if n == CUT_AFTER else None)

    with EchoService(vanish) as service:
        assert talk(service, speech, tmp_path)[0] == 1
        assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("statuses", "resumed"),
    [
        ([503, 503, 429], True),
        ([404, 502, 500], True),  # of a proxy that has just begun
        ([410], False),
        ([503, 410], False),
        ([401], False),
    ],
)
def test_a_refused_resume_is_tried_again_where_that_may_help(
    statuses: list[int],
    resumed: bool,
    speech: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("personaplex.client_call.pauses", lambda spread, at_once: itertools.repeat(0.01))
    left = list(statuses)
    handler = Resumable(abort)

    def refuse(connection: ServerConnection, request: Request) -> Response | None:
        if "resume=" not in request.path or not left:
            return None
        return connection.respond(http.HTTPStatus(left.pop(0)), "no\n")

    async def run() -> int:
        async with serve(handler, "127.0.0.1", 0, process_request=refuse, compression=None) as server:
            url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/chat"
            options = ["--url", url, "--input-wav", str(speech), "--tail", "0"]
            return await asyncio.to_thread(client.main, options)

    assert asyncio.run(run()) == (0 if resumed else 1)
    assert not left
    assert len(handler.queries) == 1 + resumed
    if not resumed:
        assert "the conversation could not be continued" in capsys.readouterr().err


def test_after_the_grace_nobody_tries_any_more(
    speech: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("personaplex.client_call.pauses", lambda spread, at_once: itertools.repeat(0.05))

    async def run() -> int:
        gone = asyncio.Event()

        async def once(socket: ServerConnection) -> None:
            with contextlib.suppress(ConnectionClosed):
                await echo(socket, after=lambda n: abort(socket), resume="token", grace_s=0.3)
            gone.set()

        server = await serve(once, "127.0.0.1", 0, compression=None)
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/api/chat"
        talking = asyncio.create_task(
            asyncio.to_thread(client.main, ["--url", url, "--input-wav", str(speech)])
        )
        await gone.wait()
        server.close()
        return await asyncio.wait_for(talking, 10)

    assert asyncio.run(run()) == 1
    assert re.search(r"could not be continued: cannot connect", capsys.readouterr().err)


def test_pauses_grow_and_differ_between_clients() -> None:
    one, other = (list(itertools.islice(pauses(random.Random(seed)), 12)) for seed in (1, 2))
    assert one[0] == other[0] == 0.0
    assert one[1:] != other[1:]
    assert 0.1 < one[1] < one[4] < one[-1] <= LONGEST_PAUSE_S
    assert sum(one) < 35


def test_the_address_to_come_back_to() -> None:
    old = "ws://h/api/chat?a=1&text_prompt=&resume=old&heard=3&read=3&a=2"
    url = resume_url(old, Ticket("t-_1", 30), 7, 6)
    assert url == "ws://h/api/chat?a=1&text_prompt=&a=2&resume=t-_1&heard=7&read=6"


def test_tickets() -> None:
    assert Ticket.of({"resume": "t", "grace_s": 30}) == Ticket("t", 30.0)
    for details in ({}, {"resume": "t"}, {"resume": 3, "grace_s": 1}, {"resume": "t", "grace_s": 0}):
        assert Ticket.of(details) is None


def test_what_is_worth_another_try() -> None:
    assert all(map(worth_retrying, (SessionLost(""), NoCapacity(""), TooManySessions(""), ProtocolError(""))))
    assert not any(map(worth_retrying, (ResumeRefused(), Unauthorized(""))))
