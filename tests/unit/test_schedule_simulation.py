"""`schedule.plan` in simulated time: sessions that speak in real time over an engine of known step times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from personaplex.config import BURST_S, FRAME_SECONDS, frames_in
from personaplex.engine.schedule import CATCH_UP_RATE, FrameQueue, PendingFrame, plan
from personaplex.engine.steptimes import StepTimes

STEPS = StepTimes.load(Path(__file__).parents[2] / "benchmarks" / "results" / "steps-example.json")
GATHER = 0.004
PCM = np.zeros(1, np.float32)


@dataclasses.dataclass
class Run:
    """What a simulation saw: seconds from each frame's arrival to its reply by session, ticks, drops."""

    waits: list[list[float]]
    ticks: list[int]
    dropped: list[int]


def simulate(
    arrivals: list[np.ndarray], tick: Callable[[int], float], limit: int = 5, gather: float = GATHER
) -> Run:
    """Frames of session i come at arrivals[i]; `tick` gives the seconds of a step over so many sessions."""
    lanes = [FrameQueue(index, limit, live=True) for index in range(len(arrivals))]
    events = sorted((at, index) for index, times in enumerate(arrivals) for at in times)
    run, now, done = Run([[] for _ in lanes], [], [0] * len(lanes)), 0.0, 0

    def come(until: float) -> None:
        nonlocal done
        while done < len(events) and events[done][0] <= until:
            at, index = events[done]
            run.dropped[index] += lanes[index].put(PendingFrame(PCM, at))
            done += 1

    while True:
        come(now)
        found = plan(lanes, now, gather)
        if found.step:
            taken = [(lane.session, lane.take(now)) for lane in found.step]
            now += tick(len(taken))
            run.ticks.append(len(taken))
            for session, frame in taken:
                run.waits[session].append(now - frame.arrived)
            continue
        following = [
            t for t in (found.again_at, events[done][0] if done < len(events) else None) if t is not None
        ]
        if not following:
            return run
        now = max(now, min(following))


def speaking(sessions: int, seconds: float, seed: int = 0, jitter: float = 0.002) -> list[np.ndarray]:
    """Real-time senders of random phase."""
    random = np.random.default_rng(seed)
    beat = np.arange(0, seconds, FRAME_SECONDS)
    return [np.sort(beat + random.uniform(0, FRAME_SECONDS) + random.uniform(0, jitter, len(beat)))
            for _ in range(sessions)]  # fmt: skip


@pytest.mark.parametrize("sessions", [1, 3])
def test_at_light_load_a_frame_waits_for_no_period(sessions: int) -> None:
    """At most the gathering and two ticks: the one under way and its own."""
    step = STEPS.tick(sessions, 3_000)
    run = simulate(speaking(sessions, 20), lambda n: STEPS.tick(n, 3_000))
    worst = max(max(waits) for waits in run.waits)
    assert worst <= GATHER + 2 * step + 1e-9
    assert worst < FRAME_SECONDS / 4
    assert not any(run.dropped)


@pytest.mark.parametrize("seed", range(4))
def test_at_full_load_nobody_is_late(seed: int) -> None:
    """64 full windows, the most a card holds, whatever the phases: every reply within one frame."""
    run = simulate(speaking(64, 20, seed), lambda n: STEPS.tick(n, 3_000))
    assert max(max(waits) for waits in run.waits) < FRAME_SECONDS
    assert not any(run.dropped)
    assert [len(waits) for waits in run.waits] == [250] * 64


def test_close_to_the_limit_everybody_still_gets_every_frame() -> None:
    """A tick that takes 95 % of a frame's time at any width: one tick serves all, nothing is dropped."""
    run = simulate(speaking(64, 20), lambda _: 0.95 * FRAME_SECONDS)
    assert not any(run.dropped)
    assert max(max(waits) for waits in run.waits) < 2 * FRAME_SECONDS


def test_beyond_the_limit_delay_stays_bounded_and_is_shared() -> None:
    """An engine a quarter too slow: inboxes drop their oldest, nobody starves, nobody waits without end."""
    limit = 5
    run = simulate(speaking(16, 40), lambda _: 1.25 * FRAME_SECONDS, limit)
    served = [len(waits) for waits in run.waits]
    assert min(served) > 0.75 * 500
    assert max(served) - min(served) <= 3
    assert max(max(waits) for waits in run.waits) < (limit + 2.5) * FRAME_SECONDS
    assert all(run.dropped)


def test_who_sends_too_fast_pays_alone() -> None:
    """One sender at ten times real time among seven: it gets its due, the others what they had."""
    calm = speaking(7, 20)
    alone = simulate(calm, lambda n: STEPS.tick(n, 3_000))
    flood = np.arange(0, 20, FRAME_SECONDS / 10)
    beside = simulate([*calm, flood], lambda n: STEPS.tick(n, 3_000))
    assert [len(waits) for waits in beside.waits[:7]] == [len(waits) for waits in alone.waits]
    assert not any(beside.dropped[:7])
    slowest = STEPS.tick(8, 3_000)
    assert max(max(waits) for waits in beside.waits[:7]) <= GATHER + 2 * slowest + 1e-9
    assert (
        len(beside.waits[7]) <= 20 / FRAME_SECONDS * CATCH_UP_RATE + 5 + 5 + 2
    )  # a burst, and the inbox left
    assert beside.dropped[7] > 2_000


def test_bursts_are_run_whole_and_hold_nobody_up() -> None:
    """One sender of pages of five seconds among 63 who speak as they should, on a card that is full."""
    calm = speaking(63, 30)
    beat = np.arange(0, 30, FRAME_SECONDS)
    bursts = np.ceil((beat + FRAME_SECONDS) / 5.0 - 1e-9) * 5.0
    run = simulate([*calm, bursts], lambda n: STEPS.tick(n, 3_000), limit=frames_in(BURST_S))
    assert not any(run.dropped)
    assert len(run.waits[63]) == len(beat)
    assert max(max(waits) for waits in run.waits[:63]) < FRAME_SECONDS


def test_senders_of_long_pages_may_fill_a_card() -> None:
    """64 of them, all at the same moment: every frame runs, before the next page comes."""
    beat = np.arange(0, 30, FRAME_SECONDS)
    bursts = np.ceil((beat + FRAME_SECONDS) / 5.0 - 1e-9) * 5.0
    run = simulate([bursts] * 64, lambda n: STEPS.tick(n, 3_000), limit=frames_in(BURST_S))
    assert not any(run.dropped)
    assert max(max(waits) for waits in run.waits) < 5.0
