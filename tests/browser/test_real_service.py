"""The page against a running service: one slot, one place in the queue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chromium import Chromium
from cutter import Cutter
from serving import Service, running
from views import Views
from websockets.sync.client import connect

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def narrow(cluster: str) -> Iterator[Service]:
    with running(cluster, model="echo", slots=1, queue_limit=1, queue_timeout_s=20.0) as service:
        yield service


@pytest.fixture
def page(browser: Chromium, narrow: Service) -> Iterator[Views]:
    narrow.wait_idle()
    views = Views(browser, f"http://{narrow.base}/")
    views.fresh()
    yield views
    views.leave()
    narrow.wait_idle()


def test_the_queue_and_the_end_of_the_wait(page: Views, narrow: Service) -> None:
    with connect(narrow.chat):
        narrow.wait(lambda seen: seen[0].used == 1)
        page.click("#connect")
        page.wait("state.textContent.startsWith('In the queue, position 1')")
        page.load("#talk")
        assert page.shown("#notice-full"), "one who comes now is told"
        page.click("#connect")
        page.wait("state.textContent.startsWith('In the queue, position 1')")
    page.live()
    page.talk_until("0:02")
    page.wait("document.getElementById('figure-latency').textContent.endsWith(' ms')")
    page.end()
    assert page.browser.console == []


def test_a_full_service(page: Views, narrow: Service) -> None:
    with connect(narrow.chat), connect(f"{narrow.chat}?status=1") as waits:
        waits.recv()  # its place in the queue
        page.click("#connect")
        page.ended()
        assert page.text("#notice-end p").startswith("No slot is free: ")
    page.browser.console.clear()  # the browser's own line about the status


def test_a_talk_and_its_history_after_a_reload(page: Views) -> None:
    page.start()
    page.talk_until("0:06")
    page.end()
    page.load("#history")
    page.click(".talk-row")
    page.wait("document.getElementById('stored-words')")
    assert float(page.run("position.max")) > 5
    assert page.run("document.querySelector('.turn.user') !== null")
    page.click("#play")
    page.wait("Number(position.value) > 0.5")
    assert page.browser.console == []


def test_a_talk_outlives_its_connection(browser: Chromium, narrow: Service) -> None:
    narrow.wait_idle()
    host, _, rest = narrow.base.partition(":")
    port, _, path = rest.partition("/")
    with Cutter((host, int(port))) as network:
        page = Views(browser, f"http://127.0.0.1:{network.port}/{path}/")
        page.fresh()
        page.run(
            "window.states = []; new MutationObserver(() => states.push(state.textContent))"
            ".observe(state, { childList: true })"
        )
        page.start()
        page.wait("document.getElementById('session-line').textContent.includes('session=')")
        session = page.text("#session-line").split()[0]
        for clock in ("0:04", "0:08"):
            page.talk_until(clock)
            network.cut()
            page.wait("states.at(-1) !== 'Live'")
            page.live()
        page.talk_until("0:11")
        assert page.text("#session-line").split()[0] == session
        assert page.run("states").count("One moment, the connection is being restored") == 2
        page.wait("document.getElementById('figure-latency').textContent.endsWith(' ms')")
        page.end()
        page.listen()
        assert float(page.run("position.max")) > 10
        page.leave()
    browser.console.clear()  # the browser's own lines about the connections
    narrow.wait_idle()


def test_a_wrong_query_is_told_in_words(page: Views) -> None:
    page.set("role-text", "long " * 2_300)
    page.click("#connect")
    page.ended()
    assert "token" in page.text("#notice-end p")
    page.browser.console.clear()
