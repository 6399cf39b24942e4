"""The page's views as a test uses them: what it says, what can be clicked."""

from __future__ import annotations

import json
from typing import Any

from chromium import Chromium

READY = "document.documentElement.dataset.ready !== undefined"


class Views:
    """The page at `url` in `browser`."""

    def __init__(self, browser: Chromium, url: str) -> None:
        self.browser, self.url = browser, url

    def fresh(self) -> None:
        """Loads the page as one that was never here before."""
        browser = self.browser
        browser.call("Storage.clearDataForOrigin", origin=self.url.rstrip("/"), storageTypes="all")
        browser.console.clear()
        browser.requests.clear()
        browser.look(1_280, 860)
        self.load()

    def load(self, fragment: str = "") -> None:
        self.browser.open("about:blank")
        self.browser.open(self.url + fragment)
        self.browser.wait(READY)

    def leave(self) -> None:
        self.browser.open("about:blank")

    def run(self, script: str) -> Any:
        return self.browser.run(script)

    def wait(self, condition: str, timeout_s: float = 10.0) -> None:
        self.browser.wait(condition, timeout_s)

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def text(self, selector: str) -> str:
        """What is shown there, without what is hidden."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def shown(self, selector: str) -> bool:
        return bool(self.run(f"document.querySelector({json.dumps(selector)})?.checkVisibility() ?? false"))

    def set(self, identifier: str, value: str, event: str = "input") -> None:
        """What a control holds, as if it had been typed or chosen."""
        self.run(
            f"(() => {{ const one = document.getElementById({json.dumps(identifier)}); "
            f"one.value = {json.dumps(value)}; "
            f"one.dispatchEvent(new Event({json.dumps(event)}, {{ bubbles: true }})); }})()"
        )

    def key(self, name: str, *, down: bool = True, up: bool = True) -> None:
        """One key of the keyboard."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "Escape": 27, "ArrowDown": 40}
        more: dict[str, Any] = {"text": name} if len(name) == 1 else {"text": "\r"} if name == "Enter" else {}
        code = codes.get(name, ord(name[0].upper()))
        if down:
            self.browser.call(
                "Input.dispatchKeyEvent", type="keyDown", key=name, windowsVirtualKeyCode=code, **more
            )
        if up:
            self.browser.call("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    def start(self) -> None:
        """Starts a conversation and waits until it is live."""
        self.click("#connect")
        self.live()

    def live(self) -> None:
        self.wait("state.dataset.state === 'live'", 20.0)

    def talk_until(self, clock: str) -> None:
        self.wait(f"document.getElementById('clock').textContent >= {json.dumps(clock)}", 60.0)

    def end(self) -> None:
        self.click("#end")
        self.ended()

    def ended(self) -> None:
        self.wait("!document.getElementById('after').hidden")

    def listen(self) -> None:
        """From the end of a conversation to its page in the history."""
        self.click("#after-listen")
        self.wait("document.getElementById('stored-words')")
