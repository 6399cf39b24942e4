"""The smallest fleet that keeps its goals under a load: a formula's first guess, then simulation.

Erlang's formula assumes a fixed fleet and exponential lengths, which is near enough to begin with. The fleet
is then simulated as the service would run it (`simulation.py`), queue, placement, start-up and scaling delays
included, and grows until the goals are met, or shrinks for as long as they are. Pure but for the environment
that `Settings` reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deployments.settings import Settings
from loadtest import continuity
from loadtest.arrivals import Arrival, Piece
from loadtest.continuity import Peak
from loadtest.failures import Failures
from loadtest.forecast import Forecast, Timing
from loadtest.simulation import Simulation
from personaplex.config import PRESET_7B
from personaplex.engine.steptimes import StepTimes
from personaplex.errors import ConfigError

FULL_WINDOW = PRESET_7B.lm.temporal.context
TRIES = 8
SPEAKING = 0.45  # of a conversation, the share in which its user speaks
TRANSCRIBING = (
    0.35  # core seconds for a second of speech, with the embedded model: benchmarks/results/words.json
)
GROWTH = 0.04  # of the GPUs, from one try to the next
SHOWN = (
    "slots",
    "replicas_min",
    "replicas_max",
    "placement",
    "spare_slots",
    "target_utilisation",
    "queue_limit",
    "queue_timeout_s",
    "sessions_per_gateway",
)


@dataclass(frozen=True)
class Goals:
    """What the fleet must keep."""

    ready_p95_s: float = 2.0
    refused_share: float = 0.01
    lost_share: float = 0.0  # of sessions whose replica died

    def met(self, figures: Mapping[str, float | None]) -> bool:
        ready, refused = figures["ready_p95_s"], figures["refused_share"]
        hit = (figures["lost"] or 0.0) + (figures["failovers"] or 0.0)
        return (
            ready is not None
            and ready <= self.ready_p95_s
            and (refused or 0.0) <= self.refused_share
            and (figures["lost"] or 0.0) <= self.lost_share * hit
        )


@dataclass(frozen=True)
class Prices:
    """Of one GPU and of one CPU core, an hour, in any currency."""

    gpu_hour: float = 0.0
    core_hour: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The answer, with the simulation it rests on."""

    settings: Settings
    steps: StepTimes
    goals: Goals
    forecast: Forecast
    gateways: int
    transcriber_cores: float  # at the peak; 0 with transcription=off
    costs: Mapping[str, float | None]
    continuity: Mapping[str, float | None]  # see continuity.py

    @property
    def met(self) -> bool:
        return self.goals.met(self.forecast.figures())

    def data(self) -> dict[str, Any]:
        """Everything but the single sessions, for programs."""
        return {
            "report": "plan",
            "steps": {"name": self.steps.name, "source": self.steps.source, "note": self.steps.note},
            "goals": {**asdict(self.goals), "met": self.met},
            "settings": {name: getattr(self.settings, name) for name in SHOWN},
            "gateways": self.gateways,
            "transcriber_cores": self.transcriber_cores,
            "costs": dict(self.costs),
            "continuity": dict(self.continuity),
            "forecast": self.forecast.figures(),
        }


def erlang_c(servers: int, load: float) -> float:
    """Chance to wait with `servers` servers and `load` erlangs of Poisson arrivals (Erlang, 1917)."""
    if load >= servers:
        return 1.0
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def fewest_gpus(load: float, length_s: float, slots: int, wait_s: float) -> int:
    """GPUs with which at most 5 % of the sessions wait longer than `wait_s`; `load` in erlangs."""

    def too_slow(gpus: int) -> bool:
        servers = gpus * slots
        return erlang_c(servers, load) * math.exp(-(servers - load) / length_s * wait_s) > 0.05

    gpus = max(1, math.ceil(load / slots))
    while too_slow(gpus):
        gpus += 1
    return gpus


