"""The page in Firefox: the start, and a talk whose two sides are kept. Its fake microphone hums one tone."""

from __future__ import annotations

import numpy as np
import pytest
from firefox import Firefox, found
from staged import Staged
from views import READY
from web_service import INFO, WebService

from personaplex.config import SAMPLE_RATE

pytestmark = [pytest.mark.browser, pytest.mark.skipif(found() is None, reason="no Firefox here")]


LOUDEST = """(async () => {
  const { openHistory } = await import("./store/history.js");
  const { Reader } = await import("./store/reader.js");
  const history = await openHistory();
  const [talk] = await history.talks();
  const { user, agent } = await new Reader(await history.chunks(talk.id)).read(0, 7 * 48000);
  return [user, agent].map((side) => side.reduce((most, one) => Math.max(most, Math.abs(one)), 0));
})()"""


def test_start_and_a_talk(service: WebService) -> None:
    staged = Staged()
    service.chat, service.info, service.refusal = staged, dict(INFO), ""
    with Firefox() as browser:
        browser.open(service.url)
        browser.wait(READY)
        assert browser.run("document.querySelectorAll('[name=voice]').length") == 18
        assert not browser.run("connect.disabled")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        browser.run("connect.click()")
        browser.wait("state.dataset.state === 'live'", 30.0)
        browser.wait("document.getElementById('clock').textContent >= '0:09'", 60.0)
        browser.run("document.getElementById('end').click()")
        browser.wait("!document.getElementById('after').hidden")
        words = browser.run("document.getElementById('transcript').innerText")
        assert "It is Paris, as everybody knows." in words
        browser.run("document.getElementById('after-listen').click()")
        browser.wait("document.getElementById('stored-words')")
        assert browser.run("Number(position.max)") > 7
        loudest = browser.run(LOUDEST)
        assert min(loudest) > 0.02, "both sides are in the history"
        assert browser.console == []
    heard = np.concatenate(staged.heard)
    assert len(heard) > 6 * SAMPLE_RATE
    spectrum = np.abs(np.fft.rfft(heard[SAMPLE_RATE : 5 * SAMPLE_RATE]))
    assert spectrum.max() > 50 * np.median(spectrum), "a tone came through"
