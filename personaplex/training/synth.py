"""Speech made here: one natural voice, taken apart into envelope, noise and pitch, and put together as any
other.

hibari's network predicts, for every 12.5 ms, a harmonic and a noise spectrum and the pitch; its durations
say when each phone is spoken. `free` makes a caller of them: pitch, formants, intonation, tilt and breath
of any voice. `locked` makes the agent's speech: in every 80 ms frame a whole number of periods, the same
noise, and the phases of one vowel, so that a frame is a sum of fixed waves whose sizes are the spectrum's
amplitudes. Between two of them lies speech too, which is what a decoder needs that guesses.

Needs the `train` extra.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplex.config import FRAME_SIZE, SAMPLE_RATE

Array = NDArray[np.float32]

BINS = 601  # of the network's spectra
LABEL_RATE = 40  # phone labels a second
_SILENT = "ˈˌ .,?!;:—…“”\"'"  # of the phoneme alphabet, what is no sound
_DURATIONS = "/Cast_32_output_0"  # the tensor of durations inside hibari's graph, in 1/40 s
HOP = 300  # samples between the network's spectra
LOUDNESS = 0.08  # rms of a caller, and of the agent where it is loud
_LOUD_SHARE = 0.03  # of the loudest frame's power: what is loud
_LOCK_WINDOW, LOCK_HOP = 1200, 240  # 8 hops a frame: the windows lie alike in all frames
_BANDWIDTH = 250.0  # Hz of the formants that give locked speech its phases
LOWEST_PERIODS = 4
# What hibari's own synthesis makes of an amplitude of one: of a harmonic, and of noise, whose 4 overlapping
# windows are drawn apart from one another.
_PULSE_GAIN, _NOISE_GAIN = 1 / 300, 1 / 30


@dataclass(frozen=True)
class Voice:
    """How the network's voice is changed; all but the last four are factors."""

    pitch: float = 1.0
    formant: float = 1.0
    wobble: tuple[float, float] = (1.0, 1.0)  # further factors of the lowest formants
    intonation: float = 1.0
    tilt: float = 0.0  # nepers at 0 Hz, the negative at 12 kHz
    breath: float = 0.0  # nepers of noise
    speed: float = 1.0


@dataclass(frozen=True)
class Spoken:
    """One sentence as the network predicts it; spectra are [601, T] log amplitudes, f0 [T] in Hz or 0."""

    text: str
    harmonic: Array
    phase: Array
    noise: Array
    rest: Array
    rest_phase: Array
    f0: Array
    phones: NDArray[np.uint8]  # at LABEL_RATE, 0 is silence
    words: tuple[tuple[str, float, float], ...]  # word, start and end in seconds


class Speaker:
    """hibari with its durations read out."""

    def __init__(self, threads: int = 1) -> None:
        from hibari import Hibari

        self.tts: Any = Hibari(model=_with_durations(), threads=threads)
        sounds = sorted(c for c in self.tts.vocab if c not in _SILENT)
        self.phones = {sound: index + 1 for index, sound in enumerate(sounds)}
        self.names = ("", *sounds)  # of phones by number

    def say(self, text: str, speed: float = 1.0) -> Spoken | None:
        """One sentence; None where the phonemes do not fall into the text's words."""
        phonemes = self.tts.phonemize(text)
        if len(phonemes) != 1:
            return None
        sounds = "".join(c for c in phonemes[0] if c in self.tts.vocab)
        ids = np.asarray([self.tts.ids(sounds)], np.int64)
        *parts, durations = self.tts.sess.run(None, {"ids": ids, "speed": np.asarray([speed], np.float32)})
        harmonic, phase, noise, rest, rest_phase, f0 = (part[0] for part in parts)
        labels, words = self._times(text, sounds, [int(d) for d in durations.ravel()])
        if words is None:
            return None
        return Spoken(text, harmonic, phase, noise, rest, rest_phase, f0, labels, words)

    def _times(
        self, text: str, sounds: str, durations: list[int]
    ) -> tuple[NDArray[np.uint8], tuple[tuple[str, float, float], ...] | None]:
        """Phone labels and word times from the durations of pad, each sound, pad."""
        written = text.split()
        labels = [0] * durations[0]
        spans: list[list[int]] = [[durations[0], durations[0]]]
        waiting = 0  # a stress mark's time belongs to the sound it marks
        for sound, duration in zip(sounds, durations[1:], strict=False):
            if sound == " ":
                labels += [labels[-1] if labels else 0] * duration
                spans.append([len(labels), len(labels)])
            elif sound in "ˈˌ":
                waiting += duration
            else:
                labels += [self.phones.get(sound, 0)] * (duration + waiting)
                waiting = 0
                if sound in self.phones:
                    spans[-1][1] = len(labels)
        labels += [0] * durations[-1]
        if len(spans) != len(written):
            return np.asarray(labels, np.uint8), None
        times = tuple(
            (word, start / LABEL_RATE, end / LABEL_RATE)
            for word, (start, end) in zip(written, spans, strict=True)
        )
        return np.asarray(labels, np.uint8), times


