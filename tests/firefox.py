"""A headless Firefox with its own fake microphone, by WebDriver BiDi: as much as the page's tests need.

Its clock of sound is a loudspeaker's: on a machine without one it plays into nothing, where that can be had.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from loudspeaker import can_sound, loudspeaker
from ports import free_port
from websockets.sync.client import ClientConnection, connect

NAMES = ("firefox-esr", "firefox")
START_TIMEOUT_S = 60.0
REPLY_TIMEOUT_S = 30.0
PREFERENCES = {
    "media.navigator.streams.fake": True,  # a microphone that hums
    "media.navigator.permission.disabled": True,
    "media.autoplay.default": 0,
    "intl.accept_languages": "en",
    "remote.prefs.recommended": True,
    "browser.shell.checkDefaultBrowser": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "app.update.enabled": False,
}


def found() -> str | None:
    """The program, where there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Firefox:
    """One browser with one tab."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="firefox-", ignore_cleanup_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._connections, self._sound = contextlib.ExitStack(), contextlib.ExitStack()
        self._socket: ClientConnection | None = None
        self._ids = 0
        self._tab = ""
        self.console: list[str] = []  # errors of scripts

    def __enter__(self) -> Firefox:
        program = found()
        assert program is not None, "the test needs a Firefox"
        lines = [
            f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in PREFERENCES.items()
        ]
        (Path(self._folder.name) / "user.js").write_text("\n".join(lines))
        port = free_port()
        command = [program, "--headless", "--no-remote", "--remote-debugging-port", str(port)]
        command += ["--profile", self._folder.name, "about:blank"]
        silent = subprocess.DEVNULL
        sound = self._sound.enter_context(loudspeaker()) if can_sound() else {}
        self._process = subprocess.Popen(command, stdout=silent, stderr=silent, env={**os.environ, **sound})
        try:
            self._socket = self._connect(f"ws://127.0.0.1:{port}/session")
            self.call("session.new", capabilities={})
            self.call("session.subscribe", events=["log.entryAdded"])
            self._tab = self.call("browsingContext.getTree")["contexts"][0]["context"]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connections.close()
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
        self._sound.close()
        self._folder.cleanup()

    def open(self, url: str) -> None:
        self.call("browsingContext.navigate", context=self._tab, url=url, wait="complete")

    def run(self, script: str) -> Any:
        """The JSON value of an expression, promises awaited, as if the user had just clicked."""
        reply = self.call(
            "script.evaluate",
            expression=f"(async () => JSON.stringify(await ({script}) ?? null))()",
            target={"context": self._tab},
            awaitPromise=True,
            userActivation=True,
        )
        if reply["type"] == "exception":
            raise AssertionError(reply["exceptionDetails"]["text"])
        return json.loads(reply["result"]["value"])

    def wait(self, condition: str, timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"not within {timeout_s:g} s: {condition}; console: {self.console}"
            time.sleep(0.05)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of WebDriver BiDi."""
        assert self._socket is not None, "use it in a with block"
        self._ids += 1
        self._socket.send(json.dumps({"id": self._ids, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=REPLY_TIMEOUT_S))
            if message.get("id") == self._ids:
                assert message["type"] == "success", f"{method}: {message}"
                return dict(message["result"])
            if message.get("method") == "log.entryAdded" and message["params"]["level"] == "error":
                self.console.append(message["params"]["text"])

    def _connect(self, address: str) -> ClientConnection:
        end = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return self._connections.enter_context(connect(address, max_size=None, proxy=None))
            except OSError:
                assert self._process is not None
                assert self._process.poll() is None, "Firefox ended"
                assert time.monotonic() < end, "Firefox did not start"
                time.sleep(0.1)
