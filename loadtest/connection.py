"""A blocking WebSocket for many sessions in one process: the library's protocol over a plain socket.

The library's own blocking client starts a thread per connection; this one is driven by whoever calls it, and
waits for as long as it is told. Under Locust gevent replaces the socket, so that waiting costs nothing.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

from personaplex.client_io import tls_context
from personaplex.session.moshi import MESSAGE_LIMIT

OPEN_TIMEOUT_S = 20.0  # for the socket and the upgrade
SEND_TIMEOUT_S = 2.0
_READ = 65_536


class Connection:
    """The library's WebSocket protocol over a plain socket: messages in order, then `closed`."""

    def __init__(self, url: str, headers: Mapping[str, str], insecure: bool = False) -> None:
        """Connects and upgrades; raises OSError, InvalidHandshake or InvalidURI."""
        where = parse_uri(url)
        self._socket = socket.create_connection((where.host, where.port), OPEN_TIMEOUT_S)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            context = tls_context(url, insecure)
            if context is not None:
                self._socket = context.wrap_socket(self._socket, server_hostname=urlsplit(url).hostname)
            self._protocol = ClientProtocol(where, max_size=MESSAGE_LIMIT)
            self._parts: list[bytes] = []  # of a message in several frames
            self._text = False
            self._upgrade(headers)
        except BaseException:
            self._socket.close()
            raise

    @property
    def closed(self) -> bool:
        return self._protocol.state.name == "CLOSED"

    @property
    def code(self) -> int:
        return self._protocol.close_code or 1006

    @property
    def reason(self) -> str:
        return self._protocol.close_reason or ""

    def receive(self, timeout_s: float) -> list[bytes | str]:
        """Messages that come within `timeout_s`, if only until the first of them; [] in time for our own."""
        waiting = list(self._messages())  # what came along with the answer to the upgrade
        if waiting or timeout_s <= 0:
            return waiting
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(_READ)
        except (TimeoutError, ssl.SSLWantReadError):
            return []
        except OSError:
            data = b""
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
        self._flush()
        return list(self._messages())

    def send(self, data: bytes | str) -> None:
        """One message, binary or text; without effect once the connection is closing."""
        if self._protocol.state.name == "OPEN":
            if isinstance(data, str):
                self._protocol.send_text(data.encode())
            else:
                self._protocol.send_binary(data)
            self._flush()

    def close_politely(self, code: int, reason: str) -> None:
        """Sends a close; the peer's answer ends the connection."""
        if self._protocol.state.name == "OPEN":
            self._protocol.send_close(code, reason)
            self._flush()

    def abandon(self) -> None:
        """Ends the connection without waiting for the peer."""
        self._protocol.receive_eof()

    def close(self) -> None:
        self._socket.close()

    def _upgrade(self, headers: Mapping[str, str]) -> None:
        request = self._protocol.connect()
        for name, value in headers.items():
            request.headers[name] = value
        self._protocol.send_request(request)
        self._flush()
        answered = False
        while not answered:
            data = self._socket.recv(_READ)
            if data:
                self._protocol.receive_data(data)
            else:
                self._protocol.receive_eof()
            if self._protocol.handshake_exc is not None:
                raise self._protocol.handshake_exc
            answered = self._protocol.state.name != "CONNECTING"  # a refusal may follow at once
        self._flush()

    def _messages(self) -> Iterator[bytes | str]:
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                continue
            assert isinstance(event, Frame)
            if event.opcode in (Opcode.BINARY, Opcode.TEXT):
                self._text = event.opcode is Opcode.TEXT
            elif event.opcode is not Opcode.CONT:
                continue
            self._parts.append(bytes(event.data))
            if event.fin:
                message, self._parts = b"".join(self._parts), []
                yield message.decode(errors="replace") if self._text else message

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            try:
                if data:
                    self._socket.settimeout(SEND_TIMEOUT_S)
                    self._socket.sendall(data)
                else:
                    self._socket.shutdown(socket.SHUT_WR)
            except OSError:  # the peer is gone or does not read; what it said last is still to be read
                return
