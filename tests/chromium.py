"""A headless Chromium driven by its DevTools protocol: as much of it as the page's tests need."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --use-fake-device-for-media-stream
--autoplay-policy=user-gesture-required --remote-debugging-port=0
"""
MUTE = "--mute-audio"  # its clock of sound is a timer then
START_TIMEOUT_S = 20.0
REPLY_TIMEOUT_S = 15.0


def found() -> str | None:
    """The program, where there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class PageError(AssertionError):
    """A script in the page threw."""


class Chromium:
    """One browser with one tab. `microphone` False lets the page be refused it. `loudspeaker`: the variables
    by which it is found, see loudspeaker.py."""

    def __init__(
        self,
        *,
        microphone: bool = True,
        loudspeaker: Mapping[str, str] | None = None,
        flags: tuple[str, ...] = (),
    ) -> None:
        program = found()
        if program is None:
            raise FileNotFoundError(f"the browser tests need a Chromium: one of {', '.join(NAMES)}")
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        ask = ["--use-fake-ui-for-media-stream"] if microphone else ["--deny-permission-prompts"]
        self.console: list[str] = []  # what the page complained of
        self.requests: list[str] = []  # addresses that were asked for, WebSockets included
        self.downloads = Path(self._folder.name) / "downloads"
        self._ids = 0
        ask += [] if loudspeaker else [MUTE]
        self._command = [program, *FLAGS.split(), *ask, *flags, f"--user-data-dir={self._folder.name}"]
        self._environment = {**os.environ, **(loudspeaker or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ("", "")  # of the browser: host, path
        self._connections = contextlib.ExitStack()
        self._socket: ClientConnection | None = None

    def __enter__(self) -> Chromium:
        silent = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [*self._command, "about:blank"], stdout=silent, stderr=silent, env=self._environment
        )
        try:
            self._attach(self._find_tab())
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
            self._process.wait(10)
        self._folder.cleanup()

    def _attach(self, tab: str) -> None:
        self._socket = self._connections.enter_context(connect(tab, max_size=None, proxy=None))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def crash(self) -> None:
        """Ends the tab's process at once, as a fault would, and goes on in a new tab."""
        assert self._socket is not None, "use it in a with block"
        base, _, crashed = self._find_tab().rpartition("/")
        self._socket.send(json.dumps({"id": 0, "method": "Page.crash"}))
        with self._browser() as browser:
            made = _ask(browser, "Target.createTarget", url="about:blank")["targetId"]
            _ask(browser, "Target.closeTarget", targetId=crashed)
        self._socket.close()
        self._attach(f"{base}/{made}")

    def downloaded(self, suffix: str, timeout_s: float = 20.0) -> Path:
        """The newest file that was saved with this ending, once it is whole."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if files := sorted(self.downloads.glob(f"*{suffix}"), key=lambda file: file.stat().st_mtime):
                return files[-1]
            self.run("0")  # reads events
            time.sleep(0.05)
        raise AssertionError(f"no {suffix} was saved within {timeout_s:g} s; console: {self.console}")

    @property
    def pid(self) -> int:
        assert self._process is not None, "use it in a with block"
        return self._process.pid

    def open(self, url: str) -> None:
        """Loads `url` and waits for its scripts."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, promises awaited, as if the user had just clicked."""
        reply = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in reply:
            details = reply["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description", details["text"]))
        return reply["result"].get("value")

    def wait(self, condition: str, timeout_s: float = 10.0) -> None:
        """Until a JavaScript expression is true, or an element."""
        end = time.monotonic() + timeout_s
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise AssertionError(f"not within {timeout_s:g} s: {condition}; console: {self.console}")
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)}).textContent"))

    def screenshot(
        self, path: Path, width: int = 1_280, height: int = 860, *, dark: bool = False, whole: bool = True
    ) -> None:
        """The window, or the whole page, at least `height` high."""
        self.look(width, height, dark=dark)
        if whole:
            height = max(height, int(self.run("document.documentElement.scrollHeight")))
            self.look(width, height, dark=dark)
        self.run("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """Sets window size and colour scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command."""
        assert self._socket is not None, "use it in a with block"
        self._ids += 1
        self._socket.send(json.dumps({"id": self._ids, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=REPLY_TIMEOUT_S))
            if message.get("id") == self._ids:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                return dict(message["result"])
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.console.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning"):
                self.console.append(" ".join(str(argument.get("value")) for argument in parameters["args"]))
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Network.webSocketCreated":
                self.requests.append(parameters["url"])
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.console.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def _find_tab(self) -> str:
        """Address of the one tab. The browser writes its own into its profile when it listens."""
        assert self._process is not None
        file, end = Path(self._folder.name) / "DevToolsActivePort", time.monotonic() + START_TIMEOUT_S
        while not (file.exists() and len(lines := file.read_text().splitlines()) == 2):
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError("Chromium did not start")
            time.sleep(0.05)
        self._address = f"ws://127.0.0.1:{lines[0]}", lines[1]
        with self._browser() as browser:
            while True:
                targets = _ask(browser, "Target.getTargets")["targetInfos"]
                tabs = [target["targetId"] for target in targets if target["type"] == "page"]
                if tabs:
                    return f"{self._address[0]}/devtools/page/{tabs[0]}"
                if time.monotonic() > end:
                    raise AssertionError("Chromium opened no tab")
                time.sleep(0.05)

    def _browser(self) -> ClientConnection:
        return connect("".join(self._address), max_size=None, proxy=None)


def _ask(browser: ClientConnection, method: str, **parameters: Any) -> dict[str, Any]:
    """One command to the browser itself."""
    browser.send(json.dumps({"id": 1, "method": method, "params": parameters}))
    while True:
        message = json.loads(browser.recv(timeout=REPLY_TIMEOUT_S))
        if message.get("id") == 1:
            return dict(message["result"])
