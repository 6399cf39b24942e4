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

from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE, Sampling
from personaplex.engine.engine import Engine
from personaplex.engine.interface import Slot
from personaplex.persona import VOICES, Persona
from personaplex.training import grammar
from personaplex.training.synth import Array
from personaplex.training.unseen import Caller

_BEFORE = 12  # frames of silence before the question
ANSWER = 60  # frames behind it
_INTO = 6  # loud frames of an answer before it is interrupted
_LOUD = 0.01  # rms of a frame that is speech
_ALIKE = 0.72  # of two spellings of a name that sound alike
_VALUES = {
    "hello": ("firm", "name"),
    "name": ("name", "firm"),
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
    for intent in grammar.ANSWERS:
        for form in grammar.forms(intent):
            pattern = re.sub(r"\\{\w+\\}", ".+?", re.escape(form))
            if form != grammar.UNTOLD and re.match(pattern, text.strip(), re.IGNORECASE):
                return intent
    return None


def sounds_like(said: str, heard: str) -> bool:
    """Whether a name stands somewhere in a transcript, spelled nearly so."""
    name, words = said.lower(), re.findall(r"[a-z']+", heard.lower())
    length = len(name.split())
    spans = (" ".join(words[i : i + n]) for n in (length, length + 1) for i in range(len(words)))
    return any(difflib.SequenceMatcher(None, name, span).ratio() >= _ALIKE for span in spans)


@dataclass(frozen=True)
class World:
    """Who the agent of one session is, and what its role text says."""

    known: grammar.Facts
    voice: str
    role: str


def worlds(count: int, seed: int = 0) -> list[World]:
    """So many agents with names, firms and prices that training never sees."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        known, voice = grammar.facts(draw, unseen=True), draw.choice(VOICES)
        made.append(World(known, voice, grammar.role_text(draw, known)))
    return made


def talks(
    engine: Engine, callers: list[Caller], agents: list[World], sampling: Sampling, after: int = ANSWER
) -> list[Talk]:
    """One session a caller, as many side by side as there are slots; `after` frames behind each question."""
    pairs = list(zip(callers, agents, strict=True))
    done: list[Talk] = []
    for start in range(0, len(pairs), engine.slots):
        done += _together(engine, pairs[start : start + engine.slots], sampling, after)
    return done


def _together(
    engine: Engine, pairs: list[tuple[Caller, World]], sampling: Sampling, after: int
) -> list[Talk]:
    waiting: dict[Slot, tuple[Talk, Array]] = {}
    for caller, agent in pairs:
        slot = engine.open(Persona(agent.voice, agent.role, sampling))
        frames = _frames(np.pad(caller.wave, (_BEFORE * FRAME_SIZE, 0)), after)
        talk = Talk(agent.known, agent.voice, caller, len(frames) - after, "", np.zeros_like(frames))
        waiting[slot] = (talk, frames)
    for index in range(max(len(frames) for _, frames in waiting.values())):
        for slot, (_, frames) in waiting.items():
            if index < len(frames):
                engine.feed(slot, frames[index])
        for output in engine.step():
            talk, _ = waiting[output.slot]
            talk.text += output.text
            talk.pcm[index] = output.pcm
    for slot in waiting:
        engine.close(slot)
    return [talk for talk, _ in waiting.values()]


def interrupted(
    engine: Engine, first: Caller, second: Caller, agent: World, sampling: Sampling
) -> Interruption:
    """A session in which the second question begins half a second into the first one's answer.

    A session that does not answer the first question within `ANSWER` frames was never interrupted.
    """
    slot = engine.open(Persona(agent.voice, agent.role, sampling))
    waiting = list(_frames(np.pad(first.wave, (_BEFORE * FRAME_SIZE, 0)), ANSWER))
    end, begun, text, loud = len(waiting) - ANSWER, None, "", []
    while waiting:
        engine.feed(slot, waiting.pop(0))
        (output,) = engine.step()
        loud.append(bool(np.sqrt(np.square(output.pcm).mean()) > _LOUD))
        text += output.text
        if begun is None and sum(loud[end:]) == _INTO:
            begun, text = len(loud), ""
            waiting = list(_frames(second.wave, ANSWER))
    engine.close(slot)
    if begun is None:
        return Interruption(None, None)
    still = [index for index, sound in enumerate(loud[begun:]) if not sound]
    stopped = still[0] * FRAME_SECONDS if still else None
    return Interruption(stopped, any(intent_of(text[i:]) == second.intent for i in range(len(text))))


@dataclass(frozen=True)
class Interruption:
    """Seconds until the agent was silent, and whether it answered the new question; None: it never spoke."""

    stopped: float | None
    answered: bool | None


def _frames(wave: Array, after: int) -> np.ndarray:
    """wave in whole frames, `after` more behind it: [frames, 1920] float32."""
    count = -(-len(wave) // FRAME_SIZE) + after
    return np.pad(wave, (0, count * FRAME_SIZE - len(wave))).reshape(-1, FRAME_SIZE).astype(np.float32)


def pitch(wave: Array) -> float | None:
    """Median fundamental frequency in Hz of a wave's voiced parts, by autocorrelation; None without any."""
    found = []
    shortest, longest, width = SAMPLE_RATE // 400, SAMPLE_RATE // 60, 1_200
    for start in range(0, len(wave) - width - longest, 480):
        part = wave[start : start + width]
        energy = float(part @ part)
        if energy < width * _LOUD**2:
            continue
        lags = np.array([part @ wave[start + lag : start + lag + width] for lag in range(shortest, longest)])
        strength = lags / energy
        best = int(strength.argmax())
        close = np.nonzero(strength > 0.9 * strength[best])[0]
        if strength[best] > 0.6:
            found.append(SAMPLE_RATE / (shortest + _peak(strength, int(close[0]))))
    return float(np.median(found)) if found else None


def _peak(strength: np.ndarray, start: int) -> int:
    """The top of the hill that `start` lies on."""
    while start + 1 < len(strength) and strength[start + 1] > strength[start]:
        start += 1
    return start


def values_of(talk: Talk) -> tuple[str, ...]:
    """The facts that the right answer to the talk's question states."""
    return _VALUES.get(talk.caller.intent, ())
