"""Full-Duplex-Bench in one command: `python -m personaplex.evaluate run | synth | score | report`.

    run DATA --output OUT     answers the recordings and scores the answers; goes on where it stopped
    synth OUT                 makes a set of the same layout by espeak-ng, whose times are known exactly
    score OUT                 scores answers that are there, of this or any other system; no engine, no torch
    report OUT...             one page of one or several runs side by side

OUT/{task}/{ID}/{repeat}/ holds output.wav, output.json and sample.json; OUT/ results.json and report.html.
The exit codes are those of `cli`: 1 when samples failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personaplex import cli

if __name__ == "__main__":
    cli.guard_imports("evaluate")

from personaplex.errors import ConfigError
from personaplex.evaluation import dataset, report, results, scoring, synth
from personaplex.evaluation.dataset import TASKS, Dataset
from personaplex.evaluation.judge import Judge
from personaplex.evaluation.report import Run
from personaplex.evaluation.scoring import Record, Scorer
from personaplex.evaluation.transcript import Whisper
from personaplex.evaluation.vad import Detector
from personaplex.files import read_bounded

RUN_FILE = "run.json"
REPORT_FILE = "report.html"
JUDGE_KEY = "OPENAI_API_KEY"  # the variable that holds the judge's key, if it wants one
_RUN_LIMIT = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; gives its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return cli.run(
        lambda: _command(argv),
        "evaluate",
        "interrupted; run it again to go on, finished answers are kept",
    )


def _command(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    code: int = options.command(options)
    return code


def _run(options: argparse.Namespace) -> int:
    from personaplex.config import Sampling
    from personaplex.evaluation.runner import Job, Runner, RunSettings, note_failure, pending
    from personaplex.loading import ModelSpec

    found = dataset.load(options.data, options.tasks or (), options.limit)
    scorer = _scorer(options, options.data)
    spec = ModelSpec(
        name=options.model,
        repo=options.hf_repo or ModelSpec.repo,
        revision=options.revision,
        device=options.device,
        dtype=options.dtype,
        weights=options.weights,
        kv=options.kv,
    )
    sampling = Sampling().greedy() if options.greedy else Sampling()
    settings = RunSettings(spec, options.voice, sampling, options.seed, options.repeats)
    runner = Runner(settings, options.batch_size)
    options.output.mkdir(parents=True, exist_ok=True)
    jobs, records = runner.plan(found.samples, options.output)
    missing = pending(jobs, options.force)
    described = {**runner.described, "data": str(options.data.resolve())}
    scoring.write_json(options.output / RUN_FILE, described)
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} answers are there already")

    def score(job: Job) -> Record:
        record = {**scorer.record(job.sample, job.folder), **job.noted}
        scoring.write_json(job.folder / scoring.SAMPLE_FILE, record)
        return record

    def finished(job: Job, reason: str | None) -> None:
        if reason is None:
            score(job)
        else:
            note_failure(job, reason)

    runner.run(missing, finished)
    for job in jobs:
        record = scoring.read_record(job.folder)
        if record is None:
            raise ConfigError(
                f"{job.folder.name}: its {scoring.SAMPLE_FILE} is gone: is another run at work?"
            )
        records.append(record if record["error"] or _current(record, options) else score(job))
    return _conclude(options.output, records, found, described, scorer.source)


def _current(record: Record, options: argparse.Namespace) -> bool:
    """Whether an answer that was there already was scored as it is asked for now."""
    return record["transcript"] == options.transcript and not (options.judge_url or options.icc_gt)


def _score(options: argparse.Namespace) -> int:
    noted = _noted(options.output)
    place = options.data or (Path(noted["data"]) if noted.get("data") else None)
    if place is None:
        raise ConfigError(f"{options.output.name} does not say what it answers: give the benchmark's --data")
    found = dataset.load(place, options.tasks or ())
    scorer = _scorer(options, place)
    records = scoring.score(options.output, found.samples, scorer)
    described = {**noted, "data": str(place.resolve())}
    return _conclude(options.output, records, found, described, scorer.source)


def _conclude(
    out: Path, records: Sequence[Record], found: Dataset, described: Mapping[str, Any], source: str
) -> int:
    """Writes results and report, prints the figures; 1 when a sample failed."""
    summary = results.results(records, found, described, source)
    scoring.write_json(out / results.RESULTS_FILE, summary)
    report.write(out / REPORT_FILE, [Run.load(out)])
    for task in summary["tasks"].values():
        print(f"{task['title']}: {task['scored']} of {task['answers']} scored")
        for profile in ("official", "event"):
            shown = (f"{name} {_value(figure)}" for name, figure in task[profile].items())
            print(f"  {profile:<9} {', '.join(shown)}")
    for error in summary["errors"]:
        cli.complain(f"{error['task']}/{error['id']}: {error['reason']}")
    print(f"report: {out / REPORT_FILE}")
    return cli.FAILED if summary["errors"] else 0


def _value(figure: Mapping[str, Any]) -> str:
    value = figure.get("mean", figure)["value"]
    return "none" if value is None else f"{value:.3f}"


def _report(options: argparse.Namespace) -> int:
    runs = [Run.load(folder) for folder in options.outputs]
    path = options.page or options.outputs[0] / REPORT_FILE
    report.write(path, runs)
    print(f"report: {path}")
    return 0


def _synth(options: argparse.Namespace) -> int:
    made = synth.synthesise(options.output, options.each, options.seed)
    print(f"{made} samples in {options.output}; their distribution of backchannels: {synth.EXPECTED_FILE}")
    return 0


def _scorer(options: argparse.Namespace, data: Path) -> Scorer:
    """The scorer the options ask for. Raises ConfigError."""
    judge = None
    if options.judge_url or options.judge_model:
        judge = Judge(options.judge_url or "", options.judge_model or "", os.environ.get(JUDGE_KEY, ""))
    place = options.icc_gt
    if place is None and (data / synth.EXPECTED_FILE).is_file():
        place = data / synth.EXPECTED_FILE
    return Scorer(
        Detector(),
        options.transcript,
        Whisper(options.whisper_model) if options.transcript == "whisper" else None,
        dataset.expected_backchannels(place) if place else {},
        judge.rate if judge else None,
    )


def _noted(out: Path) -> dict[str, Any]:
    """What `run` wrote about itself; {} for the answers of another system."""
    try:
        data = json.loads(read_bounded(out / RUN_FILE, _RUN_LIMIT))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{out.name}: {RUN_FILE} cannot be read") from error
    if not isinstance(data, dict) or not isinstance(data.get("data", ""), str):
        raise ConfigError(f"{out.name}: {RUN_FILE} cannot be read")
    return data


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m personaplex.evaluate",
        description="Full-Duplex-Bench for PersonaPlex.",
        examples=(
            "python -m personaplex.evaluate synth set --each 5",
            "python -m personaplex.evaluate run set --model tiny --output out",
            "python -m personaplex.evaluate score out --transcript file",
        ),
    )
    commands = parser.add_subparsers(required=True, metavar="run | synth | score | report")
    _add_run(commands.add_parser("run", help="answer the benchmark's recordings and score the answers"))
    made = commands.add_parser("synth", help="make a synthetic set by espeak-ng")
    made.add_argument("output", type=Path, metavar="OUT")
    made.add_argument("--each", type=cli.whole(1), default=20, metavar="N", help="samples a task (20)")
    made.add_argument("--seed", type=cli.whole(0), default=0)
    made.set_defaults(command=_synth)
    scored = commands.add_parser("score", help="score answers that are there")
    scored.add_argument("output", type=Path, metavar="OUT")
    scored.add_argument("--data", type=Path, help="what they answer, where OUT does not say")
    _add_scoring(scored)
    scored.set_defaults(command=_score)
    page = commands.add_parser("report", help="one page of one or several runs")
    page.add_argument("outputs", type=Path, nargs="+", metavar="OUT")
    page.add_argument("--page", type=Path, metavar="FILE", help="default: report.html in the first OUT")
    page.set_defaults(command=_report)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="the benchmark's folder")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT")
    parser.add_argument("--limit", type=cli.whole(1), metavar="N", help="at most N samples a task")
    parser.add_argument("--repeats", type=cli.whole(1), default=1, help="answers to each sample (1)")
    parser.add_argument("--seed", type=cli.whole(0), default=0)
    parser.add_argument("--force", action="store_true", help="replace answers made with other settings")
    parser.add_argument("--model", default="7b", help="7b, tiny or a directory (7b)")
    parser.add_argument("--hf-repo", metavar="REPO", help="Hugging Face repository of 7b")
    parser.add_argument("--revision", help="branch, tag or commit in that repository")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--weights", default="auto", choices=("auto", "int8"))
    parser.add_argument("--kv", default="auto", choices=("auto", "int8"))
    parser.add_argument(
        "--batch-size", type=cli.whole(1), default=16, metavar="N", help="conversations at once (16)"
    )
    parser.add_argument("--voice", default="NATF2", help="a voice's name, a .pt voice file or a recording")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    _add_scoring(parser)
    parser.set_defaults(command=_run)


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all there"
    )
    parser.add_argument(
        "--transcript",
        default="text",
        choices=("text", "file", "whisper"),
        help="words from the model's text stream, from output.json as it stands, or by faster-whisper",
    )
    parser.add_argument("--whisper-model", default="base.en", metavar="NAME")
    parser.add_argument("--icc-gt", type=Path, metavar="FILE", help=f"default: DATA/{synth.EXPECTED_FILE}")
    parser.add_argument("--judge-url", metavar="URL", help=f"OpenAI-compatible; its key in {JUDGE_KEY}")
    parser.add_argument("--judge-model", metavar="NAME")


if __name__ == "__main__":
    sys.exit(main())
