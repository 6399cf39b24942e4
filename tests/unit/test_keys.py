"""Keys: what a line says, when a file is read again, and what one key may hold over all gateways."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from deployments import metrics
from deployments.fleet import Fleet
from deployments.gateway import accounts
from deployments.gateway.accounts import DAY_S, REMEMBER_S, Accounts
from deployments.gateway.admission import refusal
from deployments.gateway.keys import PRIORITY, Key, Keys, KeyTable, parse_key
from deployments.gateway.turns import QueuedRequest, Turns
from deployments.wire.holdings import FORGET_AFTER_S, SETTLE_S, YOUNG_S, Holdings, Ledger, Limits
from personaplex.errors import ConfigError, PersonaplexError, SessionExpired, TooManySessions, Unauthorized

# Lines


def test_a_line_is_a_key_and_what_it_may_do() -> None:
    text, key = parse_key("s3cret  label=acme sessions=20 minutes=0.5 priority=9\town_voices=yes")
    assert text == "s3cret"
    assert key == Key("label acme", "acme", 20, 0.5, 9, True)
    text, plain = parse_key("only-a-key")
    assert (plain.label, plain.sessions, plain.minutes, plain.priority) == ("", None, 0.0, PRIORITY)
    assert "only-a-key" not in plain.holder
    assert plain.shown == "unlabelled"
    assert plain.limits(3) == Limits(3, 0.0)
    assert parse_key("k sessions=0")[1].limits(3) == Limits(0, 0.0)


@pytest.mark.parametrize(
    "options",
    [
        "label=",
        "label=a/b",
        "label=" + "x" * 65,
        "label=unlabelled",
        "sessions=-1",
        "sessions=two",
        "sessions=1.5",
        "sessions=9999999",
        "minutes=nan",
        "minutes=1e3",
        "minutes=-1",
        "priority=10",
        "own_voices=true",
        "session=2",
        "sessions",
        "s3cret-number-two",
        "sessions=1 sessions=2",
    ],
)
def test_a_bad_line_is_refused_and_not_repeated(options: str, tmp_path: Path) -> None:
    """What stands where an option should be may be another key."""
    (tmp_path / "keys").write_text(f"first\ns3cret {options}\n")
    with pytest.raises(ConfigError, match=r"api_keys_file: keys: key 2: ") as caught:
        Keys((), tmp_path / "keys")
    words = str(caught.value)
    assert "s3cret" not in words
    assert not any(said in words for said in ("a/b", "xxx", "two", "9999999", "1e3", "nan", "-number-"))


def test_the_same_key_twice_and_one_label_with_two_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        KeyTable([parse_key("a"), parse_key("a label=b")])
    with pytest.raises(ConfigError, match="labelled acme have different limits"):
        KeyTable([parse_key("a label=acme sessions=1"), parse_key("b label=acme sessions=2")])
    table = KeyTable([parse_key("old label=acme sessions=1"), parse_key("new label=acme sessions=1")])
    assert (len(table), table.holders) == (2, 1)


# A file that changes


def age(path: Path, seconds: float = 10.0) -> None:
    """Makes a file look as if it had been left alone for so long."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_file_is_read_again_when_it_changes_and_at_no_other_time(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n")
    age(path)
    keys = Keys(("given",), path)
    assert not keys.changed()
    path.write_text("one\ntwo\n")
    assert not keys.changed(), "it may be half written"
    age(path, 1.0)
    assert keys.changed()
    keys.reload()
    assert not keys.changed()
    assert all(keys.table.find(key) for key in ("given", "one", "two"))


def test_a_mounted_secret_is_swapped_as_kubernetes_does_it(tmp_path: Path) -> None:
    """keys -> ..data/keys, and ..data -> a folder of that moment, replaced by rename."""
    path, data = tmp_path / "keys", tmp_path / "..data"

    def swap(number: int) -> None:
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        (folder / "keys").write_text(f"key-{number}\n")
        (tmp_path / "..tmp").symlink_to(folder.name)
        os.replace(tmp_path / "..tmp", data)

    swap(0)
    path.symlink_to("..data/keys")
    keys = Keys((), path)
    for number in range(1, 50):
        swap(number)
        assert keys.changed(), "whole at once: nothing to wait for"
        keys.reload()
        assert keys.table.find(f"key-{number}")
        assert not keys.table.find(f"key-{number - 1}")
        assert not keys.changed()


