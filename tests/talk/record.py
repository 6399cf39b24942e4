"""Records the callers that the tests of the talk model play: `PYTHONPATH=tests python -m talk.record`.

Voices are flite's, which training never hears; wordings, names, firms and prices are held back by half or all
(personaplex/training/unseen.py). Each is one Ogg file, Opus as our own clients send it, beside what it says
and who the agent is that it calls.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SIZE
from personaplex.training.behaviour import World, worlds
from personaplex.training.grammar import Facts
from personaplex.training.unseen import Caller, callers

FOLDER = Path(__file__).parents[1] / "data" / "talk"
PER_VOICE, SEED = 2, 11  # callers of each intent and voice; figures in docs/talk.md are of other seeds


def main() -> None:
    """Writes FOLDER."""
    made = callers(PER_VOICE, SEED)
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (caller, agent) in enumerate(zip(made, worlds(len(made), SEED), strict=True)):
        (FOLDER / f"{number:02}.ogg").write_bytes(_encoded(caller.wave))
        said = {"text": caller.text, "intent": caller.intent, "voice": caller.voice}
        about = {"held_back": caller.held_back, "samples": len(caller.wave)}
        agent_of = {"known": dataclasses.asdict(agent.known), "voice": agent.voice, "role": agent.role}
        lines.append({**said, **about, "agent": agent_of})
    (FOLDER / "callers.json").write_text(json.dumps(lines, indent=1) + "\n")


def read() -> list[tuple[Caller, World]]:
    """Every caller and the agent that it calls."""
    found = []
    for number, line in enumerate(json.loads((FOLDER / "callers.json").read_text())):
        frames = Transcoder().receive((FOLDER / f"{number:02}.ogg").read_bytes())
        wave = np.concatenate(frames)[: line["samples"]]
        agent = line["agent"]
        found.append(
            (
                Caller(wave, line["text"], line["intent"], line["voice"], line["held_back"]),
                World(Facts(**agent["known"]), agent["voice"], agent["role"]),
            )
        )
    return found


def _encoded(wave: np.ndarray) -> bytes:
    transcoder = Transcoder()
    padded = np.pad(wave, (0, -len(wave) % FRAME_SIZE + FRAME_SIZE)).astype(np.float32)
    pages = [*transcoder.headers(), *(transcoder.send(frame) for frame in padded.reshape(-1, FRAME_SIZE))]
    return b"".join(pages)


if __name__ == "__main__":
    main()
