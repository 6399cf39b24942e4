"""Sessions that end before they begin."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from conversations import (
    Counted,
    Nothing,
    Silence,
    Spy,
    claim_of,
)
from ray.exceptions import RayTaskError, TaskCancelledError

from deployments.gateway import host
from deployments.gateway.app import report_failure
from deployments.gateway.host import SessionHost
from deployments.gateway.waits import Waits
from personaplex.persona import Persona


class Reporter:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.told.append(context.get("exception"))


def test_calls_that_end_with_their_client_are_no_failure() -> None:
    """Serve asks a replica for its queue while a client leaves: each such call was a traceback."""
    cancelled, fault, loop = TaskCancelledError(), ValueError("a fault"), Reporter()
    of_a_task = RayTaskError("f", "", TaskCancelledError()).as_instanceof_cause()
    for context in (
        {"exception": cancelled},
        {"exception": of_a_task},
        {"exception": fault},
        {"message": "m"},
    ):
        report_failure(cast(Any, loop), context)
    assert loop.told == [fault, None]


class Unwelcome(Silence):
    """A socket whose client goes while it is accepted; Starlette takes it for connected by then."""

    scope: ClassVar[dict[str, Any]] = {"query_string": b""}

    def __init__(self, error: BaseException | None) -> None:
        self._error, self.accepting = error, asyncio.Event()

    async def accept(self) -> None:
        self.accepting.set()
        if self._error is None:
            await asyncio.Event().wait()
        else:
            raise self._error


def _host(records: Any = None, describe: Any = None) -> Any:
    """Hosts sessions that need no slot any more."""
    services: Any = SimpleNamespace(metrics=Counted(), ending=set())
    nothing: Any = Nothing()
    accounts: Any = SimpleNamespace(attach=lambda *_: None, close=lambda *_: None)
    return SessionHost(
        services,
        fleet=SimpleNamespace(describe=describe),  # type: ignore[arg-type]
        access=nothing,
        accounts=accounts,
        room=nothing,
        waits=Waits(1_800.0, 60.0),
        voices=nothing,
        records=records,
        query_limit=16_384,
    )


@pytest.mark.parametrize(
    ("error", "cause"),
    [(None, "left"), (OSError(), "left"), (RuntimeError(), "left"), (ValueError(), "failed")],
)
def test_a_client_that_goes_while_it_is_accepted_gives_its_slot_back(
    error: Exception | None, cause: str
) -> None:
    async def run() -> None:
        spy, socket, hosting = Spy(), Unwelcome(error), _host()
        handler = asyncio.ensure_future(hosting._converse(socket, "s", Persona(), "caller", claim_of(spy)))
        await asyncio.wait_for(socket.accepting.wait(), 5)
        handler.cancel()
        await asyncio.gather(handler, return_exceptions=True)
        assert spy.released.is_set()
        assert hosting._metrics.refused == [cause]

    asyncio.run(run())


def test_a_session_that_cannot_be_made_ends_its_record_and_gives_its_slot_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Welcome(Unwelcome):
        async def accept(self) -> None:
            pass

    class Records:
        open = 0
        causes: ClassVar[list[str]] = []

        def wanted(self, query: Any) -> bool:
            return True

        def begin(self, *_: Any) -> Any:
            return SimpleNamespace(over=lambda: None)

        def finish(self, recording: Any, cause: str) -> None:
            self.causes.append(cause)

    def stumble(*_: Any, **__: Any) -> Any:
        raise MemoryError

    async def nobody() -> list[Any]:
        return []

    monkeypatch.setattr(host, "Conversation", stumble)

    async def run() -> None:
        spy, hosting = Spy(), _host(Records(), nobody)
        with pytest.raises(MemoryError):
            await hosting._converse(Welcome(None), "s", Persona(), "caller", claim_of(spy))
        assert spy.released.is_set()
        await asyncio.gather(*hosting._services.ending)
        assert Records.causes == ["SessionLost"]
        assert hosting._metrics.refused == ["SessionLost"]

    asyncio.run(run())


def test_who_is_not_recorded_does_not_wait_for_the_fleet() -> None:
    class Records:
        def wanted(self, query: Any) -> bool:
            return "record" in query

    async def describe() -> list[Any]:
        return [SimpleNamespace(engine={"model": "tiny"})]

    assert asyncio.run(_host(Records(), describe)._engine({"record": "1"})) == {"model": "tiny"}
    assert asyncio.run(_host(Records())._engine({})) == {}
