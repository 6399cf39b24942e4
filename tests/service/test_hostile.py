"""One round of the hostile suite: see tests/hostile.py, whose command takes the median of three."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import grpc
import pytest
from attackers import FLOODS, deflate_bomb, half_open
from hosted import GATEWAY, REPLICA, SLOTS, Hosted, hosted, open_to_the_network
from hostile import (
    FLOOD_S,
    flood,
    kill_proxy,
    queue_cpu,
    stall,
    stop_with_a_queue,
    wait_after_a_slot_is_free,
)
from verdict import Figures, broken

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def host() -> Iterator[Hosted]:
    with hosted() as host:
        yield host


def test_loopback_means_loopback_and_what_does_not_asks_for_a_token(host: Hosted) -> None:
    """Serve binds one gRPC port of each of its processes to every interface and takes pickles there."""
    doors = [where.split(maxsplit=2) for where in open_to_the_network(host)]
    assert {command.partition(":default:")[0] for _, _, command in doors} == {"ray::ServeReplica"}, doors
    for _, port, _ in doors:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_neighbour_notices_no_flood_and_nothing_grows(host: Hosted) -> None:
    found = flood(host, FLOODS, connections=1, seconds=2 * FLOOD_S)
    assert found["connections"] >= len(FLOODS)
    assert found["mb_taken"] > 1, "they did try"
    assert not broken({f"all.{name}": value for name, value in found.items()}), found


def test_who_waits_costs_next_to_nothing_and_is_served_at_once(host: Hosted) -> None:
    found: Figures = queue_cpu(host, (0, 6)) | wait_after_a_slot_is_free(host)
    assert not broken(found), found
    assert found["turn_s"] < 2.5


@pytest.mark.parametrize("name", [REPLICA, GATEWAY], ids=["replica", "gateway"])
def test_a_process_that_stands_still_for_less_than_the_limit_is_a_gap(host: Hosted, name: str) -> None:
    (answers,) = stall(host, name).values()
    assert answers > 0.5


def test_a_dead_proxy_takes_its_sessions_with_it(host: Hosted) -> None:
    found = kill_proxy(host)
    assert not broken(found), found


def test_who_waits_hears_of_the_end_like_the_others(host: Hosted) -> None:
    heard = stop_with_a_queue(host)
    assert len(heard) == SLOTS + 2
    stopped = "the server is being stopped; please connect again"
    assert [(one.code, one.reason) for one in heard] == [(1012, stopped)] * len(heard)


def test_the_same_judge_says_no_to_proxies_without_limits() -> None:
    with hosted(limits=False) as host:
        found = flood(host, (deflate_bomb, half_open), connections=2)
    over = broken({f"all.{name}": value for name, value in found.items()})
    assert {words.partition(" ")[0] for words in over} >= {"all.memory_mb", "all.kept_s"}, found
