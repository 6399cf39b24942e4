"""Voices: from a released file, from a recording, or built in; always verified, never from a client's path.

A voice is the beginning of every prompt of its sessions. Recorded voices are Mimi codes; the released `.pt`
files hold what the model reads of them, embeddings and the token ring, in the format of the reference.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from personaplex.config import (
    CODEBOOKS,
    DELAYS,
    PRESET_TINY,
    RING_COLUMNS,
    STREAMS,
    UNGENERATED,
    ZERO_TOKEN,
    LMConfig,
)
from personaplex.errors import CheckpointError, UnknownVoice
from personaplex.files import LFS_ADVICE, LFS_POINTER, read_bounded, replacing
from personaplex.persona import VOICES, voice_name
from personaplex.voicearchive import unpack
from personaplex.voicefile import Described, TensorFile

log = logging.getLogger(__name__)

_BUILT_IN_FRAMES = 12
_PT_OVERHEAD = 2**20  # bytes of a voice file that are not its embeddings; more than enough
_LARGEST = 65_504.0  # of an embedding: finite in every dtype a model runs in
_FAULTS_SHOWN = 20
_PACKED = struct.Struct("<BII")  # kind, frames (of embeddings one fewer), width
_CODES = 255  # kind of a voice of codes; else the index of the embeddings' dtype
_EMBEDDINGS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Voice:
    """One voice on the CPU: `codes` [8, F] int64, or `embeddings` [F - 1, dim] with `cache` [17, 4] int64.

    `digest` names the content: equal digests, equal voices.
    """

    digest: str
    codes: Tensor | None = None
    embeddings: Tensor | None = None
    cache: Tensor | None = None

    @classmethod
    def from_codes(cls, codes: Tensor) -> Voice:
        """Of Mimi codes [8, F] int64."""
        return cls(_digest(codes), codes=codes)

    @classmethod
    def from_embeddings(cls, embeddings: Tensor, cache: Tensor) -> Voice:
        """Of embeddings [F - 1, dim] and the token ring [17, 4] after F frames."""
        return cls(_digest(embeddings, cache), embeddings=embeddings, cache=cache)

    def pack(self) -> bytes:
        """The voice as bytes, for `unpack`."""
        if self.codes is not None:
            return _PACKED.pack(_CODES, self.codes.shape[1], CODEBOOKS) + _bytes(self.codes.short())
        assert self.embeddings is not None
        assert self.cache is not None
        kind = _EMBEDDINGS.index(self.embeddings.dtype)
        head = _PACKED.pack(kind, *self.embeddings.shape)
        return head + _bytes(self.cache.int()) + _bytes(self.embeddings)

    @classmethod
    def unpack(cls, data: bytes, lm: LMConfig) -> Voice:
        """What `pack` wrote of a voice for such a model. Raises CheckpointError for anything else."""
        if len(data) < _PACKED.size:
            raise CheckpointError("the voice is damaged")
        kind, length, width = _PACKED.unpack_from(data)
        body = bytearray(memoryview(data)[_PACKED.size :])
        frames = length + (kind != _CODES)
        if not 1 <= length <= frames <= lm.temporal.context:
            raise CheckpointError("the voice is empty, or longer than what the model remembers")
        if kind == _CODES:
            return _unpack_codes(body, length, width, lm)
        return _unpack_embeddings(body, kind, length, width, lm)

    @property
    def frames(self) -> int:
        """Length in frames, F."""
        if self.codes is not None:
            return self.codes.shape[1]
        assert self.embeddings is not None
        return self.embeddings.shape[0] + 1


class VoiceLibrary:
    """The voices sessions may name. A file is read and verified once, when first asked for or by `verify`;
    the voice, or what is wrong with it, is kept."""

    def __init__(self, lm: LMConfig, source: Path | None = None) -> None:
        """`source` is a folder of .pt files or a voices.tgz, which is unpacked beside itself once.

        Without one, the tiny preset has 18 voices of its own and any other model none. Files whose names no
        session could give are left out, with a warning. Raises CheckpointError for an archive that cannot be
        unpacked.
        """
        self._lm = lm
        self._files: dict[str, Path] = {}
        self._voices: dict[str, Voice] = {}
        self._faults: dict[str, str] = {}
        if source is not None:
            folder = source if source.is_dir() else unpack(source)
            self._files = {path.stem: path for path in _listed(folder) if _has_name(path)}
            if not self._files:
                log.warning("the voice folder %s holds no voice: sessions can name none", folder.name)
        elif lm == PRESET_TINY.lm:
            self._voices = {name: _built_in(name, lm) for name in VOICES}

    def verify(self) -> None:
        """Reads all files, so that no `get` after this touches the disk; it takes their size in memory.

        Bad ones are named in one warning and left out of `names`. For a service, before its first session:
        a slow or damaged file then costs no session anything.
        """
        for name in self._files:
            with contextlib.suppress(CheckpointError):
                self.get(name)
        if self._faults:
            listed = "; ".join(list(self._faults.values())[:_FAULTS_SHOWN])
            log.warning("%d of %d voices cannot be used: %s", len(self._faults), len(self._files), listed)

    def names(self) -> list[str]:
        """The names of all voices but those known to be bad, sorted."""
        return sorted({*self._files, *self._voices} - {*self._faults})

    def get(self, name: str) -> Voice:
        """The voice called `name` or `name.pt`.

        Raises UnknownVoice, or CheckpointError when its file is not a voice for this model.
        """
        name = voice_name(name)
        voice = self._voices.get(name)
        if voice is not None:
            return voice
        if name not in self._files:
            raise UnknownVoice(f"there is no voice {name!r} here")
        if name in self._faults:
            raise CheckpointError(self._faults[name])
        try:
            voice = self._voices[name] = load_voice(self._files[name], self._lm)
        except CheckpointError as error:
            self._faults[name] = str(error)
            raise
        return voice

    def add(self, name: str, voice: Voice) -> None:
        """Makes a voice of the operator's own known by `name`. Raises UnknownVoice for an impossible name."""
        self._voices[voice_name(name)] = voice
        self._faults.pop(voice_name(name), None)


