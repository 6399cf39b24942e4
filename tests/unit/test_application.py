"""What an application says of its settings when it is built, and the token logs it keeps."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
from pathlib import Path

import pytest

from deployments.application import build
from deployments.gateway.tokenlogs import TokenLogs
from deployments.settings import Settings
from personaplex.tokenlog import TokenLog


def test_settings_are_printed_without_keys(caplog: pytest.LogCaptureFixture) -> None:
    from deployments.application import build
    from deployments.settings import Settings

    with caplog.at_level(logging.INFO, logger="deployments"):
        logging.getLogger("deployments").propagate = True
        build(Settings(model="echo", api_keys="do-not-show"))
        build(Settings(model="echo"))
    assert re.search(r'"slots": 4', caplog.text)
    assert "do-not-show" not in caplog.text
    assert "whoever reaches this service may use it" in caplog.text


@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EROFS])
def test_a_token_log_that_cannot_be_written_ends_no_session(
    trouble: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, one that may only be read: said, and nothing half written stays."""

    def save(log: TokenLog, path: Path) -> None:
        raise OSError(trouble, os.strerror(trouble))

    logs = TokenLogs(tmp_path / "logs")
    log = TokenLog()
    log.append(range(17), forced=False)
    asyncio.run(logs.keep("whole", log))
    monkeypatch.setattr(TokenLog, "save", save)
    asyncio.run(logs.keep("lost", log))
    assert "tokens of session lost could not be saved" in caplog.text
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["whole.npz"]


def test_what_was_said_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """The folder as well, where it is ours; one that was there keeps its rights."""
    log = TokenLog()
    log.append(range(17), forced=False)
    mask = os.umask(0)
    try:
        (tmp_path / "theirs").mkdir(0o755)
        for folder, mode in (("ours", 0o700), ("theirs", 0o755)):
            asyncio.run(TokenLogs(tmp_path / folder).keep("said", log))
            assert (tmp_path / folder).stat().st_mode & 0o7777 == mode
            assert (tmp_path / folder / "said.npz").stat().st_mode & 0o7777 == 0o600
    finally:
        os.umask(mask)


def test_slots_no_gateway_has_room_for_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(Settings(model="echo", slots=80, sessions_per_gateway=40, gateways_max=2))
        assert "gateways hold" not in caplog.text
        build(Settings(model="echo", slots=81, sessions_per_gateway=40, gateways_max=2))
    assert "gateways hold 80 sessions at most, replicas 81" in caplog.text
