"""Own voices between their upload and their sessions, for any gateway to find: a pure table, in the fleet.

A voice is some kilobytes of codes. It is its uploader's: another key does not find it. It is forgotten at its
time, when it is taken back, and when its holder or all together have too many (the oldest first). Nothing is
written anywhere. The time is passed in.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

HOLDER_LIMIT = 50  # voices of one key
VOICES_LIMIT = 2_000
VOICE_BYTES = 65_536  # of one voice; 30 s are 6 kB


@dataclass(frozen=True)
class _Kept:
    voice: bytes = field(repr=False)
    until: float = 0.0


class VoiceStore:
    """Voices by holder and digest."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, holder: str, digest: str, voice: bytes, ttl_s: float, now: float) -> None:
        """Keeps a voice for `ttl_s` from now, also when it was there already."""
        assert len(voice) <= VOICE_BYTES, "no voice of 30 s"
        self._drop_old(now)
        self._kept.pop((holder, digest), None)
        mine = [name for name in self._kept if name[0] == holder]
        if len(mine) >= HOLDER_LIMIT:
            del self._kept[mine[0]]
        while len(self._kept) >= VOICES_LIMIT:
            self._kept.popitem(last=False)
        self._kept[holder, digest] = _Kept(voice, now + ttl_s)

    def get(self, holder: str, digest: str, now: float) -> bytes | None:
        """The voice, or None for one that is not there, not this holder's, or too old."""
        self._drop_old(now)
        kept = self._kept.get((holder, digest))
        return None if kept is None else kept.voice

    def delete(self, holder: str, digest: str) -> None:
        self._kept.pop((holder, digest), None)

    def _drop_old(self, now: float) -> None:
        for name in [name for name, kept in self._kept.items() if kept.until <= now]:
            del self._kept[name]
