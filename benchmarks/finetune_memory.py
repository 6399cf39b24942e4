"""Memory of one training step with gradient checkpointing and without, each in a process of its own.

    python -m benchmarks.finetune_memory --model tiny --output benchmarks/results/finetune-memory.json

`held` is what a process holds before its first step: the frozen model and the adapters. `step` is what the
step takes on top at its peak: activations, gradients, optimizer. On CUDA torch's allocator tells, on a CPU
the kernel (VmHWM, reset before the step). Sequences are random tokens, `--length` seconds each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.machine import machine, publish
from personaplex import cli
from personaplex.config import STREAMS, frames_in
from personaplex.finetune.adapters import Adapters
from personaplex.finetune.network import Batch, Network
from personaplex.loading import ModelSpec, resolve
from personaplex.model.lora import targets
from personaplex.model.weights import load_model


def step(options: argparse.Namespace, checkpointing: bool) -> dict[str, float]:
    """Loads the model and takes one step; bytes and seconds."""
    found = resolve(ModelSpec(options.model, device=options.device, weights=options.weights))
    lm = load_model(found.checkpoint, found.device, found.dtype, weights=options.weights).lm
    adapters = Adapters(targets(lm.config), options.rank, 2.0).to(lm.device)
    network = Network(lm, adapters, checkpointing)
    optimizer = torch.optim.AdamW(adapters.parameters(), 1e-4, fused=True)
    batch = random_batch(options.batch_size, frames_in(options.length), lm.config.card).to(lm.device)
    held = used(lm.device, reset=True)
    started = time.perf_counter()
    sums = network(batch)
    (sums[0] + sums[1]).backward()
    optimizer.step()
    peak = used(lm.device, peak=True)
    return {"held": held, "step": peak - held, "seconds": round(time.perf_counter() - started, 2)}


def random_batch(rows: int, frames: int, card: int) -> Batch:
    tokens = torch.randint(
        4, min(card, 512), (rows, frames + 1, STREAMS), generator=torch.Generator().manual_seed(0)
    )
    ones = torch.ones(rows, frames)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, ones[..., None].repeat(1, 1, 8), [None] * rows)


def used(device: torch.device, peak: bool = False, reset: bool = False) -> int:
    """Bytes in use now, or at the peak since the last reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM" if peak else "VmRSS"].split()[0])


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m benchmarks.finetune_memory", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights", default="auto", choices=("auto", "int8"))
    parser.add_argument("--rank", type=cli.whole(1), default=16)
    parser.add_argument("--batch-size", type=cli.whole(1), default=2)
    parser.add_argument("--length", type=cli.positive, default=60.0, help="seconds of a sequence")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=("plain", "checkpointing"), help="this process alone; for itself")
    given = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(given)
    if options.one:
        print(json.dumps(step(options, options.one == "checkpointing")))
        return 0
    rows = {}
    for mode in ("plain", "checkpointing"):
        command = [sys.executable, "-m", "benchmarks.finetune_memory", *given, "--one", mode]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[mode] = json.loads(done.stdout.splitlines()[-1])
    total = {mode: row["held"] + row["step"] for mode, row in rows.items()}
    result = {
        "benchmark": "finetune-memory",
        "machine": machine("torch"),
        "options": {key: str(value) for key, value in vars(options).items() if key not in ("output", "one")},
        "bytes": rows,
        "step_ratio": round(rows["checkpointing"]["step"] / rows["plain"]["step"], 3),
        "whole_process_ratio": round(total["checkpointing"] / total["plain"], 3),
        "time_ratio": round(rows["checkpointing"]["seconds"] / rows["plain"]["seconds"], 2),
    }
    publish(result, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
