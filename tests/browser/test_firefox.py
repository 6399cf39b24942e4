"""The page in Firefox: its start, and a talk. Firefox' own fake microphone hums."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from firefox import Firefox, found
from loudspeaker import can_sound
from staged import Staged
from views import READY
from web_service import INFO, WebService

pytestmark = [pytest.mark.browser, pytest.mark.skipif(found() is None, reason="no Firefox here")]


@pytest.fixture(scope="module")
def firefox() -> Iterator[Firefox]:
    with Firefox() as browser:
        yield browser


def test_the_start(firefox: Firefox, service: WebService) -> None:
    service.chat, service.info, service.refusal = Staged(), dict(INFO), ""
    firefox.open(service.url)
    firefox.wait(READY)
    assert firefox.run("document.querySelectorAll('[name=voice]').length") == 18
    assert not firefox.run("connect.disabled")
    assert firefox.run("document.documentElement.scrollWidth <= innerWidth")
    assert firefox.console == []


@pytest.mark.skipif(not can_sound(), reason="no PulseAudio here, to play sound without a device")
def test_a_talk(firefox: Firefox, service: WebService) -> None:
    staged = Staged(unprompted=True)
    service.chat, service.info, service.refusal = staged, dict(INFO), ""
    firefox.open(service.url)
    firefox.wait(READY)
    firefox.run("connect.click()")
    firefox.wait("state.dataset.state === 'live'")
    firefox.wait("document.getElementById('clock').textContent >= '0:06'", 60.0)
    assert firefox.run("document.querySelector('.turn.agent').innerText.includes('It is Paris')")
    assert firefox.run("/^[0-9]+ ms$/.test(document.getElementById('figure-latency').textContent)")
    firefox.run("document.getElementById('end').click()")
    firefox.wait("!document.getElementById('after').hidden")
    said = np.concatenate(staged.heard)
    assert len(said) > 4 * 24_000
    assert float(np.abs(said[24_000:]).max()) > 0.01, "the microphone is heard"
    assert firefox.console == []
