"""What it takes that sessions outlive rollouts, lost connections and lost gateways: arithmetic on a peak.

    rollout           Serve stops a share of the replicas at a time and starts as many; their sessions are
                      rebuilt at the others, which needs slots there
    lost connections  a session is kept as its log until its client is back, without a slot
    a lost gateway    all of its sessions come back at once and are rebuilt, wherever a slot is free

Seconds of rebuilds are those of `Failures`, which were measured; what clients wait between two tries is in no
figure. A gateway and a replica each keep a log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deployments.policy import kept_sessions
from deployments.settings import Settings
from loadtest.arrivals import Arrival
from loadtest.failures import Failures
from personaplex.config import FRAME_RATE, SAMPLE_RATE

ROLLING_SHARE = 0.2  # Serve's rolling_update_percentage, as in k8s.inplace
SAMPLE_BYTES = 4  # of the user's sound
TOKEN_BYTES = 70  # of a log, for each frame


@dataclass(frozen=True)
class Peak:
    """A fleet when it holds the most sessions. `talk_s`: how long a session of that moment has talked."""

    sessions: int
    replicas: int
    gateways: int
    talk_s: float


def talked_s(sessions: Sequence[Arrival], limit_s: float) -> float:
    """Seconds that a session which is met at some moment has talked, on average: long ones are met more
    often, so this is half of E[length^2] / E[length]."""
    lengths = [min(one.length_s, limit_s) for one in sessions]
    return sum(one * one for one in lengths) / (2 * sum(lengths))


def log_bytes(settings: Settings, talk_s: float) -> float:
    """Of one session that has talked for so long."""
    sound_s = min(talk_s, settings.rebuild_audio_s)
    return SAMPLE_BYTES * SAMPLE_RATE * sound_s + TOKEN_BYTES * FRAME_RATE * talk_s


def figures(
    settings: Settings, peak: Peak, failures: Failures, startup_s: float, cuts_per_hour: float
) -> Mapping[str, float | None]:
    """For the report. `cuts_per_hour`: connections that one session's client loses in an hour of talk."""
    return {
        **_rollout(settings, peak, failures, startup_s),
        **_detached(settings, peak, cuts_per_hour),
        **_lost_gateway(settings, peak, failures),
    }


def _rollout(settings: Settings, peak: Peak, failures: Failures, startup_s: float) -> dict[str, float | None]:
    """`rollout_gpus_missing`: without so many more GPUs some sessions find no slot and keep their replica
    until they end; then `rollout_s` is None."""
    at_once = max(int(ROLLING_SHARE * peak.replicas), 1)
    needed = at_once + math.ceil(peak.sessions / settings.slots)
    missing = max(0, needed - peak.replicas)
    seconds = None
    if not missing:
        batches = math.ceil(peak.replicas / at_once)
        moved = at_once * peak.sessions / peak.replicas
        seconds = batches * (startup_s + _rebuilt_s(moved, peak.replicas - at_once, peak.talk_s, failures))
    return {"rollout_gpus_needed": needed, "rollout_gpus_missing": missing, "rollout_s": seconds}


def _rebuilt_s(sessions: float, replicas: int, talk_s: float, failures: Failures) -> float:
    """Until the last of so many sessions is rebuilt, one after another at each of the replicas."""
    return math.ceil(sessions / replicas) * failures.rebuild(talk_s)


def _detached(settings: Settings, peak: Peak, cuts_per_hour: float) -> dict[str, float | None]:
    """If every client took all of the grace to come back."""
    detached = peak.sessions * cuts_per_hour / 3_600 * settings.resume_grace_s
    size = log_bytes(settings, peak.talk_s)
    return {
        "detached_most": detached,
        "detached_log_mb": size / 1e6,
        "detached_gateway_mb": detached / peak.gateways * size / 1e6,
        "detached_replica_mb": detached / peak.replicas * size / 1e6,
    }


def _lost_gateway(settings: Settings, peak: Peak, failures: Failures) -> dict[str, float | None]:
    """`gateway_loss_forgotten`: sessions beyond the logs that replicas keep, if they are spread evenly."""
    if not settings.resume_grace_s:
        return {"gateway_loss_sessions": math.ceil(peak.sessions / peak.gateways)}
    sessions = math.ceil(peak.sessions / peak.gateways)
    kept = peak.replicas * kept_sessions(settings.slots)
    return {
        "gateway_loss_sessions": sessions,
        "gateway_loss_forgotten": max(0, sessions - kept),
        "gateway_loss_rebuilt_s": _rebuilt_s(sessions, peak.replicas, peak.talk_s, failures),
    }
