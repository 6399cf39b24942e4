"""What the page's tests share: a browser whose microphone is a staged speaker, a service, the page in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Chromium
from staged import Staged, microphone
from views import Views
from web_service import INFO, WebService


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return microphone(tmp_path_factory.mktemp("microphone") / "user.wav")


@pytest.fixture(scope="session")
def browser(speaker: Path) -> Iterator[Chromium]:
    with Chromium(flags=(f"--use-file-for-fake-audio-capture={speaker}%noloop", "--lang=en")) as browser:
        yield browser


@pytest.fixture(scope="session")
def service() -> Iterator[WebService]:
    with WebService(Staged()) as service:
        yield service


@pytest.fixture
def page(browser: Chromium, service: WebService) -> Iterator[Views]:
    """The page as seen for the first time; at the end nothing may have gone wrong in it unnoticed."""
    service.chat, service.info, service.refusal = Staged(), dict(INFO), ""
    views = Views(browser, service.url)
    views.fresh()
    yield views
    views.leave()
    assert browser.console == []
