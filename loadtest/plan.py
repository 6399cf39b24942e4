"""How many GPUs and gateways a load needs, how long people wait, and what a session-hour costs.

    python -m loadtest.plan --arrivals 3600@5 --lengths lognormal:300:1 \\
        --steps benchmarks/results/steps-example.json --gpu-hour 3.50 --core-hour 0.04 --output plan

Slots of a GPU: as many full windows as the step-time table runs within --tick-limit-ms, unless --set slots=N.
GPUs: Erlang's waiting formula gives a first number; the fleet is then simulated with the service's own
placement, scaling and settings (`simulation.py`), and grows until the goals on waiting and refusals are met.
--gpus N skips the search. Everything rests on the table: the report says whether it was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from loadtest import arrivals
from loadtest.chart import chart
from loadtest.failures import Failures
from loadtest.forecast import Timing
from loadtest.planner import Goals, Plan, Prices, make, transcriber_cores
from loadtest.report import page, report_files, shown, table
from personaplex import cli
from personaplex.engine.steptimes import StepTimes
from personaplex.errors import ConfigError, PersonaplexError
from personaplex.files import replacing
from personaplex.outputs import file_name, refuse_overwriting, try_output

DOTS = 3_000  # that a page can bear
_STEPS = "benchmarks/results/steps-example.json"
EXAMPLES = (
    f"python -m loadtest.plan --steps {_STEPS} --arrivals 600@0.5 --lengths exponential:60",
    f"python -m loadtest.plan --steps {_STEPS} --arrivals 300@0.2-1,300@1 --gpu-hour 3.50 --output plan",
)


def rows(plan: Plan) -> list[tuple[str, str]]:
    """The answer, for people."""
    return [
        ("step times", f"{plan.steps.name} ({plan.steps.source})"),
        ("slots per GPU", str(plan.settings.slots)),
        ("GPUs, fewest to most", f"{plan.settings.replicas_min} to {plan.settings.replicas_max}"),
        ("gateways at the peak", str(plan.gateways)),
        *_transcribers(plan),
        ("goals", "met" if plan.met else "NOT met"),
        *(
            (name, shown(value))
            for name, value in {**plan.forecast.figures(), **plan.costs, **plan.continuity}.items()
        ),
    ]


def _transcribers(plan: Plan) -> list[tuple[str, str]]:
    if not plan.transcriber_cores:
        return []
    each = transcriber_cores(plan.settings, 100)
    return [
        ("transcriber cores at the peak", shown(plan.transcriber_cores)),
        ("transcriber cores per 100 sessions", shown(each)),
    ]


def html(plan: Plan) -> str:
    """One page with plots."""
    forecast = plan.forecast
    held, waiting, replicas = (
        [(time, float(value)) for time, value in zip(forecast.times, values, strict=True)]
        for values in (forecast.held, forecast.waiting, forecast.replicas)
    )
    ready = [(one.arrival.at_s, one.ready_s) for one in forecast.sessions if one.ready_s is not None]
    note = f"Step times are {plan.steps.source}. {plan.steps.note}"
    return page(
        "Capacity plan",
        f"<p{'' if plan.steps.source == 'measured' else ' class=bad'}>{escape(note)}</p>",
        table(("", ""), [(escape(name), escape(value)) for name, value in rows(plan)]),
        "<h2>Sessions</h2>" + chart("seconds", "sessions", {"slots held": held, "waiting": waiting}, "steps"),
        "<h2>GPUs that take sessions</h2>" + chart("seconds", "GPUs", {"GPUs": replicas}, "steps"),
        "<h2>From connecting to a ready slot</h2>"
        + chart("arrival, seconds", "seconds", {"sessions": ready[:: len(ready) // DOTS + 1]}, "dots"),
    )


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m loadtest.plan",
        description="Plans a fleet for a load, by simulation.",
        formatter_class=cli.HelpWithDefaults,
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--arrivals", default="3600@1", help="SECONDS@RATE or SECONDS@RATE-RATE, ..., in sessions a second")
    add("--lengths", default="lognormal:300:1", help="how long sessions talk, in seconds")
    add(
        "--longest",
        type=cli.positive,
        default=1_800.0,
        help="no session wishes to talk longer, in seconds",
    )
    add("--draw-seed", type=cli.whole(0), default=1, help="the same seed gives the same sessions")
    add("--steps", type=Path, required=True, help="step-time table")
    add(
        "--tick-limit-ms",
        type=cli.positive,
        default=64.0,
        help="longest step a full GPU may take; a frame is 80",
    )
    add("--gpus", type=cli.whole(1, 100_000), help="most GPUs; searched unless given")
    add(
        "--ready-p95", type=cli.not_negative, default=2.0, help="goal: 95 %% are ready within so many seconds"
    )
    add("--refused", type=cli.number(0, 1), default=0.01, help="goal: at most this share is refused")
    add("--mtbf-hours", type=cli.positive, help="mean time until a GPU or its node dies; never unless given")
    add(
        "--lost",
        type=cli.number(0, 1),
        default=0.0,
        help="goal: of sessions hit by that, at most this share is lost",
    )
    add(
        "--rebuild",
        nargs=2,
        type=cli.not_negative,
        default=(0.15, 0.004),
        metavar=("S", "S_PER_S"),
        help="seconds to rebuild a session, and for each second it has talked",
    )
    add(
        "--noticed",
        type=cli.not_negative,
        default=Failures.noticed_s,
        help="seconds from a replica's last answer until the first of its sessions can be rebuilt",
    )
    add(
        "--cuts-per-hour",
        type=cli.not_negative,
        default=0.0,
        help="connections that a client loses in an hour of talk, and comes back",
    )
    add("--startup", type=cli.not_negative, default=60.0, help="seconds until a new replica takes sessions")
    add("--push", type=cli.positive, default=10.0, help="seconds between Serve's reports of load")
    add("--gpu-hour", type=cli.not_negative, default=0.0, help="price of a GPU")
    add("--core-hour", type=cli.not_negative, default=0.0, help="price of a CPU core")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the service")
    add("--output", type=file_name, help="writes OUTPUT.json and OUTPUT.html")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises ConfigError for a command line that makes no sense."""
    return _parser().parse_args(argv)


