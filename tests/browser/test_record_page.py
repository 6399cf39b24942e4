"""The page of a record in a real browser: it plays, shows both lanes and the words, and loads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Chromium

from personaplex.persona import Persona
from personaplex.record.format import Event, Head, Row, pack_event, pack_head, pack_row, parse
from personaplex.record.page import render

pytestmark = pytest.mark.browser
FRAMES = 100


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


def page() -> str:
    entries = [pack_head(Head("5e55", 1.79e9, Persona("NATF2", "<b>You</b> sell bread. é"), "0.1.0", "tiny"))]
    for number in range(FRAMES):
        entries.append(pack_row(Row(number, 0.08 * number, 0.02 + 0.001 * number, np.zeros(17, int))))
        if number % 10 == 0:
            entries.append(pack_event(Event("text", 0.0, {"frame": number, "text": f" word{number}"})))
    t = np.arange(FRAMES * 1_920) / 24_000
    sound = np.stack([0.5 * np.sin(2_000 * t) * (t % 2 < 1), 0.3 * np.sin(1_500 * t) * (t % 2 >= 1)])
    return render(parse(b"".join(entries)), sound.astype(np.float32))


def test_it_shows_and_plays_all_of_it(browser: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "call.html"
    path.write_text(page(), encoding="utf-8")
    browser.open(path.as_uri())
    browser.wait("document.getElementById('player').readyState === 4")
    assert abs(browser.run("document.getElementById('player').duration") - 0.08 * FRAMES) < 0.05
    assert browser.run("document.querySelectorAll('#words button').length") == FRAMES // 10
    assert browser.text("#role") == "Role: <b>You</b> sell bread. é"
    assert "cut short" in browser.text("#about")
    assert "median 70 ms, 99 % within 119 ms" in browser.text("#typical")
    for lane in ("lanes", "delays"):
        script = (
            f"(() => {{ const c = document.getElementById('{lane}');"
            "return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((b) => b > 0); })()"
        )
        assert browser.run(script), "something is drawn"
    browser.run("document.querySelectorAll('#words button')[5].click()")
    browser.wait("document.getElementById('player').currentTime > 4")
    browser.wait("document.querySelector('#words button.now') !== null || player.currentTime > 4.1")
    browser.screenshot(tmp_path / "call.png")
    assert (tmp_path / "call.png").stat().st_size > 10_000
    assert browser.console == []
