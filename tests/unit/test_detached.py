"""Detached sessions: who gets one back, for how long, and what a taker that is lost costs."""

from __future__ import annotations

import numpy as np
import pytest

from deployments.wire.detached import Detached
from deployments.wire.messages import Held, SessionStatus
from personaplex.config import FRAME_SIZE, STREAMS
from personaplex.errors import ResumeRefused
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog

GRACE_S = 30.0


def log(frames: int = 2) -> SessionLog:
    return SessionLog(
        Persona(),
        np.zeros((frames, STREAMS), np.int32),
        np.zeros(frames, np.bool_),
        np.zeros((frames, FRAME_SIZE), np.float32),
    )


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def detached(clock: Clock) -> Detached:
    return Detached(GRACE_S, 3, clock)


def test_the_right_token_gets_the_log_and_no_other_does(detached: Detached) -> None:
    kept = log()
    detached.keep("one", kept, 4, Held(4), [(1, " hi")])
    for counter in (0, 3, 5):
        with pytest.raises(ResumeRefused):
            detached.take("one", counter, "taker")
    with pytest.raises(ResumeRefused):
        detached.take("other", 4, "taker")
    taken = detached.take("one", 4, "taker")
    assert taken.log is kept
    assert (taken.generation, taken.texts) == (4, ((1, " hi"),))


def test_a_client_that_never_got_its_new_token_may_show_the_old_one(detached: Detached) -> None:
    detached.keep("one", log(), 5, Held(4, back=2))
    for counter in (2, 4, 5):
        assert detached.take("one", counter, "taker").log.frames == 2
    for counter in (1, 3, 9):
        with pytest.raises(ResumeRefused):
            detached.take("one", counter, "taker")


def test_each_taker_gets_a_slot_of_a_higher_generation(detached: Detached) -> None:
    """So that of two who took it the last one's slot is the newest, whatever the first one made of his."""
    detached.keep("one", log(), 4, Held(4))
    assert [detached.take("one", 4, name).generation for name in ("a", "b", "c")] == [4, 5, 6]
    assert detached.take("one", 6, "whose client got its token").generation == 7
    assert detached.statuses[0].generation == 8


def test_an_owner_that_is_no_replica_knows_where_the_last_slot_was(detached: Detached) -> None:
    detached.keep("one", log(), 4, Held(4), place=("r", "host", 1))
    detached.keep("two", log(), 0, Held(0))
    found = detached.place("one")
    assert found is not None
    assert (found[0].generation, found[1]) == (4, ("r", "host", 1))
    assert detached.place("two") is None
    assert detached.place("three") is None


def test_it_stays_until_the_session_goes_on_elsewhere(detached: Detached) -> None:
    detached.keep("one", log(), 0, Held(0))
    detached.take("one", 0, "lost on the way")
    detached.take("one", 0, "taker")
    detached.confirm("one", "lost on the way")
    assert len(detached) == 1, "it belongs to the last taker"
    detached.confirm("one", "taker")
    assert len(detached) == 0
    with pytest.raises(ResumeRefused):
        detached.take("one", 0, "too late")


def test_after_the_grace_it_is_gone(detached: Detached, clock: Clock) -> None:
    detached.keep("one", log(), 0, Held(0))
    clock.now += 10
    detached.keep("two", log(), 3, Held(0))
    clock.now += GRACE_S - 10
    with pytest.raises(ResumeRefused):
        detached.take("one", 0, "taker")
    detached.expire()
    assert detached.statuses == (SessionStatus("two", GRACE_S - 10, 3, Held(0)),)


def test_beyond_the_limit_the_oldest_goes(detached: Detached) -> None:
    for name in ("a", "b", "c", "d"):
        detached.keep(name, log(), 0, Held(0))
    assert [one.session for one in detached.statuses] == ["b", "c", "d"]
    detached.keep("b", log(), 1, Held(1))
    assert [one.session for one in detached.statuses] == ["c", "d", "b"], "again, as it is detached again"
    assert detached.take("b", 1, "taker").generation == 1
