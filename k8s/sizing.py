"""How many sessions one card holds: the single place the slots of the chart's value files come from.

Computed, not measured: sizes follow from the model's shapes, memory and bandwidth from the cards' data
sheets. Where a measurement of your own card says otherwise, believe the measurement and set `settings.slots`.

    bytes(n)   = WEIGHTS + RESERVE + n * SESSION                    <= MEMORY_SHARE * memory of the card
    seconds(n) = (STEP_WEIGHTS + n * WINDOW) / (BANDWIDTH_SHARE * bandwidth)  <= FRAME_SECONDS
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
FRAME_SECONDS = 0.08
WINDOW = 1.573e9  # bf16 keys and values of a full window: 32 layers, 4096 wide, 3000 frames
SESSION = WINDOW + 16.5e6  # and the codec's state
WEIGHTS = 16.74e9  # bf16 checkpoint
STEP_WEIGHTS = 14.75e9  # what one tick reads of it
VOICES = 32 * WINDOW * 125 / 3_000  # cached prefixes of 32 voices, 125 frames each
RESERVE = VOICES + 3e9  # and the CUDA context, graphs, activations
MEMORY_SHARE = 0.92  # the rest is for fragmentation
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


def slots(card: Card) -> int:
    """Sessions with full windows that fit in memory and in a frame's time; 0 when the model does not fit."""
    by_memory = (MEMORY_SHARE * card.memory - WEIGHTS - RESERVE) / SESSION
    by_time = (FRAME_SECONDS * BANDWIDTH_SHARE * card.bandwidth - STEP_WEIGHTS) / WINDOW
    return max(0, int(min(by_memory, by_time)) // STEP * STEP)