def load_voice(path: Path, lm: LMConfig) -> Voice:
    """Reads and verifies one .pt voice file, within bounds; only plain tensors are ever made of it.

    Raises CheckpointError, naming the file and what is wrong with it.
    """
    try:
        data = read_bounded(path, 2 * 4 * lm.temporal.context * lm.temporal.dim + _PT_OVERHEAD)
        if data.startswith(LFS_POINTER):
            raise CheckpointError(f"it {LFS_ADVICE}")
        file = TensorFile(data)
        fault = _misfit(file.content, lm)
        if fault is None:
            assert isinstance(file.content, dict)
            embeddings, cache = (file.tensor(file.content[key]) for key in ("embeddings", "cache"))
            fault = _bad_value(embeddings, cache, lm)
    except Exception as error:  # damaged bytes raise nearly anything; only this session is to end
        raise CheckpointError(f"voice {path.name} cannot be read: {_reason(error)}") from error
    if fault:
        raise CheckpointError(f"voice {path.name} does not fit this model: {fault}")
    return Voice.from_embeddings(embeddings[:, 0, 0], cache[0])


def save_voice(path: Path, embeddings: Tensor, cache: Tensor) -> None:
    """Writes embeddings [F - 1, dim] and token ring [17, 4] in the reference's format, all or nothing."""
    content = io.BytesIO()  # torch's own writer has no OSError for a full disk
    torch.save({"embeddings": embeddings[:, None, None].cpu(), "cache": cache[None].cpu()}, content)
    with replacing(path) as part:
        part.write_bytes(content.getvalue())


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.pt"))
    except OSError as error:
        raise CheckpointError(f"the voice folder {folder.name} cannot be read: {error.strerror}") from error


def _has_name(path: Path) -> bool:
    try:
        voice_name(path.stem)
    except UnknownVoice:
        log.warning("the voice file %r cannot be named by a session and is left out", path.name)
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if isinstance(error, CheckpointError) else type(error).__name__


