"""What a caller in the queue is told of its wait is within a factor of two, or is not told.

LOADS are whole services in simulated time (tests/queueing.py) around the gateways' turns, rooms and waits.
"""

from __future__ import annotations

import numpy as np
import pytest
from queueing import Draw, Load, Outcome, simulate

from deployments.gateway.waits import LEAST_JUDGED, LEAST_LENGTHS, Expected, Waits, close

PROMISED = 0.8  # of all that callers are told


def uniform(low: float, high: float) -> Draw:
    return lambda random, now: float(random.uniform(low, high))


def exponential(mean: float) -> Draw:
    return lambda random, now: float(random.exponential(mean))


def lognormal(median: float, sigma: float) -> Draw:
    return lambda random, now: float(random.lognormal(np.log(median), sigma))


def mostly(short: Draw, long: Draw, share: float) -> Draw:
    """`share` of the calls are `long`."""
    return lambda random, now: (long if random.random() < share else short)(random, now)


def at_first(before: Draw, after: Draw, until: float) -> Draw:
    return lambda random, now: (before if now < until else after)(random, now)


ALIKE, ANY = uniform(110.0, 130.0), exponential(120.0)
KEYS = {"many": (5, 0.6), "few": (5, 0.2), "first": (9, 0.2)}

# The load, and how many of those who waited are told something at least.
LOADS: dict[str, tuple[Load, float]] = {
    "alike": (Load(ALIKE, slots=4, crowd=9, every=30.0), 0.7),
    "alike, two gateways": (Load(ALIKE, slots=4, crowd=10, every=30.0, gateways=2), 0.6),
    "short, two gateways": (
        Load(
            uniform(2.0, 8.0),
            slots=4,
            crowd=12,
            every=0.5,
            gateways=2,
            hours=0.06,
            end=uniform(0.3, 0.8),
        ),
        0.6,
    ),
    "varied": (Load(lognormal(120.0, 0.6), slots=4, crowd=12, every=30.0, hours=1.5), 0.5),
    "exponential": (Load(ANY, slots=6, crowd=22, every=30.0, hours=0.8), 0.4),
    "exponential, few slots": (Load(ANY, slots=2, crowd=7, every=30.0, hours=3.0), 0.0),
    "exponential, many slots": (Load(ANY, slots=40, crowd=60, every=30.0, hours=0.25), 0.3),
    "short and long": (
        Load(mostly(exponential(10.0), exponential(600.0), 0.1), slots=6, crowd=12, every=20.0, hours=0.7),
        0.0,
    ),
    "longer from now on": (
        Load(
            at_first(uniform(50.0, 70.0), uniform(250.0, 350.0), 3_500.0),
            slots=4,
            crowd=10,
            every=20.0,
            hours=2.5,
        ),
        0.4,
    ),
    "shorter from now on": (
        Load(
            at_first(uniform(250.0, 350.0), uniform(50.0, 70.0), 6_000.0),
            slots=4,
            crowd=10,
            every=20.0,
            hours=2.2,
        ),
        0.4,
    ),
    "keys": (Load(uniform(100.0, 140.0), slots=4, every=28.0, hours=1.2, keys=KEYS), 0.2),
    "callers who leave": (Load(ALIKE, slots=4, every=16.0, patience=exponential(150.0)), 0.1),
    "a queue that ends": (Load(ALIKE, slots=4, every=20.0, timeout=60.0), 0.0),
    "more slots, fewer slots": (
        Load(ANY, slots=6, crowd=22, every=20.0, slots_at=lambda now: 6 + 6 * (int(now) // 1_800 % 2)),
        0.2,
    ),
}
HARDLY_ANYBODY = 0.02  # of the callers: what so few were told is no sample


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {name: simulate(load, seed=1) for name, (load, _) in LOADS.items()}


@pytest.mark.parametrize("name", LOADS)
def test_what_callers_are_told_is_good_and_they_are_told_where_it_can_be_known(
    name: str, outcomes: dict[str, Outcome]
) -> None:
    outcome = outcomes[name]
    assert outcome.waited > 50
    if outcome.informed > HARDLY_ANYBODY * outcome.waited:
        assert outcome.good >= PROMISED
    assert outcome.informed >= LOADS[name][1] * outcome.waited


def test_over_all_loads_nine_of_ten_are_good(outcomes: dict[str, Outcome]) -> None:
    assert np.mean([outcome.good for outcome in outcomes.values() if outcome.told]) >= 0.9


# The judgement


def learned(seconds: float = 40.0) -> Waits:
    """Sessions of that length have ended, one a second until 0.0; the callers that waited, `seconds` each,
    were right to be told so."""
    waits = Waits(3_600.0, 600.0)
    for number in range(2 * LEAST_LENGTHS):
        waits.ended(seconds, number - 2.0 * LEAST_LENGTHS)
    for number in range(LEAST_JUDGED):
        judge(waits, f"judged{number}", waited=seconds, told=seconds)
    return waits


def judge(waits: Waits, session: str, *, waited: float, told: float) -> None:
    assert waits.told(session, Expected(told, known=True), -waited) is None, "nobody knows yet"
    waits.served(session, -1.0)
    waits.live(session, 0.0)


def test_alike_sessions_end_when_they_are_old_enough() -> None:
    waits = learned()
    found = waits.forecast([30.0], [10.0], 4, 0.0)
    assert [one.seconds for one in found] == pytest.approx([11.0, 31.0, 51.0, 71.0]), "and a second to begin"
    assert all(one.known for one in found)
    assert waits.sayable(found[2]) == found[2].seconds
    assert waits.told("s", found[2], 0.0) == found[2].seconds


def test_too_little_is_known_of_few_sessions_and_of_old_ones() -> None:
    waits = Waits(3_600.0, 600.0)
    for number in range(LEAST_LENGTHS - 1):
        waits.ended(40.0, float(number))
    assert waits.forecast([1.0], [], 1, 10.0) == []
    waits.ended(40.0, 10.0)
    assert len(waits.forecast([1.0], [], 1, 10.0)) == 1
    assert waits.forecast([], [], 1, 10.0) == [], "no slot"
    assert waits.forecast([1.0], [], 0, 10.0) == [], "no place"
    assert waits.forecast([1.0], [], 1, 3_700.0) == [], "an hour later"


def test_nothing_is_said_before_enough_was_good() -> None:
    waits = Waits(3_600.0, 600.0)
    for number in range(LEAST_LENGTHS):
        waits.ended(40.0, number - 20.0)
    for number in range(LEAST_JUDGED):
        (expected,) = waits.forecast([10.0], [], 1, 0.0)
        assert expected.known
        assert waits.sayable(expected) is None
        judge(waits, str(number), waited=30.0, told=30.0)
    (expected,) = waits.forecast([10.0], [], 1, 0.0)
    assert waits.sayable(expected) == expected.seconds


def test_chance_is_said_to_be_chance() -> None:
    """The next end of one exponential session is anybody's guess; the twentieth is not."""
    random, waits = np.random.default_rng(0), Waits(3_600.0, 3_600.0)
    for number in range(100):
        waits.ended(float(random.exponential(60.0)), float(number))
    found = waits.forecast([10.0], [5.0], 20, 100.0)
    assert not any(one.known for one in found[:4])
    assert all(one.known for one in found[14:])
    assert found[19].seconds == pytest.approx(20 * 60 / 2, rel=0.35)


def test_what_was_wrong_silences_the_rest_also_before_its_callers_are_served() -> None:
    waits = learned()
    told = Expected(20.0, known=True)
    for number in range(5):
        waits.told(f"late{number}", told, 0.0)
    (expected,) = waits.forecast([30.0], [], 1, 39.0)
    assert waits.sayable(expected) is not None, "they may still be served in time"
    (expected,) = waits.forecast([30.0], [], 1, 41.0)
    assert waits.sayable(expected) is None
    for number in range(5):
        waits.left(f"late{number}", 42.0)
    (expected,) = waits.forecast([30.0], [], 1, 42.0)
    assert waits.sayable(expected) is None, "they left, and it was wrong"
    assert not waits._callers


def test_who_leaves_early_proves_nothing() -> None:
    waits = learned()
    for number in range(20):
        waits.told(str(number), Expected(100.0, known=True), 0.0)
        waits.left(str(number), 5.0)
    (expected,) = waits.forecast([30.0], [], 1, 6.0)
    assert waits.sayable(expected) is not None


def test_runs_are_stretched_by_what_callers_waited_if_that_is_no_chance() -> None:
    waits = learned()
    for number in range(20):
        judge_again(waits, f"longer{number}", waited=60.0, told=40.0)
    assert waits.forecast([0.0], [], 1, 0.0)[0].seconds == pytest.approx(41.0 * 1.5, rel=0.01)
    for number in range(20):
        judge_again(waits, f"mixed{number}", waited=(20.0, 80.0)[number % 2], told=40.0)
    assert waits.forecast([0.0], [], 1, 0.0)[0].seconds == pytest.approx(41.0, rel=0.01)


def judge_again(waits: Waits, session: str, *, waited: float, told: float) -> None:
    """`told` is what the runs gave."""
    waits.told(session, Expected(told * waits._stretch(), known=True), -waited)
    waits.served(session, -1.0)
    waits.live(session, 0.0)


def test_nobody_is_told_of_a_wait_that_is_longer_than_the_queue_allows() -> None:
    waits = learned()
    found = waits.forecast([0.0], [], 20, 0.0)
    assert [one.known for one in found] == [one.seconds <= 600.0 for one in found]
    assert not found[-1].known


def test_a_session_that_got_its_slot_at_once_shows_how_long_the_beginning_takes() -> None:
    waits = learned()
    for number in range(20):
        waits.served(f"s{number}", 0.0)
        waits.live(f"s{number}", 6.0)
    assert waits.forecast([30.0], [], 1, 6.0)[0].seconds == pytest.approx(16.0)
    assert close(10.0, 19.0)
    assert close(1.0, 2.9)
    assert not close(10.0, 21.0)
    assert not close(10.0, 4.9)
