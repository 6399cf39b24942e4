"""What a session was, as bytes: any engine of the same model goes on with it from there.

    4 bytes  "PPSL"
    uint16   version of everything behind it
    uint32   length of the head
    head     JSON: persona, digest of its voice, and the sizes of what follows
    tokens   int16 or int32 [frames, 17]; 34 bytes a frame, 425 a second
    forced   one bit a frame, filled up to a byte
    sound    float32 [kept, 1920], what the engine heard last, unrounded: other numbers may be other codes
    voice    the voice itself, packed, of a session that brought its own

All numbers are little-endian. A log is read without allocating more than its own size. Version 1 is the only
one; a change of any field is a new version. Knows no tensors: numpy only.
"""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplex.config import FRAME_SIZE, REBUILD_AUDIO_S, STREAMS, Sampling, frames_in
from personaplex.errors import LogRefused, UnknownVersion
from personaplex.persona import Persona
from personaplex.tokenlog import TokenLog

VERSION = 1

_MAGIC = b"PPSL"
_START = struct.Struct("<4sHI")
_HEAD_LIMIT = 2**20  # bytes; role texts are far shorter
_FRAMES_LIMIT = 2**20  # a day of conversation
_INT16 = np.iinfo(np.int16)
_SAMPLING = {"text_temperature": float, "text_topk": int, "audio_temperature": float, "audio_topk": int,
             "text_seed": int, "audio_seed": int}  # fmt: skip
_HEAD = {"voice": str, "voice_digest": str, "text_prompt": str, "sampling": dict, "frames": int,
         "kept": int, "token_bytes": int, "voice_bytes": int}  # fmt: skip
_SIZES = ("frames", "kept", "voice_bytes")
_BLOCK = 64  # frames of sound, 0.5 MB


