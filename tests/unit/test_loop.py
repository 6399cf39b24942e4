"""The engine's thread: what it plans, what it delivers, and what becomes of sessions when things go wrong."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from personaplex.config import FRAME_SECONDS, FRAME_SIZE, STREAMS
from personaplex.engine.echo import EchoEngine
from personaplex.engine.events import Batch, Closed, EngineEvent, Faulted, Opened, Refused, Stepped
from personaplex.engine.interface import Slot
from personaplex.engine.loop import EngineLoop
from personaplex.engine.schedule import CATCH_UP_RATE, FrameQueue, PendingFrame, plan
from personaplex.errors import EngineFault, NoCapacity, PromptTooLong, UnknownVoice
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog, SessionRecorder

GATHER_S = 0.01


def _frame(value: float = 0.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full(FRAME_SIZE, value, np.float32)


def _lane(session: int, arrivals: list[float], live: bool = True, limit: int = 25) -> FrameQueue:
    lane = FrameQueue(session, limit, live)
    for arrived in arrivals:
        lane.put(PendingFrame(_frame(), arrived))
    return lane


# plan


def test_nothing_to_do_waits_for_news() -> None:
    for lanes in ([], [_lane(0, [])], [_lane(0, [1.0], live=False)]):
        assert plan(lanes, 5.0, GATHER_S).again_at is None
        assert not plan(lanes, 5.0, GATHER_S).step


def test_a_tick_waits_a_little_for_others_and_no_longer() -> None:
    lanes = [_lane(0, [1.0]), _lane(1, [])]
    assert plan(lanes, 1.0, GATHER_S).again_at == pytest.approx(1.0 + GATHER_S)
    assert not plan(lanes, 1.0, GATHER_S).step
    assert plan(lanes, 1.0 + GATHER_S, GATHER_S).step == (lanes[0],)


def test_a_tick_starts_at_once_when_everybody_is_there() -> None:
    lanes = [_lane(0, [1.0]), _lane(1, [1.0]), _lane(2, [], live=False)]
    assert plan(lanes, 1.0, GATHER_S).step == (lanes[0], lanes[1])


def test_without_a_gather_window_each_frame_runs_on_arrival() -> None:
    assert len(plan([_lane(0, [1.0]), _lane(1, [])], 1.0, 0.0).step) == 1


def test_a_full_inbox_drops_its_oldest_frame() -> None:
    lane = FrameQueue(0, 2, True)
    assert [lane.put(PendingFrame(_frame(), arrived)) for arrived in (0.0, 1.0, 2.0, 3.0)] == [
        False,
        False,
        True,
        True,
    ]
    assert [frame.arrived for frame in lane.frames] == [2.0, 3.0]


def test_a_lane_catches_up_quickly_but_never_takes_more_than_its_share() -> None:
    """Frames without end from one client: a burst at once, then little more than real time."""
    lane, now, run = FrameQueue(0, 25, True), 100.0, []
    while now < 110.0:
        while len(lane.frames) < lane.limit:
            lane.put(PendingFrame(_frame(), now))
        found = plan([lane], now, 0.0)
        if found.step:
            lane.take(now)
            run.append(now)
        else:
            assert found.again_at is not None
            assert found.again_at > now
            now = found.again_at
    burst = sum(at == 100.0 for at in run)
    assert burst == int(lane.limit * CATCH_UP_RATE) + 1
    assert (len(run) - burst) * FRAME_SECONDS / 10.0 == pytest.approx(CATCH_UP_RATE, abs=0.02)


def test_a_throttled_lane_does_not_hold_up_the_others() -> None:
    greedy, other = _lane(0, [1.0]), _lane(1, [1.0])
    greedy.due = 1_000.0
    assert plan([greedy, other], 1.0 + GATHER_S, GATHER_S).step == (other,)


def test_while_a_session_waits_for_its_rebuild_nobody_catches_up() -> None:
    """Who is behind runs in real time, with all others who are; who is not notices nothing."""
    behind = [_lane(0, [99.0] * 20), _lane(1, [99.5] * 20)]
    now, ran = 100.03, []
    while now < 101.0:
        found = plan(behind, now, GATHER_S, rebuilding=True)
        if found.step:
            assert found.step == tuple(behind)
            for lane in behind:
                lane.take(now)
                lane.put(PendingFrame(_frame(), now))
            ran.append(now)
        else:
            assert found.again_at is not None
            now = found.again_at
    assert len(ran) == pytest.approx(1.0 / FRAME_SECONDS, abs=1)
    on_time = _lane(2, [101.0])
    assert plan([*behind, on_time], 101.0 + GATHER_S, GATHER_S, rebuilding=True).step == (on_time,)
    for _ in range(20):
        assert plan(behind, 101.0, GATHER_S).step == tuple(behind)
        for lane in behind:
            lane.take(101.0)


# the thread


class Ear:
    """Collects what a loop delivers, and waits for it."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self._changed = threading.Condition()

    def __call__(self, batch: Batch) -> None:
        with self._changed:
            self.batches.append(batch)
            self._changed.notify_all()

    @property
    def events(self) -> list[EngineEvent]:
        return [event for batch in self.batches for event in batch.events]

    def of(self, kind: type[Any], session: int | None = None) -> list[Any]:
        return [
            event
            for event in self.events
            if isinstance(event, kind) and (session is None or event.session == session)
        ]

    def wait(self, condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), self.events


