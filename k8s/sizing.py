"""How many sessions one card holds: the single place the slots of the chart's value files come from.

Those are computed, not measured: sizes follow from the model's shapes, memory and bandwidth from the cards'
data sheets. `python -m k8s slots --measured` takes the time of a step from a measurement of the card instead
(the JSON of `benchmarks/gpu.py`): believe it, and set `settings.slots`.

    bytes(n)   = weights + RESERVE + n * session            <= MEMORY_SHARE * memory of the card
    seconds(n) = what a step reads, weights + n * window, at BANDWIDTH_SHARE of the bandwidth <= FRAME_SECONDS
    measured   : the median step with n full windows        <= TICK_SHARE * FRAME_SECONDS
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from k8s.errors import Failed
from personaplex.engine.steptimes import StepTimes
from personaplex.errors import ConfigError

MIB = 2**20
FRAME_SECONDS = 0.08
FRAMES = 3_000  # of a full window
KINDS = ("auto", "int8")  # of the settings `kv` and `weights`; auto is bf16 on a GPU
WINDOW = {"auto": 1.573e9, "int8": 0.799e9}  # its keys and values: 32 layers, 4096 wide
CODEC = 16.5e6  # a session's state of it
WEIGHTS = {"auto": 16.74e9, "int8": 10.17e9}  # the checkpoint in bf16; the temporal layers as int8
STEP_WEIGHTS = {"auto": 14.75e9, "int8": 8.18e9}  # what one tick reads of it
PREFIXES = 32 * 125 / FRAMES  # windows that the cached prefixes of 32 voices take, 125 frames each
RESERVE = 3e9  # the CUDA context, graphs, activations
MEMORY_SHARE = 0.92  # the rest is for fragmentation
TICK_SHARE = 0.75  # joins and the 99th percentile take the rest
BANDWIDTH_SHARE = 0.5  # of the data sheet's, for a whole tick at its 99th percentile
STEP = 4  # slots come in fours: graphs are captured for prefixes of them


@dataclass(frozen=True)
class Card:
    """Memory in bytes as the driver reports it, bandwidth in bytes a second as the data sheet does."""

    memory: float
    bandwidth: float


CARDS = {
    "l40s": Card(46_068 * MIB, 864e9),
    "a100": Card(81_920 * MIB, 2_039e9),
    "h100": Card(81_559 * MIB, 3_350e9),
    "h200": Card(143_771 * MIB, 4_800e9),
}


def slots(card: Card, kv: str = "auto", weights: str = "auto", measured: StepTimes | None = None) -> int:
    """Sessions with full windows that fit in memory and in a frame's time; 0 when the model does not fit."""
    taken = WEIGHTS[weights] + PREFIXES * WINDOW[kv] + RESERVE
    by_memory = (MEMORY_SHARE * card.memory - taken) / (WINDOW[kv] + CODEC)
    if measured is not None:
        by_time = float(measured.most_sessions(FRAMES, TICK_SHARE * FRAME_SECONDS))
    else:
        read = FRAME_SECONDS * BANDWIDTH_SHARE * card.bandwidth
        by_time = (read - STEP_WEIGHTS[weights]) / WINDOW[kv]
    return max(0, int(min(by_memory, by_time)) // STEP * STEP)


def read_measured(path: Path, kv: str) -> tuple[StepTimes, str]:
    """The step times with `kv` in a report of `benchmarks/gpu.py`, and the GPU they were measured on.

    Raises Failed for a file that holds none; those of a dry run are none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        gpu = str(report["machine"]["gpu"])
        steps = StepTimes.from_json(path.stem, report["steps_int8" if kv == "int8" else "steps_bf16"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Failed(f"{path} holds no step times of a GPU with kv={kv}") from error
    except ConfigError as error:
        raise Failed(f"{path}: {error}") from error
    if "dry_run" in report or steps.source != "measured":
        raise Failed(f"{path} was not measured")
    return steps, gpu