def _misfit(data: object, lm: LMConfig) -> str | None:
    """What is wrong with the tensors that a voice file describes, or None; nothing of them is read."""
    if not isinstance(data, dict) or set(data) != {"embeddings", "cache"}:
        return "it must hold `embeddings` and `cache`, nothing else"
    embeddings, cache = data["embeddings"], data["cache"]
    if not isinstance(embeddings, Described) or not isinstance(cache, Described):
        return "`embeddings` and `cache` must be tensors"
    shape, dim = embeddings.shape, lm.temporal.dim
    if len(shape) != 4 or shape[0] < 1 or shape[1:] != (1, 1, dim):
        return f"`embeddings` is {list(shape)}, needed [frames - 1, 1, 1, {dim}]"
    if shape[0] >= lm.temporal.context:
        return f"it has {shape[0] + 1} frames, the model remembers {lm.temporal.context}"
    if embeddings.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"`embeddings` is of {embeddings.dtype}"
    if cache.shape != (1, STREAMS, RING_COLUMNS) or cache.dtype != torch.int64:
        return f"`cache` is {cache.dtype} {list(cache.shape)}, needed int64 [1, {STREAMS}, {RING_COLUMNS}]"
    return None


def _bad_value(embeddings: Tensor, cache: Tensor, lm: LMConfig) -> str | None:
    """What is wrong with the numbers of a voice, [F - 1, 1, 1, dim] and [1, 17, 4], or None."""
    if not (embeddings.abs() <= _LARGEST).all():
        return f"`embeddings` holds values that are not numbers within {_LARGEST:g}"
    frames = embeddings.shape[0]
    highest = torch.full((STREAMS, 1), lm.audio_start)
    highest[0] = lm.text_start
    lowest = torch.full((STREAMS, RING_COLUMNS), UNGENERATED)
    lowest[:, frames % RING_COLUMNS] = ZERO_TOKEN  # the cells a session goes on from hold tokens
    lowest[torch.tensor(DELAYS) == 1, (frames + 1) % RING_COLUMNS] = ZERO_TOKEN
    if ((cache[0] > highest) | (cache[0] < lowest)).any():
        return "`cache` holds tokens outside the vocabulary"
    return None


def _built_in(name: str, lm: LMConfig) -> Voice:
    """Codes that stand for the voice `name` in the tiny preset."""
    random = np.random.default_rng(zlib.crc32(f"voice {name}".encode()))
    return Voice.from_codes(torch.from_numpy(random.integers(0, lm.card, (CODEBOOKS, _BUILT_IN_FRAMES))))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _unpack_codes(body: bytearray, length: int, width: int, lm: LMConfig) -> Voice:
    if width != CODEBOOKS or len(body) != 2 * CODEBOOKS * length:
        raise CheckpointError("the voice has fewer or more codes than it says")
    codes = torch.frombuffer(body, dtype=torch.int16).long().view(CODEBOOKS, length)
    if ((codes < 0) | (codes >= lm.card)).any():
        raise CheckpointError("the voice holds codes outside the vocabulary")
    return Voice.from_codes(codes)


def _unpack_embeddings(body: bytearray, kind: int, length: int, width: int, lm: LMConfig) -> Voice:
    cells = 4 * STREAMS * RING_COLUMNS
    if kind >= len(_EMBEDDINGS) or width != lm.temporal.dim:
        raise CheckpointError("the voice is of another model")
    dtype = _EMBEDDINGS[kind]
    if len(body) != cells + dtype.itemsize * length * width:
        raise CheckpointError("the voice has fewer or more numbers than it says")
    cache = torch.frombuffer(body, dtype=torch.int32, count=STREAMS * RING_COLUMNS).long()
    embeddings = torch.frombuffer(body, dtype=dtype, offset=cells).view(length, 1, 1, width)
    fault = _bad_value(embeddings, cache.view(1, STREAMS, RING_COLUMNS), lm)
    if fault:
        raise CheckpointError(f"the voice does not fit this model: {fault}")
    return Voice.from_embeddings(embeddings[:, 0, 0], cache.view(STREAMS, RING_COLUMNS))


def _digest(*tensors: Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