def _start(ear: Ear, make: Callable[[], Any], gather_s: float = GATHER_S, inbox: int = 25) -> EngineLoop:
    loop = EngineLoop(make, ear, gather_s=gather_s, inbox_limit=inbox)
    assert loop.start().result(5) >= 1
    return loop


@pytest.fixture
def ear() -> Ear:
    return Ear()


@pytest.fixture
def loop(ear: Ear) -> Iterator[EngineLoop]:
    loop = _start(ear, lambda: EchoEngine(4))
    yield loop
    loop.stop()
    assert not loop._thread.is_alive()


def _open(loop: EngineLoop, ear: Ear, persona: Persona | None = None) -> int:
    session = loop.open(persona or Persona())
    ear.wait(lambda: ear.of(Opened, session) or ear.of(Refused, session))
    return session


def test_frames_come_back_in_order_with_their_marks(loop: EngineLoop, ear: Ear) -> None:
    session = _open(loop, ear)
    for number in range(10):
        loop.push(session, _frame(number), timestamp=100 + number)
    ear.wait(lambda: len(ear.of(Stepped)) == 10)
    replies = ear.of(Stepped, session)
    assert [reply.timestamp for reply in replies] == list(range(100, 110))
    assert [reply.output.frame for reply in replies] == list(range(10))
    assert [reply.output.pcm[0] for reply in replies] == [0.0, *range(9)]  # one frame late, as the model


def test_sessions_share_ticks(loop: EngineLoop, ear: Ear) -> None:
    sessions = [_open(loop, ear) for _ in range(4)]
    for session in sessions:
        loop.push(session, _frame())
    ear.wait(lambda: len(ear.of(Stepped)) == 4)
    assert [batch.slots for batch in ear.batches if batch.work == "tick"] == [4]


def test_frames_pushed_before_the_prompt_is_done_wait_for_it(ear: Ear) -> None:
    gate = threading.Event()

    class Slow(EchoEngine):
        def prefill(self) -> Slot | None:
            gate.wait(5)
            return super().prefill()

    loop = _start(ear, lambda: Slow(1))
    session = loop.open(Persona())
    loop.push(session, _frame(1.0))
    assert not ear.of(Stepped)
    gate.set()
    ear.wait(lambda: ear.of(Stepped, session))
    assert ear.events.index(ear.of(Opened)[0]) < ear.events.index(ear.of(Stepped)[0])
    loop.stop()


def test_a_long_prompt_runs_in_pieces_between_ticks(ear: Ear) -> None:
    """Somebody joins with a prompt of many pieces while another talks: every piece is followed by a tick."""
    order: list[str] = []

    class Pieces(EchoEngine):
        def prefill(self) -> Slot | None:
            if self._waiting[0].index == 0:
                return super().prefill()
            order.append("piece")
            loop.push(first, _frame())  # as if it came while the piece ran
            return super().prefill() if order.count("piece") == 20 else None

        def step(self) -> Any:
            order.append("tick")
            return super().step()

    loop = _start(ear, lambda: Pieces(2), gather_s=0.0)
    first = _open(loop, ear)
    _open(loop, ear)
    ear.wait(lambda: len(ear.of(Stepped, first)) == 20)
    assert order == ["piece", "tick"] * 20
    loop.stop()


@pytest.mark.parametrize(
    ("persona", "error"),
    [(Persona(voice="NOBODY"), UnknownVoice), (Persona(text_prompt="x" * 100_000), PromptTooLong)],
)
def test_a_refused_session_holds_nothing(
    loop: EngineLoop, ear: Ear, persona: Persona, error: type[Exception]
) -> None:
    session = _open(loop, ear, persona)
    assert isinstance(ear.of(Refused, session)[0].error, error)
    loop.push(session, _frame())
    for _ in range(4):
        assert ear.of(Opened, _open(loop, ear))


def test_slots_come_back_and_a_full_engine_says_so(loop: EngineLoop, ear: Ear) -> None:
    sessions = [_open(loop, ear) for _ in range(4)]
    assert isinstance(ear.of(Refused, _open(loop, ear))[0].error, NoCapacity)
    loop.close(sessions[1])
    ear.wait(lambda: ear.of(Closed, sessions[1]))
    assert ear.of(Opened, _open(loop, ear))
    loop.close(sessions[1])  # closing twice takes nothing from the slot's new user
    loop.push(sessions[1], _frame())
    time.sleep(0.05)
    assert not ear.of(Stepped, sessions[1])


