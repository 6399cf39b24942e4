"""How long sessions are, of which some still run, and when the places of a queue have their slots."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from deployments.gateway.forecast import RUNS, Survival, Watched, play

UNIFORM = (np.arange(100_000) + 0.5) / 100_000


def ended(*seconds: float) -> list[Watched]:
    return [Watched(0.0, one, ended=True) for one in seconds]


def test_of_sessions_that_have_all_ended_each_is_as_likely() -> None:
    survival = Survival.of(ended(3.0, 1.0, 2.0, 2.0), 100.0)
    assert survival.times.tolist() == [1.0, 2.0, 3.0]
    assert survival.ended.tolist() == pytest.approx([0.25, 0.75, 1.0])
    values, counts = np.unique(survival.draw(UNIFORM), return_counts=True)
    assert values.tolist() == [1.0, 2.0, 3.0]
    assert (counts / len(UNIFORM)).tolist() == pytest.approx([0.25, 0.5, 0.25], abs=1e-3)


def test_a_session_that_runs_counts_until_its_age() -> None:
    """The example by hand: of four at risk one ends at 1; of two at 3 one; the last one runs, 5 s old."""
    watched = [*ended(1.0, 3.0), Watched(0.0, 2.0, ended=False), Watched(0.0, 5.0, ended=False)]
    survival = Survival.of(watched, 1_000.0)
    assert survival.ended.tolist() == pytest.approx([1 / 4, 1 - 3 / 4 * 1 / 2])
    drawn = survival.draw(UNIFORM)
    assert np.mean(drawn > 3.0) == pytest.approx(3 / 8, abs=1e-3)
    assert drawn[drawn > 3.0].min() >= 5.0, "nothing ends where something is known to have gone on"
    assert np.mean(drawn[drawn > 3.0] > 10.0) == pytest.approx(1 / 2, abs=1e-3)
    assert drawn.max() == 1_000.0, "the limit"


def test_a_session_counts_only_while_it_was_watched() -> None:
    """Of those that were old when the watch began the short ones had gone; they must not look long."""
    random = np.random.default_rng(0)
    every, since, until = [], 10_000.0, 11_000.0
    for began in np.arange(0.0, until, 4.0):
        seconds = float(random.exponential(300.0))
        if began + seconds > since:
            age = max(0.0, since - began)
            every.append(Watched(age, min(seconds, until - began), ended=began + seconds < until))
    drawn = Survival.of(every, 36_000.0).draw(UNIFORM)
    assert np.median(drawn) == pytest.approx(300.0 * np.log(2), rel=0.15)
    biased = Survival.of([Watched(0.0, one.seconds, one.ended) for one in every], 36_000.0).draw(UNIFORM)
    assert np.median(biased) > 1.15 * np.median(drawn)


@pytest.mark.parametrize("age", [0.0, 1.0, 2.5, 3.0, 50.0, 99.0, 100.0, 120.0])
def test_no_session_is_shorter_than_it_is_old(age: float) -> None:
    for watched in (ended(1.0, 2.0, 3.0), [*ended(1.0, 2.0), Watched(0.0, 40.0, ended=False)]):
        drawn = Survival.of(watched, 100.0).draw(UNIFORM, age)
        assert (drawn >= age).all()
        assert (drawn <= max(age, 100.0)).all()
        assert np.isfinite(drawn).all()


def by_hand(survival: Survival, ages: list[float], places: int, random: np.random.Generator) -> list[float]:
    """One run, session by session."""
    ends = [float(survival.draw(random.random(1), age)[0]) - age for age in ages]
    heapq.heapify(ends)
    found = []
    for _ in range(places):
        found.append(ends[0])
        heapq.heapreplace(ends, ends[0] + float(survival.draw(random.random(1))[0]))
    return found


@pytest.mark.parametrize(("slots", "places"), [(1, 1), (1, 9), (3, 12), (40, 8)])
def test_runs_are_those_of_a_queue_played_session_by_session(slots: int, places: int) -> None:
    random = np.random.default_rng(1)
    survival = Survival.of(ended(*random.lognormal(4.0, 0.8, 60)), 3_600.0)
    ages = random.uniform(0.0, 80.0, slots).tolist()
    slow = np.array([by_hand(survival, ages, places, random) for _ in range(300)])
    fast = np.concatenate([play(survival, ages, places, random) for _ in range(5)])
    assert fast.shape == (5 * RUNS, places)
    assert (np.diff(fast, axis=1) >= 0).all()
    for share in (0.2, 0.5, 0.8):
        assert np.quantile(fast, share, axis=0) == pytest.approx(
            np.quantile(slow, share, axis=0), rel=0.3, abs=2.0
        )


def test_one_slot_of_short_sessions_serves_a_queue_beside_long_ones() -> None:
    """Three slots are held for an hour; all places have theirs from the fourth, session after session."""
    survival = Survival.of([*ended(*[5.0] * 97), *ended(*[3_600.0] * 3)], 3_600.0)
    waits = play(survival, [10.0, 20.0, 30.0, 0.0], 20, np.random.default_rng(2))
    assert np.median(waits[:, 0]) == 5.0
    assert np.median(waits[:, 9]) == 50.0
