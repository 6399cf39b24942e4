"""Recorded calls as people bring them: a stereo file each, and beside it a JSON with the agent's words.

    NAME.wav     agent on the left, user on the right; any format that libsndfile reads, 16 kHz or more
    NAME.json    {"alignments": [[word, [start, end], speaker], ...], "text_prompt": ..., "voice": ...}

A manifest `data.jsonl` lists them, {"path": ..., "duration": ...} a line; a folder without one means all its
sound files. This is what `python -m personaplex.records export` writes. `text_prompt` and `voice` (a name, or
the path of a recording) are optional, and so is the speaker: words of others than AGENT are left out.

A call that cannot be used is a `Fault` with its reason; nothing is left out without one. Knows no tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplex import cli
from personaplex.audio.wav import read_wav, resample
from personaplex.config import SAMPLE_RATE
from personaplex.errors import BadAudio, ConfigError
from personaplex.files import read_bounded
from personaplex.recordings import find_recordings

MANIFEST = "data.jsonl"
AGENT = "SPEAKER_MAIN"
LOWEST_RATE = 16_000  # below, consonants are missing, and the agent would learn to speak without them
_JSON_LIMIT = 2**26  # bytes
_DURATION_SLACK = 0.05  # share by which a manifest's duration may differ
_QUIET = 1e-3  # rms of a channel that holds nothing
_ALIKE = 1e-4  # rms of the difference of two channels that are one
_FULL = 0.999
_CLIPPED_RUN, _CLIPPED_SHARE = 3, 1e-3  # samples in a row, share of all of a channel
_WORD_SHARE = 0.6  # of the words that must fall on sound in the agent's channel
_BLOCK = SAMPLE_RATE // 50


@dataclass(frozen=True)
class Word:
    """`start` and `end` in seconds from the beginning of the recording."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Call:
    """Where a call's files are. `duration` as a manifest has it, in seconds, or None."""

    name: str
    wav: Path
    words: Path
    duration: float | None = None


@dataclass(frozen=True)
class Fault:
    """A call that cannot be used, or the part of it that cannot, and why."""

    file: str
    reason: str


@dataclass(frozen=True, eq=False)
class Recorded:
    """A call that was read: agent and user float32 [samples] at 24 kHz, and what `notes` say of it."""

    agent: NDArray[np.float32]
    user: NDArray[np.float32]
    words: list[Word]
    role: str | None
    voice: str | None
    notes: tuple[str, ...] = ()


class Unusable(ValueError):
    """A call that cannot be used; the message is the reason."""


def find_calls(sources: Sequence[Path]) -> tuple[list[Call], list[Fault]]:
    """The calls of folders, manifests and single recordings, in order, and lines that name none.

    Raises ConfigError when there are none, for a path that is not there and for two calls of one name.
    """
    calls: list[Call] = []
    faults: list[Fault] = []
    for source in sources:
        if not source.exists():
            raise ConfigError(f"no such file or folder: {source}")
        manifest = source / MANIFEST if source.is_dir() else source
        if manifest.suffix == ".jsonl" and manifest.is_file():
            for entry in _listed(manifest):
                if isinstance(entry, Call):
                    calls.append(entry)
                else:
                    faults.append(entry)
        elif source.is_dir():
            found = find_recordings([source])
            calls += [_call(path) for path in found.recordings]
            faults += [Fault(*failure) for failure in found.unreadable]
            lonely = {path.stem for path in source.glob("*.json")} - {path.stem for path in found.recordings}
            faults += [Fault(f"{stem}.json", "no recording belongs to it") for stem in sorted(lonely)]
        else:
            calls.append(_call(source))
    names = [call.name for call in calls]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two recordings are called alike: {', '.join(twice)}")
    if not calls and not faults:
        raise ConfigError(f"no recordings in {', '.join(map(str, sources))}")
    return calls, faults


def _call(wav: Path, duration: float | None = None) -> Call:
    return Call(wav.stem, wav, wav.with_suffix(".json"), duration)