def test_nothing_is_said_for_a_session_after_its_slot_is_free(loop: EngineLoop, ear: Ear) -> None:
    session = _open(loop, ear)
    for number in range(20):
        loop.push(session, _frame(number))
    loop.close(session)
    ear.wait(lambda: ear.of(Closed, session))
    assert isinstance(
        [event for event in ear.events if getattr(event, "session", None) == session][-1], Closed
    )


def test_a_slot_is_never_closed_during_a_step(ear: Ear) -> None:
    inside = threading.Event()
    go_on = threading.Event()
    calls: list[str] = []

    class Watched(EchoEngine):
        def step(self) -> Any:
            calls.append("step begins")
            inside.set()
            go_on.wait(5)
            calls.append("step ends")
            return super().step()

        def close(self, slot: Slot) -> None:
            calls.append("close")
            super().close(slot)

    loop = _start(ear, lambda: Watched(1), gather_s=0.0)
    session = _open(loop, ear)
    loop.push(session, _frame())
    assert inside.wait(5)
    loop.close(session)
    time.sleep(0.05)
    assert calls == ["step begins"]
    go_on.set()
    ear.wait(lambda: ear.of(Closed, session))
    assert calls == ["step begins", "step ends", "close"]
    loop.stop()


def test_a_flood_is_dropped_and_counted(ear: Ear) -> None:
    loop = _start(ear, lambda: EchoEngine(2), gather_s=0.0, inbox=5)
    greedy, other = _open(loop, ear), _open(loop, ear)
    for _ in range(500):
        loop.push(greedy, _frame())
    loop.push(other, _frame())
    ear.wait(lambda: ear.of(Stepped, other))
    assert loop.counters.frames_dropped >= 480
    assert len(ear.of(Stepped, greedy)) <= 20
    loop.stop()


def test_a_failing_engine_ends_everything_and_is_reported(ear: Ear) -> None:
    class Broken(EchoEngine):
        def step(self) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

    loop = _start(ear, lambda: Broken(1))
    session = _open(loop, ear)
    loop.check(1.0)
    loop.push(session, _frame())
    ear.wait(lambda: ear.of(Faulted))
    with pytest.raises(EngineFault) as caught:
        loop.check(1.0)
    assert "CUDA" not in str(caught.value)
    with pytest.raises(EngineFault):
        loop.open(Persona())


def test_an_engine_that_cannot_be_built_says_why(ear: Ear) -> None:
    def make() -> EchoEngine:
        raise NoCapacity("no memory")

    loop = EngineLoop(make, ear, gather_s=0.0, inbox_limit=5)
    with pytest.raises(NoCapacity):
        loop.start().result(5)


def test_who_does_not_wait_for_a_slow_start_does_it_no_harm(ear: Ear) -> None:
    """asyncio.wait_for cancels what it waits for: the thread then died of its own result."""
    built = threading.Event()

    def make() -> Any:
        built.wait(10)
        return EchoEngine(1)

    loop = EngineLoop(make, ear, gather_s=0.0, inbox_limit=5)
    started = loop.start()
    assert not started.cancel()
    built.set()
    assert started.result(5) == 1
    loop.stop()


def test_a_stuck_engine_is_noticed_and_an_idle_one_is_not(ear: Ear) -> None:
    go_on = threading.Event()

    class Stuck(EchoEngine):
        def step(self) -> Any:
            go_on.wait(10)
            return super().step()

    loop = _start(ear, lambda: Stuck(1), gather_s=0.0)
    session = _open(loop, ear)
    time.sleep(0.15)
    loop.check(0.1)  # idle for longer than the limit
    loop.push(session, _frame())
    time.sleep(0.15)
    with pytest.raises(EngineFault, match="not answered"):
        loop.check(0.1)
    go_on.set()
    ear.wait(lambda: ear.of(Stepped, session))
    loop.check(0.1)
    loop.stop()


