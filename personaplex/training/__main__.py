"""All stages in order: `python -m personaplex.training FOLDER`.

What is done is skipped, what broke off goes on; every stage has its fixed seed. Speech is made by all cores,
the ear trained on one, the mouth and the language model on a GPU if there is one, in fewer minutes of larger
steps. The gates are scored by `make score-talk`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from personaplex.training import bank, copying, corpus, hearing, optim, reading, speaking, talking
from personaplex.training.assemble import assemble
from personaplex.training.run import curves

CALLER_SHARDS, AGENT_SHARDS, READING_SHARDS = 16, 70, 36
OTHER_SHARDS = {"robots": 8, "joe": 7, "festival": 6, "kokoro": 5}
EAR = 52  # minutes, as all that follow
MOUTH = {"cpu": 240, "cuda": 6.2}
COPYING = {"cpu": 13, "cuda": 1}
TALKING = {"cpu": 360, "cuda": 12}


def stages(folder: Path) -> list[tuple[str, Callable[[], object]]]:
    """(name, what it runs), in order."""
    device = optim.training_device().type
    shards = {"callers": CALLER_SHARDS, **OTHER_SHARDS}
    return [
        *(
            (f"callers: {kind}", partial(spread, partial(corpus.make, kind, folder / "callers"), count))
            for kind, count in shards.items()
        ),
        ("agent's speech", lambda: spread(partial(corpus.make, "agent", folder / "agent"), AGENT_SHARDS)),
        ("mouth", lambda: speaking.train(folder, MOUTH[device])),
        ("ear", lambda: hearing.train(folder, EAR)),
        ("words", lambda: bank.fill(folder)),
        ("reading", lambda: spread(partial(reading.make, folder), READING_SHARDS)),
        ("copying", lambda: copying.train(folder, COPYING[device])),
        ("talking", lambda: talking.train(folder, TALKING[device])),
        ("model", lambda: assemble(folder, folder / "model")),
    ]


def spread(make: Callable[[int, int], None], shards: int) -> None:
    """`make(1, n)` for each shard n, by as many processes as there are cores."""
    context = multiprocessing.get_context("spawn")  # the parent has threads
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        list(pool.map(make, [1] * shards, range(shards)))


def main(folder: Path) -> None:
    """Runs every stage and says how long each took."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for name, stage in stages(folder):
        started, cores = time.monotonic(), core_seconds()
        stage()
        print(
            f"{name}: {(time.monotonic() - started) / 60:.1f} minutes, "
            f"{(core_seconds() - cores) / 60:.1f} of a core",
            flush=True,
        )
    runs = [folder / f"{name}.pt" for name in ("mouth", "ear", "copying", "talk")]
    curves(runs, folder / "curves.png")
    print(f"all in {(time.monotonic() - begun) / 3600:.2f} hours")


def core_seconds() -> float:
    """What this process and those it has ended have taken of the processor."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
