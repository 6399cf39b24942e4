"""Full-duplex sessions against a live service, under Locust.

    locust -f loadtest/locustfile.py --headless --host ws://localhost:8998 \\
        --arrivals 60@0.5,60@2 --lengths exponential:40 --output report

Every session is one Locust user, started when `arrivals` says so, whatever the service does (exchange.py);
the shape only says when the test ends. With workers (`--processes 4`, or `--master` and `--worker`) each
takes every n-th session. Without --headless Locust's web page shows the same run. The exit code is 0 when
every threshold was met, 1 when not.
"""

from __future__ import annotations

from typing import Any

from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser

from loadtest.exchange import UNFINISHED, Exchange
from loadtest.outcome import Outcome
from loadtest.protocols import PROTOCOLS
from loadtest.report import REQUIRED
from loadtest.speech import DEFAULT
from personaplex import cli
from personaplex.errors import PersonaplexError
from personaplex.persona import PROMPTS, VOICES

QUIET_S = 15.0  # without a session, after the last arrival: what is still missing will not come


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    def add(name: str, **details: Any) -> None:
        parser.add_argument(name, include_in_web_ui=False, **details)

    add("--arrivals", default="60@1", help="SECONDS@RATE or SECONDS@RATE-RATE, ..., in sessions a second")
    add("--lengths", default="exponential:30", help="how long sessions talk, in seconds")
    add(
        "--longest",
        type=cli.positive,
        default=600.0,
        help="no session wishes to talk longer, in seconds",
    )
    add("--draw-seed", type=cli.whole(0), default=1, help="the same seed gives the same sessions")
    add("--voices", default=",".join(VOICES), help="drawn from these")
    add("--prompts", default=",".join(PROMPTS), help="drawn from these")
    add("--speech", nargs="+", default=[str(DEFAULT)], help="recordings the sessions send")
    add("--dialogues", default="", help="a benchmark's folder: sessions say its samples in turn, once each")
    add("--tasks", nargs="+", default=[], help="of the benchmark; default: all that are there")
    add("--answers", default="", help="where what they heard goes, for personaplex.evaluate score")
    add("--api-key", default="", help="sent as a bearer token")
    add("--protocol", choices=list(PROTOCOLS), default="chat", help="what the sessions speak")
    add("--public-url", default="", help="the service's setting of that name, for twilio")
    add("--twilio-token", default="", help="the account's auth token, to sign as Twilio does")
    add("--insecure", action="store_true", help="accept any certificate")
    add(
        "--drain",
        type=cli.not_negative,
        default=700.0,
        help="longest time after the last arrival, seconds",
    )
    add("--require", nargs="*", default=list(REQUIRED), help="thresholds, such as good_share>=0.99")
    add("--output", default="", help="writes OUTPUT.json and OUTPUT.html")


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    try:
        environment.exchange = Exchange(environment, PersonaPlexUser.__name__)
    except (PersonaplexError, OSError) as error:
        cli.complain(cli.reason(error))
        raise SystemExit(cli.REFUSED) from error


class PersonaPlexUser(User):
    """One session, from its connection to its end."""

    @task
    def converse(self) -> None:
        caller = self.environment.exchange.take()
        finished = False
        try:
            caller.run()
            finished = True
        finally:
            if not finished:  # Locust ends its users by an exception of its own
                caller.outcome.cause = UNFINISHED
            self.environment.exchange.keep(caller.outcome)
        self._tell_locust(caller.outcome, caller.error)
        raise StopUser

    def _tell_locust(self, outcome: Outcome, error: PersonaplexError | None) -> None:
        """Locust's own statistics: each step that was reached, and the error at the one that was not."""
        steps = (
            ("connect", outcome.connect_s),
            ("slot and prompt", outcome.ready_s),
            ("conversation", outcome.talked_s if outcome.live else None),
        )
        for name, seconds in steps:
            last = seconds is None or name == "conversation"
            self.environment.events.request.fire(
                request_type="session",
                name=name,
                response_time=1e3 * (seconds or 0.0),
                response_length=0,
                exception=error if last else None,
            )
            if seconds is None:
                return


class UntilAllAreDone(LoadTestShape):
    """Ends the test once the profile is over and nobody talks any more; starts nobody."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_since: float | None = None

    def tick(self) -> tuple[int, float] | None:
        environment = self.runner.environment
        now, end = self.get_run_time(), environment.exchange.profile_s
        if now < end or self.runner.user_count:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        quiet = self._quiet_since is not None and now - self._quiet_since > QUIET_S
        over = environment.exchange.complete or quiet or now > end + environment.parsed_options.drain
        return None if over else (0, 1)