@pytest.mark.parametrize("fault", ["bad", "empty", "gone", "binary"])
def test_a_bad_file_keeps_the_old_keys_and_is_said_once(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deployments.gateway.keys.LOOK_EVERY_S", 0.01)
    caplog.set_level(logging.INFO, "deployments.gateway.keys")
    logging.getLogger("deployments").propagate = True
    path, results = tmp_path / "keys", list[bool]()
    path.write_text("old-key\n")
    keys = Keys((), path)

    async def run() -> None:
        watching = asyncio.ensure_future(keys.watch(results.append))
        part = tmp_path / "part"
        if fault == "gone":
            path.unlink()
        else:
            content = {"bad": b"fine\nhidden-key color=red\n", "empty": b"", "binary": b"\xff\xfe\x00"}[fault]
            part.write_bytes(content)
            os.replace(part, path)
        await until(lambda: results)
        await asyncio.sleep(0.1)
        assert results == [False]
        assert keys.table.find("old-key")
        part.write_text("new-key\n")
        os.replace(part, path)
        await until(lambda: len(results) > 1)
        assert results == [False, True]
        assert keys.table.find("new-key")
        assert not keys.table.find("old-key")
        watching.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))
    warnings = {record.created for record in caplog.records if "the old keys stay" in record.getMessage()}
    assert len(warnings) == 1
    assert not any(key in caplog.text for key in ("hidden-key", "old-key", "new-key", "red"))


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110  of threads and other tasks
        await asyncio.sleep(0.005)


# The fleet's table


LIMIT = Limits(sessions=2)
OLD = YOUNG_S + 1


def test_a_third_session_is_refused_wherever_it_comes() -> None:
    ledger = Ledger(0.0)
    for gateway in "ab":
        ledger.report(gateway, Holdings(1), OLD)
    assert ledger.enter("a", "s1", "h", LIMIT, 1, OLD) == "enter"
    assert ledger.enter("b", "s2", "h", LIMIT, 1, OLD) == "enter"
    for gateway in "abc":
        assert ledger.enter(gateway, "s3", "h", LIMIT, 1, OLD) == "sessions"
    assert ledger.enter("b", "s3", "another", LIMIT, 1, OLD) == "enter"
    ledger.leave("a", "s1")
    assert ledger.enter("b", "s4", "h", LIMIT, 1, OLD) == "enter"


def test_reports_carry_sessions_on_and_end_those_they_lack() -> None:
    ledger = Ledger(0.0)
    assert ledger.enter("a", "s1", "h", Limits(1), 1, OLD) == "enter"
    ledger.report("a", Holdings(1), OLD + 0.01)  # it was on its way before the session began
    assert ledger.enter("b", "s2", "h", Limits(1), 1, OLD + 0.1) == "sessions"
    ledger.report("a", Holdings(1, {"s1": "h"}), OLD + SETTLE_S + 1)
    assert ledger.enter("b", "s2", "h", Limits(1), 1, OLD + SETTLE_S + 1) == "sessions"
    ledger.report("a", Holdings(1), OLD + SETTLE_S + 2)
    assert ledger.enter("b", "s2", "h", Limits(1), 1, OLD + SETTLE_S + 2) == "enter"


def test_a_gateway_that_died_holds_nothing_and_what_it_used_stays_used() -> None:
    ledger, limits = Ledger(0.0), Limits(1, 60.0)
    ledger.report("a", Holdings(1, {"s": "h"}, {"h": 59.0}), OLD)
    later = OLD + FORGET_AFTER_S
    assert ledger.enter("b", "t", "h", limits, 1, later - 0.1) == "sessions"
    assert ledger.enter("b", "t", "h", limits, 1, later + 0.1) == "enter"
    ledger.report("b", Holdings(1, {}, {"h": 2.0}), later)
    assert ledger.enter("b", "u", "h", limits, 1, later + SETTLE_S + 9) == "minutes"
    assert ledger.enter("b", "u", "h", limits, 2, later + SETTLE_S + 9) == "enter", "the next day"


