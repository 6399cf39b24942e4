"""The gates, in order: `python -m personaplex.training.score FOLDER [codec|ear|copying|talk ...]`.

Figures are of names, wordings, prices and voices that training never sees, each with its number of trials
and the 95 % interval (Wilson). Whisper tiny.en is the judge of speech.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from personaplex.config import FRAME_SIZE, EngineConfig, Sampling
from personaplex.engine.engine import Engine
from personaplex.model.hub import SCORES_FILE, resolve
from personaplex.model.weights import load_model
from personaplex.text import Tokenizer
from personaplex.training import behaviour, copying, grammar
from personaplex.training.articulation import NAMES
from personaplex.training.assemble import assemble
from personaplex.training.bank import Words
from personaplex.training.corpus import agent_says
from personaplex.training.documents import Batch
from personaplex.training.ear import ASKED, LABELS, Ear
from personaplex.training.export import CONFIG
from personaplex.training.hearing import load_ear
from personaplex.training.lm import Talker
from personaplex.training.mouth import Mouth
from personaplex.training.run import load as load_state
from personaplex.training.speaking import Fitted, render
from personaplex.training.synth import Array, Speaker
from personaplex.training.unseen import Caller, callers, paused, through_line
from personaplex.training.vocabulary import Pieces, cached
from personaplex.transcription.whisper import embedded_model
from personaplex.voices import VoiceLibrary
from personaplex.words import word_errors

_SPOKEN_VOICES = ("NATF2", "NATM1", "VARF0", "VARM2")
_NOISE = 20.0  # dB below the caller


def interval(right: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share."""
    if not trials:
        return 0.0, 1.0
    share = right / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * ((share * (1 - share) + z * z / (4 * trials)) / trials) ** 0.5 / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(hits: Sequence[bool]) -> str:
    """`0.86 [0.80, 0.91], n 126`."""
    low, high = interval(sum(hits), len(hits))
    return f"{sum(hits) / max(1, len(hits)):.2f} [{low:.2f}, {high:.2f}], n {len(hits)}"


def words(text: str) -> list[str]:
    """Lower-case words; numbers as they are spoken."""
    spoken = re.sub(
        r"\$?(\d+)", lambda m: grammar.spoken_number(int(m[1])) if int(m[1]) < 1000 else m[1], text
    )
    return re.findall(r"[a-z']+", spoken.lower())


@cache
def _whisper() -> Any:
    from faster_whisper import WhisperModel

    return WhisperModel(str(embedded_model()), device="cpu", compute_type="int8", cpu_threads=1)


def transcript(wave: Array) -> str:
    """What Whisper tiny.en hears in a wave at 24 kHz."""
    import soxr

    segments, _ = _whisper().transcribe(soxr.resample(wave, 24_000, 16_000), language="en", beam_size=2)
    return " ".join(segment.text.strip() for segment in segments)


def _mouth(folder: Path) -> Mouth:
    state = load_state(folder / "mouth.pt")
    assert state is not None, "train the mouth first"
    mouth = Mouth(CONFIG.mimi)
    mouth.load_state_dict(state["mouth"])
    return mouth.eval()


def codec(folder: Path, count: int = 100) -> dict[str, float]:
    """Word error rates of locked and of decoded speech, on answers about unseen facts."""
    fitted, mouth = Fitted.load(folder / "basis.pt"), _mouth(folder)
    speaker, draw = Speaker(), random.Random(5)
    wrong = {"locked": 0, "decoded": 0}
    total = 0
    for index, text in enumerate(grammar.sentences(draw, count, unseen=True)):
        made = agent_says(speaker, text, _SPOKEN_VOICES[index % len(_SPOKEN_VOICES)])
        if made is None:
            continue
        wave, codes = made
        decoded = render(mouth, fitted, torch.from_numpy(codes)).numpy()
        total += len(words(text))
        for name, sound in (("locked", wave), ("decoded", decoded)):
            wrong[name] += word_errors(words(text), words(transcript(sound)))
    rates = {name: count / total for name, count in wrong.items()}
    print(
        f"codec: WER decoded {rates['decoded']:.3f}, locked {rates['locked']:.3f}, {total} words", flush=True
    )
    return rates