def run(options: argparse.Namespace) -> Plan:
    """The plan for parsed options. Raises ConfigError."""
    values: dict[str, str] = {}
    for pair in options.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r} is not NAME=VALUE")
        values[name] = value
    pieces = arrivals.profile(options.arrivals)
    length = arrivals.lengths(options.lengths)
    sessions = arrivals.draw(pieces, length, options.draw_seed, longest_s=options.longest)
    steps = StepTimes.load(options.steps)
    return make(
        sessions,
        pieces,
        values,
        steps,
        Timing(startup_s=options.startup, push_s=options.push),
        Goals(options.ready_p95, options.refused, options.lost),
        Prices(options.gpu_hour, options.core_hour),
        tick_limit_s=options.tick_limit_ms / 1e3,
        gpus=options.gpus,
        failures=Failures(
            mtbf_s=math.inf if options.mtbf_hours is None else 3_600 * options.mtbf_hours,
            noticed_s=options.noticed,
            rebuild_s=options.rebuild[0],
            rebuild_per_s=options.rebuild[1],
        ),
        cuts_per_hour=options.cuts_per_hour,
    )


def write(plan: Plan, stem: Path) -> None:
    """STEM.json and STEM.html, each whole or not at all."""
    for path, text in zip(
        report_files(stem), (json.dumps(plan.data(), indent=1) + "\n", html(plan)), strict=True
    ):
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the goals are met, 1 when not or when there is no plan, 2 for a command line or a file that will
    not do."""
    return cli.run(lambda: _main(parse(argv)), "loadtest")


def _main(options: argparse.Namespace) -> int:
    if options.output:
        files = report_files(options.output)
        refuse_overwriting([("--output", path) for path in files], [("--steps", options.steps)])
        for path in files:
            try_output(path)
    try:
        plan = run(options)
    except PersonaplexError as error:
        cli.complain(cli.reason(error))
        return cli.FAILED
    print("\n".join(f"{name:24} {value}" for name, value in rows(plan)))
    if options.output:
        write(plan, options.output)
    return 0 if plan.met else 1


if __name__ == "__main__":
    sys.exit(main())
