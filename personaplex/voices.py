"""Voices: from a released file, from a recording, or built in; always verified, never from a client's path.

A voice is the beginning of every prompt of its sessions. Recorded voices are Mimi codes; the released `.pt`
files hold what the model reads of them, embeddings and the token ring, in the format of the reference.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import tarfile
import tempfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from personaplex.config import (
    CODEBOOKS,
    DELAYS,
    PRESET_TINY,
    RING_COLUMNS,
    SAMPLE_RATE,
    STREAMS,
    UNGENERATED,
    ZERO_TOKEN,
    LMConfig,
)
from personaplex.errors import BadAudio, CheckpointError, UnknownVoice
from personaplex.files import LFS_ADVICE, is_lfs_pointer, replacing
from personaplex.persona import VOICES, voice_name

log = logging.getLogger(__name__)

LOUDNESS = -24.0  # LUFS of a voice recording, as in training
SHORTEST_SECONDS = 0.4  # one loudness block
_BUILT_IN_FRAMES = 12


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

    @property
    def frames(self) -> int:
        """Length in frames, F."""
        if self.codes is not None:
            return self.codes.shape[1]
        assert self.embeddings is not None
        return self.embeddings.shape[0] + 1


class VoiceLibrary:
    """The voices sessions may name. Files are read and verified when first asked for, and kept."""

    def __init__(self, lm: LMConfig, source: Path | None = None) -> None:
        """`source` is a folder of .pt files or a voices.tgz, which is unpacked beside itself once.

        Without one, the tiny preset has 18 voices of its own and any other model none. Files whose names no
        session could give are left out, with a warning. Raises CheckpointError for an archive that cannot be
        unpacked.
        """
        self._lm = lm
        self._files: dict[str, Path] = {}
        self._voices: dict[str, Voice] = {}
        if source is not None:
            folder = source if source.is_dir() else unpack(source)
            self._files = {path.stem: path for path in sorted(folder.glob("*.pt")) if _has_name(path)}
            if not self._files:
                log.warning("the voice folder %s holds no voice: sessions can name none", folder.name)
        elif lm == PRESET_TINY.lm:
            self._voices = {name: _built_in(name, lm) for name in VOICES}

    def names(self) -> list[str]:
        """All names `get` knows, sorted."""
        return sorted({*self._files, *self._voices})

    def get(self, name: str) -> Voice:
        """The voice called `name` or `name.pt`.

        Raises UnknownVoice, or CheckpointError when its file is not a voice for this model.
        """
        name = voice_name(name)
        voice = self._voices.get(name)
        if voice is None:
            if name not in self._files:
                raise UnknownVoice(f"there is no voice {name!r} here")
            voice = self._voices[name] = load_voice(self._files[name], self._lm)
        return voice

    def add(self, name: str, voice: Voice) -> None:
        """Makes a voice of the operator's own known by `name`. Raises UnknownVoice for an impossible name."""
        self._voices[voice_name(name)] = voice


def load_voice(path: Path, lm: LMConfig) -> Voice:
    """Reads and verifies one .pt voice file; it is never unpickled beyond plain tensors.

    Raises CheckpointError, naming the file and what is wrong with it.
    """
    try:
        if is_lfs_pointer(path):
            raise CheckpointError(f"voice {path.name} {LFS_ADVICE}")
        data = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything; only this session is to end
        raise CheckpointError(f"voice {path.name} cannot be read: {type(error).__name__}") from error
    fault = _fault(data, lm)
    if fault:
        raise CheckpointError(f"voice {path.name} does not fit this model: {fault}")
    return Voice.from_embeddings(data["embeddings"][:, 0, 0].contiguous(), data["cache"][0].contiguous())


def save_voice(path: Path, embeddings: Tensor, cache: Tensor) -> None:
    """Writes embeddings [F - 1, dim] and token ring [17, 4] in the reference's format, all or nothing."""
    content = io.BytesIO()  # torch's own writer has no OSError for a full disk
    torch.save({"embeddings": embeddings[:, None, None].cpu(), "cache": cache[None].cpu()}, content)
    with replacing(path) as part:
        part.write_bytes(content.getvalue())


