"""A whole fleet on paper: arrivals, queue, placement, prompts, conversations and scaling as discrete events.

Time is simulated; nothing sleeps. Placement and scaling are decided by the service's own policy code
(`fleet.py`, `autoscaler.py`), settings are the service's own, step and prompt times come from a table. Laws:

1. A session that finds no slot waits, first come first served over all gateways. It counts as queued after
   GRACE_S; beyond `queue_limit` per gateway it is refused then, and after `queue_timeout_s` in any case. 2.
   A slot that becomes free while somebody waits is taken after `Timing.handover_s`. 3. A prompt runs in
   pieces between ticks; a voice in the replica's cache is not run again. 4. A conversation begins with the
   handshake, not before HANDSHAKE_DELAY_S after the connection, lasts as long as its caller wished (at most
   `session_limit_s`) and holds its slot for `Timing.close_s` more. 5. A replica that is asked for takes
   sessions after `Timing.startup_s`; one that goes finishes its sessions. 6. A replica that dies is asked
   for again at once. Its sessions go on at others, the shortest first; those that find no slot wait before
   all others and are lost after `queue_timeout_s` (`failures.py`).
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from deployments.policy import GRACE_S
from deployments.settings import Settings
from loadtest.arrivals import Arrival
from loadtest.autoscaler import Autoscaler, History
from loadtest.failures import Failures
from loadtest.fleet import SimulatedFleet, SimulatedReplica
from loadtest.forecast import Forecast, Session, Timing
from personaplex.config import FRAME_RATE
from personaplex.engine.simulated import VOICE_POSITIONS, WINDOW, prompt_positions
from personaplex.engine.steptimes import StepTimes
from personaplex.persona import PROMPTS
from personaplex.session.core import HANDSHAKE_DELAY_S

SAMPLES = 400  # of the fleet's state, over the whole run


class Simulation:
    """One run; `run` may be called once."""

    def __init__(
        self,
        arrivals: Sequence[Arrival],
        settings: Settings,
        steps: StepTimes,
        timing: Timing,
        gateways: int = 1,
        failures: Failures | None = None,
    ) -> None:
        """Raises ConfigError when the table does not reach to `settings.slots` sessions a step."""
        steps.tick(settings.slots, 0)
        self._settings, self._steps, self._timing = settings, steps, timing
        self._failures = failures or Failures()
        self._dice = np.random.default_rng(self._failures.seed)
        self._homeless: deque[Session] = deque()  # whose replica died
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
            self._add(SimulatedReplica(self._name(), 0.0))
        for moment in self._failures.at:
            self._at(moment, self._kill_one)
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
        if not (self._waiting or self._homeless) and self._place(session, self._timing.grant_s):
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
        self._hold(session, replica)
        ready = self._now + delay_s + self._prompt_s(session, replica, cached)
        session.ready_s = ready - session.arrival.at_s
        live = max(ready, session.arrival.at_s + HANDSHAKE_DELAY_S)
        end = live + min(session.arrival.length_s, self._settings.session_limit_s)
        self._at(live, partial(self._begin, session))
        self._at(end, partial(self._end, session))
        self._at(end + self._timing.close_s, partial(self._leave, session))
        return True

    def _hold(self, session: Session, replica: SimulatedReplica) -> None:
        session.replica = replica
        replica.holders[session.arrival.number] = session
        self._held += 1
        self._count()

    def _prompt_s(self, session: Session, replica: SimulatedReplica, cached: bool) -> float:
        text = prompt_positions(PROMPTS[session.arrival.prompt].text)
        pieces = [text] if cached else [VOICE_POSITIONS, text]
        between = self._steps.tick(replica.live, self._context(replica)) if replica.live else 0.0
        return sum(self._steps.prefill(piece) + between for piece in pieces)

    def _begin(self, session: Session) -> None:
        session.began = self._now
        if session.replica is not None:
            self._change_live(session.replica, self._now, 1)

    def _end(self, session: Session) -> None:
        if session.over:
            return
        session.over = True
        assert session.began is not None, "its conversation began"
        self._forecast.live_seconds += self._now - session.began
        if session.replica is not None:
            self._change_live(session.replica, session.began, -1)
        else:  # it ended in silence, but by its caller's will
            self._homeless.remove(session)
            self._open -= 1
            self._count()

    def _change_live(self, replica: SimulatedReplica, began: float, change: int) -> None:
        replica.live += change
        replica.begun += change * began

    def _leave(self, session: Session) -> None:
        replica = session.replica
        if replica is None:  # it was lost, or ended while it waited for another replica
            return
        self._held -= 1
        self._open -= 1
        del replica.holders[session.arrival.number]
        self._fleet.leave(replica)
        self._settle(replica)
        self._count()
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        while self._homeless and self._go_on(self._homeless[0]):
            self._homeless.popleft()
        while self._waiting and not self._homeless:
            session = self._waiting[0]
            if not self._place(session, self._timing.handover_s + self._timing.grant_s):
                return
            self._waiting.popleft()
            self._queued -= session.waited
            self._count()

    def _count(self) -> None:
        self._load.set(self._now, self._held + len(self._waiting) + len(self._homeless))

    # Replicas that die

    def _add(self, replica: SimulatedReplica) -> None:
        self._fleet.add(replica)
        if np.isfinite(self._failures.mtbf_s):
            lifetime = self._dice.exponential(self._failures.mtbf_s)
            self._at(self._now + lifetime, partial(self._die, replica))

    def _kill_one(self) -> None:
        serving = sorted(key for key, one in self._fleet.replicas.items() if not one.draining)
        if serving:
            self._die(self._fleet.replicas[serving[self._dice.integers(len(serving))]])

    def _die(self, replica: SimulatedReplica) -> None:
        if replica.key not in self._fleet.replicas:
            return
        self._forecast.deaths += 1
        self._fleet.remove(replica)
        self._settle(replica)
        if not replica.draining:
            self._starting += 1
            self._at(self._now + self._timing.startup_s, partial(self._come_up, self._now))
        sessions = sorted(replica.holders.values(), key=lambda one: -(one.began or self._now))
        for session in sessions:
            self._held -= 1
            session.replica, session.silent_since = None, self._now
            if session.over:
                self._open -= 1
            elif self._homeless or not self._go_on(session):
                self._homeless.append(session)
                give_up = self._now + self._settings.queue_timeout_s
                self._at(give_up, partial(self._lose, session, self._now))
        self._count()

    def _go_on(self, session: Session) -> bool:
        """Takes a slot for a session whose replica died, if there is one."""
        found = self._fleet.place(session.arrival.voice)
        if found is None:
            return False
        replica, _ = found
        self._hold(session, replica)
        talk_s = 0.0
        if session.began is not None:
            talk_s = session.silent_since - session.began
            self._change_live(replica, session.began, 1)
        begins = max(self._now, session.silent_since + self._failures.noticed_s, replica.rebuilding_until)
        replica.rebuilding_until = begins + self._failures.rebuild(talk_s)
        self._forecast.gaps.append(replica.rebuilding_until - session.silent_since)
        return True

    def _lose(self, session: Session, since: float) -> None:
        if session.replica is not None or session.silent_since != since or session.over:
            return
        session.over = True
        self._forecast.lost += 1
        self._open -= 1
        self._homeless.remove(session)
        if session.began is not None:
            self._forecast.live_seconds += session.silent_since - session.began
        self._count()

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
        self._add(SimulatedReplica(self._name(), asked))
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