def _listed(manifest: Path) -> Iterator[Call | Fault]:
    try:
        lines = read_bounded(manifest, _JSON_LIMIT).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{manifest.name} cannot be read: {cli.reason(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            duration = entry.get("duration")
            if duration is not None and not math.isfinite(float(duration)):
                raise ValueError
            yield _call(manifest.parent / entry["path"], None if duration is None else float(duration))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            yield Fault(f"{manifest.name}:{number}", 'is not {"path": file, "duration": seconds}')


def read_call(call: Call, shortest_s: float) -> Recorded:
    """Reads and checks both files. Raises Unusable with the reason."""
    try:
        size = call.wav.stat().st_size
        pcm, rate = read_wav(call.wav)
    except BadAudio as error:
        raise Unusable("it is empty" if not size else str(error)) from error
    except OSError as error:
        raise Unusable(error.strerror or "it cannot be read") from error
    notes = _check_sound(call, pcm, rate, shortest_s)
    both = np.stack([resample(channel, rate, SAMPLE_RATE) for channel in pcm])
    words, head = _words(call.words, both.shape[1] / SAMPLE_RATE)
    _check_words(words, both)
    role, voice = head.get("text_prompt"), head.get("voice")
    for key, value in (("text_prompt", role), ("voice", voice)):
        if value is not None and not isinstance(value, str):
            raise Unusable(f"{call.words.name}: {key} is no text")
    return Recorded(both[0], both[1], words, role, voice or None, tuple(notes))


def _check_sound(call: Call, pcm: NDArray[np.float32], rate: int, shortest_s: float) -> list[str]:
    """What is worth saying of the samples [channels, samples]. Raises Unusable."""
    seconds = pcm.shape[1] / rate
    if len(pcm) == 1:
        raise Unusable("it is mono: the agent belongs on the left channel, the user on the right")
    if len(pcm) > 2:
        raise Unusable(f"it has {len(pcm)} channels: two are needed, agent and user")
    if rate < LOWEST_RATE:
        raise Unusable(
            f"its sampling rate is {rate} Hz: at least {LOWEST_RATE} is needed, best {SAMPLE_RATE}"
        )
    if call.duration is not None and abs(call.duration - seconds) > max(0.1, _DURATION_SLACK * seconds):
        raise Unusable(
            f"it lasts {seconds:.2f} s and {MANIFEST} says {call.duration:.2f}: is its sampling rate, {rate} "
            "Hz, the right one?"
        )
    if seconds < shortest_s:
        raise Unusable(f"it is too short: {seconds:.2f} s, at least {shortest_s:g} are needed")
    notes = []
    for channel, who in ((0, "agent"), (1, "user")):
        clipped = _clipped(pcm[channel])
        if clipped > _CLIPPED_SHARE:
            raise Unusable(f"the {who}'s channel is clipped: {100 * clipped:.1f} % of its samples")
    loudness = np.sqrt(np.mean(np.square(pcm, dtype=np.float64), axis=1))
    if loudness[0] < _QUIET:
        raise Unusable("the agent's (left) channel is silent")
    if np.sqrt(np.mean(np.square(pcm[0] - pcm[1], dtype=np.float64))) < _ALIKE:
        raise Unusable("both channels are the same: agent and user must be apart")
    if loudness[1] < _QUIET:
        notes.append("the user's (right) channel is silent")
    if rate != SAMPLE_RATE:
        notes.append(f"resampled from {rate} Hz")
    return notes


def _clipped(samples: NDArray[np.float32]) -> float:
    """Share of the samples that lie at full scale, several in a row."""
    full = np.abs(samples) >= _FULL
    if not full.any():
        return 0.0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], full.view(np.int8), [0]])))
    runs = edges[1::2] - edges[::2]
    return float(runs[runs >= _CLIPPED_RUN].sum() / len(samples))


def _words(path: Path, seconds: float) -> tuple[list[Word], Mapping[str, Any]]:
    """The agent's words in order of time, and the whole of the file. Raises Unusable."""
    try:
        data = json.loads(read_bounded(path, _JSON_LIMIT))
    except FileNotFoundError as error:
        raise Unusable(f"its transcript {path.name} is missing") from error
    except OSError as error:
        raise Unusable(f"its transcript {path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Unusable(f"its transcript {path.name} is no JSON") from error
    rows = data.get("alignments") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise Unusable(f"{path.name} has no list of `alignments`")
    found = []
    for number, row in enumerate(rows, 1):
        word = _word(row)
        if word is None:
            raise Unusable(f"{path.name}: alignment {number} is not [word, [start, end], speaker]")
        if word.text and (len(row) < 3 or row[2] == AGENT):
            found.append(word)
    if not found:
        raise Unusable(f"{path.name} holds no word of the agent ({AGENT})")
    found.sort(key=lambda word: word.start)
    late = [word for word in found if word.end > seconds + 0.1]
    if late:
        raise Unusable(
            f"its transcript is off: {late[-1].text!r} ends at {late[-1].end:.2f} s, "
            f"the sound at {seconds:.2f} s"
        )
    return found, data


def _word(row: object) -> Word | None:
    if not isinstance(row, list) or len(row) not in (2, 3) or not isinstance(row[0], str):
        return None
    times = row[1]
    if not isinstance(times, list) or len(times) != 2:
        return None
    if not all(isinstance(t, (int, float)) and not isinstance(t, bool) for t in times):
        return None
    start, end = times
    if not 0 <= start <= end < math.inf:
        return None
    try:
        row[0].encode()
    except UnicodeEncodeError:
        return None
    return Word(row[0].strip(), float(start), float(end))


def _check_words(words: Sequence[Word], both: NDArray[np.float32]) -> None:
    """Raises Unusable when the words do not fall on sound of the agent's channel."""
    loud = []
    for channel in both:
        whole = channel[: len(channel) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
        level = np.sqrt(np.mean(np.square(whole), axis=1))
        loud.append(level > max(_QUIET, 0.1 * float(np.quantile(level, 0.95))))
    on = [[_sounds(flags, word) for word in words] for flags in loud]
    if sum(on[0]) >= _WORD_SHARE * len(words):
        return
    swapped = sum(on[1]) >= _WORD_SHARE * len(words)
    advice = "; the other channel sounds there: are they swapped?" if swapped else ""
    raise Unusable(
        f"its transcript is off: {len(words) - sum(on[0])} of {len(words)} words fall where the agent's "
        f"channel is silent{advice}"
    )


def _sounds(loud: NDArray[np.bool_], word: Word) -> bool:
    start, stop = int(word.start * 50), max(int(word.start * 50) + 1, math.ceil(word.end * 50))
    return bool(loud[start:stop].any())
