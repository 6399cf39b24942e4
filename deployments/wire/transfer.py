"""A session's log on the link: REBUILD tells its size, LOG messages carry it piece by piece.

Pieces are small enough that frames of the same connection are not held up for long, and the receiver never
holds more than was announced. Knows no socket; what is in a log is the business of `sessionlog`.
"""

from __future__ import annotations

from collections.abc import Iterator

from personaplex.errors import LogRefused, ProtocolError

PIECE_BYTES = 32_768
LOG_LIMIT = 2**26  # bytes; a day of conversation is half of it


def check_size(log_bytes: int) -> None:
    """Raises LogRefused for a log that no replica takes."""
    if log_bytes > LOG_LIMIT:
        raise LogRefused(f"the session log has {log_bytes} bytes, at most {LOG_LIMIT} are taken")


def pieces(log: bytes) -> Iterator[bytes]:
    """Payloads of the LOG messages that carry `log`."""
    for start in range(0, len(log), PIECE_BYTES):
        yield log[start : start + PIECE_BYTES]


class LogReceiver:
    """Puts the pieces of one log together."""

    def __init__(self, log_bytes: int) -> None:
        """Raises LogRefused for a log that is too large, ProtocolError for an empty one."""
        check_size(log_bytes)
        if not log_bytes:
            raise ProtocolError("an empty session log")
        self._log_bytes = log_bytes
        self._received = bytearray()

    def add(self, piece: bytes) -> bytes | None:
        """The whole log once this was its last piece. Raises ProtocolError for more than was announced."""
        if not piece or len(self._received) + len(piece) > self._log_bytes:
            raise ProtocolError("a piece of a session log that does not fit")
        self._received += piece
        return bytes(self._received) if len(self._received) == self._log_bytes else None