def test_an_idle_loop_sleeps(loop: EngineLoop, ear: Ear) -> None:
    """No polling: the thread uses no processor time while there is nothing to do."""
    _open(loop, ear)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_many_threads_may_talk_to_it(loop: EngineLoop, ear: Ear) -> None:
    def one(results: list[int]) -> None:
        for _ in range(25):
            session = loop.open(Persona())
            loop.push(session, _frame())
            loop.close(session)
            results.append(session)

    results: list[int] = []
    threads = [threading.Thread(target=one, args=(results,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 100
    ear.wait(
        lambda: len({event.session for event in ear.of(Closed)} | {e.session for e in ear.of(Refused)}) == 100
    )
    for _ in range(4):
        assert ear.of(Opened, _open(loop, ear))


# rebuilds


def _log(frames: int = 3) -> SessionLog:
    recorder = SessionRecorder(Persona())
    for number in range(frames):
        recorder.answered(_frame(number), np.zeros(STREAMS, np.int64))
    return recorder.log()


def test_a_rebuilt_session_goes_on_at_its_frame(loop: EngineLoop, ear: Ear) -> None:
    session = loop.rebuild(_log(3))
    loop.push(session, _frame(3.0))  # waits in the inbox, if it is early
    ear.wait(lambda: ear.of(Stepped, session))
    assert ear.of(Opened, session)[0].frame == 3
    output = ear.of(Stepped, session)[0].output
    assert (output.frame, output.pcm[0]) == (3, 2.0)
    assert [batch.work for batch in ear.batches if ear.of(Opened)[0] in batch.events] == ["rebuild"]


def test_a_log_that_is_refused_holds_nothing(loop: EngineLoop, ear: Ear) -> None:
    bad = dataclasses.replace(_log(), persona=Persona(voice="NOBODY"))
    session = loop.rebuild(bad)
    ear.wait(lambda: ear.of(Refused, session))
    assert isinstance(ear.of(Refused, session)[0].error, UnknownVoice)
    for _ in range(4):
        assert ear.of(Opened, _open(loop, ear))


class Chunks(EchoEngine):
    """A rebuild takes `CHUNKS` chunks, a prompt `CHUNKS` of its own; keeps the order of everything."""

    CHUNKS = 6

    def __init__(self, slots: int, chunk: Callable[[str], None]) -> None:
        super().__init__(slots)
        self.order: list[str] = []
        self._chunk = chunk

    def _count(self, kind: str, finish: Callable[[], Slot | None]) -> Slot | None:
        self.order.append(kind)
        self._chunk(kind)
        return finish() if self.order.count(kind) == self.CHUNKS else None

    def prefill(self) -> Slot | None:
        if self._waiting[0].index == 0:
            return super().prefill()
        return self._count("prompt", super().prefill)

    def rebuild_chunk(self) -> Slot | None:
        return self._count("rebuild", super().rebuild_chunk)

    def step(self) -> Any:
        self.order.append("tick")
        return super().step()


def test_a_rebuild_runs_in_chunks_between_ticks_in_turn_with_a_prompt(ear: Ear) -> None:
    made: list[Chunks] = []

    def make() -> Chunks:
        made.append(Chunks(3, lambda _: loop.push(first, _frame())))  # as if it came while the chunk ran
        return made[0]

    loop = EngineLoop(make, ear, gather_s=0.0, inbox_limit=25, rebuild_share=1.0)
    loop.start().result(5)
    first = _open(loop, ear)
    with loop._backlog._wake:  # both arrive together
        sessions = loop.open(Persona()), loop.rebuild(_log())
    ear.wait(lambda: all(ear.of(Opened, session) for session in sessions))
    ear.wait(lambda: len(ear.of(Stepped, first)) == 12)
    assert made[0].order == ["rebuild", "tick", "prompt", "tick"] * 6
    loop.stop()


@pytest.mark.parametrize("live", [True, False])
def test_beside_live_sessions_a_rebuild_takes_its_share_of_the_time(ear: Ear, live: bool) -> None:
    """Chunks of 10 ms at a share of a quarter: one every 40 ms, and back to back when nobody is live."""
    starts: list[float] = []

    def chunk(kind: str) -> None:
        starts.append(time.monotonic())
        time.sleep(0.01)

    loop = EngineLoop(lambda: Chunks(2, chunk), ear, gather_s=0.0, inbox_limit=25, rebuild_share=0.25)
    loop.start().result(5)
    if live:
        _open(loop, ear)
    session = loop.rebuild(_log())
    ear.wait(lambda: ear.of(Opened, session))
    gaps = np.diff(starts)
    if live:
        assert gaps.min() >= 0.039
    else:
        assert gaps.min() < 0.03
    loop.stop()


def test_closed_while_it_is_rebuilt(ear: Ear) -> None:
    """Its chunks end, its slot is free, and nothing waits for it."""
    reached, go_on = threading.Event(), threading.Event()

    def chunk(kind: str) -> None:
        reached.set()
        go_on.wait(5)

    loop = EngineLoop(lambda: Chunks(1, chunk), ear, gather_s=0.0, inbox_limit=25)
    loop.start().result(5)
    session = loop.rebuild(_log())
    assert reached.wait(5)
    loop.close(session)
    go_on.set()
    ear.wait(lambda: ear.of(Closed, session))
    assert not ear.of(Opened, session)
    assert loop._backlog._waiting == {"prefill": 0, "rebuild": 0}
    assert ear.of(Opened, _open(loop, ear))
    loop.stop()
