"""Who is let in by a running service, in what words the others are refused, and that a neighbour does not
notice clients that ask for nothing, or for a slot and nothing more. Attackers come from a loopback address
other than the neighbours', which is not limited."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from attackers import CROWDS, CUTS, attackers
from exported import HELD, gauges
from rawsocket import BINARY, Raw, Target, frame
from serving import Client, Service, connect, running, speech

from deployments.connections import REQUEST_TIMEOUT_S
from deployments.gateway.reconnects import FIRST_WAIT_S
from personaplex.session.core import HANDSHAKE_DELAY_S
from personaplex.session.moshi import Audio

GAP_S = 0.5
QUIET_S = 2.0
AFTERMATH_S = 0.5  # of an attack
SLOTS = 8
FIRST_AUDIO_S = 1.5
KEY = "X-API-Key: right"


def _target(service: Service, query: str = "", path: str = "api/chat") -> Target:
    host, _, name = service.base.partition("/")
    address, _, port = host.partition(":")
    return Target(address, int(port), f"/{name}/{path}{query and '?' + query}")


def _answer(head: str) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    first, *lines = head.strip().split("\r\n")
    named = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in named}


def _upgrade(target: Target, *headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and words of the answer to an upgrade from SOURCE that is refused."""
    with Raw(target) as raw:
        status, named = _answer(raw.upgrade(*headers))
        size = int(named.get("content-length", 0))
        return status, named, raw.socket.makefile("rb").read(size).decode()


@pytest.fixture(scope="module")
def guarded(cluster: str) -> Iterator[Service]:
    with running(
        cluster,
        model="echo",
        slots=2,
        queue_limit=1,
        sessions_per_gateway=3,
        api_keys="right",
        allowed_origins="https://a.example",
        sessions_per_address=1,
        unlimited_networks="127.0.0.1",
    ) as service:
        yield service


@pytest.mark.parametrize(
    ("query", "headers", "status", "word"),
    [
        ("", (), 401, "key"),
        ("", ("X-API-Key: wrong",), 401, "key"),
        ("", (KEY, "Origin: https://b.example"), 403, "origin"),
        ("seed=-7", (KEY,), 400, "seed"),
        ("voice_prompt=..%2Fetc", (KEY,), 400, "voice"),
        ("a=%FF", (KEY,), 400, "query"),
    ],
)
def test_a_refusal_is_a_status_before_the_upgrade(
    guarded: Service, query: str, headers: tuple[str, ...], status: int, word: str
) -> None:
    got, named, words = _upgrade(_target(guarded, query), *headers)
    assert got == status
    assert word in words
    assert ("www-authenticate" in named) == (status == 401)


def test_no_upgrade_and_no_such_address(guarded: Service) -> None:
    with Raw(_target(guarded)) as raw:
        raw.request()
        status, named = _answer(raw.head())
    assert (status, named["upgrade"]) == (426, "websocket")
    assert _upgrade(_target(guarded, path="app.js"))[0] == 404


def test_an_address_has_its_limit_and_a_gateway_too(guarded: Service) -> None:
    """The limit of a caller is told by another status than the lack of room."""

    async def run() -> None:
        headers = {"X-API-Key": "right"}
        async with contextlib.AsyncExitStack() as stack:
            with Raw(_target(guarded)) as first:
                assert _answer(first.upgrade(KEY))[0] == 101
                status, named, words = await asyncio.to_thread(_upgrade, _target(guarded), KEY)
                assert (status, "address" in words) == (429, True)
                assert int(named["retry-after"]) > 0
                forged = ("X-Forwarded-For: 203.0.113.5", "Forwarded: for=203.0.113.5")
                assert (await asyncio.to_thread(_upgrade, _target(guarded), KEY, *forged))[0] == 429
            await asyncio.to_thread(guarded.wait_idle, 5.0)
            clients = [await stack.enter_async_context(connect(guarded, headers)) for _ in range(3)]
            await clients[2].until(lambda heard: heard.queue == [1])
            status, named, words = await asyncio.to_thread(_upgrade, _target(guarded), KEY)
            assert (status, "gateway" in words) == (503, True)
            assert int(named["retry-after"]) > 0

    asyncio.run(run())
    guarded.wait_idle()


# Neighbours


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(
        cluster,
        model="echo",
        slots=SLOTS,
        first_audio_s=FIRST_AUDIO_S,
        idle_limit_s=4.0,
        unlimited_networks="127.0.0.1",
        log_level="info",
        metrics_page=True,
    ) as service:
        yield service


async def _undisturbed(service: Service, attack: Callable[[], Any]) -> Any:
    """What `attack` returns, which runs while a neighbour talks; fails when the neighbour notices. The bound
    is one for the median of three rounds: the second and third are run where the first is over it."""
    result, over = await _excess(service, attack)
    rounds = [over]
    while over > 0 and len(rounds) < 3:
        result, more = await _excess(service, attack)
        rounds.append(more)
    assert np.median(rounds) <= 0, f"seconds over the bound: {rounds}"
    return result


