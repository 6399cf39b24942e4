"""The page's start in Firefox."""

from __future__ import annotations

import pytest
from firefox import Firefox, found
from staged import Staged
from views import READY
from web_service import INFO, WebService

pytestmark = [pytest.mark.browser, pytest.mark.skipif(found() is None, reason="no Firefox here")]


def test_the_start(service: WebService) -> None:
    service.chat, service.info, service.refusal = Staged(), dict(INFO), ""
    with Firefox() as browser:
        browser.open(service.url)
        browser.wait(READY)
        assert browser.run("document.querySelectorAll('[name=voice]').length") == 18
        assert not browser.run("connect.disabled")
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        assert browser.console == []
