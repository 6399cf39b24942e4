"""A record heard again, compared or continued: `python -m personaplex.replay --help`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from personaplex import cli

if __name__ == "__main__":
    cli.guard_imports("model")

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from personaplex.audio.wav import one_channel, read_wav, resample, write_wav
from personaplex.config import AGENT, FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE, USER, EngineConfig, frames_in
from personaplex.engine.rerun import rerun
from personaplex.errors import BadRecord, ConfigError
from personaplex.files import replacing
from personaplex.loading import Parts, Resolved, load_parts, resolve
from personaplex.model.mimi import Mimi
from personaplex.outputs import make_folder_of, refuse_overwriting, try_output, wav_bytes
from personaplex.playback import check_codes, load_codec, play, spec, stereo
from personaplex.record.folder import read_record
from personaplex.record.format import Event, Record
from personaplex.record.options import parser
from personaplex.record.page import render
from personaplex.record.transcript import TEXT, as_json
from personaplex.sessionlog import SessionLog
from personaplex.text import Tokenizer

_HEARD_FRAMES = 1_000  # 80 s: what the encoder is given of the user when a conversation goes on
_ANY_LENGTH = 2**31  # tokens of a role text: it was short enough for the service


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit codes are those of `cli`, 1 also for a difference found."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return cli.run(lambda: _run(parser().parse_args(argv)), "model")


def _run(options: argparse.Namespace) -> int:
    outputs = _outputs(options)
    if not (outputs or options.compare):
        raise ConfigError("nothing to do: give --output-wav, --output-text, --html or --compare")
    record = _read(options.record)
    _prepare(outputs, options, record)
    user = None if options.input_wav is None else _user_frames(options.input_wav, frames_in(options.seconds))
    differences = 0
    if not (options.compare or options.go_on or options.output_wav or options.html):
        _write(options, record, None)  # a transcript needs no model
        return 0
    found = resolve(spec(options, record.head))
    if not (options.compare or options.go_on):
        _write(options, record, load_codec(found))
        return 0
    parts = load_parts(found, _config(found))
    if options.compare:
        differences = compare(record, parts, found)
    if options.go_on:
        record = continued(record, parts, found, frames_in(options.seconds), user)
    if outputs:
        _write(options, record, parts.model.mimi)
    return cli.FAILED if differences else 0


def _config(found: Resolved) -> EngineConfig:
    return EngineConfig(kv=found.spec.kv, prompt_tokens=_ANY_LENGTH, voice_cache=1)


def _read(path: Path) -> Record:
    try:
        record = read_record(path)
    except BadRecord as error:
        raise BadRecord(f"{path}: {error}") from error
    if record.damage is not None:
        cli.complain(f"{path}: {record.damage}", "")
    elif record.ended is None:
        cli.complain(f"{path}: its session was cut short, or still goes on", "")
    missing = record.span - len(record)
    if missing:
        cli.complain(f"{path}: {missing} frames ({missing * FRAME_SECONDS:.1f} s) are missing", "")
    if not len(record):
        raise BadRecord(f"{path}: this record holds no frame of the conversation")
    return record


def _outputs(options: argparse.Namespace) -> list[tuple[str, Path]]:
    named = (("--output-wav", options.output_wav), ("--output-text", options.output_text))
    return [(option, path) for option, path in (*named, ("--html", options.html)) if path is not None]


def _prepare(outputs: Sequence[tuple[str, Path]], options: argparse.Namespace, record: Record) -> None:
    """Refuses what cannot be written before any work is done."""
    inputs = [("RECORD", options.record)]
    if options.input_wav is not None:
        inputs.append(("--input-wav", options.input_wav))
        if not options.go_on:
            raise ConfigError("--input-wav is what the user says after the end: it needs --continue")
    if options.go_on and not outputs:
        raise ConfigError("--continue needs an output: --output-wav, --output-text or --html")
    refuse_overwriting(outputs, inputs)
    for option, path in outputs:
        make_folder_of(path)
        try_output(path, wav_bytes(2 * record.span * FRAME_SIZE) if option == "--output-wav" else 1)


def _write(options: argparse.Namespace, record: Record, mimi: Mimi | None) -> None:
    if options.output_text is not None:
        with replacing(options.output_text) as part:
            part.write_text(json.dumps(as_json(record), ensure_ascii=False, indent=1), encoding="utf-8")
    if mimi is None or not (options.output_wav or options.html):
        return
    sound = stereo(record, mimi)
    if options.output_wav is not None:
        write_wav(options.output_wav, sound, SAMPLE_RATE)
    if options.html is not None:
        with replacing(options.html) as part:
            part.write_text(render(record, sound), encoding="utf-8")


def compare(record: Record, parts: Parts, found: Resolved) -> int:
    """Runs the model on what the user said and prints where it says something else; how many frames differ.
    Only the frames before the first missing one can be compared."""
    kept = _known(record, found)
    engine = parts.engine(_config(found))
    slot = engine.open(record.head.persona)
    said = np.stack(list(tqdm(rerun(engine, slot, kept), total=len(kept), unit="frame", disable=None)))
    text, codes = said[:, 0] != kept[:, 0], (said[:, AGENT] != kept[:, AGENT]).any(axis=1)
    wrong = np.flatnonzero(text | codes)
    if not len(wrong):
        print(f"the same: {len(kept)} frames ({len(kept) * FRAME_SECONDS:.1f} s), token for token")
        return 0
    first = int(wrong[0])
    what = _what(kept[first], said[first], parts.tokenizer)
    print(f"differs from frame {first} ({first * FRAME_SECONDS:.2f} s) on: {what}")
    print(f"of {len(kept)} frames {text.sum()} differ in text, {codes.sum()} in sound")
    return len(wrong)


def _what(kept: NDArray[np.integer], said: NDArray[np.integer], tokenizer: Tokenizer) -> str:
    if kept[0] != said[0]:
        old = tokenizer.label(int(kept[0])) if 0 <= kept[0] < tokenizer.size else f"token {kept[0]}"
        return f"text {old!r} was, {tokenizer.label(int(said[0]))!r} is"
    book = int(np.flatnonzero(kept[AGENT] != said[AGENT])[0])
    return f"codebook {book} of the agent's sound, {kept[AGENT][book]} was, {said[AGENT][book]} is"


def _known(record: Record, found: Resolved) -> NDArray[np.int32]:
    """The rows before the first missing frame. Raises BadRecord when they are not this model's."""
    kept = record.tokens[: record.unbroken]
    if not len(kept):
        raise BadRecord("the beginning of this conversation is missing: nothing can be run again")
    if len(kept) < len(record):
        seconds = len(kept) * FRAME_SECONDS
        cli.complain(f"frames are missing after {seconds:.1f} s: taken up to there", "")
    config = found.checkpoint.config
    check_codes(kept[:, 1:], config.mimi)
    if not 0 <= kept[:, 0].min() <= kept[:, 0].max() < config.lm.text_card:
        raise BadRecord("this record holds text tokens that the model does not have: name its own --model")
    return kept


