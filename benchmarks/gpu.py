"""What the engine does on a GPU: `python -m benchmarks.gpu --output benchmarks/results/gpu.json`.

Checks first (kernels, device against CPU, graphs against pieces), then the machine's own ceilings, then ticks
by sessions and context in bfloat16 and int8 keys and values, session starts, joins, a paced minute, memory.
Runs on a machine with torch, triton, numpy, safetensors and sentencepiece and nothing else: the 7B weights
are random and made on the device. Keeps to `--budget` seconds: parts that no longer fit are under `skipped`.

No result of it is here yet: the kernels have run in Triton's interpreter and compile for an H100/H200
(`tests/test_kernels.py`), but nothing has been timed on a GPU.

`--dry-run` goes through the same parts with `tiny` on whatever device there is, in seconds; its figures mean
nothing and say so. `benchmarks/gpu_setup.py` makes the models, `gpu_checks.py` and `gpu_parts.py` hold the
parts, `gpu_chart.py` draws the plot.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks as checks
from benchmarks import gpu_parts as parts
from benchmarks.gpu_chart import draw
from benchmarks.gpu_setup import make_engine, random_model, release
from benchmarks.machine import machine
from personaplex.config import PRESET_7B, PRESET_TINY, ModelConfig
from personaplex.engine.engine import Engine
from personaplex.engine.memory import plan_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
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


DRY = Plan(
    config=PRESET_TINY, dtype=torch.float32, counts=(1, 3), contexts=(20,), slots={"int8": 3, "auto": 3},
    rounds=2, paced_s=0.4, joining=1, joins=(1, 2), chunks=(1, 16),
)  # fmt: skip


class Report:
    """Results by part; what fails is written down and does not stop the rest."""

    def __init__(self, budget_s: float, output: Path | None) -> None:
        self.data: dict[str, Any] = {"benchmark": "gpu", "seconds": {}, "skipped": [], "errors": {}}
        self._end, self._output = time.monotonic() + budget_s, output

    def part(self, name: str, needs_s: float, work: Callable[[], Any]) -> Any:
        """Runs one part if `needs_s` are left; its result, or None."""
        start = time.monotonic()
        if start + needs_s > self._end:
            self.data["skipped"].append(name)
            return None
        log.info("%s", name)
        try:
            result = self.data[name] = work()
        except Exception as error:  # a task root: one part's fault is a result too
            log.exception("%s failed", name)
            self.data["errors"][name] = f"{type(error).__name__}: {error}"[:500]
            result = None
        self.data["seconds"][name] = round(time.monotonic() - start, 1)
        self.save()
        return result

    def save(self) -> None:
        if self._output:
            self._output.write_text(json.dumps(self.data, indent=1) + "\n")


def slots_that_fit(plan: Plan, kv: str, device: torch.device) -> int:
    """At most the plan's, as many as memory holds."""
    if device.type != "cuda":
        return plan.slots[kv]
    free, _ = torch.cuda.mem_get_info(device)
    memory = plan_memory(plan.config, kv=kv)
    return min(plan.slots[kv], memory.sessions(free + memory.weights))  # the weights are there already


def run(plan: Plan, device: torch.device, report: Report, dry: bool) -> None:
    """All parts in the order of what matters most."""
    on_gpu = device.type == "cuda"
    small = report.part("ceilings", 5, lambda: parts.ceilings(device, dry)) or {}
    read_gb_s = small.get("read_gb_s", 1.0)
    report.part("kernel_checks", 20, lambda: checks.kernels(device, 40 if dry else 1_000))
    report.part("against_cpu", 20, lambda: checks.against_cpu(device, 3 if dry else 40))
    model = random_model(plan.config, device, plan.dtype)
    report.part("graphs_against_pieces", 30, lambda: checks.graphs_against_pieces(model, 3, 2 if dry else 8))
    measure(plan, model, device, report, "int8", read_gb_s)
    release(device)
    measure(plan, model, device, report, "auto", read_gb_s)
    release(device)
    temporal = plan.config.lm.temporal
    if on_gpu:
        report.part("attention_sizes", 40, lambda: parts.attention_sizes(temporal, device, 32))
    report.part("products", 20, lambda: parts.products(temporal, device, [1, 3] if dry else [1, 8, 32, 128]))
    report.part("int8_cost", 20, lambda: checks.int8_cost(20 if dry else 200))


def measure(plan: Plan, model: Any, device: torch.device, report: Report, kv: str, read_gb_s: float) -> None:
    """Everything about engines with one kind of keys and values."""
    name = "int8" if kv == "int8" else "bf16"
    slots = slots_that_fit(plan, kv, device)
    report.part(f"memory_{name}", 5, lambda: parts.session_memory(model, kv, device))
    if slots <= plan.joining:
        report.data["skipped"].append(f"everything with {name}: {slots} sessions fit")
        return
    engines: list[Engine] = []

    def build(graphs: bool) -> dict[str, Any]:
        engines.append(make_engine(model, slots, kv=kv, graphs=graphs))
        return {"slots": slots, "recorded": engines[0]._runner.widths}

    report.part(f"engine_{name}", 40, lambda: build(True))
    if not engines:  # what can be measured without graphs still is
        release(device)
        report.part(f"engine_{name}_in_pieces", 20, lambda: build(False))
    if not engines:
        return
    engine = engines[0]
    counts, contexts = list(plan.counts), list(plan.contexts)
    rows = report.part(
        f"ticks_{name}", 60, lambda: parts.ticks(engine, counts, contexts, plan.rounds, read_gb_s, kv)
    )
    chunks = report.part(
        f"prefill_{name}", 10, lambda: parts.prefill_chunks(model, engine, device, list(plan.chunks))
    )
    if rows and chunks:
        report.data[f"steps_{name}"] = parts.step_table(rows, chunks, report.data["machine"])
    for slot in range(slots):
        engine._state.reset(slot)
    report.part(f"starts_{name}", 10, lambda: parts.starts(engine, device, 2 if plan.rounds < 10 else 10))
    report.part(
        f"joins_{name}",
        40,
        lambda: parts.joins(engine, contexts[-1], plan.joining, *plan.joins),
    )
    wanted = [c for c in counts if c > slots // 4] if kv == "int8" else [slots]
    report.part(
        f"paced_{name}", plan.paced_s + 10, lambda: parts.longest(engine, contexts[-1], wanted, plan.paced_s)
    )
    if device.type == "cuda":
        some = sorted({1, min(32, slots), slots})
        report.part(f"kernels_{name}", 20, lambda: parts.kernel_times(engine, some, contexts[-1]))


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
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if device.type != "cuda":
        if not arguments.dry_run:
            parser.error("there is no GPU here: only --dry-run works")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, with the first kernel
    report = Report(arguments.budget, arguments.output)
    report.data["machine"] = describe(device)
    if arguments.dry_run:
        report.data["dry_run"] = "tiny, a few rounds: these figures mean nothing"
    run(DRY if arguments.dry_run else Plan(), device, report, arguments.dry_run)
    report.save()
    if arguments.output:
        arguments.output.with_suffix(".svg").write_text(draw(report.data))
        for name in ("int8", "bf16"):
            if f"steps_{name}" in report.data and not arguments.dry_run:
                path = arguments.output.with_name(f"steps-{arguments.output.stem}-{name}.json")
                path.write_text(json.dumps(report.data[f"steps_{name}"], indent=1) + "\n")
    print(json.dumps(report.data, indent=1))
    return 1 if report.data["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
