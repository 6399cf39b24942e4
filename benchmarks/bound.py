"""A step-time table from the bound of memory bandwidth: what no engine can beat, not what one was seen to do.

    python -m benchmarks.bound [--bandwidth 4.3e12] [--output benchmarks/results/steps-example.json]

A tick reads the weights once and each session's keys and values once; a prompt chunk reads the weights or is
bound by arithmetic. Sizes are those of the 7B preset in bf16. Serves planners and the simulated engine until
a measured table is there; every report that rests on it says "derived".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from personaplex import sizing
from personaplex.config import PRESET_7B
from personaplex.sizing import prefill_flops

MODEL = sizing.footprint(PRESET_7B)
BANDWIDTH = 4.3e12  # bytes a second a kernel can read on an H200 (4.8e12 on its data sheet)
ARITHMETIC = 400e12  # FLOP a second, bf16, of a well-kept matrix product
CONTEXTS = (0, 375, 1_500, 3_000)
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # as many full windows as fit in 141 GB in bf16
POSITIONS = (1, 32, 64, 128, 256)
OUTPUT = Path(__file__).parent / "results" / "steps-example.json"


def table(bandwidth: float, arithmetic: float) -> dict[str, Any]:
    """The table in the format of `personaplex.engine.steptimes`. Milliseconds."""
    tick = [[1e3 * MODEL.tick_bytes(batch, context) / bandwidth for batch in BATCHES] for context in CONTEXTS]
    prefill = [
        1e3 * max(MODEL.tick_weights / bandwidth, positions * prefill_flops(PRESET_7B.lm) / arithmetic)
        for positions in POSITIONS
    ]
    return {
        "table": "steps",
        "source": "derived",
        "note": "Synthetic: the bound of memory bandwidth, (weights + sessions x context x 512 KiB) / "
        f"{bandwidth:.3g} B/s, written by benchmarks/bound.py. Nothing here was measured.",
        "machine": {"name": "none", "bandwidth_bytes_per_s": bandwidth, "arithmetic_flop_per_s": arithmetic},
        "contexts": list(CONTEXTS),
        "batches": list(BATCHES),
        "tick_ms": [[round(value, 4) for value in row] for row in tick],
        "prefill_positions": list(POSITIONS),
        "prefill_ms": [round(value, 4) for value in prefill],
    }


def text(data: dict[str, Any]) -> str:
    """The table as it is written to a file."""
    return json.dumps(data, indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes a second")
    parser.add_argument("--arithmetic", type=float, default=ARITHMETIC, help="FLOP a second")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    options.output.write_text(text(table(options.bandwidth, options.arithmetic)))
    print(options.output)


if __name__ == "__main__":
    main()
