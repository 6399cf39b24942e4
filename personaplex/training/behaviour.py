"""What an assembled model does on the phone: sessions of the engine with callers it has never heard.

Every talk is one question about an unseen world. It is asked once the session has been silent for a moment,
and the session goes on in silence until the answer has had its time.
"""

from __future__ import annotations

import difflib
import random
import re
from dataclasses import dataclass

import numpy as np

from personaplex.config import FRAME_SECONDS, FRAME_SIZE, Sampling
from personaplex.engine.engine import Engine, Slot
from personaplex.persona import VOICES, Persona
from personaplex.training import grammar
from personaplex.training.synth import Array
from personaplex.training.unseen import Caller

_BEFORE = 12  # frames of silence before the question
ANSWER = 60  # frames behind it
_LOUD = 0.01  # rms of a frame that is speech
_ALIKE = 0.72  # of two spellings of a name that sound alike
_VALUES = {
    "hello": ("firm", "name"),
    "name": ("name",),
    "firm": ("firm",),
    "price": ("price", "item"),
    "open": ("first_day", "last_day"),
}


@dataclass
class Talk:
    """One session: what was known and asked, and what the agent wrote and said, frame by frame."""

    known: grammar.Facts
    voice: str
    caller: Caller
    end: int  # frame in which the question ends
    text: str
    pcm: Array  # [frames, 1920]

    @property
    def loud(self) -> np.ndarray:
        return np.asarray(np.sqrt(np.square(self.pcm).mean(1)) > _LOUD)

    @property
    def delay(self) -> float | None:
        """Seconds from the question's end to the first sound behind it; None without one."""
        later = np.nonzero(self.loud[self.end :])[0]
        return float(later[0] * FRAME_SECONDS) if len(later) else None

    @property
    def silent_before(self) -> bool:
        return not self.loud[: self.end].any()

    @property
    def answered(self) -> str | None:
        """The intent whose answer the agent's text is, whatever values stand in it."""
        return intent_of(self.text)

    def wrote(self, field: str) -> bool:
        return value(self.known, field).lower() in self.text.lower()


def value(known: grammar.Facts, field: str) -> str:
    return grammar.spoken_number(known.price) if field == "price" else str(getattr(known, field))


def intent_of(text: str) -> str | None:
    """The intent whose answer, with any values, `text` begins with."""
    for intent, template in grammar.ANSWERS.items():
        pattern = re.sub(r"\\{\w+\\}", ".+?", re.escape(template))
        if re.match(pattern, text.strip(), re.IGNORECASE):
            return intent
    return None


def sounds_like(said: str, heard: str) -> bool:
    """Whether a name stands somewhere in a transcript, spelled nearly so."""
    name, words = said.lower(), re.findall(r"[a-z']+", heard.lower())
    length = len(name.split())
    spans = (" ".join(words[i : i + n]) for n in (length, length + 1) for i in range(len(words)))
    return any(difflib.SequenceMatcher(None, name, span).ratio() >= _ALIKE for span in spans)


def talks(
    engine: Engine, callers: list[Caller], sampling: Sampling, after: int = ANSWER, seed: int = 0
) -> list[Talk]:
    """One session a caller, as many side by side as the engine has slots; `after` frames behind a question."""
    draw = random.Random(seed)
    done: list[Talk] = []
    for start in range(0, len(callers), engine.slots):
        done += _together(engine, callers[start : start + engine.slots], sampling, after, draw)
    return done


def _together(
    engine: Engine, callers: list[Caller], sampling: Sampling, after: int, draw: random.Random
) -> list[Talk]:
    waiting: dict[Slot, tuple[Talk, Array]] = {}
    for caller in callers:
        known, voice = grammar.facts(draw, unseen=True), draw.choice(VOICES)
        slot = engine.open(Persona(voice, grammar.role_text(draw, known), sampling))
        wave = np.pad(caller.wave, (_BEFORE * FRAME_SIZE, 0))
        end = -(-len(wave) // FRAME_SIZE)
        frames = np.pad(wave, (0, (end + after) * FRAME_SIZE - len(wave))).reshape(-1, FRAME_SIZE)
        waiting[slot] = (Talk(known, voice, caller, end, "", np.zeros_like(frames)), frames)
    for index in range(max(len(frames) for _, frames in waiting.values())):
        for slot, (_, frames) in waiting.items():
            if index < len(frames):
                engine.feed(slot, frames[index].astype(np.float32))
        for output in engine.step():
            talk, _ = waiting[output.slot]
            talk.text += output.text
            talk.pcm[index] = output.pcm
    for slot in waiting:
        engine.close(slot)
    return [talk for talk, _ in waiting.values()]


def values_of(talk: Talk) -> tuple[str, ...]:
    """The facts that the right answer to the talk's question states."""
    return _VALUES.get(talk.caller.intent, ())