@dataclass(frozen=True, eq=False)
class SessionLog:
    """A session after `frames` answered frames.

    tokens int32 [frames, 17] are the engine's outputs in order, the first of them the prompt's last frame;
    forced bool [frames] marks those that were given, not drawn. sound float32 [kept, 1920] are the last user
    frames that were answered, at least one unless there were none. `voice` is a session's own voice, packed
    (`Voice.pack`), or empty: then the persona names it. `voice_digest`, if known, is that of the voice that
    was heard: an engine with another voice of that name refuses the log.
    """

    persona: Persona
    tokens: NDArray[np.int32]
    forced: NDArray[np.bool_]
    sound: NDArray[np.float32]
    voice: bytes = b""
    voice_digest: str = ""

    def __post_init__(self) -> None:
        """Raises LogRefused for arrays that do not fit together."""
        frames = len(self.tokens)
        if (
            self.tokens.shape != (frames, STREAMS)
            or self.forced.shape != (frames,)
            or self.sound.ndim != 2
            or self.sound.shape[1] != FRAME_SIZE
        ):
            raise LogRefused("the session log's arrays do not fit together")
        if not min(frames, 1) <= len(self.sound) <= frames <= _FRAMES_LIMIT:
            raise LogRefused("the session log needs the sound of the last frame, and of no more than it has")

    @property
    def frames(self) -> int:
        """Frames answered: the number of the next one."""
        return len(self.tokens)

    def pack(self) -> bytes:
        """The log as bytes, see the module."""
        small = not self.tokens.size or (self.tokens.min() >= _INT16.min and self.tokens.max() <= _INT16.max)
        head = {
            "voice": self.persona.voice,
            "voice_digest": self.voice_digest,
            "text_prompt": self.persona.text_prompt,
            "sampling": {
                name: kind(getattr(self.persona.sampling, name)) for name, kind in _SAMPLING.items()
            },
            "frames": self.frames,
            "kept": len(self.sound),
            "token_bytes": 2 if small else 4,
            "voice_bytes": len(self.voice),
        }
        text = json.dumps(head).encode()
        parts = [
            _START.pack(_MAGIC, VERSION, len(text)),
            text,
            self.tokens.astype("<i2" if small else "<i4").tobytes(),
            np.packbits(self.forced).tobytes(),
            self.sound.astype("<f4", copy=False).tobytes(),
            self.voice,
        ]
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> SessionLog:
        """What `pack` wrote; its sound is a read-only view of `data`.

        Raises UnknownVersion for another version, LogRefused for anything else that is no log.
        """
        head, body = _head(data)
        frames, kept, width = head["frames"], head["kept"], head["token_bytes"]
        if width not in (2, 4) or not all(0 <= head[name] <= len(data) for name in _SIZES):
            raise LogRefused("the session log is damaged: its sizes are impossible")
        sizes = (frames * STREAMS * width, -(-frames // 8), kept * FRAME_SIZE * 4, head["voice_bytes"])
        if sum(sizes) != len(body):
            raise LogRefused("the session log is damaged: it is shorter or longer than it says")
        ends = np.cumsum((0, *sizes)).tolist()
        tokens, forced, sound, voice = (body[start:stop] for start, stop in itertools.pairwise(ends))
        return cls(
            persona=_persona(head),
            tokens=np.frombuffer(tokens, f"<i{width}").astype(np.int32).reshape(frames, STREAMS),
            forced=np.unpackbits(np.frombuffer(forced, np.uint8), count=frames).astype(np.bool_),
            sound=np.frombuffer(sound, "<f4").reshape(kept, FRAME_SIZE),
            voice=bytes(voice),
            voice_digest=head["voice_digest"],
        )


class SessionRecorder:
    """Keeps the log of one running session, frame by frame; holds at most `audio_s` of its sound.

    `voice_digest` may be set once the engine has named it.
    """

    def __init__(
        self,
        persona: Persona,
        audio_s: float = REBUILD_AUDIO_S,
        voice: bytes = b"",
        voice_digest: str = "",
    ) -> None:
        """`voice` and `voice_digest` as in SessionLog; a persona's own voice is the session's."""
        self.tokens = TokenLog()
        self.voice_digest = voice_digest
        self.persona = persona
        self._voice = voice or persona.own
        self._sound = _Sound(max(1, frames_in(audio_s)))

    @classmethod
    def of(cls, log: SessionLog, audio_s: float = REBUILD_AUDIO_S) -> SessionRecorder:
        """One that goes on with a session that was rebuilt from `log`."""
        persona = replace(log.persona, own=log.voice)  # a log may go on before it has frames
        recorder = cls(persona, audio_s, log.voice, log.voice_digest)
        for row, forced in zip(log.tokens, log.forced, strict=True):
            recorder.tokens.append(row, bool(forced))
        for frame in log.sound:
            recorder._sound.append(frame)
        return recorder

    def answered(self, pcm: NDArray[np.float32] | None, tokens: NDArray[np.integer]) -> None:
        """The engine answered the user's frame `pcm` float32 [1920] with an output of `tokens` [17].

        None for a frame whose sound is not known: the sound kept begins behind it.
        """
        self.tokens.append(tokens, forced=len(self.tokens) == 0)
        if pcm is None:
            self._sound.clear()
        else:
            self._sound.append(pcm)

    def sound_since(self, frame: int) -> list[NDArray[np.float32]]:
        """The user's frames that were answered from number `frame` on.

        Raises LogRefused when they are not kept any more.
        """
        count = len(self.tokens) - frame
        if not 0 <= count <= len(self._sound):
            raise LogRefused(f"the sound of {count} frames is not kept")
        return list(self._sound.last(count))

    def log(self) -> SessionLog:
        """The session as it stands, in memory of its own. Raises LogRefused while the sound of the last frame
        is not known."""
        return SessionLog(
            persona=self.persona,
            tokens=self.tokens.tokens.copy(),
            forced=self.tokens.forced.copy(),
            sound=self._sound.last(len(self._sound)),
            voice=self._voice,
            voice_digest=self.voice_digest,
        )


class _Sound:
    """The last `limit` frames of a session's user, copied into blocks: frames that were kept one by one would
    take new memory from the system for each, in the process that handles it in real time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks: list[NDArray[np.float32]] = []  # frame n lies at place n modulo `limit`
        self._appended = self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, pcm: NDArray[np.float32]) -> None:
        place = self._appended % self._limit
        if place >= len(self._blocks) * _BLOCK:
            frames = min(_BLOCK, self._limit - place)
            self._blocks.append(np.empty((frames, FRAME_SIZE), np.float32))
        self._blocks[place // _BLOCK][place % _BLOCK] = pcm
        self._appended += 1
        self._length = min(self._length + 1, self._limit)

    def clear(self) -> None:
        self._length = 0

    def last(self, count: int) -> NDArray[np.float32]:
        """float32 [count, 1920], the newest at the end, in memory of its own."""
        out = np.empty((count, FRAME_SIZE), np.float32)
        for row, number in enumerate(range(self._appended - count, self._appended)):
            place = number % self._limit
            out[row] = self._blocks[place // _BLOCK][place % _BLOCK]
        return out


def _head(data: bytes | memoryview) -> tuple[dict[str, Any], memoryview]:
    """The checked head of a log, and the bytes behind it."""
    view = memoryview(data).cast("B")
    if len(view) < _START.size or view[: len(_MAGIC)] != _MAGIC:
        raise LogRefused("these bytes are no session log")
    _, version, length = _START.unpack_from(view)
    if version != VERSION:
        raise UnknownVersion(f"the session log is of version {version}, this process reads {VERSION}")
    end = _START.size + length
    if length > _HEAD_LIMIT or end > len(view):
        raise LogRefused("the session log is damaged: its head is cut off")
    try:
        head = json.loads(bytes(view[_START.size : end]))
    except (ValueError, RecursionError) as error:
        raise LogRefused("the session log is damaged: its head cannot be read") from error
    _check_types(head, _HEAD)
    _check_types(head["sampling"], _SAMPLING)
    return head, view[end:]


def _check_types(found: Any, expected: dict[str, type]) -> None:
    """Raises LogRefused unless `found` has exactly these keys, each of its type."""
    if (
        not isinstance(found, dict)
        or set(found) != set(expected)
        or not all(type(found[key]) is kind for key, kind in expected.items())
    ):
        raise LogRefused("the session log is damaged: its head has other fields")


def _persona(head: dict[str, Any]) -> Persona:
    return Persona(head["voice"], head["text_prompt"], Sampling(**head["sampling"]))
