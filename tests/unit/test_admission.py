"""Who gets in, and what the others are told. Without Ray."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers

from deployments.addresses import caller_of, network
from deployments.gateway.admission import LIMIT_RETRY_S, AccessControl, ClientInfo, refusal
from deployments.gateway.keys import KeyTable, parse_key
from deployments.gateway.reconnects import FIRST_WAIT_S, LIMIT, LONGEST_WAIT_S, REMEMBERED, Reconnects
from deployments.settings import Settings, proxies_in_front
from personaplex.errors import (
    BadAudio,
    BadParameter,
    Forbidden,
    NoCapacity,
    PersonaplexError,
    SessionExpired,
    SessionIdle,
    SessionLost,
    TooManySessions,
    Unauthorized,
    UnknownVoice,
)

# Keys, origins and limits


def _access(**options: Any) -> AccessControl:
    limits = {"sessions_per_address": 0, "trusted_proxies": 0}
    keys, origins = options.pop("keys", ()), options.pop("origins", ())
    options["unlimited_networks"] = tuple(map(network, options.pop("unlimited", ("127.0.0.0/8", "::1"))))
    table = KeyTable(map(parse_key, keys))
    return AccessControl((lambda: table) if keys else None, origins, **{**limits, **options})


def _client(address: str = "192.0.2.1", query: dict[str, str] | None = None, **headers: str) -> ClientInfo:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return ClientInfo(address, Headers(named), query or {})


@pytest.mark.parametrize(
    "client",
    [
        _client(x_api_key="good"),
        _client(authorization="Bearer good"),
        _client(authorization="bearer  good"),
        _client(query={"worker_auth_id": "good"}),
    ],
)
def test_a_key_opens_wherever_clients_put_it(client: ClientInfo) -> None:
    access = _access(keys=("other", "good label=mine"))
    with access.enter(client) as entrant:
        assert access.counted == 1, "the address"
        assert entrant.key is not None
        assert entrant.key.label == "mine"
    assert access.counted == 0


@pytest.mark.parametrize(
    "client",
    [
        _client(),
        _client(x_api_key="goo"),
        _client(x_api_key="goodd"),
        _client(authorization="Basic good"),
        _client(query={"worker_auth_id": "\ud800"}),
    ],
)
def test_no_other_key_does(client: ClientInfo) -> None:
    with pytest.raises(Unauthorized) as caught, _access(keys=("good",)).enter(client):
        pass
    assert "good" not in str(caught.value)


def test_without_keys_everybody_may_enter() -> None:
    access = _access()
    with access.enter(_client()), access.enter(_client(x_api_key="whatever")) as entrant:
        assert entrant.key is None
        assert access.counted == 1, "the address alone: no key is looked at"
    assert access.counted == 0


def test_only_allowed_origins_may_but_programs_have_none() -> None:
    access = _access(origins=("https://a.example",))
    for client in (_client(origin="https://a.example"), _client()):
        with access.enter(client):
            pass
    for origin in ("https://b.example", "https://a.example.evil", "null", ""):
        with pytest.raises(Forbidden), access.enter(_client(origin=origin)):
            pass


def test_sessions_are_counted_by_address_and_uncounted_when_they_end() -> None:
    access = _access(keys=("a", "b"), sessions_per_address=2)
    with access.enter(_client(x_api_key="a")), access.enter(_client(x_api_key="b")):
        with pytest.raises(TooManySessions, match="address") as caught, access.enter(_client(x_api_key="b")):
            pass
        assert refusal(caught.value).headers["x-limit"] == "address"
        with access.enter(_client("192.0.2.2", x_api_key="b")):
            pass
    assert access.counted == 0


def test_a_refused_client_is_not_counted() -> None:
    access = _access(keys=("a",), sessions_per_address=1)
    for _ in range(3):
        with pytest.raises(Unauthorized), access.enter(_client(x_api_key="x")):
            pass
    with access.enter(_client(x_api_key="a")):
        pass


def test_a_caller_has_one_name_per_address_and_key() -> None:
    access, names = _access(keys=("a", "b")), []
    for address, key in (("192.0.2.1", "a"), ("192.0.2.1", "b"), ("192.0.2.2", "a"), ("192.0.2.1", "a")):
        with access.enter(_client(address, x_api_key=key)) as entrant:
            names.append(entrant.caller)
    assert names[0] == names[3]
    assert len(set(names)) == 3
    assert not any("192" in name or name in "ab" for name in names)


# Addresses


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:4711", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1:a:b:c:d", "2001:db8:0:1::/64"),
        ("2001:db8:0:1::2", "2001:db8:0:1::/64"),
        ("[2001:db8:0:1::2]:443", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("unknown", "unknown"),
        ("_" * 1_000, "_" * 64),
        ("", ""),
    ],
)
def test_an_address_is_counted_as_its_owner(address: str, name: str) -> None:
    """IPv6 gives one subscriber more addresses than there are sessions."""
    assert caller_of(address) == name


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_not_limited_unless_it_is_asked_for(address: str) -> None:
    access = _access(sessions_per_address=1)
    with access.enter(_client(address)), access.enter(_client(address)):
        assert access.counted == 0
    limited = _access(sessions_per_address=1, unlimited=("127.0.0.1",))
    with limited.enter(_client("127.0.0.2")):
        with pytest.raises(TooManySessions), limited.enter(_client("127.0.0.2")):
            pass
        with limited.enter(_client("127.0.0.1")), limited.enter(_client("127.0.0.1")):
            pass


def test_forwarded_addresses_count_only_as_far_as_proxies_are_trusted() -> None:
    """The last entries are our proxies' own; whatever stands before them the client may have written."""
    header = {"x_forwarded_for": "203.0.113.9, 198.51.100.7, 10.0.0.1"}
    for proxies, address in ((0, "192.0.2.1"), (1, "10.0.0.1"), (2, "198.51.100.7"), (4, "192.0.2.1")):
        access = _access(sessions_per_address=1, trusted_proxies=proxies)
        with (
            access.enter(_client(**header)),
            pytest.raises(TooManySessions),
            access.enter(_client(address)),
        ):
            pass


