"""Does an adapter teach a firm's lines, and what does it cost of what was known? On `tiny`, on a CPU.

    python -m benchmarks.finetune FOLDER --output benchmarks/results/finetune.json

Needs espeak-ng. Calls of two firms are synthesised (firm.py). The first is taught to `tiny` and merged: that
is a base with an ability. The second is taught to that base, with as much of every batch from the first.
Both suites ask with wordings and by callers that training never hears, in sessions of the engine, greedily;
an answer is right when the agent's text is the whole answer and nothing else. What is done in FOLDER is not
done again.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import firm
from benchmarks.machine import machine, publish
from personaplex import cli
from personaplex.config import FRAME_SIZE, EngineConfig, Sampling
from personaplex.engine.engine import Engine
from personaplex.finetune.__main__ import main as finetune
from personaplex.loading import ModelSpec, load_parts, resolve
from personaplex.persona import Persona
from personaplex.text import PieceDecoder

EACH = 6  # calls of every wording by every caller
HELD = 3  # questions of every held-back pair of wording and caller
ANSWER = 30  # frames of silence behind a question, in which it is answered
STEPS = {"bakery": 600, "garage": 700}
FIRMS = {"bakery": firm.BAKERY, "garage": firm.GARAGE}
KINDS = ("temporal-attention", "temporal-feedforward", "depth-attention", "depth-feedforward", "depth-inputs",
         "heads", "embeddings")  # fmt: skip
SLOTS = 8


def calls(folder: Path, name: str) -> None:
    """Synthesises and prepares a firm's calls."""
    wavs = folder / name / "calls"
    if not wavs.exists():
        draw, part = random.Random(1), folder / name / "calls.part"
        asked = list(firm.training_questions(FIRMS[name], EACH, draw))
        firm.write_calls(asked, name, part, draw)
        part.rename(wavs)
    if not (folder / name / "data" / "dataset.json").exists():
        ran(["prepare", wavs, "--output", folder / name / "data", "--model", "tiny"])


def train(folder: Path, name: str, base: str, *more: object) -> float:
    """Trains and merges; seconds of a core."""
    started, run = time.process_time(), folder / name / "run"
    if not (folder / name / "model").exists():
        model = ["--model", base, "--device", "cpu"]
        what = ["--targets", *KINDS, "--rank", 16, "--quiet-share", 0.1, "--validation", 0.03]
        how = ["--steps", STEPS[name], "--batch-size", 6, "--rate", 4e-3, "--warmup", 40, "--samples", 0]
        often = ["--save-every", 20, "--evaluate-every", 40]
        ran(["train", folder / name / "data", "--output", run, *model, *what, *how, *often, *more])
        adapter = run / "adapter.safetensors"
        ran(["merge", "--lora", adapter, "--output", folder / name / "model", *model])
    return time.process_time() - started


def ran(arguments: Sequence[object]) -> None:
    if finetune([str(argument) for argument in arguments]) != 0:
        raise SystemExit("the command failed")


def suite(model: str, name: str) -> dict[str, list[int]]:
    """[right, asked] by what of the question is new: its wording, its caller, or both."""
    parts = load_parts(resolve(ModelSpec(model, device="cpu")), EngineConfig(slots=SLOTS))
    engine = parts.engine(EngineConfig(slots=SLOTS))
    asked = held(name)
    result: dict[str, list[int]] = {}
    for start in range(0, len(asked), SLOTS):
        some = asked[start : start + SLOTS]
        decoders = [PieceDecoder(parts.tokenizer) for _ in some]
        said = answers(engine, name, [question for _, question in some], decoders)
        for (new, question), text in zip(some, said, strict=True):
            row = result.setdefault(new, [0, 0])
            row[0] += text == question.answer
            row[1] += 1
    return result


@functools.cache
def held(name: str) -> list[tuple[str, firm.Question]]:
    return list(firm.held_questions(FIRMS[name], HELD, random.Random(11)))


def answers(
    engine: Engine, role: str, questions: Sequence[firm.Question], decoders: Sequence[PieceDecoder]
) -> list[str]:
    """What the agent writes in a session with each question."""
    persona = Persona(voice="NATF2", text_prompt=role, sampling=Sampling().greedy())
    slots = {engine.open(persona): index for index, _ in enumerate(questions)}
    sounds = [np.pad(q.sound, (4 * FRAME_SIZE, ANSWER * FRAME_SIZE)) for q in questions]
    said = [""] * len(questions)
    for frame in range(max(len(sound) for sound in sounds) // FRAME_SIZE):
        for slot, index in slots.items():
            pcm = sounds[index][frame * FRAME_SIZE : (frame + 1) * FRAME_SIZE]
            engine.feed(slot, np.pad(pcm, (0, FRAME_SIZE - len(pcm))).astype(np.float32))
        for output in engine.step():
            index = slots[output.slot]
            said[index] += decoders[index].push(int(output.tokens[0]))
    for slot in slots:
        engine.close(slot)
    return [text.strip() for text in said]


def share(rows: dict[str, list[int]]) -> float:
    return sum(right for right, _ in rows.values()) / sum(asked for _, asked in rows.values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m benchmarks.finetune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = options.folder
    for name in FIRMS:
        calls(folder, name)
    rehearsed = ["--rehearse", folder / "bakery" / "data", "--rehearsal", 0.5]
    seconds = {"bakery": train(folder, "bakery", "tiny")}
    bakery, garage = str(folder / "bakery" / "model"), str(folder / "garage" / "model")
    seconds["garage"] = train(folder, "garage", bakery, *rehearsed)
    rows = {
        "bakery by tiny": suite("tiny", "bakery"),
        "bakery by the base": suite(bakery, "bakery"),
        "garage by the base": suite(bakery, "garage"),
        "garage after the adapter": suite(garage, "garage"),
        "bakery after the adapter": suite(garage, "bakery"),
    }
    result = {
        "benchmark": "finetune",
        "machine": machine("torch"),
        "steps": STEPS,
        "core_seconds": {name: round(value) for name, value in seconds.items()},
        "right_and_asked": rows,
        "shares": {name: round(share(row), 3) for name, row in rows.items()},
    }
    publish(result, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
