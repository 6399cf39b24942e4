"""Sentences said by synthetic voices, with the true time of every word: espeak-ng, Flite and hibari.

The first two come from the system's libraries (Debian: `espeak-ng`, `flite`), by ctypes, since their
commands tell no times; hibari, one natural voice that `personaplex.training.synth` changes into any, from
the extra `train`. Sound is mono float32 at 24 kHz, at one loudness.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from personaplex.audio.wav import resample
from personaplex.config import SAMPLE_RATE, Pcm
from personaplex.words import Word

LOUDNESS = 0.08  # RMS
QUIET = 0.01  # of the peak: what is less at the ends is not speech

SENTENCES = (
    "What is the capital of France?",
    "I would like to book a table for two people tonight.",
    "Could you please repeat the last part again?",
    "My daughter starts school in September and she is very excited.",
    "The train to the airport leaves every fifteen minutes.",
    "Sorry, I think you have the wrong number.",
    "Please send the invoice to our new office address.",
    "Can you tell me how long the battery lasts?",
    "We walked along the river until it was dark.",
    "Yes, that sounds like a good idea to me.",
    "The washing machine makes a strange noise when it spins.",
    "How much does it cost to send a package to Canada?",
    "My grandfather was a baker and my father was a teacher.",
    "I forgot my password and I cannot log in anymore.",
    "There is a small bookshop around the corner.",
    "Do you have anything without sugar?",
    "The meeting was moved to Thursday afternoon.",
    "Tell me something interesting about the moon.",
    "It has been raining since early this morning.",
    "I need to change the date of my appointment.",
    "The children are playing football in the garden.",
    "Wait a moment, let me write that down.",
    "Our flight was delayed because of heavy snow.",
    "Which color would you choose for the kitchen?",
    "He bought fresh bread, butter and a jar of honey.",
    "Nobody told me that the store was closed on Sunday.",
    "She plays the piano better than anyone I know.",
    "The doctor said that I should drink more water.",
    "Is there a pharmacy near the central station?",
    "I am calling about the apartment you advertised.",
    "Turn left at the church and then go straight ahead.",
    "The soup needs a little more salt and pepper.",
    "We have been waiting here for almost an hour.",
    "Could I speak with someone from customer service?",
    "The old bridge was built before the war.",
    "No, I have never been to South America.",
    "Her brother works for a large insurance company.",
    "Please turn off the lights when you leave the room.",
    "The movie was too long and the story made no sense.",
    "What time does the swimming pool open tomorrow?",
    "I learned to ride a bicycle when I was five.",
    "The window in the bedroom does not close properly.",
    "They are planning a trip around the world.",
    "Would you mind speaking a bit more slowly?",
    "The dog sleeps under the table all day long.",
    "My phone fell into the water and stopped working.",
    "There were about twenty people at the party.",
    "I prefer coffee with milk and without sugar.",
    "The teacher asked us to read the first chapter.",
    "Where can I leave my luggage until this evening?",
    "A good friend of mine lives in New Zealand.",
    "The company will open a second factory next year.",
    "I cannot find the receipt for these shoes.",
    "Thank you very much for your help and your patience.",
    "The garden looks beautiful in the morning light.",
    "He wrote a long letter to the city council.",
    "Are you sure that this is the right street?",
    "We should leave now if we want to catch the bus.",
    "The price includes breakfast and free parking.",
    "I think the heating in our building is broken.",
)


@dataclass(frozen=True, eq=False)
class Spoken:
    """One sentence: sound, float32 [samples] at 24 kHz, and its words in seconds from the first sample."""

    voice: str
    text: str
    pcm: Pcm = field(repr=False)
    words: tuple[Word, ...]


Voice = Callable[[str], tuple[Pcm, list[Word]]]


def utterances(count: int = len(SENTENCES), seed: int = 0) -> list[Spoken]:
    """`count` sentences, each by the next of the voices that are installed. Raises OSError without any."""
    voices = available(seed)
    if not voices:
        raise OSError("no synthetic voice is installed (Debian: espeak-ng, flite)")
    said = []
    for number in range(count):
        name, voice = voices[number % len(voices)]
        text = SENTENCES[number % len(SENTENCES)]
        pcm, words = voice(text)
        said.append(Spoken(name, text, *_trimmed(pcm, words)))
    return said


def available(seed: int = 0) -> list[tuple[str, Voice]]:
    """Names and voices that are installed, one synthesiser after the other."""
    kinds = [_espeak_voices(), _flite_voices(), _hibari_voices(seed)]
    longest = max(map(len, kinds))
    return [kind[i] for i in range(longest) for kind in kinds if i < len(kind)]


def _trimmed(pcm: Pcm, words: Sequence[Word]) -> tuple[Pcm, tuple[Word, ...]]:
    """Without the silence at both ends, at LOUDNESS; words lie within."""
    loud = np.flatnonzero(np.abs(pcm) > QUIET * np.abs(pcm).max())
    first, last = int(loud[0]), int(loud[-1]) + 1
    sound = pcm[first:last]
    sound = sound * np.float32(LOUDNESS / np.sqrt(np.mean(np.square(sound))))
    begin, end = first / SAMPLE_RATE, last / SAMPLE_RATE
    moved = (Word(w.text, min(max(w.start, begin), end) - begin, min(w.end, end) - begin) for w in words)
    return sound.astype(np.float32), tuple(moved)


# espeak-ng


class _EspeakId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _EspeakEvent(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EspeakId),
    )


_RETRIEVAL, _UTF8, _CHARACTER = 1, 1, 1
_WORD, _LIST_END = 1, 0
_ESPEAK = ("gmw/en-US", "gmw/en-GB-x-rp", "gmw/en-US+f3", "gmw/en-US+m3", "gmw/en-GB-scotland+f2")


@cache
def _espeak() -> tuple[Any, int] | None:
    name = ctypes.util.find_library("espeak-ng")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    rate = library.espeak_Initialize(_RETRIEVAL, 0, None, 0)
    return (library, rate) if rate > 0 else None


def _espeak_voices() -> list[tuple[str, Voice]]:
    return [
        (f"espeak-ng {name}", lambda text, name=name: _espeak_say(name, text))
        for name in _ESPEAK
        if _espeak()
    ]


def _espeak_say(voice: str, text: str) -> tuple[Pcm, list[Word]]:
    found = _espeak()
    assert found is not None
    library, rate = found
    pieces: list[np.ndarray] = []
    starts: list[tuple[int, int]] = []  # character, sample

    @ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_EspeakEvent)
    )
    def take(wave: Any, count: int, events: Any) -> int:
        if wave and count > 0:
            pieces.append(np.ctypeslib.as_array(wave, (count,)).copy())
        number = 0
        while events[number].type != _LIST_END:
            if events[number].type == _WORD:
                starts.append((events[number].text_position, events[number].sample))
            number += 1
        return 0

    library.espeak_SetSynthCallback(take)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise OSError(f"espeak-ng has no voice {voice}")
    data = text.encode() + b"\0"
    library.espeak_Synth(data, len(data), 0, _CHARACTER, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    pcm = np.concatenate(pieces).astype(np.float32) / np.float32(32_768)
    marks = [
        starts[0],
        *(mark for before, mark in pairwise(starts) if mark[0] > before[0]),
    ]
    ends = [*(sample for _, sample in marks[1:]), len(pcm)]
    words = [
        Word(text[position - 1 :].split()[0], start / rate, end / rate)
        for (position, start), end in zip(marks, ends, strict=True)
    ]
    return resample(pcm, rate, SAMPLE_RATE), words


# Flite

_FLITE = ("slt", "rms", "awb", "kal16")


class _FliteWave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


@cache
def _flite(voice: str) -> tuple[Any, Any] | None:
    """The library and the voice."""
    try:
        library = ctypes.CDLL("libflite.so.1", mode=ctypes.RTLD_GLOBAL)
        for name in ("usenglish", "cmulex"):
            ctypes.CDLL(f"libflite_{name}.so.1", mode=ctypes.RTLD_GLOBAL)
        own = ctypes.CDLL(f"libflite_cmu_us_{voice}.so.1")
    except OSError:
        return None
    for name in (
        "flite_synth_text",
        "utt_wave",
        "utt_relation",
        "relation_head",
        "item_next",
        "item_daughter",
    ):
        getattr(library, name, library.flite_init).restype = ctypes.c_void_p
    library.ffeature_float.restype = ctypes.c_float
    library.ffeature_string.restype = ctypes.c_char_p
    library.flite_init()
    register = getattr(own, f"register_cmu_us_{voice}")
    register.restype = ctypes.c_void_p
    return library, ctypes.c_void_p(register(None))


def _flite_voices() -> list[tuple[str, Voice]]:
    return [
        (f"flite {name}", lambda text, name=name: _flite_say(name, text)) for name in _FLITE if _flite(name)
    ]


def _flite_say(voice: str, text: str) -> tuple[Pcm, list[Word]]:
    found = _flite(voice)
    assert found is not None
    library, speaker = found
    utterance = ctypes.c_void_p(library.flite_synth_text(text.encode(), speaker))
    wave = ctypes.cast(library.utt_wave(utterance), ctypes.POINTER(_FliteWave)).contents
    pcm = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).astype(np.float32) / np.float32(32_768)
    rate = wave.sample_rate
    words = []
    relation = ctypes.c_void_p(library.utt_relation(utterance, b"Word"))
    item = library.relation_head(relation)
    while item:
        word = ctypes.c_void_p(item)
        first = b"R:SylStructure.daughter1.daughter1.R:Segment.p.end"
        last = b"R:SylStructure.daughtern.daughtern.R:Segment.end"
        start, end = library.ffeature_float(word, first), library.ffeature_float(word, last)
        words.append(Word(library.ffeature_string(word, b"name").decode(), float(start), float(end)))
        item = library.item_next(word)
    library.delete_utterance(utterance)
    return resample(pcm, rate, SAMPLE_RATE), words


# hibari


def _hibari_voices(seed: int) -> list[tuple[str, Voice]]:
    try:
        import hibari  # noqa: F401
        import onnx  # noqa: F401

        from personaplex.training import synth
    except ImportError:
        return []
    draw = random.Random(seed)
    makes = [synth.Voice(), *(synth.caller(draw) for _ in range(3))]
    return [
        (f"hibari {number}", lambda text, make=make: _hibari_say(make, text))
        for number, make in enumerate(makes)
    ]


@cache
def _speaker() -> Any:
    from personaplex.training import synth

    return synth.Speaker()


def _hibari_say(voice: Any, text: str) -> tuple[Pcm, list[Word]]:
    from personaplex.training import synth

    spoken = _speaker().say(text, voice.speed)
    if spoken is None:
        raise OSError(f"hibari cannot say: {text}")
    pcm = synth.free(spoken, voice, np.random.default_rng(0))
    # its durations are those of its own speed
    faster = len(pcm) / SAMPLE_RATE / (len(spoken.phones) / synth.LABEL_RATE)
    return np.asarray(pcm, np.float32), [
        Word(w, faster * start, faster * end) for w, start, end in spoken.words
    ]
