"""What the engine does on a GPU: `python -m benchmarks.gpu --output benchmarks/results/gpu.json`.

The machine's own ceilings and checks first (kernels, device against CPU, captured against eager), then ticks
by sessions and context in int8 and bfloat16 keys and values, session starts, rebuilds from logs, joins, a
paced minute, memory; last what helps to tune. Runs on a machine with torch, triton, numpy, safetensors and
sentencepiece and nothing else: the 7B weights are random and made on the device. Keeps to `--budget` seconds:
parts that no longer fit are under `skipped`. Each group of parts runs in a process of its own (`report.py`).

docs/gpu.md tells what it found on an H100.

`--dry-run` goes through the same parts with `tiny` on whatever device there is, in seconds; its figures mean
nothing and say so.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import checks, compare, parts
from benchmarks.gpu.chart import draw
from benchmarks.gpu.report import GRACE_S, Report, run_group
from benchmarks.gpu.setup import make_engine, random_model, release
from benchmarks.machine import machine
from personaplex.config import PRESET_7B, PRESET_TINY, ModelConfig
from personaplex.engine.engine import Engine
from personaplex.model import Model
from personaplex.sizing import footprint


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything. Int8 engines come first: they tell most."""

    config: ModelConfig = PRESET_7B
    dtype: torch.dtype = torch.bfloat16
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 96, 128)
    contexts: tuple[int, ...] = (375, 1_500, 3_000)
    slots: dict[str, int] = field(default_factory=lambda: {"int8": 128, "auto": 64})
    rounds: int = 40
    paced_s: float = 60.0
    joining: int = 8
    joins: tuple[int, int] = (4, 24)  # how often, ticks timed each time
    chunks: tuple[int, ...] = (1, 32, 64, 128, 256)
    rebuilt: tuple[int, ...] = (375, 3_000)  # frames of the talks
    at_once: tuple[int, ...] = (1, 40)


DRY = Sizes(
    config=PRESET_TINY, dtype=torch.float32, counts=(1, 3), contexts=(20,), slots={"int8": 3, "auto": 3},
    rounds=2, paced_s=0.4, joining=1, joins=(1, 2), chunks=(1, 16), rebuilt=(5,), at_once=(1, 2),
)  # fmt: skip


# Groups in the order of what matters most: the seconds each may take, at most.
MIN_GROUP_S = 20.0  # left, for a group to be worth its start
GROUPS = {"checks": 130.0, "int8": 260.0, "bf16": 200.0, "tuning": 120.0}


def slots_that_fit(plan: Sizes, kv: str, device: torch.device) -> int:
    """At most the plan's, as many as memory holds."""
    if device.type != "cuda":
        return plan.slots[kv]
    free, _ = torch.cuda.mem_get_info(device)
    planned = footprint(plan.config, kv=kv)
    return min(plan.slots[kv], planned.slots(free + planned.weights))  # the weights are there already


def run(plan: Sizes, group: str, device: torch.device, report: Report, dry: bool) -> None:
    """All parts of one group."""
    report.part("ceilings", 5, lambda: parts.ceilings(device, dry))
    if group == "checks":
        check(plan, device, report, dry)
    elif group == "tuning":
        tune(plan, device, report, dry)
    else:
        model = make_model(plan, group, device, report)
        if model is not None:
            measure(plan, model, device, report, group)


def make_model(plan: Sizes, group: str, device: torch.device, report: Report) -> Model | None:
    """Random weights, or None with the reason in the report."""
    made: list[Model] = []

    def make() -> dict[str, Any]:
        made.append(random_model(plan.config, device, plan.dtype))
        return {
            "weights": group,
            "bytes": torch.cuda.memory_allocated(device) if device.type == "cuda" else 0,
        }

    report.part(f"model_{group}", 5, make)
    return made[0] if made else None


def check(plan: Sizes, device: torch.device, report: Report, dry: bool) -> None:
    """Whether it computes what it should."""
    report.part("kernel_checks", 20, lambda: compare.all_kernels(device, 40 if dry else 1_000))
    report.part("against_cpu", 20, lambda: checks.against_cpu(device, 3 if dry else 40))

    def both_ways() -> dict[str, Any]:
        model = random_model(plan.config, device, plan.dtype)
        return checks.captured_against_eager(model, 3, 2 if dry else 8)

    report.part("captured_against_eager", 30, both_ways)


def tune(plan: Sizes, device: torch.device, report: Report, dry: bool) -> None:
    """Sizes of kernels, one layer at a time, and what int8 costs in quality."""
    temporal = plan.config.lm.temporal
    sizes: dict[str, Any] = {"rows": [1, 3], "copies": 1, "rounds": 1} if dry else {"rows": [1, 8, 32, 128]}
    report.part("matmuls", 20, lambda: parts.matmuls(temporal, device, **sizes))
    if device.type == "cuda":
        report.part("attention_sizes", 40, lambda: parts.attention_sizes(temporal, device, 32))
    report.part("int8_cost", 20, lambda: checks.int8_cost(20 if dry else 200))


