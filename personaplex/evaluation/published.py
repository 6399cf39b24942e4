"""Figures others have published for the same tasks, to stand beside ours: as their authors print them.

From Full-Duplex-Bench's README, but for the marked rows. Weights of ours compare with the *released* model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One system on one task: figures by the names `results` gives them; `note` says what is particular."""

    system: str
    figures: Mapping[str, float]
    note: str = ""


_RELEASED = "PersonaPlex 7b-v1, released"
_AGAIN = "Moshi, measured again"
_CARD = "from the model card: 1 - mean takeover"
_STOP = "the card gives the time to the agent's stop; ours is to its start"
_ISSUE = "reported to the benchmark's authors"


def _pause(values: Mapping[str, float], notes: Mapping[str, str]) -> tuple[Row, ...]:
    return tuple(Row(name, {"takeover": value}, notes.get(name, "")) for name, value in values.items())


def _backchannel(values: Mapping[str, tuple[float, float, float]]) -> tuple[Row, ...]:
    return tuple(
        Row(name, {"takeover": t, "frequency": f, "jsd": j}, _ISSUE if name == _AGAIN else "")
        for name, (t, f, j) in values.items()
    )


def _answer(values: Mapping[str, tuple[float, float]]) -> tuple[Row, ...]:
    return tuple(
        Row(name, {"takeover": t, "latency": latency}, _ISSUE if name == _AGAIN else "")
        for name, (t, latency) in values.items()
    )


PUBLISHED: Mapping[str, tuple[Row, ...]] = {
    "synthetic_pause_handling": _pause(
        {
            "PersonaPlex, paper's model": 0.584,
            _RELEASED: 0.358,
            "Moshi": 0.985,
            _AGAIN: 1.0,
            "dGSLM": 0.934,
            "Freeze-Omni": 0.642,
            "Gemini Live 2.0": 0.255,
            "GPT-Realtime": 0.010,
        },
        {_AGAIN: _ISSUE},
    ),
    "candor_pause_handling": _pause(
        {
            "PersonaPlex, paper's model": 0.662,
            _RELEASED: 0.43,
            "Moshi": 0.980,
            _AGAIN: 1.0,
            "dGSLM": 0.935,
            "Freeze-Omni": 0.481,
            "Gemini Live 2.0": 0.310,
            "GPT-Realtime": 0.120,
        },
        {_RELEASED: _CARD, _AGAIN: _ISSUE},
    ),
    "icc_backchannel": _backchannel(
        {
            "PersonaPlex, paper's model": (0.327, 0.025, 0.649),
            "Moshi": (1.000, 0.001, 0.957),
            _AGAIN: (0.327, 0.158, 0.714),
            "dGSLM": (0.691, 0.015, 0.934),
            "Freeze-Omni": (0.636, 0.001, 0.997),
            "Gemini Live 2.0": (0.091, 0.012, 0.896),
            "GPT-Realtime": (0.000, 0.007, 0.980),
        }
    ),
    "candor_turn_taking": _answer(
        {
            "PersonaPlex, paper's model": (0.992, 0.070),
            _RELEASED: (0.908, 0.170),
            "Moshi": (0.941, 0.265),
            _AGAIN: (1.0, 0.0),
            "dGSLM": (0.975, 0.352),
            "Freeze-Omni": (0.336, 0.953),
            "Gemini Live 2.0": (0.655, 1.301),
            "GPT-Realtime": (1.000, 1.470),
        }
    ),
    "synthetic_user_interruption": tuple(
        Row(
            name,
            {"takeover": t, "rating": rating, "latency": latency},
            _STOP if name == _RELEASED else "",
        )
        for name, (t, rating, latency) in {
            "PersonaPlex, paper's model": (1.000, 4.21, 0.400),
            _RELEASED: (0.950, 4.29, 0.240),
            "Moshi": (1.000, 0.765, 0.257),
            "dGSLM": (0.917, 0.201, 2.531),
            "Freeze-Omni": (0.867, 3.615, 1.409),
            "Gemini Live 2.0": (0.891, 3.376, 1.183),
            "GPT-Realtime": (0.970, 3.850, 1.500),
        }.items()
    ),
    "service_duplex": tuple(
        Row(name, {"rating": rating}, "mean rating of the judge, as the paper gives it")
        for name, rating in {
            _RELEASED: 4.40,
            "Gemini Live": 4.73,
            "PersonaPlex, paper's model": 4.48,
            "Freeze-Omni": 4.02,
            "Qwen2.5-Omni": 2.76,
            "Moshi": 1.75,
        }.items()
    ),
}
