"""All stages in order: `python -m personaplex.training FOLDER`.

What is done is skipped, what broke off goes on. Minutes are those of a core; every stage has its fixed seed.
The gates are scored by `make score-talk`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from personaplex.training import bank, copying, corpus, hearing, reading, speaking, talking
from personaplex.training.assemble import assemble
from personaplex.training.run import curves

CALLER_SHARDS, AGENT_SHARDS = 16, 78
OTHER_SHARDS = {"robots": 8, "joe": 7, "festival": 6, "kokoro": 5}
SENTENCES_READ = 45_000
EAR, MOUTH, COPYING, TALKING = 52, 92, 6, 145  # minutes


def stages(folder: Path) -> list[tuple[str, Callable[[], object]]]:
    """(name, what it runs), in order."""
    others = [
        (f"callers by {kind}", partial(corpus.make, kind, folder / "callers", shards))
        for kind, shards in OTHER_SHARDS.items()
    ]
    return [
        ("callers", lambda: corpus.make("callers", folder / "callers", CALLER_SHARDS)),
        *others,
        ("agent's speech", lambda: corpus.make("agent", folder / "agent", AGENT_SHARDS)),
        ("mouth", lambda: speaking.train(folder, MOUTH)),
        ("ear", lambda: hearing.train(folder, EAR)),
        ("words", lambda: bank.fill(folder)),
        ("reading", lambda: reading.make(folder, SENTENCES_READ)),
        ("copying", lambda: copying.train(folder, COPYING)),
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