def test_a_gateway_that_ended_in_good_order_is_not_waited_for() -> None:
    async def run() -> None:
        fleet = Fleet()
        fleet._ledger = ledger = Ledger(0.0)
        ledger.report("a", Holdings(1, {"s": "h"}, {"h": 59.0}), OLD)
        await fleet.closed("a")
        assert ledger.enter("b", "t", "h", Limits(1, 60.0), 1, OLD) == "enter"
        ledger.report("b", Holdings(1, {}, {"h": 2.0}), OLD)
        assert ledger.enter("b", "u", "h", Limits(0, 60.0), 1, OLD) == "minutes", "used is used"

    asyncio.run(run())


def test_what_gateways_hear_of_each_other_is_the_others_sum() -> None:
    ledger = Ledger(0.0)
    ledger.report("a", Holdings(1, {"s": "h", "t": "h"}, {"h": 5.0}), 10.0)
    ledger.report("b", Holdings(1, {"u": "h"}, {"h": 7.0}), 10.0)
    heard = ledger.report("c", Holdings(1), 10.0)
    assert dict(heard.sessions) == {"h": 3}
    assert dict(heard.seconds) == {"h": 12.0}
    assert dict(ledger.report("a", Holdings(1), 10.0).sessions) == {"h": 1}


def test_a_young_fleet_says_that_it_does_not_know() -> None:
    ledger = Ledger(100.0)
    assert ledger.enter("a", "s", "h", Limits(1), 1, 100.1) == "unsure"
    assert ledger.enter("b", "t", "h", Limits(1), 1, 100.2) == "sessions", "what it knows it does say"


# Accounts


class Times:
    def __init__(self) -> None:
        self.now, self.wall = 1_000.0, 20 * DAY_S + 3_600.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


class Spy:
    """Metrics that are kept."""

    def __init__(self) -> None:
        self.added: list[tuple[str, float, dict[str, str]]] = []

    def add(self, series: Any, amount: float = 1.0, **labels: str) -> None:
        self.added.append((series.name, amount, labels))


class Talk:
    def __init__(self) -> None:
        self.talked_s = 0.0
        self.ended: PersonaplexError | None = None

    def end(self, error: PersonaplexError) -> None:
        self.ended = error


