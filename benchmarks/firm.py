"""A firm's calls, synthesised: questions by many espeak-ng voices, answers by one (`benchmarks.finetune`).

Each call is a stereo wav with a word-timed transcript, as `python -m personaplex.finetune prepare` reads
them. An intent has wordings, and the firm callers, that training never hears.

The codec of `tiny` is random: of speech its codes tell when there is some, and next to nothing of what is
said. So the intents differ in rhythm as well: a short question, a long one, a greeting and then a question.
"""

from __future__ import annotations

import functools
import json
import random
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personaplex.audio.wav import read_wav, resample, write_wav
from personaplex.config import FRAME_SIZE, SAMPLE_RATE, Pcm
from personaplex.finetune.source import AGENT

AGENT_VOICE = ("en-us+f3", 165, 50)  # espeak voice, words a minute, pitch
CALLERS = (
    "en-us+m3",
    "en-us+f2",
    "en-gb+m1",
    "en-gb+f4",
    "en-gb-scotland+m4",
    "en-us+m7",
    "en-gb-x-rp+f1",
    "en-029+m2",
)
HELD_CALLERS = ("en-us+f5", "en-gb+m5")
_LOUDNESS = 0.08
_PAUSE = 6  # frames from the end of a question to the answer
_BEHIND = 8  # frames behind an answer
_INSIDE = 3 * FRAME_SIZE  # samples of a pause inside a question, less than _PAUSE


@dataclass(frozen=True)
class Intent:
    """Wordings that are trained on, wordings that are held back, and the answer."""

    asked: tuple[str, ...]
    held: tuple[str, ...]
    answer: str


@dataclass(frozen=True, eq=False)
class Question:
    """What one caller asks."""

    answer: str
    text: str
    voice: str
    sound: Pcm


BAKERY = (
    Intent(
        ("Are you open?", "Open today?", "When open?", "Still open?"),
        ("You open now?",),
        "We open at nine.",
    ),
    Intent(
        (
            "How much do you take for a large loaf of your white bread?",
            "Could you tell me what a big loaf of brown bread costs today?",
            "I would like to know the price of a loaf of bread in your shop.",
            "What do I have to pay for two loaves of bread, please?",
        ),
        ("Please tell me how much money you want for a loaf of rye bread.",),
        "It is two pounds.",
    ),
    Intent(
        (
            "Good morning. | Where is your shop?",
            "Hello there. | What is your address?",
            "Good evening. | Where do I find you?",
            "Hello, hello. | Which street is it?",
        ),
        ("Good afternoon. | Where is the bakery?",),
        "In Mill Street.",
    ),
)
GARAGE = (
    Intent(
        ("Is it ready?", "Car ready?", "Is it done?", "Finished yet?"),
        ("Ready now?",),
        "On Friday at four.",
    ),
    Intent(
        (
            "There is a very strange noise in the engine of my car.",
            "My old car makes a terrible noise when I drive up a hill.",
            "I can hear something rattle under the bonnet of my car.",
            "Since yesterday the engine of my car has been far too loud.",
        ),
        ("Something in my car makes a noise whenever I turn the wheel.",),
        "Bring it in today.",
    ),
    Intent(
        (
            "Good morning. | Do you sell tyres?",
            "Hello there. | I need new tyres.",
            "Good evening. | Do you change tyres?",
            "Hello, hello. | Four tyres, please.",
        ),
        ("Good afternoon. | Any winter tyres?",),
        "Yes, we do tyres.",
    ),
)


def speak(text: str, voice: str, speed: int, pitch: int) -> Pcm:
    """float32 [samples] at 24 kHz, trimmed and of one loudness; a bar in the text is a pause."""
    if "|" in text:
        first, second = (speak(part, voice, speed, pitch) for part in text.split("|"))
        return np.concatenate([first, np.zeros(_INSIDE, np.float32), second])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), text]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        pcm, rate = read_wav(path)
    sound = resample(pcm[0], rate, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(sound) > 0.01 * np.abs(sound).max())
    sound = sound[loud[0] : loud[-1] + 1]
    return (sound * (_LOUDNESS / np.sqrt(np.mean(np.square(sound))))).astype(np.float32)


def ask(intent: Intent, text: str, voice: str, draw: random.Random) -> Question:
    """A question at a pace and a pitch of its own."""
    return Question(
        intent.answer, text, voice, speak(text, voice, draw.randint(150, 185), draw.randint(40, 60))
    )


@functools.cache
def answer(text: str) -> tuple[Pcm, list[list[object]]]:
    """The agent's answer, word by word, and when its words are said, from its beginning."""
    parts: list[Pcm] = []
    rows: list[list[object]] = []
    at = 0
    for word in text.split():
        sound = speak(word, *AGENT_VOICE)
        rows.append([word, [round(at / SAMPLE_RATE, 3), round((at + len(sound)) / SAMPLE_RATE, 3)], AGENT])
        parts += [sound, np.zeros(480, np.float32)]
        at += len(sound) + 480
    return np.concatenate(parts), rows


def call(question: Question, draw: random.Random) -> tuple[Pcm, list[list[object]]]:
    """float32 [2, samples], agent and user, and the agent's words."""
    lead = draw.randrange(2 * FRAME_SIZE, 8 * FRAME_SIZE)
    start = (-(-(lead + len(question.sound)) // FRAME_SIZE) + _PAUSE) * FRAME_SIZE
    said, rows = answer(question.answer)
    total = start + (-(-len(said) // FRAME_SIZE) + _BEHIND) * FRAME_SIZE
    both = np.zeros((2, total), np.float32)
    both[0, start : start + len(said)] = said
    both[1, lead : lead + len(question.sound)] = question.sound
    shift = start / SAMPLE_RATE
    words = [[word, [t + shift for t in times], who] for word, times, who in rows]  # type: ignore[attr-defined]
    return both, words


def training_questions(firm: Sequence[Intent], each: int, draw: random.Random) -> Iterator[Question]:
    """Every wording by every caller, `each` times."""
    for intent in firm:
        for text in intent.asked:
            for voice in CALLERS:
                for _ in range(each):
                    yield ask(intent, text, voice, draw)


def held_questions(firm: Sequence[Intent], each: int, draw: random.Random) -> Iterator[tuple[str, Question]]:
    """What training never hears: (what is new in it, the question)."""
    for intent in firm:
        for _ in range(each):
            for voice in HELD_CALLERS:
                for text in intent.asked:
                    yield "voice", ask(intent, text, voice, draw)
            for text in intent.held:
                for voice in CALLERS:
                    yield "wording", ask(intent, text, voice, draw)
                for voice in HELD_CALLERS:
                    yield "both", ask(intent, text, voice, draw)


def write_calls(questions: Sequence[Question], role: str, folder: Path, draw: random.Random) -> None:
    """One call a question, as recordings with transcripts."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, question in enumerate(questions):
        both, words = call(question, draw)
        write_wav(folder / f"{number:04}.wav", both, SAMPLE_RATE)
        content = {"alignments": words, "text_prompt": role}
        (folder / f"{number:04}.json").write_text(json.dumps(content))