@torch.no_grad()
def intent_of(ear: Ear, wave: Array) -> str | None:
    """The intent that the ear tells longest in the 1.2 s behind a wave; None where it tells none."""
    padded = torch.from_numpy(np.pad(wave, (0, 15 * FRAME_SIZE + -len(wave) % FRAME_SIZE)).astype(np.float32))
    states = ear.codes(ear(padded[None]))[0, :, 0]
    counts = torch.bincount(states[len(wave) // FRAME_SIZE :], minlength=ASKED + len(LABELS))[ASKED:]
    return LABELS[int(counts.argmax())] if counts.any() else None


def ear(folder: Path, per_intent: int = 10) -> dict[str, float]:
    """Intents read from the codes of unseen callers, clean and through a noisy line."""
    network, rng = load_ear(folder), np.random.default_rng(5)
    made = callers(per_intent)
    result = {}
    lines: dict[str, Callable[[Array], Array]] = {
        "clean": lambda wave: wave,
        "Opus, 20 dB": lambda wave: through_line(wave, _NOISE, rng),
    }
    for name, line in lines.items():
        hits = [(intent_of(network, line(_placed(c, rng))) == c.intent, c) for c in made]
        result[name] = sum(hit for hit, _ in hits) / len(hits)
        print(f"ear, {name}: intent {share([hit for hit, _ in hits])}")
        held = [hit for hit, c in hits if c.held_back and c.intent in grammar.INTENTS]
        print(f"  held-back wordings {share(held)}")
        for label in LABELS:
            print(f"  {label}: {share([hit for hit, c in hits if c.intent == label])}", flush=True)
    return result


def _placed(caller: Caller, rng: np.random.Generator) -> Array:
    """A caller behind some silence, somewhere in a frame."""
    return np.pad(caller.wave, (int(rng.integers(200, 8000)), 0)).astype(np.float32)


def copying_gate(folder: Path, batches: int = 20) -> dict[str, float]:
    """Values copied whole from unseen role texts, in text alone, teacher-forced."""
    name = "talk.pt" if (folder / "talk.pt").exists() else "copying.pt"
    state = load_state(folder / name)
    assert state is not None, "train copying first"
    talker = Talker(CONFIG.lm)
    talker.load_state_dict(state["talker"])
    pieces, draw = Pieces(cached(folder)), random.Random(77)
    made = [Batch.of(copying.documents(1, draw, pieces, unseen=True)) for _ in range(batches)]
    shares = copying.exact_slots(talker, made)
    for slot, (right, trials) in shares.items():
        low, high = interval(round(right * trials), trials)
        print(f"copying ({name}), {slot}: {right:.2f} [{low:.2f}, {high:.2f}], n {trials}", flush=True)
    return {slot: right for slot, (right, _) in shares.items()}


def talk(folder: Path, per_intent: int = 8) -> None:
    """Sessions of the assembled model: greedy, sampled, and sampled through a noisy line."""
    model_folder = folder / "model"
    assemble(folder, model_folder)
    checkpoint = resolve(str(model_folder))
    model = load_model(checkpoint, "cpu", torch.float32)
    library = VoiceLibrary(checkpoint.config.lm, checkpoint.voices)
    tokenizer = Tokenizer(checkpoint.tokenizer, size=checkpoint.config.lm.text_card)
    voices = _pitches(folder)
    made, rng = callers(per_intent, seed=1), np.random.default_rng(5)
    agents = behaviour.worlds(len(made))
    noisy = [dataclasses.replace(c, wave=through_line(c.wave, _NOISE, rng)) for c in made]
    rounds: list[dict[str, float]] = []
    for name, chosen, sampling in (
        ("greedy", made, Sampling().greedy()),
        ("sampled", made, Sampling()),
        ("sampled, Opus, 20 dB", noisy, Sampling()),
    ):
        engine = Engine(model, library, tokenizer, EngineConfig(slots=4))
        rounds.append(_tell(name, behaviour.talks(engine, chosen, agents, sampling), voices))
    scores = {name: min(one[name] for one in rounds[:2]) for name in rounds[0]}
    scores["intent_noisy"] = rounds[2]["intent"]
    (model_folder / SCORES_FILE).write_text(json.dumps(scores, indent=1) + "\n")
    pauses = [dataclasses.replace(c, wave=paused(c.wave, 0.5)) for c in made]
    still = [t.silent_before for t in behaviour.talks(engine, pauses, agents, Sampling())]
    print(f"talk: no start in a pause inside the question {share(still)}")
    pairs = zip(made, random.Random(3).sample(made, len(made)), strict=True)
    cut = [
        behaviour.interrupted(engine, a, b, agent, Sampling())
        for (a, b), agent in zip(pairs, agents, strict=True)
    ]
    spoken = [c for c in cut if c.answered is not None]
    print(f"talk: stops within 0.6 s {share([c.stopped is not None and c.stopped <= 0.6 for c in spoken])}")
    print(f"talk: answers the new question {share([bool(c.answered) for c in spoken])}", flush=True)


def _pitches(folder: Path) -> dict[str, float | None]:
    """Fundamental frequency of each voice's prompt."""
    fitted, mouth = Fitted.load(folder / "basis.pt"), _mouth(folder)
    words = Words(folder, Pieces(cached(folder)))
    return {
        n: behaviour.pitch(render(mouth, fitted, torch.from_numpy(words.samples(n)[0])).numpy())
        for n in NAMES
    }


def _tell(name: str, talks: list[behaviour.Talk], voices: dict[str, float | None]) -> dict[str, float]:
    """Prints the shares of one round of talks; returns those that `hub.FLOOR` names."""
    right = [t for t in talks if t.answered == t.caller.intent]
    print(f"talk, {name}: intent {share([t in right for t in talks])}")
    prompt = [t.delay is not None and 0.2 <= t.delay <= 1.2 for t in talks]
    print(f"  answers 0.2 to 1.2 s after the end {share(prompt)}")
    heard = {id(t): " ".join(words(transcript(t.pcm[t.end :].flatten()))) for t in right}  # no digits
    silent = [t.silent_before for t in talks]
    print(f"  silent while the caller speaks {share(silent)}")
    found = {"intent": len(right) / len(talks), "silent": sum(silent) / len(talks)}
    for field in ("name", "firm", "price", "first_day"):
        asked = [t for t in right if field in behaviour.values_of(t)]
        written = [t.wrote(field) for t in asked]
        print(f"  {field} in its own text {share(written)}")
        by_ear = [behaviour.sounds_like(behaviour.value(t.known, field), heard[id(t)]) for t in asked]
        print(f"  {field} by ear {share(by_ear)}")
        found |= {f"{field}_written": sum(written) / max(1, len(asked))}
        found |= {f"{field}_heard": sum(by_ear) / max(1, len(asked))}
    pairs = [(behaviour.pitch(t.pcm[t.end :].flatten()), voices[t.voice]) for t in right]
    print(f"  pitch within 15 % of the voice's {share([_alike(*pair) for pair in pairs])}")
    wrong = sum(word_errors(words(t.text), words(heard[id(t)])) for t in right)
    total = sum(len(words(t.text)) for t in right)
    print(f"  what it says against its text: WER {wrong / max(1, total):.2f}, {total} words", flush=True)
    return found


def _alike(pitch: float | None, wanted: float | None) -> bool:
    return pitch is not None and wanted is not None and abs(pitch / wanted - 1) <= 0.15


GATES: dict[str, Callable[[Path], Any]] = {"codec": codec, "ear": ear, "copying": copying_gate, "talk": talk}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for gate in sys.argv[2:] or GATES:
        GATES[gate](Path(sys.argv[1]))