def load_voice_wav(path: Path) -> NDArray[np.float32]:
    """A recording as the model hears voices: float32 [samples] at 24 kHz, first channel, -24 LUFS.

    Loudness after ITU-R BS.1770-4. Raises BadAudio when it is unreadable, shorter than 0.4 s or silent.
    """
    import pyloudnorm  # here, so that an engine without recordings needs no audio libraries

    from personaplex.audio.wav import one_channel, read_wav, resample

    pcm, rate = read_wav(path)
    mono = resample(one_channel(pcm, path.name), rate, SAMPLE_RATE)
    if len(mono) < SHORTEST_SECONDS * SAMPLE_RATE:
        raise BadAudio(f"a voice recording must last at least {SHORTEST_SECONDS} s")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # silence: means of nothing, logarithms of zero
        loudness = pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(mono)
    if not np.isfinite(loudness):
        raise BadAudio("the voice recording is silent")
    normalised: NDArray[np.float32] = mono * np.float32(10.0 ** ((LOUDNESS - float(loudness)) / 20.0))
    return normalised


def unpack(archive: Path) -> Path:
    """The folder `voices` beside `archive`, unpacked from it unless it is there already.

    Two processes may do this at once: each unpacks into a folder of its own and one of them is moved into
    place. Raises CheckpointError.
    """
    folder = archive.parent / "voices"
    if folder.is_dir():
        return folder
    scratch: Path | None = None
    try:
        if is_lfs_pointer(archive):
            raise CheckpointError(f"{archive.name} {LFS_ADVICE}")
        scratch = Path(tempfile.mkdtemp(dir=archive.parent, prefix=".voices-"))
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(scratch, filter="data")
            else:  # Python before 3.10.12 or 3.11.4, Debian 12's among them
                tar.extractall(scratch, _plain_members(tar))
        try:
            (scratch / "voices").chmod(0o755)
            (scratch / "voices").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same files
                raise
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise CheckpointError(
            f"{archive.name} cannot be unpacked beside itself ({type(error).__name__}): fetch it again, or "
            "unpack it elsewhere and give that folder as the voice directory"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _plain_members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """All members of `tar`. Raises TarError unless they are files and folders below where they go."""
    members = tar.getmembers()
    for member in members:
        path = PurePosixPath(member.name)
        if not (member.isfile() or member.isdir()) or path.is_absolute() or ".." in path.parts:
            raise tarfile.TarError(f"{member.name!r} leads elsewhere")
    return members


def _has_name(path: Path) -> bool:
    try:
        voice_name(path.stem)
    except UnknownVoice:
        log.warning("the voice file %r cannot be named by a session and is left out", path.name)
        return False
    return True


def _fault(data: object, lm: LMConfig) -> str | None:
    """What is wrong with the content of a voice file, or None."""
    if not isinstance(data, dict) or set(data) != {"embeddings", "cache"}:
        return "it must hold `embeddings` and `cache`, nothing else"
    embeddings, cache = data["embeddings"], data["cache"]
    if not isinstance(embeddings, Tensor) or not isinstance(cache, Tensor):
        return "`embeddings` and `cache` must be tensors"
    shape, dim = tuple(embeddings.shape), lm.temporal.dim
    if len(shape) != 4 or shape[0] < 1 or shape[1:] != (1, 1, dim):
        return f"`embeddings` is {list(shape)}, needed [frames - 1, 1, 1, {dim}]"
    if embeddings.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"`embeddings` is of {embeddings.dtype}"
    if not embeddings.isfinite().all():
        return "`embeddings` holds values that are not numbers"
    if tuple(cache.shape) != (1, STREAMS, RING_COLUMNS) or cache.dtype != torch.int64:
        return f"`cache` is {cache.dtype} {list(cache.shape)}, needed int64 [1, {STREAMS}, {RING_COLUMNS}]"
    highest = torch.full((STREAMS, 1), lm.audio_start)
    highest[0] = lm.text_start
    lowest = torch.full((STREAMS, RING_COLUMNS), UNGENERATED)
    lowest[:, shape[0] % RING_COLUMNS] = ZERO_TOKEN  # the cells a session goes on from hold tokens
    lowest[torch.tensor(DELAYS) == 1, (shape[0] + 1) % RING_COLUMNS] = ZERO_TOKEN
    if ((cache[0] > highest) | (cache[0] < lowest)).any():
        return "`cache` holds tokens outside the vocabulary"
    return None


def _built_in(name: str, lm: LMConfig) -> Voice:
    """Codes that stand for the voice `name` in the tiny preset."""
    random = np.random.default_rng(zlib.crc32(f"voice {name}".encode()))
    return Voice.from_codes(torch.from_numpy(random.integers(0, lm.card, (CODEBOOKS, _BUILT_IN_FRAMES))))


def _digest(*tensors: Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
