"""Whether conversations that were cut, moved and brought back said what uninterrupted ones would have said.

The gateway keeps each session's tokens (`token_log_dir`). They are compared with those of an engine of our
own that hears the same frames without a break: what each connection brought, up to the frame with which the
service says that the next one goes on. Where a rebuild made other codes of the user's sound, the agent's
tokens are compared given the user's codes of the log instead. The agent's text, and that of the frames which
the client was told to have missed, has to be all that the tokens spell.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplex.audio.transcoder import Transcoder
from personaplex.config import USER, EngineConfig, Pcm
from personaplex.engine.engine import Engine
from personaplex.engine.interface import Slot
from personaplex.engine.rerun import rerun
from personaplex.loading import ModelSpec, load_parts, resolve
from personaplex.text import PieceDecoder, Tokenizer
from personaplex.tokenlog import TokenLog

from .talks import Talk

LOG_WAIT_S = 10.0
GROUP = 8  # conversations at a time in our own engine


@dataclass
class Compared:
    """One conversation. `user_codes_equal`: share of the user's frames."""

    session: str
    frames: int
    tokens_equal: bool
    user_codes_equal: float
    holes: list[str]


class _Given:
    """A talk, its log and the frames that the service was sent."""

    def __init__(self, talk: Talk, log: TokenLog) -> None:
        self.talk, self.log = talk, log
        self.fed, self.short = _fed(talk, len(log))
        self.rows: list[NDArray[np.integer]] = []


def compare(talks: list[Talk], folder: Path, model: str) -> list[Compared]:
    """Of every conversation that was live; raises AssertionError for one whose tokens were not kept."""
    parts = load_parts(resolve(ModelSpec(model, device="cpu")), EngineConfig())
    given = [_Given(talk, _read(folder / f"{talk.session}.npz", talk)) for talk in talks if talk.legs]
    given.sort(key=lambda one: len(one.fed))
    engine = parts.engine(EngineConfig(slots=GROUP))
    for start in range(0, len(given), GROUP):
        _run(engine, given[start : start + GROUP])
    return [_compare(engine, parts.tokenizer, one) for one in given]


def figures(compared: list[Compared]) -> dict[str, Any]:
    """For the report."""
    shares = [one.user_codes_equal * one.frames for one in compared]
    frames = sum(one.frames for one in compared)
    return {
        "sessions": len(compared),
        "frames": frames,
        "sessions_with_other_tokens": [one.session for one in compared if not one.tokens_equal],
        "user_codes_equal": round(sum(shares) / max(1, frames), 5),
        "untold_holes": [f"{one.session}: {hole}" for one in compared for hole in one.holes],
    }


def _read(path: Path, talk: Talk) -> TokenLog:
    """Each connection's end writes the file anew; the last one has all frames."""
    deadline, wanted = time.monotonic() + LOG_WAIT_S, max(talk.legs[-1].frame, talk._next_page)
    while True:
        log = TokenLog.load(path) if path.exists() else TokenLog()
        if len(log) >= wanted:
            return log
        assert time.monotonic() < deadline, f"{talk.session}: {len(log)} of {wanted} frames were kept"
        time.sleep(0.1)


def _fed(talk: Talk, frames: int) -> tuple[list[Pcm], int]:
    """The frames that were answered, and how many the service says to have heard that nobody sent it."""
    fed: list[Pcm] = []
    short = 0
    ends = [leg.frame for leg in talk.legs[1:]] + [frames]
    for leg, end in zip(talk.legs, ends, strict=True):
        transcoder = Transcoder()
        heard = [frame for data in leg.sent for frame in transcoder.receive(data)]
        short += max(0, end - len(fed) - len(heard))
        fed += heard[: max(0, end - len(fed))]
    return fed, short


def _run(engine: Engine, group: list[_Given]) -> None:
    slots: dict[Slot, _Given] = {engine.open(one.talk.persona): one for one in group}
    for number in range(max(len(one.fed) for one in group)):
        for slot, one in list(slots.items()):
            if number < len(one.fed):
                engine.feed(slot, one.fed[number])
            else:
                engine.close(slot)
                del slots[slot]
        for output in engine.step():
            slots[output.slot].rows.append(output.tokens)
    for slot in slots:
        engine.close(slot)


def _compare(engine: Engine, tokenizer: Tokenizer, one: _Given) -> Compared:
    kept, count = one.log.tokens, min(len(one.log), len(one.rows))
    rows = np.stack(one.rows[:count]) if count else kept[:0]
    same_user = (rows[:, USER] == kept[:count, USER]).all(axis=1)
    equal = bool((rows == kept[:count]).all())
    if not equal and not same_user.all():
        slot = engine.open(one.talk.persona)
        said = np.stack(list(rerun(engine, slot, kept)))
        engine.close(slot)
        equal = bool((said[:, :9] == kept[:, :9]).all())
    share = float(same_user.mean()) if count else 1.0
    return Compared(one.talk.session, len(one.log), equal, share, _holes(tokenizer, one))


def _holes(tokenizer: Tokenizer, one: _Given) -> list[str]:
    """What is missing of a conversation without a word."""
    found = []
    for number, leg in enumerate(one.talk.legs):
        if leg.frame - leg.heard != leg.lost or leg.lost < 0:
            found.append(f"connection {number}: from {leg.heard} to {leg.frame}, told {leg.lost}")
    if one.short:
        found.append(f"{one.short} frames of the user were answered that were not sent")
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.push(int(token)) for token in one.log.text]
    heard = one.talk.report.transcript
    least = "".join(pieces[: max(0, one.talk._next_page - 1)])  # the last page's text may not have come yet
    if not (heard.startswith(least) and "".join(pieces).startswith(heard)):
        at = next((k for k, (a, b) in enumerate(zip(heard, "".join(pieces), strict=False)) if a != b), -1)
        found.append(f"the transcript differs from the tokens at character {at}")
    return found
