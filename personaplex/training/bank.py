"""What dialogues are put together from: answers in codes with their words' times, and callers in codes.

`python -m personaplex.training.bank answers FOLDER SHARDS [FIRST]` speaks the answers of ever new worlds
with the voices of `VOICES` and analyses them (needs `FOLDER/analysis.pt`); `... callers FOLDER` runs
callers through the trained ear (`FOLDER/ear.pt`).
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE
from personaplex.training import grammar, hearing
from personaplex.training.corpus import as_float
from personaplex.training.ear import LABELS, Ear
from personaplex.training.export import CONFIG
from personaplex.training.mouth import features
from personaplex.training.run import load as load_state
from personaplex.training.speaking import Fitted
from personaplex.training.synth import Array, Speaker, Spoken, Voice, locked

WORLDS = 60  # of one shard
SAMPLES = 3  # of each voice, for prompts
SAMPLE_FRAMES = 12
QUIET = 36  # frames of the caller's silence behind a question
_PAUSED = 0.2  # share of callers with a pause inside
_BEFORE = 1  # frames of an answer before its first word
_SAMPLE_TEXTS = (
    "I am happy to talk to you.",
    "Please ask me anything you like.",
    "It is a lovely day, is it not?",
)

VOICES = {
    **{f"NATF{i}": Voice(p, f) for i, (p, f) in enumerate(
        ((0.95, 1.0), (1.04, 1.02), (0.87, 0.98), (1.12, 1.04)))},
    **{f"NATM{i}": Voice(p, f) for i, (p, f) in enumerate(
        ((0.55, 0.86), (0.62, 0.88), (0.5, 0.84), (0.68, 0.9)))},
    **{f"VARF{i}": Voice(p, f, tilt=t) for i, (p, f, t) in enumerate(
        ((0.8, 1.0, 0.2), (1.0, 0.97, -0.3), (1.18, 1.06, 0.0), (0.9, 1.05, 0.3), (1.08, 0.98, -0.2)))},
    **{f"VARM{i}": Voice(p, f, tilt=t) for i, (p, f, t) in enumerate(
        ((0.52, 0.9, 0.3), (0.58, 0.83, -0.2), (0.72, 0.87, 0.0), (0.65, 0.84, 0.3), (0.6, 0.92, -0.3)))},
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    """Codes [T, 8] of a sentence and the frame at which each of its words begins."""

    codes: np.ndarray
    words: list[int]


@dataclass(frozen=True)
class World:
    known: grammar.Facts
    voice: str
    answers: dict[str, Said]


@dataclass(frozen=True)
class Call:
    """A caller's codes [T, 8]: `spoken` frames with speech, then QUIET more."""

    intent: str
    spoken: int
    codes: np.ndarray


def say(spoken: Spoken, voice: Voice, fitted: Fitted, shift: int) -> Said:
    """A sentence in codes, trimmed to a frame before its first word and two behind its last."""
    wave, periods = locked(spoken, voice, shift)
    codes = fitted.analysis.codes(torch.from_numpy(features(wave, periods))).numpy().astype(np.int16)
    starts = [int((start + shift / SAMPLE_RATE) / FRAME_SECONDS) for _, start, _ in spoken.words]
    first = max(0, starts[0] - _BEFORE)
    last = int((spoken.words[-1][2] + shift / SAMPLE_RATE) / FRAME_SECONDS) + 2
    return Said(codes[first : last + 1], [start - first for start in starts])


def world(speaker: Speaker, fitted: Fitted, draw: random.Random, unseen: bool = False) -> World:
    """A world's answers in one voice."""
    known, name = grammar.facts(draw, unseen), draw.choice(list(VOICES))
    answers = {}
    for intent in grammar.ANSWERS:
        voice = VOICES[name]
        spoken = speaker.say(grammar.answer(intent, known), draw.uniform(0.95, 1.1))
        if spoken is not None:
            answers[intent] = say(spoken, voice, fitted, draw.randrange(FRAME_SIZE))
    return World(known, name, answers)