class Handle:
    """The fleet's handle: calls `fleet`, or fails while `away`."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.away = fleet, False

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            if self.away:
                raise ActorDiedError
            return await getattr(self.fleet, name)(*args)

        return SimpleNamespace(remote=call)


def gateways(
    times: Times, table: KeyTable, count: int = 2, **options: Any
) -> tuple[Handle, list[Accounts], Spy]:
    """Several gateways of one fleet, which is old enough to know."""
    handle, spy = Handle(Fleet()), Spy()
    handle.fleet._ledger = Ledger(time.monotonic() - OLD)
    options = {"sessions_per_key": 0, "revoke_ends_sessions": False, **options}
    made = [
        Accounts(
            handle,
            f"g{number}",
            spy,  # type: ignore[arg-type]
            Turns(lambda: times.now),
            table=lambda: table,
            clock=lambda: times.now,
            wall=lambda: times.wall,
            **options,
        )
        for number in range(count)
    ]
    return handle, made, spy


async def report(*accounts: Accounts) -> None:
    for one in accounts:
        one.tick()
        await one._report(())


def key_of(line: str) -> tuple[KeyTable, Key]:
    table = KeyTable([parse_key(line)])
    key = table.find(line.split()[0])
    assert key is not None
    return table, key


def test_two_gateways_and_a_key_with_two_sessions() -> None:
    times = Times()
    table, key = key_of("k label=acme sessions=2")

    async def run() -> None:
        _, (a, b), _ = gateways(times, table)
        async with contextlib.AsyncExitStack() as open_:
            await open_.enter_async_context(a.enter("s1", key))
            await open_.enter_async_context(b.enter("s2", key))
            for number, gateway in enumerate((a, b, a)):
                with pytest.raises(TooManySessions, match="holds 2 sessions") as caught:
                    async with gateway.enter(f"t{number}", key):
                        pass
                answer = refusal(caught.value)
                assert (answer.status_code, answer.headers["x-limit"]) == (429, "sessions")
                assert answer.headers["retry-after"] == "10"
        await asyncio.sleep(0)  # the fleet is told
        async with a.enter("s3", key), b.enter("s4", key):
            assert a.describe(key)["sessions"]["limit"] == 2

    asyncio.run(run())


def test_many_at_once_are_judged_one_by_one() -> None:
    times = Times()
    table, key = key_of("k sessions=5")

    async def run() -> None:
        _, made, _ = gateways(times, table, count=4)
        entered = 0

        async def come(number: int) -> None:
            nonlocal entered
            with contextlib.suppress(TooManySessions):
                async with made[number % 4].enter(f"s{number}", key):
                    entered += 1
                    await asyncio.sleep(0.2)

        await asyncio.gather(*map(come, range(100)))
        assert entered == 5
        assert not any(one._held for one in made)

    asyncio.run(run())


def test_while_the_fleet_is_away_gateways_go_by_what_they_heard_last() -> None:
    times = Times()
    table, key = key_of("k sessions=2")

    async def run() -> None:
        handle, (a, b), _ = gateways(times, table)
        async with a.enter("s1", key):
            await report(a, b)
            handle.away = True
            async with b.enter("s2", key):
                with pytest.raises(TooManySessions):
                    async with b.enter("s3", key):
                        pass
                times.pass_(REMEMBER_S + 1)
                async with b.enter("s4", key):
                    assert len(b._held) == 2, "what it heard is too old; its own it still counts"
                    with pytest.raises(TooManySessions):
                        async with b.enter("s5", key):
                            pass
        handle.away, handle.fleet = False, Fleet()  # a new one, which knows nothing
        async with a.enter("s6", key):
            await report(a)
            async with b.enter("s7", key):
                with pytest.raises(TooManySessions):
                    async with a.enter("s8", key):
                        pass

    asyncio.run(run())


def test_minutes_are_counted_over_gateways_and_open_again_at_midnight() -> None:
    times = Times()
    table, key = key_of("k label=acme minutes=2")

    async def run() -> None:
        _, (a, b), spy = gateways(times, table)
        talks = [Talk(), Talk()]
        async with a.enter("s1", key), b.enter("s2", key):
            for account, session, talk in zip((a, b), ("s1", "s2"), talks, strict=True):
                account.attach(session, talk)
            for seconds in (0.0, 20.0, 59.0):
                for talk in talks:
                    talk.talked_s = seconds
                await report(a, b)
                await report(a)
            assert not any(talk.ended for talk in talks)
            assert a.describe(key)["minutes"]["used"] == pytest.approx(118 / 60, abs=0.01)
            talks[0].talked_s = talks[1].talked_s = 61.0
            await report(a, b)
            await report(a, b)
            for talk in talks:
                assert isinstance(talk.ended, SessionExpired)
                assert "2 minutes" in str(talk.ended)
        for account in (a, b):
            with pytest.raises(TooManySessions, match="2 minutes of today") as caught:
                async with account.enter("s3", key):
                    pass
        answer = refusal(caught.value)
        assert answer.headers["x-limit"] == "minutes"
        assert int(answer.headers["retry-after"]) == DAY_S - 3_600
        counted = [amount for name, amount, labels in spy.added if labels == {"label": "acme"}]
        assert sum(counted) == pytest.approx(122.0)
        assert {name for name, _, _ in spy.added} == {metrics.KEY_SECONDS.name}
        times.pass_(DAY_S)
        await report(a, b)
        async with a.enter("s4", key):
            pass

    asyncio.run(run())


@pytest.mark.parametrize("ends", [True, False])
def test_a_revoked_keys_sessions_end_only_if_they_shall(ends: bool) -> None:
    times, tables = Times(), [key_of("k label=acme sessions=1")[0]]
    key = tables[0].find("k")

    async def run() -> None:
        _, (a,), _ = gateways(times, tables[0], count=1, revoke_ends_sessions=ends)
        a._table = lambda: tables[-1]
        async with a.enter("s", key):
            talk = Talk()
            a.attach("s", talk)
            a.tick()
            tables.append(KeyTable([parse_key("new label=acme sessions=1")]))
            a.tick()
            assert talk.ended is None, "another key of the same label is there"
            tables.append(KeyTable([parse_key("other")]))
            a.tick()
            assert isinstance(talk.ended, Unauthorized) == ends

    asyncio.run(run())


def test_a_session_makes_one_line_of_usage_and_no_key_is_in_it(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("deployments").propagate = True
    caplog.set_level(logging.INFO, "deployments.gateway.usage")
    times = Times()
    tables = [key_of("s3cret-one label=acme"), key_of("s3cret-two")]

    async def run() -> None:
        for number, (table, key) in enumerate(tables):
            _, (a,), _ = gateways(times, table, count=1)
            async with a.enter(f"s{number}", key):
                times.pass_(3.0)
                talk = Talk()
                a.attach(f"s{number}", talk)
                times.pass_(60.0)
                talk.talked_s = 60.0
                a.close(f"s{number}", "left")

    asyncio.run(run())
    lines = [json.loads(line) for line in caplog.messages]
    assert [line["label"] for line in lines] == ["acme", "unlabelled"]
    assert lines[0] == {
        "session": "s0",
        "label": "acme",
        "began": "1970-01-21T01:00:00.000+00:00",
        "waited_s": 3.0,
        "talked_s": 60.0,
        "cause": "left",
    }
    assert "s3cret" not in caplog.text
    assert tables[1][1].holder.split()[1] not in caplog.text


def test_a_client_that_comes_back_takes_its_own_place() -> None:
    """By another socket, while the old one still looks open; also at the key's limit."""
    table, key = key_of("k label=acme sessions=1")

    async def run() -> None:
        _, (a, b), _ = gateways(Times(), table)
        async with contextlib.AsyncExitStack() as old:
            await old.enter_async_context(a.enter("s", key))
            async with a.enter("s", key):
                await old.aclose()
                assert list(a._held) == ["s"]
                with pytest.raises(TooManySessions):
                    async with b.enter("t", key):
                        pass
        await asyncio.sleep(0)
        async with b.enter("t", key):
            assert not a._held

    asyncio.run(run())


