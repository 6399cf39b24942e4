"""When pages leave. Time is simulated; every figure is in seconds."""

from __future__ import annotations

import itertools
import random

import pytest

from personaplex.session.pacer import HIGH_WATER, LONG_STANDING, SLACK_S, STANDING, Pacer

FRAME = 0.08


def play(
    arrivals: list[float], *, timer_late: float = 0.0, pacer: Pacer | None = None
) -> list[tuple[float, int]]:
    """Drives a pacer as a shell would, with pages numbered by arrival; returns (time, page) as they left."""
    pacer = Pacer() if pacer is None else pacer
    left: list[tuple[float, int]] = []

    def release(now: float) -> None:
        page = pacer.release(now)
        if page is not None:
            left.append((now, int(page)))

    def run_until(end: float) -> None:
        while (due := pacer.deadline()) is not None and due + timer_late < end:
            release(due + timer_late)

    for number, arrival in enumerate(arrivals):
        run_until(arrival)
        pacer.push(str(number).encode())
        release(arrival)
    run_until(float("inf"))
    return left


def gaps(left: list[tuple[float, int]]) -> list[float]:
    return [after[0] - before[0] for before, after in itertools.pairwise(left)]


def test_a_page_leaves_at_once_when_nothing_waits() -> None:
    assert play([1.0]) == [(1.0, 0)]


def test_steady_pages_leave_steadily_whatever_the_timer_lag() -> None:
    left = play([0.08 * n for n in range(500)], timer_late=0.003)
    assert [page for _, page in left] == list(range(500))
    assert left[-1][0] == pytest.approx(499 * FRAME, abs=0.01)  # lags do not add up


def test_no_burst_after_a_stall() -> None:
    pacer = Pacer()
    left = play([0.0, 0.08, *[0.48] * 4, 0.56], pacer=pacer)
    assert [page for _, page in left] == list(range(7))
    assert min(gaps(left)) >= FRAME - SLACK_S - 1e-9
    assert pacer.dropped == 0


def test_oldest_is_dropped_over_the_high_water_mark() -> None:
    pacer = Pacer()
    left = play([0.0] * (HIGH_WATER + 3), pacer=pacer)
    assert [page for _, page in left] == [0, *range(3, HIGH_WATER + 3)]  # 0 left before the others came
    assert pacer.dropped == 2


def test_never_two_pages_closer_than_the_slack_allows() -> None:
    dice = random.Random(1)
    for _ in range(200):
        moments = [max(0.0, n * FRAME + dice.gauss(0, 0.06)) for n in range(100)]
        left = play(sorted(moments), timer_late=dice.random() * 0.01)
        assert min(gaps(left)) >= FRAME - SLACK_S - 0.01 - 1e-9
        numbers = [page for _, page in left]
        assert numbers == sorted(set(numbers))


def test_standing_latency_is_given_back_in_a_quiet_page() -> None:
    pacer = Pacer()
    pacer.push(b"0")
    pacer.push(b"1")
    now = 0.0
    for number in range(2, STANDING + 1):
        assert pacer.release(now) is not None
        pacer.push(str(number).encode(), quiet=True)
        now += FRAME
    assert pacer.trimmed == 0, "one page standing for less than STANDING pages is not yet latency"
    assert pacer.release(now) is not None
    pacer.push(b"loud", quiet=False)
    assert (pacer.waiting, pacer.trimmed) == (2, 0)
    assert pacer.release(now + FRAME) is not None
    pacer.push(b"quiet", quiet=True)
    assert (pacer.waiting, pacer.trimmed) == (1, 1)


def test_standing_latency_is_given_back_at_last_where_there_is_no_quiet() -> None:
    pacer = Pacer()
    for _ in range(4):
        pacer.push(b"loud")
    counts, now = [], 0.0
    for _ in range(5 * LONG_STANDING):
        assert pacer.release(now) is not None
        now += FRAME
        pacer.push(b"loud")
        counts.append(pacer.trimmed)
    assert [counts.index(trims) for trims in (1, 2, 3)] == [n * LONG_STANDING - 1 for n in (1, 2, 3)]
    assert (pacer.waiting, pacer.trimmed, pacer.dropped) == (1, 3, 0), "an empty queue is the floor"


def test_a_queue_that_was_empty_once_is_not_standing_until_a_whole_period_later() -> None:
    pacer = Pacer()
    now = 0.0
    for _ in range(STANDING - 1):
        pacer.push(b"on time", quiet=True)
        assert pacer.release(now) is not None
        now += FRAME
    for _ in range(3 * STANDING):
        pacer.push(b"late", quiet=True)
        pacer.push(b"late", quiet=True)
        pacer.release(now)
        now += FRAME
        while pacer.waiting > 1:
            pacer.release(now)
            now += FRAME
    assert pacer.trimmed >= 1
    assert pacer.dropped == 0