def make(
    sessions: Sequence[Arrival],
    pieces: Sequence[Piece],
    values: Mapping[str, Any],
    steps: StepTimes,
    timing: Timing,
    goals: Goals,
    prices: Prices,
    *,
    tick_limit_s: float,
    gpus: int | None = None,
    failures: Failures | None = None,
    cuts_per_hour: float = 0.0,
) -> Plan:
    """Searches the smallest fleet that meets `goals`. `values` are settings of the service. `cuts_per_hour`:
    connections that a client loses in an hour of talk.

    Raises ConfigError for settings that make no sense and for a table none of whose steps is quick enough.
    """
    if not sessions:
        raise ConfigError("arrivals: no session arrives")
    slots = steps.most_sessions(FULL_WINDOW, tick_limit_s)
    if not slots and "slots" not in values:
        raise ConfigError("no step of the table is quick enough for a single session")
    values = {"slots": slots, **values}
    settings = Settings.load({**values, "replicas_min": 0, "replicas_max": 1, "replicas_initial": None})
    length = sum(min(one.length_s, settings.session_limit_s) for one in sessions) / len(sessions)
    rates = [rate for piece in pieces for rate in (piece.first, piece.last)]

    def attempt(most: int) -> tuple[Settings, Forecast]:
        sized = _sized(values, settings, most, rates, length)
        gateways = _gateways(sized, max(rates) * length)
        return sized, Simulation(sessions, sized, steps, timing, gateways, failures).run()

    if gpus:
        settings, forecast = attempt(gpus)
    else:
        guess = fewest_gpus(max(rates) * length, length, settings.slots, goals.ready_p95_s)
        settings, forecast = _search(attempt, guess, goals)
    peak = max(held + more for held, more in zip(forecast.held, forecast.waiting, strict=True))
    gateways = _gateways(settings, peak)
    cores = transcriber_cores(settings, peak)
    costs = _costs(forecast, settings, gateways, cores, prices)
    talk_s = continuity.talked_s(sessions, settings.session_limit_s)
    held, replicas = max(1, *forecast.held), max(1, *forecast.replicas)
    kept = continuity.figures(
        settings,
        Peak(held, replicas, gateways, talk_s),
        failures or Failures(),
        timing.startup_s,
        cuts_per_hour,
    )
    return Plan(settings, steps, goals, forecast, gateways, cores, costs, kept)


def _search(
    attempt: Callable[[int], tuple[Settings, Forecast]], guess: int, goals: Goals
) -> tuple[Settings, Forecast]:
    """From `guess` GPUs on, up until the goals are met or down while they are; the last try, if none does."""
    found = attempt(guess)
    down = goals.met(found[1].figures())
    most = guess
    for _ in range(TRIES):
        step = max(1, round(GROWTH * most))
        most += -step if down else step
        if most < 1:
            break
        tried = attempt(most)
        met = goals.met(tried[1].figures())
        if down and not met:
            break
        found = tried
        if not down and met:
            break
    return found


def _sized(
    values: Mapping[str, Any], settings: Settings, most: int, rates: Sequence[float], length_s: float
) -> Settings:
    """`values` with as many replicas as the least and the first rate need, and at most `most`."""

    def needed(rate: float) -> int:
        share = settings.slots * settings.target_utilisation
        return min(most, max(1, math.ceil(rate * length_s / share)))

    sizes = {"replicas_min": needed(min(rates)), "replicas_initial": needed(rates[0]), "replicas_max": most}
    return Settings.load({**sizes, **values, "replicas_max": most})


def _gateways(settings: Settings, sessions: float) -> int:
    return max(1, math.ceil(sessions / (settings.sessions_per_gateway * settings.target_utilisation)))


def transcriber_cores(settings: Settings, sessions: float) -> float:
    """CPU cores that keep up with what the users of so many sessions say; 0 with transcription=off."""
    if settings.transcription == "off":
        return 0.0
    return sessions * SPEAKING * TRANSCRIBING / settings.target_utilisation


def _costs(
    forecast: Forecast, settings: Settings, gateways: int, transcribing: float, prices: Prices
) -> dict[str, float | None]:
    """Gateways and transcribers run all the time at their peak number; replicas while they are up or coming
    up."""
    gpu = forecast.replica_seconds / 3_600 * prices.gpu_hour
    cores = (gateways * max(1.0, settings.gateway_num_cpus) + transcribing) * forecast.seconds / 3_600
    hours = forecast.live_seconds / 3_600
    total = gpu + cores * prices.core_hour
    slot_hours = forecast.replica_seconds / 3_600 * settings.slots
    return {
        "cost": total,
        "cost_per_session_hour": total / hours if hours else None,
        "slots_in_use_share": hours / slot_hours if slot_hours else None,
    }
