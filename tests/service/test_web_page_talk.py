"""The embedded model in the page: a recorded caller is its microphone; it shows and plays the answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import chromium
import numpy as np
import pytest
import soundfile
import soxr
from chromium import Chromium
from serving import Service, running
from talk.record import read
from views import Views

from personaplex.config import SAMPLE_RATE
from personaplex.training.behaviour import intent_of
from personaplex.training.score import transcript

pytestmark = pytest.mark.skipif(chromium.found() is None, reason="no Chromium here")

BEFORE_S, AFTER_S = 3.0, 7.0  # of silence; the browser plays the recording again and again
AGENT = (
    "[...document.querySelectorAll('.turn.agent')].filter((one) => one.checkVisibility())"
    ".map((one) => one.querySelector('.said').textContent).join(' ')"
)


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(cluster, model="talk", slots=2) as service:
        yield service


def test_a_caller_asks_for_the_name_and_the_page_answers(service: Service, tmp_path: Path) -> None:
    caller, world = next(one for one in read() if one[0].intent == "name" and not one[0].held_back)
    silent = (round(BEFORE_S * SAMPLE_RATE), round(AFTER_S * SAMPLE_RATE))
    microphone = tmp_path / "caller.wav"
    soundfile.write(microphone, np.pad(caller.wave, silent), SAMPLE_RATE)
    with Chromium(flags=("--lang=en", f"--use-file-for-fake-audio-capture={microphone}")) as browser:
        page = Views(browser, f"http://{service.base}/")
        page.fresh()
        assert "a few sentences" in page.text("#notice-toy")
        assert page.run("document.querySelector('.role .name').textContent") == "Green Hotel"
        page.set("role-text", world.role)
        page.start()
        page.wait(f"({AGENT}).includes({json.dumps(world.known.name)})", 60.0)
        page.talk_until("0:20")
        said = str(page.run(AGENT)).strip()
        page.end()
        page.listen()
        page.click("#export-wav")
        pcm, rate = soundfile.read(browser.downloaded(".wav"), dtype="float32", always_2d=True)
        assert browser.console == []
    assert intent_of(said) == "name", said
    agent = soxr.resample(pcm[:, 0], rate, SAMPLE_RATE)
    assert "my name is" in transcript(agent).lower()
