"""A whole fleet on paper: arrivals, queue, placement, prompts, conversations and scaling as discrete events.

Time is simulated; nothing sleeps. Placement and scaling are decided by the service's own policy code
(`fleet.py`, `autoscaler.py`), settings are the service's own, step and prompt times come from a table. Laws:

1. A session that finds no slot waits, first come first served over all gateways. It counts as queued after
   GRACE_S; beyond `queue_limit` per gateway it is refused then, and after `queue_timeout_s` in any case.
2. A slot that becomes free while somebody waits is taken after `Timing.handover_s`.
3. A prompt runs in pieces between ticks; a voice in the replica's cache is not run again.
4. A conversation begins with the handshake, not before HANDSHAKE_DELAY_S after the connection, lasts as long
   as its caller wished (at most `session_limit_s`) and holds its slot for `Timing.close_s` more.
5. A replica that is asked for takes sessions after `Timing.startup_s`; one that goes finishes its sessions.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from deployments.policy import GRACE_S
from deployments.settings import Settings
from loadtest.arrivals import Arrival
from loadtest.autoscaler import Autoscaler, History
from loadtest.fleet import SimulatedFleet, SimulatedReplica
from personaplex.config import FRAME_RATE, FRAME_SECONDS
from personaplex.engine.simulated import VOICE_POSITIONS, WINDOW, prompt_positions
from personaplex.engine.steptimes import StepTimes
from personaplex.persona import PROMPTS
from personaplex.session.core import HANDSHAKE_DELAY_S

SAMPLES = 400  # of the fleet's state, over the whole run


@dataclass(frozen=True)
class Timing:
    """What settings do not say. Seconds; the defaults were seen on one machine, measure your own."""

    startup_s: float = 60.0  # from the decision until a new replica takes sessions: node, image, weights
    handover_s: float = 0.1  # half of the longest pause between two looks for a free slot
    grant_s: float = 0.02  # from the slot to the start of the prompt: lease, media link
    close_s: float = 0.3  # the last answers and the end of the link
    push_s: float = 10.0  # Serve's reports of load to its controller
    control_s: float = 1.0  # between two looks of the controller


@dataclass
class Session:
    """One arrival on its way. Times are of the simulation; None for what did not happen."""

    arrival: Arrival
    ready_s: float | None = None  # from its arrival until slot and prompt were ready
    waited: bool = False
    refused: bool = False
    placed: bool = False


@dataclass
class Forecast:
    """What the simulation saw; series are sampled at `times`."""

    sessions: list[Session]
    seconds: float = 0.0
    replica_seconds: float = 0.0
    live_seconds: float = 0.0
    asked: list[float] = field(default_factory=list)  # when each further replica was asked for
    times: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # slots
    waiting: list[int] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)  # that take sessions
    ticks: list[float] = field(default_factory=list)  # seconds, of busy replicas at the samples

    def figures(self) -> dict[str, float | None]:
        """By the names a load test's report uses, where it has them too."""
        ready = np.array([one.ready_s for one in self.sessions if one.ready_s is not None])
        offered, ticks = len(self.sessions), np.array(self.ticks)
        refused = sum(one.refused for one in self.sessions)
        levels = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
        return {
            "offered": offered,
            "refused": refused,
            "refused_share": refused / offered if offered else None,
            "queued": sum(one.waited for one in self.sessions),
            "ready_mean_s": float(ready.mean()) if len(ready) else None,
            **{f"ready_{name}_s": _quantile(ready, share) for name, share in levels.items()},
            **{f"tick_{name}_ms": _scaled(_quantile(ticks, share), 1e3) for name, share in levels.items()},
            "ticks_late_share": float((ticks > FRAME_SECONDS).mean()) if len(ticks) else None,
            "peak_held": max(self.held, default=0),
            "peak_replicas": max(self.replicas, default=0),
            "replica_hours": self.replica_seconds / 3_600,
            "session_hours": self.live_seconds / 3_600,
            "scale_outs": len(self.asked),
        }


