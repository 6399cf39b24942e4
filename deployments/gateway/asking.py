"""A gateway's questions to replicas outside any session: a role's length in tokens, a voice of a recording.

Any replica that takes sessions knows the answer, a full one too (wire/questions.py). Counts are remembered,
since a page asks while somebody types.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from deployments.wire import questions
from deployments.wire.link import Link, OnLost, OnMessage
from deployments.wire.messages import MessageKind, ReplicaStatus, unpack_error
from personaplex.config import Pcm
from personaplex.errors import NoCapacity, ProtocolError

REMEMBERED = 1_024  # counts
TOKENS_TIMEOUT_S = 5.0
ENCODE_TIMEOUT_S = 60.0  # beside live sessions it gets what they leave
RETRY_S = 5.0

Reach = Callable[[str, str, int, OnMessage, OnLost], Awaitable[Link]]  # a replica's name, host and port


class Asking:
    """`replicas()` gives those known, `reach` makes a link to one."""

    def __init__(self, replicas: Callable[[], Awaitable[Sequence[ReplicaStatus]]], reach: Reach) -> None:
        self._replicas, self._reach = replicas, reach
        self._counts: OrderedDict[str, tuple[int, int]] = OrderedDict()

    async def count_tokens(self, text: str) -> tuple[int, int]:
        """Tokens of a role text, and how many one may have. Raises NoCapacity while no replica answers."""
        if text not in self._counts:
            answer = await self._ask([(MessageKind.TOKENS, questions.pack_text(text))], TOKENS_TIMEOUT_S)
            self._counts[text] = questions.unpack_tokens(answer)
            while len(self._counts) > REMEMBERED:
                self._counts.popitem(last=False)
        self._counts.move_to_end(text)
        return self._counts[text]

    async def encode(self, pcm: Pcm) -> tuple[str, bytes]:
        """The voice of a recording: digest and packed. Raises NoCapacity, and what the engine says of it."""
        asked = [(MessageKind.SAMPLES, piece) for piece in questions.pieces(pcm)]
        return questions.unpack_voice(await self._ask([*asked, (MessageKind.ENCODE, b"")], ENCODE_TIMEOUT_S))

    async def _ask(self, asked: Sequence[tuple[MessageKind, bytes]], timeout_s: float) -> bytes:
        usable = [one for one in await self._replicas() if one.accepting and one.media[1]]
        for replica in random.sample(usable, min(2, len(usable))):
            try:
                return await asyncio.wait_for(self._ask_one(replica, asked), timeout_s)
            except (OSError, asyncio.TimeoutError):  # another one may be better off
                continue
        raise NoCapacity("no replica answers", RETRY_S)

    async def _ask_one(self, replica: ReplicaStatus, asked: Sequence[tuple[MessageKind, bytes]]) -> bytes:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def hear(link: Link, kind: MessageKind, payload: bytes) -> None:
            if answer.done():
                return
            if kind is MessageKind.ANSWER:
                answer.set_result(payload)
            elif kind is MessageKind.CLOSE:
                answer.set_exception(unpack_error(payload))
            else:
                answer.set_exception(ProtocolError("a message that does not belong here"))

        def lose(link: Link) -> None:
            if not answer.done():
                answer.set_exception(ConnectionError("the replica hung up"))

        link = await self._reach(replica.replica, *replica.media, hear, lose)
        try:
            for kind, payload in asked:
                link.send(kind, payload)
            return await answer
        finally:
            answer.cancel()
            link.close()
