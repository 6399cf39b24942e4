"""All stages in order: `python -m personaplex.training FOLDER`.

What is done is skipped, what broke off goes on. Minutes are those of a core; every stage has its fixed seed.
The gates are scored by `make score-talk`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from personaplex.training import bank, copying, corpus, hearing, speaking, talking
from personaplex.training.assemble import assemble
from personaplex.training.run import curves

CALLER_SHARDS, ROBOT_SHARDS, AGENT_SHARDS, WORLD_SHARDS = 16, 8, 16, 30
EAR, MOUTH, COPYING, TALKING = 60, 40, 40, 120  # minutes


def stages(folder: Path) -> list[tuple[str, Callable[[], object]]]:
    """(name, what it runs), in order."""
    return [
        ("callers", lambda: corpus.make("callers", folder / "callers", CALLER_SHARDS)),
        ("callers by espeak", lambda: corpus.make("robots", folder / "callers", ROBOT_SHARDS)),
        ("agent's speech", lambda: corpus.make("agent", folder / "agent", AGENT_SHARDS)),
        ("mouth", lambda: speaking.train(folder, MOUTH)),
        ("ear", lambda: hearing.train(folder, EAR)),
        ("copying", lambda: copying.train(folder, COPYING)),
        ("answers", lambda: bank.make_answers(folder, WORLD_SHARDS)),
        ("calls", lambda: bank.make_callers(folder)),
        ("talking", lambda: talking.train(folder, TALKING)),
        ("model", lambda: assemble(folder, folder / "model")),
    ]


def main(folder: Path) -> None:
    """Runs every stage and says how long each took."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for name, stage in stages(folder):
        started = time.process_time()
        stage()
        print(f"{name}: {(time.process_time() - started) / 60:.1f} minutes of a core", flush=True)
    runs = [folder / f"{name}.pt" for name in ("mouth", "ear", "copying", "talk")]
    curves(runs, folder / "curves.png")
    print(f"all in {(time.monotonic() - begun) / 3600:.2f} hours")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
