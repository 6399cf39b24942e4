"""The page against a running service, in a Chromium where there is one: the quickest talk.

tests/browser has the rest.
"""

from __future__ import annotations

import chromium
import numpy as np
import pytest
import soundfile
import soxr
from chromium import Chromium
from serving import Service
from views import Views

from personaplex.config import SAMPLE_RATE

pytestmark = pytest.mark.skipif(chromium.found() is None, reason="no Chromium here")


def test_a_talk_with_the_echo(echo_app: Service) -> None:
    """The browser's fake microphone beeps, the service says it back, and both are kept on one clock."""
    echo_app.wait_idle()
    with Chromium(flags=("--lang=en",)) as browser:
        page = Views(browser, f"http://{echo_app.base}/")
        page.fresh()
        assert "you hear yourself" in page.text("#notice-toy")
        assert page.text("#service") == "echo · 4 of 4 slots free"
        page.start()
        page.talk_until("0:04")
        assert page.text("#session-line").startswith("session=")
        page.end()
        page.listen()
        page.click("#export-wav")
        pcm, rate = soundfile.read(browser.downloaded(".wav"), dtype="float32", always_2d=True)
        assert browser.console == []
    echo_app.wait_idle()
    agent, user = (soxr.resample(pcm[:, channel], rate, SAMPLE_RATE) for channel in (0, 1))
    assert np.abs(user).max() > 0.05
    spoken = user[SAMPLE_RATE // 2 : 2 * SAMPLE_RATE]
    scores = np.correlate(agent[SAMPLE_RATE // 2 :], spoken, "valid")
    at = int((scores > 0.9 * scores.max()).argmax())  # the first of them: the microphone beeps every second
    there = agent[SAMPLE_RATE // 2 + at :][: len(spoken)]
    assert scores[at] > 0.5 * np.linalg.norm(there) * np.linalg.norm(spoken), "what was said is heard"
    assert 0.1 < at / SAMPLE_RATE < 2.0, "later, on the same clock"
