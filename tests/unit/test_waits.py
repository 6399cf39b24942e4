"""What a caller in the queue is told of its wait is within a factor of two, or is not told."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest

from deployments.gateway.waits import HONEST, LEAST_JUDGED, LEAST_LENGTHS, Waits, close

Draw = Callable[[np.random.Generator], float]


def simulate(
    arrivals_a_minute: float,
    length: Draw,
    *,
    slots: int = 8,
    hours: float = 6.0,
    seed: int = 0,
    around_s: float = 0.0,
) -> tuple[list[tuple[float, float]], int]:
    """A service of `slots` with Poisson arrivals: what callers were told with what they waited, and how many
    waited in all. `around_s`: for which a slot is held before and after its conversation."""
    random, waits, now = np.random.default_rng(seed), Waits(), 0.0
    busy: list[tuple[float, float]] = []  # when it ends, its length
    queue: deque[tuple[str, float, float | None]] = deque()
    told, waited, number = list[tuple[float, float]](), 0, 0
    arrival = random.exponential(60 / arrivals_a_minute)
    while now < 3_600 * hours:
        if busy and busy[0][0] <= arrival:
            now, lasted = heapq.heappop(busy)
            waits.ended(lasted, now)
        else:
            now, arrival = arrival, arrival + random.exponential(60 / arrivals_a_minute)
            number += 1
            if len(queue) < 64:
                name = str(number)
                said = waits.queued(name, len(queue) + 1, slots, now) if len(busy) == slots else None
                queue.append((name, now, said))
        while queue and len(busy) < slots:
            session, since, said = queue.popleft()
            waits.served(session, now)
            waited += now > since
            if said is not None:
                told.append((said, now - since))
            lasted = length(random)
            heapq.heappush(busy, (now + lasted + around_s, lasted))
    return told, waited


LENGTHS: dict[str, Draw] = {
    "lognormal": lambda random: float(random.lognormal(np.log(120.0), 0.6)),
    "exponential": lambda random: float(random.exponential(120.0)),
    "alike": lambda random: float(random.uniform(110.0, 130.0)),
}


@pytest.mark.parametrize("lengths", LENGTHS)
def test_under_overload_most_callers_are_told_and_what_they_are_told_is_good(lengths: str) -> None:
    for seed in range(3):
        told, waited = simulate(8.0, LENGTHS[lengths], seed=seed)
        assert waited > 500
        assert len(told) > 0.7 * waited
        assert np.mean([close(*one) for one in told]) >= HONEST


def test_short_conversations_wait_for_what_is_around_them_too() -> None:
    def short(random: np.random.Generator) -> float:
        return float(random.uniform(4.0, 10.0))

    told, waited = simulate(60.0, short, hours=1.0, around_s=5.0)
    assert waited > 500
    assert len(told) > 0.7 * waited
    assert np.mean([close(*one) for one in told]) >= HONEST
    assert 0.8 < np.median([said / waited for said, waited in told]) < 1.25


def test_where_lengths_say_nothing_hardly_anybody_is_told() -> None:
    """A few calls of an hour among many of seconds, at a load where each wait is a matter of chance."""

    def odd(random: np.random.Generator) -> float:
        return 3_000.0 if random.random() < 0.04 else 5.0

    told, waited = simulate(3.4, odd, hours=20.0)
    assert waited > 50
    wrong = sum(not close(*one) for one in told)
    assert wrong < 0.2 * waited


def test_nothing_is_said_before_it_is_known_to_be_good() -> None:
    waits = Waits()
    for number in range(LEAST_LENGTHS):
        assert waits.queued(f"early{number}", 1, 4, 0.0) is None
        waits.ended(40.0, float(number))
    assert waits.estimate(2, 4, 10.0) == 20.0
    for number in range(LEAST_JUDGED):
        assert waits.queued(str(number), 1, 4, 10.0) is None
        waits.served(str(number), 20.0)
    assert waits.queued("told", 3, 4, 20.0) == 30.0
    assert waits.estimate(1, 0, 20.0) is None
    assert waits.estimate(1, 4, 4_000.0) is None, "an hour later nothing is known"


def test_estimates_that_turn_out_wrong_silence_the_rest() -> None:
    waits = Waits()
    for number in range(LEAST_LENGTHS):
        waits.ended(40.0, float(number))
    for number in range(10):
        waits.queued(str(number), 1, 4, 10.0)
        waits.served(str(number), 10.0 + (10.0 if number < 7 else 90.0))
    assert not waits.honest
    waits.queued("impatient", 1, 4, 10.0)
    waits.left("impatient", 200.0)
    waits.queued("quick", 9, 4, 10.0)
    waits.left("quick", 11.0)
    assert not waits._estimates
