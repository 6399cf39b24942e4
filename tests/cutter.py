"""A network that can be cut: forwards TCP to a service, and ends every connection at once when told to."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from types import TracebackType

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close is a reset


class Cutter:
    """Listens on `port` and forwards to `target`, a host and a port."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._cut = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Cutter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(10)
        self._listener.close()

    def cut(self) -> None:
        """Resets all connections there are; new ones are let through."""
        self._cut.set()
        while self._cut.is_set():
            self._thread.join(0.01)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stop.is_set():
                for key, _ in selector.select(0.05):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        self._forward(selector, key.fileobj)  # type: ignore[arg-type]
                if self._cut.is_set():
                    self._reset(selector)
            self._reset(selector)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        self._pairs |= {near: far, far: near}
        for one in (near, far):
            selector.register(one, selectors.EVENT_READ)

    def _forward(self, selector: selectors.BaseSelector, one: socket.socket) -> None:
        if one not in self._pairs:
            return  # its other side was closed in this very round
        other, data = self._pairs[one], b""
        with contextlib.suppress(OSError):
            data = one.recv(65_536)
        if data:
            with contextlib.suppress(OSError):
                other.sendall(data)
            return
        for end in (one, other):
            selector.unregister(end)
            del self._pairs[end]
            end.close()

    def _reset(self, selector: selectors.BaseSelector) -> None:
        for one in list(self._pairs):
            selector.unregister(one)
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            one.close()
        self._pairs.clear()
        self._cut.clear()
