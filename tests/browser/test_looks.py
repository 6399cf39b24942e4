"""Every screen of the page: in order for axe-core, phone and wide, in both colours and languages.

With PAGE_IMAGES=docs/images in the environment the documentation's pictures are made on the way
(`make page-images`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium
from staged import Staged
from views import Views
from web_service import INFO, WebService

pytestmark = pytest.mark.browser

AXE = Path(__file__).parents[2] / ".cache" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
PHONE, WIDE = (390, 844), (1_280, 860)
LOOKS = [(dark, size) for dark in (False, True) for size in (WIDE, PHONE)]
SHOWN = {  # in the documentation; the other pictures are for this test's own eyes
    *("start", "start-chinese-dark", "talk", "talk-dark", "talk-phone", "after", "history", "history-phone"),
}
EXTRAS: dict[str, Any] = {
    "prompt_tokens": 1_000,
    "record": "allowed",
    "own_voices": {"allowed": "yes", "seconds": 30, "bytes": 2_000_000, "ttl_s": 3_600},
}


@pytest.fixture(scope="module")
def axe() -> str:
    if not AXE.exists():
        pytest.skip("axe-core is not there: make test-browser gets it from npm")
    return AXE.read_text()


@pytest.fixture(scope="module")
def screens(browser: Chromium, service: WebService) -> Iterator[Views]:
    """The page for the whole module, which takes it from screen to screen."""
    service.chat, service.info, service.refusal = Staged(), {**INFO, **EXTRAS}, ""
    views = Views(browser, service.url)
    views.fresh()
    yield views
    views.leave()
    assert browser.console == []


class Looker:
    """Looks at what is shown, in both colours, wide and on a phone; `findings` is what is wrong."""

    def __init__(self, views: Views, axe: str, images: Path, others: Path) -> None:
        self.findings: list[str] = []
        self._views, self._axe, self._images, self._others = views, axe, images, others

    def see(self, name: str) -> None:
        """A picture of each, the whole page where that is longer than the window, and axe's judgement."""
        self.take(name, whole=True)
        self.judge(name)

    def take(self, name: str, *, whole: bool = False) -> None:
        browser = self._views.browser
        for dark, (width, height) in LOOKS:
            kind = f"{'-phone' if width < 600 else ''}{'-dark' if dark else ''}"
            folder = self._images if f"{name}{kind}" in SHOWN else self._others
            file = folder / f"page-{name}{kind}.png"
            browser.screenshot(file, width, height, dark=dark, whole=whole and width > 600)
        browser.look(*WIDE)

    def judge(self, name: str) -> None:
        """axe keeps the page from its work: what is heard then has gaps."""
        browser = self._views.browser
        for dark, (width, height) in LOOKS:
            browser.look(width, height, dark=dark)
            self._judge(f"{name}, {'dark' if dark else 'light'}, {width} wide", width)
        browser.look(*WIDE)

    def _judge(self, place: str, width: int) -> None:
        run = self._views.run
        if not run("'axe' in window"):
            run(f"{self._axe}; 0")
        options = json.dumps({"runOnly": TAGS, "resultTypes": ["violations"]})
        found = run(
            f"axe.run(document, {options}).then(({{ violations }}) => violations.map((one) => "
            "`${one.impact} ${one.id}: ${one.nodes.slice(0, 3).map((node) => node.target).join('; ')}`))"
        )
        self.findings += [f"{place}: {one}" for one in found if not one.startswith("minor")]
        if (wide := run("document.documentElement.scrollWidth")) > width:
            self.findings.append(f"{place}: {wide} pixels wide")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = os.environ.get("PAGE_IMAGES")
    return Path(asked) if asked else tmp_path_factory.mktemp("images")


def test_every_screen(screens: Views, service: WebService, axe: str, images: Path, tmp_path: Path) -> None:
    looker, page = Looker(screens, axe, images, tmp_path), screens
    looker.see("start")
    page.click("#language")
    service.info = {**INFO, **EXTRAS, "model": "tiny", "used": 4, "wait_s": 40, "key_needed": True}
    page.load()
    page.run("sampling.open = true; document.querySelector('#own-voice details').open = true")
    looker.see("start-chinese")
    page.click("#language")
    service.info = {**INFO, **EXTRAS, "used": 2}
    page.load()

    page.start()
    page.talk_until("0:17")
    looker.take("talk")
    page.end()
    looker.take("after")
    looker.judge("after")
    page.listen()
    looker.see("history")
    page.click("#rename")
    page.wait("document.getElementById('dialog').open")
    looker.judge("dialog")
    page.click("#dialog [type=button]")
    page.click("#again")
    page.live()
    page.talk_until("0:02")
    looker.judge("talk")
    page.click("#mute")
    page.click("#language")
    looker.judge("talk in Chinese, muted")
    looker.take("talk-chinese")
    page.click("#language")
    page.end()
    page.click("#nav-history")
    page.wait("document.querySelector('.select')")
    looker.see("list")
    assert not looker.findings, "\n".join(looker.findings)


def test_nothing_moves_for_who_wants_no_motion(screens: Views) -> None:
    calm = {"name": "prefers-reduced-motion", "value": "reduce"}
    screens.browser.call("Emulation.setEmulatedMedia", features=[calm])
    screens.load()
    screens.run("document.getElementById('state').dataset.state = 'busy'")
    script = "getComputedStyle(document.getElementById('state'), '::before').animationName"
    assert screens.run(script) == "none"
    screens.browser.look(*WIDE)


def test_the_start_by_keyboard_alone(screens: Views) -> None:
    """Tab reaches every control in the order of the page, and Enter on the last one starts."""
    screens.load()
    seen: list[str] = []
    for _ in range(80):
        screens.key("Tab")
        seen.append(screens.run("document.activeElement.id || document.activeElement.name || ''"))
        if seen[-1] == "connect":
            break
    order = ["role-search", "role", "role-text", "role-save", "microphone", "check", "keep", "connect"]
    assert [name for name in seen if name in order] == order
    ring = "getComputedStyle(document.activeElement).outlineStyle"
    assert screens.run(ring) == "solid", "and one sees where one is"
