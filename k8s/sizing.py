"""How many sessions one card holds: the single place the slots of the chart's value files come from.

Those are computed, not measured: sizes follow from the model's shapes, memory and bandwidth from the cards'
data sheets. `python -m k8s slots --measured` takes the time of a step from a measurement of the card instead
(the JSON of `benchmarks.gpu`): believe it, and set `settings.slots`.

    memory   : `personaplex.sizing` in MEMORY_SHARE of the card's, voices' prefixes and RESERVE included
    time     : a tick with n full windows, read within one frame at a share of the card's bandwidth
    measured : the median tick with n full windows within TICK_SHARE of a frame
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from k8s.errors import Failed
from personaplex import sizing
from personaplex.config import FRAME_SECONDS, PRESET_7B, EngineConfig
from personaplex.engine.steptimes import StepTimes
from personaplex.errors import ConfigError

MIB = 2**20
KINDS = ("auto", "int8")  # of the settings `kv` and `weights`; auto is bf16 on a GPU
RESERVE = sizing.CONTEXT + sizing.WORKSPACE
MEMORY_SHARE = 0.92  # the rest is for fragmentation
TICK_SHARE = 0.75  # joins and the 99th percentile take the rest
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
    model = sizing.footprint(PRESET_7B, weights=weights, kv=kv)
    voices = sizing.cached_voices(EngineConfig())
    by_memory = model.slots(int(MEMORY_SHARE * card.memory), voices, workspace=RESERVE)
    if measured is not None:
        by_time = measured.most_sessions(PRESET_7B.lm.temporal.context, TICK_SHARE * FRAME_SECONDS)
    else:
        by_time = model.slots_in_time(card.bandwidth)
    return min(by_memory, by_time) // STEP * STEP


def read_measured(path: Path, kv: str) -> tuple[StepTimes, str]:
    """The step times with `kv` in a report of `benchmarks.gpu`, and the GPU they were measured on.

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
