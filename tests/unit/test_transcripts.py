"""The gateway's way to a transcriber: bounded, in order, patient with trouble, never a session's affair."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments import metrics
from deployments.gateway import transcripts as module
from deployments.gateway.listening import Listening
from deployments.gateway.transcripts import Heard, Transcript, Transcripts
from deployments.wire.speech import Answer, Reading, Unreadable, Unready
from personaplex.config import FRAME_SIZE
from personaplex.session.events import UserText, UserTextLost
from personaplex.transcription.listener import Speech
from personaplex.words import Segment, Word

SECRET = "abracadabra"


class Published:
    """Metrics as they were told."""

    def __init__(self) -> None:
        self.levels: dict[str, float] = {}
        self.counted: dict[tuple[str, str], float] = {}
        self.observed: list[tuple[str, float]] = []

    def set(self, series: metrics.Series, value: float) -> None:
        self.levels[series.name] = value

    def add(self, series: metrics.Series, amount: float = 1.0, **labels: str) -> None:
        key = (series.name, labels.get("reason", ""))
        self.counted[key] = self.counted.get(key, 0.0) + amount

    def observe(self, series: metrics.Series, value: float, **labels: str) -> None:
        self.observed.append((series.name, value))

    def dropped(self, reason: str) -> float:
        return self.counted.get((metrics.TRANSCRIPTION_DROPPED.name, reason), 0.0)


class Deaf:
    """An ear that hears nothing: speech is handed over by the test."""

    def __init__(self) -> None:
        self.on_speech: list[Callable[[Speech], None]] = []

    def open(self, on_speech: Callable[[Speech], None], on_dropped: Callable[[float], None]) -> Any:
        self.on_speech.append(on_speech)
        return self

    def end(self, ear: Any, then: Callable[[], None]) -> None:
        then()

    def close(self) -> None: ...


@dataclass
class Oracle:
    """A transcriber that answers when it is told to."""

    calls: list[tuple[Speech, asyncio.Future[Answer]]] = field(default_factory=list)

    def __call__(self, speech: Speech) -> Awaitable[Answer]:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.calls.append((speech, answer))
        return answer

    def answer(self, number: int, answer: Answer | BaseException | None = None) -> None:
        speech, future = self.calls[number]
        if isinstance(answer, BaseException):
            future.set_exception(answer)
        else:
            future.set_result(answer or Reading(segment_of(speech)))


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Room:
    """A queue with all its surroundings."""

    def __init__(self, backlog_s: float = 30.0, transcribers: int = 1) -> None:
        self.oracle, self.published, self.clock, self.deaf = Oracle(), Published(), Clock(), Deaf()
        self.queue = Transcripts(
            self.oracle,
            self.published,  # type: ignore[arg-type]
            self.deaf,  # type: ignore[arg-type]
            backlog_s=backlog_s,
            transcribers=transcribers,
            clock=self.clock,
        )
        self.told: list[list[Heard]] = []
        self.sessions: list[Transcript] = []

    def open(self) -> int:
        heard: list[Heard] = []
        self.told.append(heard)
        self.sessions.append(self.queue.open(heard.append))
        return len(self.sessions) - 1

    async def say(self, session: int, start: float, seconds: float = 2.0) -> None:
        self.deaf.on_speech[session](speech(start, seconds))
        await settle()


def speech(start: float, seconds: float = 2.0) -> Speech:
    pcm = np.zeros(round(16_000 * seconds), np.int16)
    return Speech(pcm, start, start, start + seconds, ((start, start + seconds),), waited=0.6)


def segment_of(speech: Speech) -> Segment:
    return Segment.of([Word(SECRET, speech.start, speech.end)])


async def until(condition: Callable[[], Any]) -> None:
    async def wait() -> None:
        while not condition():  # noqa: ASYNC110  it has no event
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), 10)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_answers_reach_their_sessions_in_order() -> None:
    async def main() -> None:
        room = Room()
        one, other = room.open(), room.open()
        await room.say(one, 1.0)
        await room.say(one, 5.0)
        await room.say(other, 2.0)
        assert len(room.oracle.calls) == 2, "as many as keep one transcriber busy"
        room.oracle.answer(1)
        await settle()
        assert room.told == [[], []], "the first is not known yet"
        room.clock.now += 0.5
        room.oracle.answer(0)
        await settle()
        assert [heard.segment.start for heard in room.told[one] if isinstance(heard, UserText)] == [1.0, 5.0]
        room.oracle.answer(2, Reading(None))
        await settle()
        assert room.told[other] == []
        assert ("personaplex_transcription_lag_seconds", pytest.approx(1.1)) in room.published.observed
        assert room.queue.seconds == room.published.levels["personaplex_transcription_backlog_seconds"] == 0

    asyncio.run(main())


def test_who_falls_behind_drops_the_oldest_and_says_so() -> None:
    async def main() -> None:
        room = Room(backlog_s=6.0)
        session = room.open()
        for number in range(7):
            await room.say(session, 10.0 * number)
        # two under way, three wait: 2 and 3 went
        assert room.published.dropped("behind") == 4.0
        assert room.queue.seconds == 10.0
        room.oracle.answer(0)
        room.oracle.answer(1)
        await settle()
        kinds = [type(heard) for heard in room.told[session]]
        assert kinds == [UserText, UserText, UserTextLost, UserTextLost]
        assert room.told[session][2] == UserTextLost(20.0, 22.0, "behind")
        assert [called.start for called, _ in room.oracle.calls] == [0.0, 10.0, 40.0, 50.0]
        room.clock.now += 7.0  # what waits is too old now
        room.oracle.answer(2)
        await settle()
        assert room.published.dropped("behind") == 6.0

    asyncio.run(main())


@pytest.mark.parametrize(
    "trouble",
    [
        Unready("its model is being loaded"),
        RayError("gone"),
        RayServeException("none"),
        OSError(),
    ],
    ids=lambda trouble: type(trouble).__name__,
)
def test_trouble_is_a_line_and_passes(
    trouble: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    monkeypatch.setattr(logging.getLogger("deployments"), "propagate", True)
    caplog.set_level("INFO")

    async def main() -> None:
        room = Room()
        session = room.open()
        await room.say(session, 1.0)
        await room.say(session, 5.0)
        for _ in range(3):  # the first pieces fail, and are asked for again, in their order
            at = len(room.oracle.calls) - 2
            room.oracle.answer(at, trouble)
            room.oracle.answer(at + 1, trouble)
            await until(lambda asked=at + 4: len(room.oracle.calls) == asked)
        assert room.told[session] == []
        at = len(room.oracle.calls) - 2
        assert [called.start for called, _ in room.oracle.calls[at:]] == [1.0, 5.0]
        room.oracle.answer(at)
        room.oracle.answer(at + 1)
        await settle()
        assert [type(heard) for heard in room.told[session]] == [UserText, UserText]
        assert room.published.counted == {}

    asyncio.run(main())
    lines = [record.getMessage() for record in caplog.records if record.name == module.logger.name]
    assert len(lines) == 2
    assert "sessions go on" in lines[0]
    assert SECRET not in caplog.text


def test_trouble_that_lasts_loses_words_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)

    async def main() -> None:
        room = Room(backlog_s=20.0)
        session = room.open()
        await room.say(session, 1.0)
        room.oracle.answer(0, Unready("no model"))
        await settle()
        room.clock.now += 21.0
        await until(lambda: room.told[session])
        assert room.told[session] == [UserTextLost(1.0, 3.0, "unavailable")]
        assert room.published.dropped("unavailable") == 2.0
        assert len(room.oracle.calls) == 1, "what is lost is not asked for"

    asyncio.run(main())


def test_a_piece_that_breaks_the_model_is_not_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        room = Room()
        session = room.open()
        await room.say(session, 1.0)
        await room.say(session, 5.0)
        room.oracle.answer(0, Unreadable())
        room.oracle.answer(1, ValueError(SECRET))
        await settle()
        assert [type(heard) for heard in room.told[session]] == [UserTextLost, UserTextLost]
        assert room.published.dropped("unavailable") == 4.0
        assert len(room.oracle.calls) == 2

    asyncio.run(main())
    assert SECRET not in caplog.text


def test_a_transcriber_that_hangs_holds_a_place_for_a_while() -> None:
    async def main() -> None:
        room = Room(backlog_s=0.05)
        session = room.open()
        await room.say(session, 1.0, seconds=0.02)
        while not room.told[session]:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert room.told[session] == [UserTextLost(1.0, 1.02, "behind")]
        assert room.oracle.calls[0][1].cancelled()
        await room.say(session, 5.0, seconds=0.02)
        room.oracle.answer(1)
        await settle()
        assert isinstance(room.told[session][1], UserText)

    asyncio.run(main())


def test_who_left_is_forgotten() -> None:
    async def main() -> None:
        room = Room()
        one, other = room.open(), room.open()
        for number in range(3):
            await room.say(one, 10.0 * number)
        await room.say(other, 1.0)
        room.sessions[one].end()
        room.sessions[one].close()
        assert room.queue.seconds == 6.0, "two under way, and the other's"
        room.oracle.answer(0)
        room.oracle.answer(1)
        await settle()
        room.oracle.answer(2)
        await settle()
        assert room.told[one] == []
        assert len(room.told[other]) == 1
        assert room.published.dropped("behind") == 0

    asyncio.run(main())


def test_a_record_waits_for_the_last_words_but_not_for_ever() -> None:
    async def main() -> None:
        room = Room()
        session = room.open()
        await room.say(session, 1.0)
        room.sessions[session].end()
        waiting = asyncio.ensure_future(room.sessions[session].settled(5.0))
        await settle()
        assert not waiting.done()
        room.oracle.answer(0)
        await asyncio.wait_for(waiting, 1.0)
        assert len(room.told[session]) == 1
        slow = room.open()
        await room.say(slow, 1.0)
        room.sessions[slow].end()
        await room.sessions[slow].settled(0.01)
        assert room.told[slow] == []

    asyncio.run(main())


# The ear


def test_the_ear_drops_the_oldest_when_nobody_listens() -> None:
    """The thread stands still; the event loop goes on, and what is lost is counted."""

    async def main() -> None:
        import threading

        gate, lost, found = threading.Event(), [], []

        def detector() -> None:
            gate.wait(10)

        listening = Listening(10, detector)
        ear = listening.open(found.append, lost.append)
        limit = 10 + round(5 / 0.08)
        frame = np.zeros(FRAME_SIZE, np.float32)
        for number in range(limit + 5):
            ear.hear(number, frame)
            listening.wake()
        assert len(ear.frames) == limit
        assert ear.frames[0][0] == 5
        assert sum(lost) == pytest.approx(5 * 0.08)
        gate.set()
        done = asyncio.Event()
        listening.end(ear, done.set)
        await asyncio.wait_for(done.wait(), 10)
        assert not ear.frames
        listening.close()

    asyncio.run(main())


def test_a_fault_of_one_ear_is_nobody_elses(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        found: list[Speech] = []
        listening = Listening(10, lambda: None)
        broken = listening.open(found.append, lambda s: None)
        whole = listening.open(found.append, lambda s: None)
        loud = 0.2 * np.random.default_rng(0).standard_normal(FRAME_SIZE).astype(np.float32)
        quiet = np.full(FRAME_SIZE, 1e-4, np.float32)
        for number in range(60):
            whole.hear(number, loud if 20 <= number < 35 else quiet)
        broken.hear(0, None)  # type: ignore[arg-type]
        listening.wake()
        done = asyncio.Event()
        listening.end(whole, done.set)
        await asyncio.wait_for(done.wait(), 10)
        assert len(found) == 1
        assert found[0].start == pytest.approx(1.6, abs=0.1)
        listening.close()

    asyncio.run(main())
