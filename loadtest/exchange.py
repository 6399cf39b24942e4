"""One process's part in a Locust run: starts its sessions at their moments and collects what becomes of them.

Locust's own ramps count users and would wait for a slow service, so sessions are started here: all processes
draw the same list from the same seed, the master (or the only process) tells each worker which part is its
own once Locust has set the run going, and workers send each outcome as soon as it is known. A session
that was due and of which nothing was heard, because its worker died or the run was cut off, counts as
unfinished: nothing that was meant to start is left out.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment
from locust.runners import STATE_RUNNING, STATE_SPAWNING, MasterRunner, WorkerRunner

from loadtest import arrivals
from loadtest.arrivals import Arrival
from loadtest.caller import Caller
from loadtest.dialogue import Dialogue, Dialogues, check_places, write_all
from loadtest.outcome import Outcome
from loadtest.protocols import PROTOCOLS
from loadtest.report import Report, Threshold, report_files
from loadtest.speech import load
from loadtest.target import SECRETS, target
from personaplex.outputs import make_folder_of, refuse_overwriting, try_output

logger = logging.getLogger(__name__)

UNFINISHED = "Unfinished"
SHARE = "personaplex-share"  # to a worker: the options, and which part of the sessions is its own
OUTCOME = "personaplex-outcome"  # from a worker: what became of a session
OPTIONS = (
    *("arrivals", "lengths", "longest", "draw_seed", "voices", "prompts", "speech", "insecure", *SECRETS),
    *("dialogues", "tasks", "answers", "protocol", "public_url"),
)


class Exchange:
    """Made once per process; listens to Locust's events. `user` is the name of the user class to start."""

    def __init__(self, environment: Environment, user: str) -> None:
        """Raises ConfigError, BadAudio or OSError when the options will not do; a worker gets them later."""
        self._environment, self._user = environment, user
        self._outcomes: dict[int, Outcome] = {}  # by number of the session
        self._due: deque[tuple[Arrival, float]] = deque()
        self._sessions: list[Arrival] = []
        self._began: float | None = None
        self._worker = isinstance(environment.runner, WorkerRunner)
        self._dialogues: Dialogues | None = None
        self._spoken: list[Dialogue] = []
        events = environment.events
        if self._worker:
            environment.runner.register_message(SHARE, self._take_share)
        else:
            self._try_outputs()
            self.thresholds = [Threshold.parse(text) for text in environment.parsed_options.require]
            self._prepare(self._options())
            environment.runner.register_message(OUTCOME, self._hear_worker)
            events.test_start.add_listener(self._reset)
            events.spawning_complete.add_listener(self._hand_out)
            events.test_stop.add_listener(self._write)
        events.quitting.add_listener(self._quit)

    @property
    def profile_s(self) -> float:
        """Until the last arrival, about."""
        return arrivals.duration(self._pieces)

    @property
    def complete(self) -> bool:
        """Whether it is known what became of every session."""
        return len(self._outcomes) == len(self._sessions)

    def take(self) -> Caller:
        """The session of the user that was just started."""
        arrival, late_s = self._due.popleft()
        if self._dialogues is None:
            return Caller(self._target, arrival, self._speech, late_s=late_s)
        arrival, dialogue = self._dialogues.take(arrival)
        self._spoken.append(dialogue)
        return Caller(self._target, arrival, dialogue.speech, late_s=late_s, dialogue=dialogue)

    def keep(self, outcome: Outcome) -> None:
        """What became of one session of this process."""
        self._outcomes[outcome.number] = outcome
        if self._worker:
            self._environment.runner.send_message(OUTCOME, outcome.packed())

    def report(self) -> Report:
        """All sessions that were due so far."""
        elapsed = 0.0 if self._began is None else time.monotonic() - self._began
        outcomes = []
        for arrival in self._sessions:
            if arrival.number in self._outcomes:
                outcomes.append(self._outcomes[arrival.number])
            elif arrival.at_s <= elapsed:
                outcomes.append(Outcome(arrival.number, arrival.at_s, voice=arrival.voice, cause=UNFINISHED))
        asked = {name: value for name, value in self._options().items() if name not in SECRETS}
        asked["speech"] = [Path(path).name for path in asked["speech"]]
        for name in ("dialogues", "answers"):
            asked[name] = Path(asked[name]).name
        return Report(outcomes, self.thresholds, asked)

    def _try_outputs(self) -> None:
        """Raises ConfigError or OSError where a report could not be written at the end."""
        options = self._environment.parsed_options
        if options.output:
            outputs = report_files(Path(options.output))
            refuse_overwriting(
                [("--output", path) for path in outputs],
                [("--speech", Path(path)) for path in options.speech],
            )
            for path in outputs:
                make_folder_of(path)
                try_output(path)

    def _options(self) -> dict[str, Any]:
        options = self._environment.parsed_options
        return {"host": self._environment.host, **{name: getattr(options, name) for name in OPTIONS}}

    def _prepare(self, options: dict[str, Any]) -> None:
        self._target = target(options)
        form = PROTOCOLS[self._target.protocol]({}).audio
        self._speech = load([Path(path) for path in options["speech"]], form)
        self._prepare_dialogues(options)
        self._pieces = arrivals.profile(options["arrivals"])
        self._sessions = arrivals.draw(
            self._pieces,
            arrivals.lengths(options["lengths"]),
            options["draw_seed"],
            longest_s=options["longest"],
            voices=options["voices"].split(","),
            prompts=options["prompts"].split(","),
        )

    def _prepare_dialogues(self, options: dict[str, Any]) -> None:
        self._answers = Path(options["answers"])
        if not self._worker:
            check_places(options["dialogues"], options["answers"])
        if options["dialogues"]:
            self._dialogues = Dialogues(Path(options["dialogues"]), options["tasks"])

    def _keep_answers(self) -> None:
        """Writes what the sessions of this process heard, once none of them talks any more."""
        if self._dialogues is not None:
            for fault in write_all(self._spoken, self._answers):
                logger.error("not kept: %s", fault)
            self._spoken.clear()

    def _start_all(self, sessions: list[Arrival]) -> None:
        runner = self._environment.runner
        began = time.monotonic()
        for arrival in sessions:
            gevent.sleep(max(0.0, began + arrival.at_s - time.monotonic()))
            if runner.state not in (STATE_SPAWNING, STATE_RUNNING):
                return
            self._due.append((arrival, time.monotonic() - began - arrival.at_s))
            runner.spawn_users({self._user: 1})

    # Events of the master, or of the only process

    def _reset(self, **_: Any) -> None:
        self._outcomes.clear()
        self._began = None

    def _hand_out(self, **_: Any) -> None:
        # Not before Locust has begun with no users at all: it would end those that we had started.
        runner = self._environment.runner
        self._began = time.monotonic()
        if self._dialogues is not None:
            asked = {"sessions": len(self._sessions), "arrivals": self._options()["arrivals"]}
            self._dialogues.describe(self._answers, asked)
        logger.info("%d sessions in %.0f s", len(self._sessions), self.profile_s)
        if not isinstance(runner, MasterRunner):
            gevent.spawn(self._start_all, self._sessions)
            return
        workers = sorted(runner.clients)
        for index, worker in enumerate(workers):
            part = {"index": index, "count": len(workers), "options": self._options()}
            runner.send_message(SHARE, part, client_id=worker)

    def _hear_worker(self, msg: Any, **_: Any) -> None:
        self.keep(Outcome.unpacked(msg.data))

    def _write(self, **_: Any) -> None:
        output = self._environment.parsed_options.output
        if output:
            for path in self.report().write(Path(output)):
                logger.info("report written: %s", path)

    def _quit(self, **_: Any) -> None:
        self._keep_answers()
        if self._worker:
            self._environment.process_exit_code = 0  # the master judges
            return
        self._write()  # again: what was cut off is known only now
        report = self.report()
        for failure in report.failures:
            logger.error("threshold not met: %s", failure)
        self._environment.process_exit_code = 0 if report.passed else 1

    # Events of a worker

    def _take_share(self, msg: Any, **_: Any) -> None:
        self._outcomes.clear()
        self._prepare(msg.data["options"])
        share = arrivals.share(self._sessions, msg.data["index"], msg.data["count"])
        gevent.spawn(self._start_all, share)