def test_keys_without_limits_never_wait_for_the_fleet() -> None:
    table, key = key_of("k label=acme")

    async def run() -> None:
        handle, (a,), _ = gateways(Times(), table, count=1)
        handle.fleet = None  # type: ignore[assignment]  # a call would fail
        async with a.enter("s", key), a.enter("t", key), a.enter("u", None):
            a.check(key)
            a.check(None)

    asyncio.run(run())


def test_a_gateway_where_no_key_holds_anything_tells_the_fleet_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But each second while one does, and at once when that is over: others would count what is gone."""
    monkeypatch.setattr(accounts, "TICK_S", 0.0)
    monkeypatch.setattr(accounts, "QUEUE_TICK_S", 0.0)
    times = Times()
    table, key = key_of("k label=acme")
    reported: list[tuple[int, int]] = []

    async def run() -> None:
        _, (a,), _ = gateways(times, table, count=1)
        told, ticks, ended = a._report, itertools.count(1), asyncio.Event()

        async def note(queued: Any) -> None:
            reported.append((int(times.now), len(a._held)))
            await told(queued)

        def tick() -> tuple[()]:
            times.now = next(ticks)
            if times.now == 8:
                a._held["s"] = accounts._Held(key, times.wall, times.now)
            elif times.now == 11:
                del a._held["s"]
            elif times.now == 18:
                ended.set()
            return ()

        monkeypatch.setattr(a, "_report", note)
        running = asyncio.ensure_future(a.run(tick))
        await ended.wait()
        running.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))
    held = [(8, 1), (9, 1), (10, 1)]
    assert [one for one in reported if one[0] < 18] == [
        (1, 0),
        (4, 0),
        (7, 0),
        *held,
        (11, 0),
        (14, 0),
        (17, 0),
    ]


def test_while_callers_wait_the_fleet_is_told_at_every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gateways take turns by each other's queues: a second late, whole turns go to the wrong holder."""
    monkeypatch.setattr(accounts, "QUEUE_TICK_S", 0.0)
    times = Times()
    table, _ = key_of("k label=acme")
    reported: list[float] = []

    async def run() -> None:
        _, (a,), _ = gateways(times, table, count=1)
        ended, looks = asyncio.Event(), itertools.count(1)

        async def note(_: Any) -> None:
            reported.append(round(times.now, 2))

        def queued() -> list[QueuedRequest]:
            look = next(looks)
            times.now = look / 4
            if look == 12:
                ended.set()
            return [QueuedRequest("s", "")] if 5 <= look < 9 else []

        monkeypatch.setattr(a, "_report", note)
        running = asyncio.ensure_future(a.run(queued))
        await ended.wait()
        running.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert reported == [0.25, 1.25, 1.5, 1.75, 2.0, 3.0]