class Simulation:
    """One run; `run` may be called once."""

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        settings: Settings,
        steps: StepTimes,
        timing: Timing,
        gateways: int = 1,
    ) -> None:
        """Raises ConfigError when the table does not reach to `settings.slots` sessions a step."""
        steps.tick(settings.slots, 0)
        self._settings, self._steps, self._timing = settings, steps, timing
        self._queue_limit = gateways * settings.queue_limit
        self._fleet = SimulatedFleet(settings.slots, settings.placement)
        self._scaler = Autoscaler(settings, timing.push_s)
        self._load = History()
        self._forecast = Forecast([Session(arrival) for arrival in arrivals])
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._names = itertools.count()
        self._waiting: deque[Session] = deque()
        self._queued = 0
        self._held = 0
        self._starting = 0
        self._unwanted = 0  # of those that start, to be dropped when they are up
        self._open = len(arrivals)  # sessions that have not ended
        self._now = 0.0
        self._horizon = (arrivals[-1].at_s if arrivals else 0.0) + 60.0

    def run(self) -> Forecast:
        initial = self._settings.replicas_initial
        for _ in range(self._settings.replicas_min if initial is None else initial):
            self._fleet.add(SimulatedReplica(self._name(), 0.0))
        self._target = self._fleet.serving
        for session in self._forecast.sessions:
            self._at(session.arrival.at_s, partial(self._arrive, session))
        self._at(self._timing.control_s, self._control)
        self._at(0.0, self._sample)
        while self._events and self._open:
            self._now, _, event = heapq.heappop(self._events)
            event()
        self._forecast.seconds = self._now
        self._forecast.replica_seconds += sum(self._now - one.since for one in self._fleet.replicas.values())
        return self._forecast

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _name(self) -> str:
        return f"{next(self._names):08d}"

    # Sessions

    def _arrive(self, session: Session) -> None:
        if not self._waiting and self._place(session, self._timing.grant_s):
            return
        self._waiting.append(session)
        self._count()
        self._at(self._now + GRACE_S, partial(self._queue, session))

    def _queue(self, session: Session) -> None:
        if session.placed:
            return
        if self._queued >= self._queue_limit:
            self._refuse(session)
            return
        self._queued += 1
        session.waited = True
        give_up = session.arrival.at_s + self._settings.queue_timeout_s
        self._at(give_up, partial(self._give_up, session))

    def _give_up(self, session: Session) -> None:
        if not session.placed:
            self._refuse(session)

    def _refuse(self, session: Session) -> None:
        session.refused = True
        self._waiting.remove(session)
        self._queued -= session.waited
        self._open -= 1
        self._count()

    def _place(self, session: Session, delay_s: float) -> bool:
        """Takes a slot if there is one; the prompt starts `delay_s` later."""
        found = self._fleet.place(session.arrival.voice)
        if found is None:
            return False
        replica, cached = found
        session.placed = True
        self._held += 1
        self._count()
        ready = self._now + delay_s + self._prompt_s(session, replica, cached)
        session.ready_s = ready - session.arrival.at_s
        live = max(ready, session.arrival.at_s + HANDSHAKE_DELAY_S)
        end = live + min(session.arrival.length_s, self._settings.session_limit_s)
        self._at(live, partial(self._change_live, replica, live, 1))
        self._at(end, partial(self._change_live, replica, live, -1))
        self._at(end + self._timing.close_s, partial(self._leave, replica))
        return True

    def _prompt_s(self, session: Session, replica: SimulatedReplica, cached: bool) -> float:
        text = prompt_positions(PROMPTS[session.arrival.prompt].text)
        pieces = [text] if cached else [VOICE_POSITIONS, text]
        between = self._steps.tick(replica.live, self._context(replica)) if replica.live else 0.0
        return sum(self._steps.prefill(piece) + between for piece in pieces)

    def _change_live(self, replica: SimulatedReplica, began: float, change: int) -> None:
        replica.live += change
        replica.begun += change * began
        if change < 0:
            self._forecast.live_seconds += self._now - began

    def _leave(self, replica: SimulatedReplica) -> None:
        self._held -= 1
        self._open -= 1
        self._fleet.leave(replica)
        self._settle(replica)
        self._count()
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        while self._waiting:
            session = self._waiting[0]
            if not self._place(session, self._timing.handover_s + self._timing.grant_s):
                return
            self._waiting.popleft()
            self._queued -= session.waited
            self._count()

    def _count(self) -> None:
        self._load.set(self._now, self._held + len(self._waiting))

    # The fleet

    def _control(self) -> None:
        target = self._scaler.decide(self._now, self._load, self._target)
        for _ in range(target - self._target):
            if self._unwanted:
                self._unwanted -= 1
                continue
            self._starting += 1
            self._forecast.asked.append(self._now)
            self._at(self._now + self._timing.startup_s, partial(self._come_up, self._now))
        fewer = max(0, self._target - target)
        early = min(fewer, self._starting - self._unwanted)  # those that are not up yet go first
        self._unwanted += early
        for replica in self._fleet.drain(fewer - early) if fewer > early else ():
            self._settle(replica)
        self._target = target
        self._at(self._now + self._timing.control_s, self._control)

    def _come_up(self, asked: float) -> None:
        self._starting -= 1
        if self._unwanted:
            self._unwanted -= 1
            self._forecast.replica_seconds += self._now - asked
            return
        self._fleet.add(SimulatedReplica(self._name(), asked))
        self._serve_waiting()

    def _settle(self, replica: SimulatedReplica) -> None:
        """Books the time of a replica that is gone."""
        if replica.key not in self._fleet.replicas:
            self._forecast.replica_seconds += self._now - replica.since

    def _context(self, replica: SimulatedReplica) -> float:
        """Positions that its live sessions remember, on average."""
        age = self._now - replica.begun / replica.live
        return min(float(WINDOW), VOICE_POSITIONS + FRAME_RATE * age)

    def _sample(self) -> None:
        forecast = self._forecast
        busy = [one for one in self._fleet.replicas.values() if one.live]
        batches = np.array([one.live for one in busy], float)
        contexts = np.array([self._context(one) for one in busy])
        forecast.times.append(self._now)
        forecast.held.append(self._held)
        forecast.waiting.append(len(self._waiting))
        forecast.replicas.append(self._fleet.serving)
        forecast.ticks += self._steps.tick_many(batches, contexts).tolist()
        self._at(self._now + max(0.5, self._horizon / SAMPLES), self._sample)


def _quantile(values: np.ndarray, share: float) -> float | None:
    return float(np.quantile(values, share, method="higher")) if len(values) else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
