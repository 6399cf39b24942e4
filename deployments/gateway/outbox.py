"""What one client has still to be sent, in order, and whether it is more than a client may leave unread.

Two limits: messages, since audio is one message for each frame, and bytes, since some protocols repeat what
the client wrote and a short question may have a long answer. What the socket buffers is not counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from deployments.gateway.protocols.translator import Message

MESSAGE_LIMIT = 256  # 20 s of speech
BYTE_LIMIT = 2_097_152  # 20 s of 24 kHz in base64 take 1.3 MB


class Outbox:
    """One client's."""

    def __init__(self, messages: Iterable[Message], share: float = 1.0) -> None:
        """`messages` come first; `share` is what both limits are multiplied by."""
        self._messages: deque[Message] = deque()
        self._bytes = 0
        self.message_limit, self.byte_limit = round(MESSAGE_LIMIT * share), round(BYTE_LIMIT * share)
        for message in messages:
            self.put(message)

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def full(self) -> bool:
        return len(self._messages) > self.message_limit or self._bytes > self.byte_limit

    def put(self, message: Message) -> None:
        self._messages.append(message)
        self._bytes += len(message)

    def take(self) -> Message:
        """The oldest. Raises IndexError when there is none."""
        message = self._messages.popleft()
        self._bytes -= len(message)
        return message

    def clear(self) -> None:
        self._messages.clear()
        self._bytes = 0