@cache
def _with_durations() -> str:
    """hibari's graph with one more output, made once a process."""
    import tempfile

    import hibari
    import onnx
    from onnx import TensorProto, helper

    graph = onnx.load(Path(hibari.__file__).parent / "assets" / "hibari.onnx")
    graph.graph.output.append(helper.make_tensor_value_info(_DURATIONS, TensorProto.INT64, None))
    handle, path = tempfile.mkstemp(suffix=".onnx")
    os.close(handle)
    onnx.save(graph, path)
    return path


def caller(draw: random.Random) -> Voice:
    """A voice of a caller, man or woman."""
    male = draw.random() < 0.5
    return Voice(
        pitch=draw.uniform(0.42, 0.72) if male else draw.uniform(0.75, 1.3),
        formant=draw.uniform(0.76, 0.95) if male else draw.uniform(0.88, 1.12),
        wobble=(draw.uniform(0.95, 1.05), draw.uniform(0.95, 1.05)),
        intonation=draw.uniform(0.3, 1.5),
        tilt=draw.uniform(-1.2, 1.0),
        breath=draw.uniform(-1.5, 1.0),
        speed=draw.uniform(0.75, 1.4),
    )


def free(spoken: Spoken, voice: Voice, rng: np.random.Generator) -> Array:
    """The sentence in another voice, float32 at 24 kHz, of the same loudness for all."""
    from hibari import dsp

    tilt = _tilt(voice)
    sharper = 0.5 * np.log(max(voice.pitch, 0.3))  # a lower voice has more harmonics under one envelope
    wave = dsp.synth(
        _warped(spoken.harmonic, voice) + tilt + np.float32(sharper),
        _warped(spoken.phase, voice),
        _warped(spoken.noise, voice) + tilt + np.float32(voice.breath),
        _warped(spoken.rest, voice) + tilt - np.float32(20.0 if voice.pitch != 1.0 else 0.0),
        spoken.rest_phase,
        changed_pitch(spoken.f0, voice),
        rng,
    )
    level = np.sqrt(np.mean(np.square(wave))) + 1e-6
    return np.asarray(wave * np.float32(LOUDNESS / level), np.float32)


def locked(spoken: Spoken, voice: Voice, place: NDArray[np.float64], periods: NDArray[np.int64]) -> Array:
    """The sentence as the agent says it, [frames * 1920], with so many periods in each frame.

    `place` is the moment of the prediction, in seconds, at every LOCK_HOP samples. A whole number of periods
    k a frame is a pitch of 12.5 k Hz.
    """
    lead = np.log(np.float32(1e-5))
    position = place * SAMPLE_RATE / HOP - 0.5
    tilt = _tilt(voice)
    harmonic = _at(_warped(spoken.harmonic, voice) + tilt, position, lead)
    aside = np.logaddexp(_warped(spoken.noise, voice) + np.float32(voice.breath), _warped(spoken.rest, voice))
    noise = _at(np.asarray(aside + tilt, np.float32), position, lead)
    pulses = np.concatenate([_pulses(int(k)) for k in periods])
    wave = _filtered(pulses, harmonic, _PULSE_GAIN)
    wave += _filtered(np.tile(_frame_noise(), len(periods)), noise, _NOISE_GAIN)
    power = np.square(wave).reshape(len(periods), FRAME_SIZE).mean(1)
    level = np.sqrt(power[power > _LOUD_SHARE * power.max()].mean()) + 1e-6
    return np.asarray(wave * np.float32(LOUDNESS / level), np.float32)


def _tilt(voice: Voice) -> Array:
    return np.asarray(np.linspace(1, -1, BINS)[:, None] * voice.tilt, np.float32)


def changed_pitch(f0: Array, voice: Voice) -> Array:
    voiced = f0 > 40
    if not voiced.any():
        return f0
    mean = np.exp(np.log(f0[voiced]).mean())
    changed = np.zeros_like(f0)
    changed[voiced] = np.maximum(mean * voice.pitch * (f0[voiced] / mean) ** voice.intonation, 55.0)
    return changed


