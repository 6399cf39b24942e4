"""What the fleet remembers of sessions whose clients come back, and for how long."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from deployments.gateway import observer
from deployments.gateway.observer import Observer
from deployments.wire.messages import Held
from deployments.wire.whereabouts import NOTHING_KNOWN, ResumeBook, Whereabouts


def test_used_tokens_and_kept_sessions_are_known_for_as_long_as_was_said() -> None:
    book = ResumeBook()
    assert book.look_up("a", 0.0) == NOTHING_KNOWN
    book.use("a", 3, 30.0, now=0.0)
    book.keep("a", Held(3), 4, 10.0, now=5.0)
    known = book.look_up("a", 14.9)
    assert [known.used(counter) for counter in (0, 2, 3, 5)] == [True, True, False, False]
    assert [known.kept(counter) for counter in (2, 3, 4, 5)] == [False, True, True, False]
    assert book.look_up("b", 14.9) == NOTHING_KNOWN
    assert book.look_up("a", 15.0) == Whereabouts(3)
    assert book.look_up("a", 30.0) == NOTHING_KNOWN
    assert not any(NOTHING_KNOWN.used(counter) or NOTHING_KNOWN.kept(counter) for counter in range(3))
    assert not book._kept
    assert not book._good_from


def test_news_that_come_late_make_no_token_good_again() -> None:
    book = ResumeBook()
    book.use("a", 7, 30.0, now=0.0)
    book.use("a", 4, 30.0, now=1.0)
    assert book.look_up("a", 30.5) == Whereabouts(7), "and they count for as long as the latest"


def test_a_fleet_that_is_away_is_told_once_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "RETRY_S", 0.001)
    told: list[tuple[Any, ...]] = []
    answers = [ActorDiedError(), ActorDiedError(), None, None, ActorDiedError()]

    async def call(*said: Any) -> Any:
        told.append(said)
        if (error := answers.pop(0)) is not None:
            raise error

    async def run() -> None:
        remote = SimpleNamespace(remote=call)
        fleet: Any = SimpleNamespace(use_tokens=remote, keep_session=remote, look_up=remote)
        gateway = Observer(fleet)
        gateway.use_tokens("a", 3, 30.0)
        await asyncio.gather(*gateway._telling)
        assert told == [("a", 3, 30.0)] * 3
        gateway.keep_session("a", Held(3), 4, 30.0)
        await asyncio.gather(*gateway._telling)
        assert told[3:] == [("a", Held(3), 4, 30.0)]
        assert await gateway.look_up("a") is None

    asyncio.run(asyncio.wait_for(run(), 5))
