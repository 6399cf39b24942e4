"""Recorded calls into a dataset: read, checked, encoded by Mimi once, words put on frames.

A second run encodes only what has changed. Calls that cannot be used are said, by file and reason, and kept
in the dataset's list of faults.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from personaplex import cli
from personaplex.audio.voicewav import load_voice_wav
from personaplex.audio.wav import write_wav
from personaplex.config import AGENT, CODEBOOKS, FRAME_SIZE, SAMPLE_RATE, STREAMS, USER
from personaplex.errors import BadAudio, CheckpointError, ConfigError, UnknownVoice
from personaplex.finetune import dataset
from personaplex.finetune.align import Spelling, text_stream
from personaplex.finetune.dataset import Arrays, Dataset, Entry
from personaplex.finetune.source import Call, Fault, Recorded, Unusable, find_calls, read_call
from personaplex.loading import Resolved
from personaplex.model.identity import base_of
from personaplex.model.mimi import Mimi, encode_block
from personaplex.model.weights import load_mimi
from personaplex.text import Tokenizer
from personaplex.voices import VoiceLibrary

_BLOCK = 32  # frames of the codec run at once
_QUIET, _SOFTEST, _AROUND = 1e-3, 0.02, 2  # rms of a silent frame, share of the loudest one's, frames


@dataclass(frozen=True)
class Options:
    """What of the calls is used and how. `voice` and `role` are those of calls that bring none."""

    voice: str
    role: str
    spelling: Spelling = Spelling()
    shortest_s: float = 2.0


class Preparation:
    """Writes into one folder, call by call."""

    def __init__(self, found: Resolved, folder: Path, options: Options) -> None:
        """Raises ConfigError, CheckpointError, OSError."""
        checkpoint = found.checkpoint
        base = base_of(checkpoint)
        self._lm, self._options, self._folder = checkpoint.config.lm, options, folder
        self._tokenizer = Tokenizer(checkpoint.tokenizer, size=self._lm.text_card)
        self._library = VoiceLibrary(self._lm, checkpoint.voices)
        self._mimi = load_mimi(checkpoint.mimi, checkpoint.config.mimi, found.device)
        folder.mkdir(parents=True, exist_ok=True)
        made = asdict(options)
        self._new = Dataset(folder, base.codec, base.tokenizer, (), (), made)
        self._old = self._earlier()

    def run(self, sources: Sequence[Path]) -> Dataset:
        """Prepares all calls of the sources. Raises ConfigError when none of them can be used."""
        calls, faults = find_calls(sources)
        entries: list[Entry] = []
        for call in tqdm(calls, unit="call", disable=None):
            try:
                entries.append(self._prepared(call))
            except Unusable as error:
                faults.append(Fault(call.wav.name, str(error)))
            except OSError as error:
                faults.append(Fault(call.wav.name, cli.reason(error)))
        for fault in faults:
            cli.complain(f"{fault.file}: {fault.reason}")
        for entry in entries:
            for note in entry.notes:
                cli.complain(f"{entry.name}: {note}", "")
        if not entries:
            raise ConfigError("no recording can be used")
        done = replace(self._new, entries=tuple(entries), faults=tuple(faults))
        done.write()
        return done

    def _earlier(self) -> dict[str, Entry]:
        """Calls that an earlier run with the same codec has encoded, by name."""
        try:
            old = Dataset.read(self._folder)
        except ConfigError:
            return {}
        return {entry.name: entry for entry in old.entries} if old.codec == self._new.codec else {}

    def _prepared(self, call: Call) -> Entry:
        recorded = read_call(call, self._options.shortest_s)
        source, transcript = _digest(call.wav), _digest(call.words)
        codes = self._codes(call.name, source, recorded)
        role = self._options.role if recorded.role is None else recorded.role
        self._check_role(role)
        name, voice = self._voice(call, recorded)
        frames = codes.shape[1]
        tokens = np.empty((STREAMS, frames), np.int64)
        encode = self._tokenizer.encode_word
        tokens[0] = text_stream(recorded.words, frames, encode, self._options.spelling)
        tokens[AGENT], tokens[USER] = codes[:CODEBOOKS], codes[CODEBOOKS:]
        arrays = Arrays(tokens, _sounds(recorded.agent, frames), voice)
        dataset.write_arrays(self._folder, call.name, arrays)
        entry = Entry(
            call.name, frames, len(recorded.words), role, name, voice is not None, source, transcript,
            recorded.notes,
        )  # fmt: skip
        write_wav(self._new.user_wav(entry), recorded.user, SAMPLE_RATE)
        return entry

    def _codes(self, name: str, source: str, recorded: Recorded) -> NDArray[np.int64]:
        """[16, frames]: of agent and user, from the earlier run where the recording is the same."""
        earlier = self._old.get(name)
        if earlier is not None and earlier.source == source:
            try:
                return dataset.read_arrays(self._folder, earlier, self._lm).tokens[1:]
            except ConfigError:
                pass  # damaged since: encoded again
        return np.concatenate([encode(self._mimi, recorded.agent), encode(self._mimi, recorded.user)])

    def _check_role(self, role: str) -> None:
        tokens = len(self._tokenizer.encode_prompt(role))
        limit = self._lm.temporal.context // 2
        if tokens > limit:
            raise Unusable(f"its role text has {tokens} tokens, at most {limit} can be used")

    def _voice(self, call: Call, recorded: Recorded) -> tuple[str, NDArray[np.int64] | None]:
        """A name of the library, or the codes [8, F] of a recording beside the call's."""
        wanted = self._options.voice if recorded.voice is None else recorded.voice
        path = call.words.parent / wanted
        if path.is_file():
            try:
                return "", encode(self._mimi, load_voice_wav(path))
            except BadAudio as error:
                raise Unusable(f"its voice {wanted} cannot be used: {error}") from error
        try:
            self._library.get(wanted)
        except (UnknownVoice, CheckpointError) as error:
            raise Unusable(f"its voice: {error}") from error
        return wanted, None


def encode(mimi: Mimi, pcm: NDArray[np.float32]) -> NDArray[np.int64]:
    """float32 [samples] at 24 kHz -> codes [8, frames] of a stream that begins there; the last frame is
    filled up with silence."""
    device = next(mimi.parameters()).device
    state = mimi.allocate(1, device).encoder
    padded = np.pad(pcm, (0, -len(pcm) % FRAME_SIZE)).astype(np.float32)
    codes, start = [], 0
    with torch.inference_mode():
        for block in torch.from_numpy(padded).to(device).split(_BLOCK * FRAME_SIZE):
            codes.append(encode_block(mimi, state, 0, start, block))
            start += len(block) // FRAME_SIZE
    found: NDArray[np.int64] = torch.cat(codes).t().cpu().numpy()
    return found


def _sounds(agent: NDArray[np.float32], frames: int) -> NDArray[np.bool_]:
    """Frames [frames] in which the agent sounds, and those around them."""
    whole = np.pad(agent, (0, frames * FRAME_SIZE - len(agent))).reshape(frames, FRAME_SIZE)
    level = np.sqrt(np.mean(np.square(whole), axis=1))
    loud = level > max(_QUIET, _SOFTEST * float(level.max()))
    return np.convolve(loud, np.ones(2 * _AROUND + 1), "same") > 0


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
