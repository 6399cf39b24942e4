"""Shards of synthesised speech on disk: callers for the ear, the agent's sentences for the codec and the
model.

A shard is one `.npz`: all waves end to end as int16, their lengths, and what each says. Each is written
whole, from a seed of its own, so that a broken run goes on where it stopped. `python -m
personaplex.training.corpus callers|robots|agent FOLDER SHARDS [FIRST]`.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from personaplex.config import SAMPLE_RATE
from personaplex.training import grammar
from personaplex.training.synth import LABEL_RATE, LOUDNESS, Array, Speaker, Voice, caller, free, locked

CALLER_SHARD, AGENT_SHARD = 400, 300  # sentences run through the network a shard
ROBOT_SHARD = 1_000
_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
_TIMBRES = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "klatt", "klatt2")
_ESPEAK_RATE = 22_050
OTHER = "other"  # speech for the phones' sake, in no dialogue
_VOICINGS = 3


@dataclass(frozen=True)
class Utterance:
    """One wave with what it says; `labels` are phones at LABEL_RATE (callers) or periods a frame (agent)."""

    wave: NDArray[np.int16]
    labels: NDArray[np.uint8]
    text: str
    intent: str


def save(path: Path, utterances: list[Utterance]) -> None:
    """Writes a shard; it is there whole or not at all."""
    part = path.with_suffix(".part.npz")
    arrays: dict[str, Any] = {
        "wave": np.concatenate([u.wave for u in utterances]),
        "lengths": np.array([len(u.wave) for u in utterances]),
        "labels": np.concatenate([u.labels for u in utterances]),
        "label_lengths": np.array([len(u.labels) for u in utterances]),
        "texts": np.array([u.text for u in utterances]),
        "intents": np.array([u.intent for u in utterances]),
    }
    np.savez(part, **arrays)
    os.replace(part, path)


def load(path: Path) -> list[Utterance]:
    with np.load(path) as file:
        waves = np.split(file["wave"], np.cumsum(file["lengths"])[:-1])
        labels = np.split(file["labels"], np.cumsum(file["label_lengths"])[:-1])
        pairs = zip(waves, labels, file["texts"].tolist(), file["intents"].tolist(), strict=True)
        return [Utterance(*row) for row in pairs]


def caller_sentence(draw: random.Random) -> tuple[str, str]:
    """(intent, text): a question, or speech for the phones' sake."""
    dice = draw.random()
    if dice < 0.55:
        intent = draw.choice((*grammar.INTENTS, grammar.UNKNOWN))
        return intent, grammar.question(draw, intent, unseen=False)
    if dice < 0.85:
        return OTHER, " ".join(draw.sample(grammar.lexicon(), draw.randint(1, 6)))
    known = grammar.facts(draw, unseen=False)
    lines = (
        f"my name is {known.name}",
        f"this is {known.name} from {known.firm}",
        f"i need the {known.item} for {grammar.spoken_number(known.price)} on {known.first_day}",
        grammar.answer(draw.choice(list(grammar.ANSWERS)), known),
    )
    return OTHER, draw.choice(lines)


def callers(speaker: Speaker, seed: int) -> Iterator[Utterance]:
    """One shard of callers, each sentence in several voices, silence trimmed."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    for _ in range(CALLER_SHARD):
        intent, text = caller_sentence(draw)
        spoken = speaker.say(text, draw.uniform(0.75, 1.4))
        if spoken is None or not spoken.phones.any():
            continue
        said = np.nonzero(spoken.phones)[0]
        start, end = max(0, said[0] - 4), min(len(spoken.phones), said[-1] + 7)
        step = SAMPLE_RATE // LABEL_RATE
        for _ in range(_VOICINGS):
            wave = free(spoken, caller(draw), rng)[start * step : end * step]
            yield Utterance(as_int16(wave), spoken.phones[start:end], text, intent)


def robots(_speaker: Speaker, seed: int) -> Iterator[Utterance]:
    """One shard of questions by espeak's voices, far from the natural one; without phones: for intents."""
    draw = random.Random(seed)
    for _ in range(ROBOT_SHARD):
        intent = draw.choice((*grammar.INTENTS, grammar.UNKNOWN))
        text = grammar.question(draw, intent, unseen=False)
        wave = espeak(text, draw)
        yield Utterance(as_int16(wave), np.zeros(0, np.uint8), text, intent)


def espeak(text: str, draw: random.Random) -> Array:
    """Speech at 24 kHz by one of espeak's voices, trimmed. Raises RuntimeError without espeak-ng."""
    voice = f"{draw.choice(_ACCENTS)}+{draw.choice(_TIMBRES)}"
    options = [
        "-v",
        voice,
        "-s",
        str(draw.randint(125, 205)),
        "-p",
        str(draw.randint(20, 75)),
        "--stdout",
        text,
    ]
    done = subprocess.run(["espeak-ng", *options], capture_output=True)
    if done.returncode:
        raise RuntimeError(f"espeak-ng failed: {done.stderr.decode(errors='replace').strip()}")
    samples = np.frombuffer(done.stdout[44:], np.int16).astype(np.float32) / 32768  # behind the WAV's header
    wave = soxr.resample(samples, _ESPEAK_RATE, SAMPLE_RATE).astype(np.float32)
    loud = np.nonzero(np.abs(wave) > 0.02 * np.abs(wave).max())[0]
    wave = wave[loud[0] : loud[-1] + 1]
    return np.asarray(wave * (LOUDNESS / np.sqrt(np.mean(wave**2))), np.float32)


def agent(speaker: Speaker, seed: int) -> Iterator[Utterance]:
    """One shard of the agent's sentences, locked, in voices around the agent's own."""
    draw = random.Random(seed)
    for text in grammar.sentences(draw, AGENT_SHARD, unseen=False):
        voice = agent_voice(draw)
        spoken = speaker.say(text, voice.speed)
        if spoken is None:
            continue
        wave, periods = locked(spoken, voice, shift=draw.randrange(1920))
        yield Utterance(as_int16(wave), periods.astype(np.uint8), text, OTHER)


def agent_voice(draw: random.Random) -> Voice:
    """A voice of the agent's range: pitch and formants move together, little else changes."""
    pitch = draw.uniform(0.5, 1.2)
    return Voice(
        pitch=pitch,
        formant=(0.83 + (pitch - 0.5) * 0.33) * draw.uniform(0.97, 1.03),
        tilt=draw.uniform(-0.2, 0.2),
        speed=draw.uniform(0.9, 1.1),
    )


def as_int16(wave: Array) -> NDArray[np.int16]:
    return np.asarray(np.clip(wave, -1, 1) * 32767, np.int16)


def as_float(wave: NDArray[np.int16]) -> Array:
    return np.asarray(wave / np.float32(32767), np.float32)


MAKERS: dict[str, Callable[[Speaker, int], Iterator[Utterance]]] = {
    "callers": callers,
    "robots": robots,
    "agent": agent,
}


def make(kind: str, folder: Path, shards: int, first: int = 0) -> None:
    """Writes the shards that `folder` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    speaker = Speaker()
    for seed in range(first, first + shards):
        path = folder / f"{kind}-{seed:04}.npz"
        if path.exists():
            continue
        utterances = list(MAKERS[kind](speaker, seed))
        save(path, [dataclasses.replace(u) for u in utterances])
        print(f"{path.name}: {sum(len(u.wave) for u in utterances) / SAMPLE_RATE / 60:.1f} min", flush=True)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