async def _excess(service: Service, attack: Callable[[], Any]) -> tuple[Any, float]:
    """One round: what `attack` returns, and how far the neighbour's longest gap is over the bound. Its quiet
    gap, which a busy machine makes, is the longest of QUIET_S before and as long after."""
    async with connect(service) as client:
        await client.headers()
        await client.until(lambda heard: heard.live)
        talking = asyncio.ensure_future(_talk_on(client))
        await asyncio.sleep(QUIET_S)
        began = time.monotonic()
        result = await asyncio.to_thread(attack)
        ended = time.monotonic() + AFTERMATH_S
        await asyncio.sleep(AFTERMATH_S + QUIET_S)
        talking.cancel()
        assert not client.ended
    heard = np.array([at for at, message in client.heard.messages if isinstance(message, Audio)][2:])
    gaps, ends = np.diff(heard), heard[1:]
    attacked = (ends > began) & (heard[:-1] < ended)
    return result, float(gaps[attacked].max() - max(GAP_S, 3 * gaps[~attacked].max()))


async def _talk_on(client: Client) -> None:
    while True:
        await client.speak(speech(8.0))


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """The lines that all processes of the cluster log meanwhile."""
    folder = Path("/tmp/ray", ray.get_runtime_context().get_session_name(), "logs")

    def sizes() -> dict[Path, int]:
        return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}

    before, lines = sizes(), list[str]()
    yield lines
    for path in sizes():
        with path.open("rb") as file:
            file.seek(before.get(path, 0))
            lines += file.read().decode(errors="replace").splitlines()


def test_connections_that_ask_for_nothing_are_closed(service: Service) -> None:
    """A thousand at any time: half say nothing, half send their request byte by byte, and all come back."""
    target = _target(service)

    def attack() -> dict[str, float]:
        with attackers(CROWDS, target, 1, REQUEST_TIMEOUT_S + 1.0) as (start, report):
            start()
            began = time.monotonic()
            while time.monotonic() - began < REQUEST_TIMEOUT_S:
                assert service.get("healthz").ok
                time.sleep(0.5)
            return report()

    found = asyncio.run(_undisturbed(service, attack))
    assert found["connections"] > 1_000, "those that made room came back"
    assert found["kept_s"] < REQUEST_TIMEOUT_S + 3.0


def test_upgrades_that_are_cut_leave_nothing(service: Service) -> None:
    """Hundreds in 4 s."""
    made = 0

    def attack() -> None:
        nonlocal made
        with attackers(CUTS, _target(service), 1, 4.0) as (start, report):
            start()
            made += int(report()["connections"])

    with _logged() as lines:
        asyncio.run(_undisturbed(service, attack))
        assert service.wait_idle(5.0) < 5.0
        assert gauges(service, *HELD) == {one.name: 0 for one in HELD}
    assert made > 100
    assert not [line for line in lines if "Traceback" in line or "Exception" in line]
    sessions = [line for line in lines if "session" in line]
    assert len(sessions) <= made + 10, "one line for each, and the neighbours'"


def test_a_slot_is_for_those_who_speak(service: Service) -> None:
    """Silence, a byte now and then: the slot is free soon, and who does it again and again has to wait."""
    target = _target(service)
    due = HANDSHAKE_DELAY_S + FIRST_AUDIO_S

    def attack() -> None:
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(Raw(target)) for _ in range(SLOTS)]
            answers = [_answer(raw.upgrade())[0] for raw in silent]
            assert answers == [101] * (SLOTS // 4) + [429] * (SLOTS - SLOTS // 4), "a quarter of the slots"
            accepted = time.monotonic()
            assert [raw.close_code() for raw in silent[: SLOTS // 4]] == [1000] * (SLOTS // 4)
            assert due - 0.2 < time.monotonic() - accepted < due + 1.5
        service.wait(lambda seen: sum(one.used for one in seen) == 1, 5.0)
        with Raw(target) as raw:
            assert _answer(raw.upgrade())[0] == 101
            accepted = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - accepted < due + 1.5:
                    raw.socket.sendall(frame(BINARY, b"\x01O") + frame(BINARY, b"\x06"))
                    time.sleep(0.3)
        service.wait(lambda seen: sum(one.used for one in seen) == 1, 5.0)
        status, named, words = _upgrade(target)
        assert (status, "want of audio" in words) == (429, True)
        assert FIRST_WAIT_S - 5 < int(named["retry-after"]) <= FIRST_WAIT_S
        assert _upgrade(target, "X-Forwarded-For: 203.0.113.5")[0] == 429
        assert _upgrade(_target(service, "voice_prompt=VARM0"))[0] == 101, "another conversation"

    asyncio.run(_undisturbed(service, attack))
    service.wait_idle(5.0)
