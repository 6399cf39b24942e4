"""Answers what gateways ask a replica outside any session; see wire/questions.py.

Counting tokens is arithmetic and done at once; a recording becomes a voice on the engine's thread, between
ticks. At most LINKS_LIMIT questions are open at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from deployments.wire.link import Link
from deployments.wire.messages import MessageKind
from deployments.wire.questions import Samples, pack_tokens, pack_voice, unpack_text
from personaplex.config import Pcm
from personaplex.engine.events import Encoded
from personaplex.errors import NoCapacity, PersonaplexError, ProtocolError

LINKS_LIMIT = 8
QUESTIONS = (MessageKind.TOKENS, MessageKind.SAMPLES, MessageKind.ENCODE)


class Questions:
    """One replica's."""

    def __init__(
        self, count_tokens: Callable[[str], int], prompt_tokens: int, encode: Callable[[Pcm], int]
    ) -> None:
        """`encode(pcm)` begins to make a voice and gives its number; `encoded` is called with the result."""
        self._count_tokens, self._prompt_tokens, self._encode = count_tokens, prompt_tokens, encode
        self._samples: dict[Link, Samples] = {}
        self._encoding: dict[int, Link] = {}

    def __contains__(self, link: object) -> bool:
        return link in self._samples

    def receive(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        """A message on a link that has no lease. Raises ProtocolError."""
        if link not in self._samples:
            if len(self._samples) >= LINKS_LIMIT:
                link.close(NoCapacity("too many questions at once"))
                return
            self._samples[link] = Samples()
        if kind is MessageKind.TOKENS:
            tokens = self._count_tokens(unpack_text(payload))
            link.send(MessageKind.ANSWER, pack_tokens(tokens, self._prompt_tokens))
        elif kind is MessageKind.SAMPLES:
            self._samples[link].add(payload)
        elif kind is MessageKind.ENCODE:
            self._begin(link)
        elif kind is MessageKind.CLOSE:
            link.close()
        else:
            raise ProtocolError("a message that does not belong here")

    def encoded(self, event: Encoded) -> None:
        """A recording has become a voice, or has not."""
        link = self._encoding.pop(event.number, None)
        if link is None:
            return
        if event.error is not None:
            link.close(event.error)
        elif event.voice is not None:
            link.send(MessageKind.ANSWER, pack_voice(event.voice.digest, event.voice.packed))

    def lost(self, link: Link) -> None:
        """The link is gone."""
        self._samples.pop(link, None)
        self._encoding = {number: one for number, one in self._encoding.items() if one is not link}

    def _begin(self, link: Link) -> None:
        if link in self._encoding.values():
            raise ProtocolError("a second question on one link")
        pcm, self._samples[link] = self._samples[link].pcm(), Samples()
        try:
            self._encoding[self._encode(pcm)] = link
        except PersonaplexError as error:
            link.close(error)