def test_a_forwarded_header_of_the_client_does_not_hide_the_proxys() -> None:
    lines = [(b"x-forwarded-for", b"203.0.113.9"), (b"x-forwarded-for", b"198.51.100.7, 10.0.0.1")]
    twice = ClientInfo("192.0.2.1", Headers(raw=lines), {})
    for proxies, address in ((1, "10.0.0.1"), (2, "198.51.100.7"), (3, "203.0.113.9")):
        access = _access(sessions_per_address=1, trusted_proxies=proxies)
        with access.enter(twice), pytest.raises(TooManySessions), access.enter(_client(address)):
            pass


def test_a_forged_header_neither_lifts_the_limit_nor_moves_it_to_another() -> None:
    access = _access(sessions_per_address=1)
    with access.enter(_client(x_forwarded_for="127.0.0.1")), pytest.raises(TooManySessions):  # noqa: SIM117
        with access.enter(_client(x_forwarded_for="203.0.113.9")):
            pass


def test_a_proxy_in_front_that_is_not_trusted_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    access = _access(sessions_per_address=5)
    for _ in range(3):
        with access.enter(_client(x_forwarded_for="203.0.113.9")):
            pass
    assert caplog.text.count("trusted_proxies") == 2  # twice in one line
    assert "203.0.113.9" not in caplog.text


def test_behind_our_own_proxy_nobody_is_counted_until_it_is_trusted() -> None:
    blind = _access(sessions_per_address=1, peer_is_proxy=True)
    with blind.enter(_client("10.0.0.1")), blind.enter(_client("10.0.0.1")):
        assert blind.counted == 0
    seeing = _access(sessions_per_address=1, peer_is_proxy=True, trusted_proxies=1)
    one, other = (
        _client("10.0.0.1", x_forwarded_for="1.1.1.1"),
        _client("10.0.0.1", x_forwarded_for="1.1.1.2"),
    )
    with seeing.enter(one), seeing.enter(other), pytest.raises(TooManySessions), seeing.enter(one):
        pass