def measure(plan: Sizes, model: Model, device: torch.device, report: Report, name: str) -> None:
    """Everything about engines with one kind of keys and values."""
    kv = "int8" if name == "int8" else "auto"
    read_gb_s = (report.data.get("ceilings") or {}).get("read_gb_s", 1.0)
    slots = slots_that_fit(plan, kv, device)
    if slots <= plan.joining:
        report.data["skipped"].append(f"everything with {name}: {slots} sessions fit")
        report.save()
        return
    report.part(f"memory_{name}", 5, lambda: parts.session_memory(model, kv, device))
    release(device)
    engines: list[Engine] = []

    def build(graphs: bool) -> dict[str, Any]:
        engines.append(make_engine(model, slots, kv=kv, graphs=graphs, rebuilds=slots))
        return {"slots": slots, "captured": engines[0]._runner.widths}

    report.part(f"engine_{name}", 20, lambda: build(True))
    if not engines:  # what can be measured without graphs still is
        release(device)
        report.part(f"engine_{name}_eager", 20, lambda: build(False))
    if not engines:
        return
    engine = engines[0]
    counts, contexts = list(plan.counts), list(plan.contexts)
    rows = report.part(
        f"ticks_{name}", 30, lambda: parts.ticks(engine, counts, contexts, plan.rounds, read_gb_s, kv)
    )
    chunks = report.part(
        f"prefill_{name}", 10, lambda: parts.prefill_chunks(model, engine, device, list(plan.chunks))
    )
    if rows and chunks:
        described = describe(device)
        report.part(f"steps_{name}", 0, lambda: parts.step_table(rows, chunks, described))

    def starts() -> dict[str, Any]:
        for slot in range(slots):
            engine._state.reset(slot)
        return parts.starts(engine, device, 2 if plan.rounds < 10 else 10)

    report.part(f"starts_{name}", 10, starts)
    report.part(
        f"rebuilds_{name}",
        10,
        lambda: parts.rebuilds(engine, device, list(plan.rebuilt), list(plan.at_once)),
    )
    wanted = [c for c in counts if c > slots // 4] if kv == "int8" else [slots]
    report.part(
        f"paced_{name}",
        plan.paced_s + 5,
        lambda: parts.longest(engine, contexts[-1], wanted, plan.paced_s, lambda: report.left_s),
    )
    report.part(f"joins_{name}", 20, lambda: parts.joins(engine, contexts[-1], plan.joining, *plan.joins))
    if device.type == "cuda":
        some = sorted({1, min(32, slots), slots})
        report.part(f"kernels_{name}", 10, lambda: parts.kernel_times(engine, some, contexts[-1]))


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, for the JSON."""
    found = machine("torch", "numpy")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
                  "cuda": torch.version.cuda}  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, seconds: does every part run?")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds to stay within")
    parser.add_argument("--output", type=Path, help="JSON file; the plot goes beside it as SVG")
    parser.add_argument("--group", choices=GROUPS, help="only these parts, in this process")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if device.type != "cuda":
        if not arguments.dry_run:
            parser.error("there is no GPU here: only --dry-run works")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, with the first kernel
    if arguments.group:
        report = Report(arguments.budget, arguments.output, device)
        run(DRY if arguments.dry_run else Sizes(), arguments.group, device, report, arguments.dry_run)
    else:
        report = Report(arguments.budget, arguments.output)
        run_groups(report, device, arguments.dry_run, arguments.output)
    report.save()
    return 1 if report.data["errors"] else 0


def run_groups(report: Report, device: torch.device, dry: bool, output: Path | None) -> None:
    """All groups one after the other, then the files made from them."""
    report.data |= {"benchmark": "gpu", "machine": describe(device)}
    if dry:
        report.data["dry_run"] = "tiny, a few rounds: these figures mean nothing"
    for group, most in GROUPS.items():
        budget = min(most, report.left_s - GRACE_S)
        if budget < MIN_GROUP_S:
            report.data["skipped"].append(f"group {group}")
            continue
        run_group(report, group, budget, ["--dry-run"] if dry else [])
    if output:
        output.with_suffix(".svg").write_text(draw(report.data))
        for name in ("int8", "bf16"):
            if f"steps_{name}" in report.data and not dry:
                path = output.with_name(f"steps-{output.stem}-{name}.json")
                path.write_text(json.dumps(report.data[f"steps_{name}"], indent=1) + "\n")
    print(json.dumps(report.data, indent=1))


if __name__ == "__main__":
    sys.exit(main())