def continued(
    record: Record, parts: Parts, found: Resolved, frames: int, user: NDArray[np.float32] | None
) -> Record:
    """The record with `frames` more, in which the user says `user` [frames, 1920], or nothing.

    The encoder hears the user as Mimi renders them, and for the last frame silence: neither is in a record.
    """
    kept = _known(record, found)
    engine = parts.engine(_config(found))
    heard = play(parts.model.mimi, kept[1:, USER])
    sound = np.concatenate([heard, np.zeros((1, FRAME_SIZE), np.float32)])[-_HEARD_FRAMES:]
    slot = engine.rebuild(SessionLog(record.head.persona, kept, record.forced[: len(kept)], sound))
    silence = np.zeros((1, FRAME_SIZE), np.float32)
    said = user if user is not None else np.repeat(silence, frames, axis=0)
    rows, events = [], [event for event in record.events if event.type != "end"]
    for frame in tqdm(said, unit="frame", disable=None):
        engine.feed(slot, frame)
        (out,) = engine.step()
        rows.append(out.tokens)
        if out.text:
            events.append(Event(TEXT, out.frame * FRAME_SECONDS, {"frame": out.frame, "text": out.text}))
    count, more = len(kept), len(rows)
    return dataclasses.replace(
        record,
        frames=np.arange(count + more),
        times_s=np.concatenate([record.times_s[:count], np.arange(count, count + more) * FRAME_SECONDS]),
        latencies_s=np.concatenate([record.latencies_s[:count], np.zeros(more)]),
        forced=np.concatenate([record.forced[:count], np.zeros(more, np.bool_)]),
        tokens=np.concatenate([kept, np.stack(rows).astype(np.int32)]),
        events=tuple(events),
    )


def _user_frames(path: Path, frames: int) -> NDArray[np.float32]:
    """The recording as frames [frames, 1920], cut or filled up with silence. Raises BadAudio, OSError."""
    pcm, rate = read_wav(path)
    samples = resample(one_channel(pcm, path.name), rate, SAMPLE_RATE)[: frames * FRAME_SIZE]
    return np.pad(samples, (0, frames * FRAME_SIZE - len(samples))).reshape(frames, FRAME_SIZE)


if __name__ == "__main__":
    sys.exit(main())