def samples(speaker: Speaker, fitted: Fitted, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Codes [SAMPLE_FRAMES, 8] of each voice, for the voice prompt."""
    draw, made = random.Random(seed), {}
    for name, voice in VOICES.items():
        spoken = [speaker.say(text) for text in _SAMPLE_TEXTS]
        codes = [say(s, voice, fitted, draw.randrange(FRAME_SIZE)).codes for s in spoken if s is not None]
        made[name] = [c[:SAMPLE_FRAMES] for c in codes if len(c) >= SAMPLE_FRAMES]
    return made


def make_answers(folder: Path, shards: int, first: int = 0) -> None:
    """Writes the shards of worlds that `folder` lacks, and the voices' samples."""
    speaker, fitted = Speaker(), Fitted.load(folder / "analysis.pt")
    (folder / "worlds").mkdir(exist_ok=True)
    if not (folder / "voices.npz").exists():
        voices = samples(speaker, fitted)
        np.savez(folder / "voices.npz", **{n: np.stack(v) for n, v in voices.items()})  # type: ignore[arg-type]
    for seed in range(first, first + shards):
        path = folder / "worlds" / f"{seed:04}.json"
        if path.exists():
            continue
        draw = random.Random(1_000 + seed)
        part = path.with_suffix(".part")
        part.write_text(json.dumps([_packed(world(speaker, fitted, draw)) for _ in range(WORLDS)]))
        part.replace(path)
        print(path.name, flush=True)


def _packed(made: World) -> dict[str, object]:
    answers = {i: {"codes": s.codes.tolist(), "words": s.words} for i, s in made.answers.items()}
    return {"known": dataclasses.asdict(made.known), "voice": made.voice, "answers": answers}


def load_worlds(folder: Path) -> list[World]:
    worlds = []
    for path in sorted((folder / "worlds").glob("????.json")):
        for row in json.loads(path.read_text()):
            answers = {
                i: Said(np.asarray(s["codes"], np.int64), s["words"]) for i, s in row["answers"].items()
            }
            worlds.append(World(grammar.Facts(**row["known"]), row["voice"], answers))
    return worlds


def load_voices(folder: Path) -> dict[str, np.ndarray]:
    """Codes [SAMPLES, SAMPLE_FRAMES, 8] of each voice."""
    with np.load(folder / "voices.npz") as file:
        return {name: file[name].astype(np.int64) for name in file.files}


def load_ear(folder: Path) -> Ear:
    """The ear as trained so far. Raises FileNotFoundError before there is one."""
    state = load_state(folder / "ear.pt")
    if state is None:
        raise FileNotFoundError("no ear.pt: train the ear first")
    ear = Ear(CONFIG.mimi, hearing.PHONES)
    ear.load_state_dict(state["ear"])
    return ear.eval()


@torch.no_grad()
def heard(ear: Ear, wave: np.ndarray) -> np.ndarray:
    """Codes [T, 8] of a whole wave."""
    padded = np.pad(wave, (0, -len(wave) % FRAME_SIZE)).astype(np.float32)
    codes: np.ndarray = ear.codes(ear.latent(torch.from_numpy(padded)[None])[0])[0].numpy()
    return codes


def make_callers(folder: Path, count: int = 4000, seed: int = 0) -> None:
    """Runs `count` disturbed callers, all intents alike, through the ear, unless that has been done."""
    if (folder / "calls.npz").exists():
        return
    ear = load_ear(folder)
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    shelf, noises = hearing.Shelf(folder / "callers"), hearing.Noises(rng)
    by_intent = {label: [u for u in shelf.utterances if u.intent == label] for label in LABELS}
    calls: dict[str, list[np.ndarray]] = {label: [] for label in LABELS}
    for index in range(count):
        label = LABELS[index % len(LABELS)]
        speech = as_float(draw.choice(by_intent[label]).wave)
        if draw.random() < _PAUSED:
            speech = paused(speech, draw.uniform(0.3, 0.7))
        lead = draw.randrange(FRAME_SIZE)
        wave = np.pad(speech, (lead, QUIET * FRAME_SIZE))
        wave = hearing.disturbed(wave, noises, shelf.utterances, rng, 0.8)
        codes = heard(ear, wave)
        spoken = -(-(lead + len(speech)) // FRAME_SIZE)
        calls[label].append(
            np.concatenate([np.full((1, 8), spoken), codes[: spoken + QUIET]]).astype(np.int16)
        )
    arrays = {f"{label}-{i}": c for label, rows in calls.items() for i, c in enumerate(rows)}
    np.savez(folder / "calls.npz", **arrays)  # type: ignore[arg-type]


def paused(speech: Array, seconds: float) -> Array:
    """The wave with a pause where it is softest in its middle half."""
    width = SAMPLE_RATE // 50
    quarter = len(speech) // 4
    energy = np.convolve(np.square(speech), np.ones(width), "same")[quarter : 3 * quarter]
    place = quarter + int(energy.argmin())
    pause = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
    return np.concatenate([speech[:place], pause, speech[place:]])


def load_calls(folder: Path) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = {label: [] for label in LABELS}
    with np.load(folder / "calls.npz") as file:
        for name in file.files:
            label, rows = name.rsplit("-", 1)[0], file[name].astype(np.int64)
            calls[label].append(Call(label, int(rows[0, 0]), rows[1:]))
    return calls


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "answers":
        make_answers(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
    else:
        make_callers(Path(sys.argv[2]))