def _warped(spectra: Array, voice: Voice) -> Array:
    """Formants moved by the voice's factors up to 60 % of the band, tied to its end above."""
    if voice.formant == 1.0 and voice.wobble == (1.0, 1.0):
        return spectra
    knots = np.array([0.0, 0.15, 0.3, 0.6, 1.0])
    sources = knots / np.array(
        [1.0, voice.formant * voice.wobble[0], voice.formant * voice.wobble[1], voice.formant, 1.0]
    )
    source = np.interp(np.linspace(0, 1, BINS), knots, np.maximum.accumulate(sources)) * (BINS - 1)
    source = np.clip(source, 0, BINS - 1.001)
    low = source.astype(int)
    part = (source - low).astype(np.float32)[:, None]
    return np.asarray(spectra[low] * (1 - part) + spectra[low + 1] * part, np.float32)


def _at(spectra: Array, position: NDArray[np.float64], outside: np.float32) -> Array:
    """Spectra [601, T] at fractional positions, `outside` before and after: [601, len(position)]."""
    padded = np.pad(spectra, ((0, 0), (1, 1)), constant_values=outside)
    place = np.clip(position + 1, 0, padded.shape[1] - 1.001)
    low = place.astype(int)
    part = (place - low).astype(np.float32)
    return np.asarray(padded[:, low] * (1 - part) + padded[:, low + 1] * part, np.float32)


def periods_of(pitch: Array, frames: int) -> NDArray[np.int64]:
    """Periods in each frame from pitch [frames, n] in Hz or 0; where nothing is voiced the last stands."""
    known = [np.median(row[row > 0]) for row in pitch if (row > 0).any()]
    last = max(LOWEST_PERIODS, round(float(known[0]) / 12.5)) if known else 16
    periods = []
    for row in pitch[:frames]:
        if (row > 0).any():
            last = max(LOWEST_PERIODS, round(float(np.median(row[row > 0])) / 12.5))
        periods.append(last)
    return np.asarray(periods, np.int64)


@cache
def _pulses(periods: int) -> Array:
    """A frame of `periods` pulses of the amplitude the network's harmonics are measured by.

    They lie half a period from the frame's ends, so that what they ring stays in the frame.
    """
    frame = np.zeros(FRAME_SIZE, np.float32)
    spacing = FRAME_SIZE / periods
    frame[np.floor((np.arange(periods) + 0.5) * spacing).astype(int)] = spacing / 2
    return frame


@cache
def _frame_noise() -> Array:
    return np.asarray(np.random.default_rng(1).standard_normal(FRAME_SIZE), np.float32)


@cache
def _phases() -> NDArray[np.complex64]:
    """[601] of size one: the phases of an evenly open tube 17 cm long with wide formants, for every sound."""
    frequency = 1j * np.linspace(0, SAMPLE_RATE / 2, BINS)
    response = np.ones(BINS, complex)
    for formant in np.arange(500, SAMPLE_RATE / 2, 1000):
        pole = -_BANDWIDTH / 2 + 1j * formant
        response /= (frequency - pole) * (frequency - pole.conjugate())
    return np.asarray(response / np.abs(response), np.complex64)


def _filtered(excitation: Array, envelope: Array, gain: float) -> Array:
    """Excitation through filters of these log amplitudes [601, hops + 1], one a hop, and of `_phases`."""
    response = np.exp(np.minimum(envelope.T, np.float32(7.0))) * _phases()
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_LOCK_WINDOW) / _LOCK_WINDOW)).astype(np.float32)
    margin = _LOCK_WINDOW // 2
    padded = np.pad(excitation, margin)
    blocks = np.lib.stride_tricks.sliding_window_view(padded, _LOCK_WINDOW)[::LOCK_HOP]
    count = min(len(blocks), len(response))
    spectra = np.fft.rfft(blocks[:count] * window, axis=1) * response[:count] * np.float32(gain)
    rows = np.fft.irfft(spectra, _LOCK_WINDOW, axis=1) * window
    steps = _LOCK_WINDOW // LOCK_HOP
    total, weight = np.zeros((2, count + steps, LOCK_HOP), np.float32)
    for step in range(steps):
        part = slice(step * LOCK_HOP, (step + 1) * LOCK_HOP)
        total[step : step + count] += rows[:, part]
        weight[step : step + count] += np.square(window[part])
    made = (total / np.maximum(weight, 0.1)).ravel()
    return np.asarray(made[margin : margin + len(excitation)], np.float32)