# Settings


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"slots": 4}, 2),
        ({"slots": 64}, 16),
        ({"slots": 10}, 3),
        ({"slots": 64, "replicas_max": 4}, 64),
        ({"slots": 64, "replicas_max": 4, "gateways_max": 4}, 16),
        ({"slots": 64, "sessions_per_address": 1}, 1),
        ({"slots": 64, "sessions_per_address": 0}, 0),
    ],
)
def test_one_address_may_take_a_quarter_unless_said_otherwise(settings: dict[str, Any], limit: int) -> None:
    assert Settings(model="echo", **settings).address_limit == limit


def test_haproxy_of_ours_is_trusted_and_serves_own_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxies_in_front(None) == 0
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert proxies_in_front(None) == 0
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/opt/bin/personaplex-haproxy")
    assert proxies_in_front(None) == 1
    assert proxies_in_front(0) == 0


def test_networks_are_checked_and_may_be_a_list() -> None:
    settings = Settings(model="echo", unlimited_networks="10.0.0.0/8, ::1")
    assert settings.unlimited == (network("10.0.0.0/8"), network("::1"))
    with pytest.raises(ValidationError, match="unlimited_networks"):
        Settings(model="echo", unlimited_networks="10.0.0.1/8")


# What the refused are told


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadParameter("seed"), 400),
        (UnknownVoice("no such voice"), 400),
        (Unauthorized("a key"), 401),
        (Forbidden("origin"), 403),
        (TooManySessions("enough", 7.2), 429),
        (NoCapacity("full", 7.2), 503),
        (SessionLost("the server is being stopped"), 503),
    ],
)
def test_a_refusal_is_a_status_with_words(error: PersonaplexError, status: int) -> None:
    answer = refusal(error)
    assert answer.status_code == status
    assert bytes(answer.body).decode().startswith(str(error))
    retry = answer.headers.get("retry-after")
    assert retry == ("8" if isinstance(error, (TooManySessions, NoCapacity)) else None)
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert answer.headers["cache-control"] == "no-store"


def test_a_limit_says_when_to_come_back() -> None:
    access = _access(sessions_per_address=1)
    with access.enter(_client()), pytest.raises(TooManySessions) as caught, access.enter(_client()):
        pass
    assert refusal(caught.value).headers["retry-after"] == f"{LIMIT_RETRY_S:g}"


# Clients that come back after their idle limit


def _idle(reconnects: Reconnects, caller: str, times: int, now: float = 0.0) -> None:
    for _ in range(times):
        reconnects.ended(caller, SessionIdle("no audio"), now)


def test_who_comes_back_idle_again_and_again_waits_longer_each_time() -> None:
    reconnects, now, waits = Reconnects(), 1_000.0, []
    for _ in range(10):
        try:
            reconnects.check("a", now)
            waits.append(0.0)
        except TooManySessions as error:
            waits.append(error.retry_after_s)
            now += error.retry_after_s
            reconnects.check("a", now)
        now += 60.0
        reconnects.ended("a", SessionIdle("no audio"), now)
    assert waits[:LIMIT] == [0.0] * LIMIT
    assert waits[LIMIT:] == [min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**n) for n in range(10 - LIMIT)]
    reconnects.check("b", now)


@pytest.mark.parametrize("end", [None, SessionExpired("its time"), SessionLost("gone"), BadAudio("?")])
def test_any_other_end_clears_the_caller(end: PersonaplexError | None) -> None:
    reconnects = Reconnects()
    _idle(reconnects, "a", LIMIT)
    with pytest.raises(TooManySessions):
        reconnects.check("a", 1.0)
    reconnects.ended("a", end, 1.0)
    reconnects.check("a", 1.0)


def test_only_so_many_callers_are_remembered() -> None:
    reconnects = Reconnects()
    for number in range(REMEMBERED + 10):
        _idle(reconnects, str(number), LIMIT)
    assert len(reconnects._records) == REMEMBERED
    reconnects.check("0", 1.0)
    with pytest.raises(TooManySessions):
        reconnects.check(str(REMEMBERED), 1.0)
