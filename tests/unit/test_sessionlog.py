"""The log of a session as bytes: what comes back, and what is refused by type."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from collections import deque

import numpy as np
import pytest
import torch
from golden import CONFIG

from personaplex.config import FRAME_SECONDS, FRAME_SIZE, STREAMS, Sampling
from personaplex.engine.script import embed_voice
from personaplex.errors import CheckpointError, LogRefused, UnknownVersion
from personaplex.persona import Persona
from personaplex.sessionlog import VERSION, SessionLog, SessionRecorder
from personaplex.voices import Voice

HEAD = struct.Struct("<4sHI")


def log(frames: int = 9, kept: int = 3, top: int = 2_047, voice: bytes = b"voice") -> SessionLog:
    rng = np.random.default_rng(frames)
    return SessionLog(
        persona=Persona("NATM1", "Grüß \ud800 Gott", Sampling(0.7, 3, 1 / 3, 5, 2**63 - 1, 6)),
        tokens=rng.integers(-2, top + 1, (frames, STREAMS)).astype(np.int32),
        forced=rng.random(frames) < 0.5,
        sound=rng.standard_normal((kept, FRAME_SIZE)).astype(np.float32),
        voice=voice,
        voice_digest="ab" * 32,
    )


def repacked(
    change: dict[str, object], cut: tuple[str, ...] = (), sampling: dict[str, object] | None = None
) -> bytes:
    """A log's bytes with other fields in its head."""
    data = log().pack()
    magic, version, length = HEAD.unpack_from(data)
    head = json.loads(data[HEAD.size : HEAD.size + length]) | change
    head["sampling"] |= sampling or {}
    text = json.dumps({key: value for key, value in head.items() if key not in cut}).encode()
    return HEAD.pack(magic, version, len(text)) + text + data[HEAD.size + length :]


@pytest.mark.parametrize(
    ("frames", "kept", "top"),
    [(0, 0, 1), (1, 1, 5), (9, 3, 2_047), (9, 9, 32_767), (9, 1, 32_768), (300, 250, 31_999)],
)
def test_what_goes_in_comes_out(frames: int, kept: int, top: int) -> None:
    whole = log(frames, kept, top)
    data = whole.pack()
    back = SessionLog.unpack(memoryview(data))
    assert (back.persona, back.voice, back.voice_digest) == (whole.persona, whole.voice, whole.voice_digest)
    for name in ("tokens", "forced", "sound"):
        ours, theirs = getattr(back, name), getattr(whole, name)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert back.frames == frames
    width = 34 if top <= 32_767 else 68
    assert len(data) < 600 + frames * (width + 1) + kept * FRAME_SIZE * 4


def test_another_version_is_refused_by_type() -> None:
    for version in (0, VERSION + 1, 65_535):
        data = bytearray(log().pack())
        struct.pack_into("<H", data, 4, version)
        with pytest.raises(UnknownVersion, match=str(version)):
            SessionLog.unpack(bytes(data))
        with pytest.raises(UnknownVersion):  # whatever follows in it
            SessionLog.unpack(bytes(data[: HEAD.size]))


def test_every_cut_is_refused() -> None:
    data = log(frames=2, kept=1).pack()
    for length in (*range(400), len(data) - 1):
        with pytest.raises(LogRefused):
            SessionLog.unpack(data[:length])
    with pytest.raises(LogRefused):
        SessionLog.unpack(data + b"x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PPSX" + log().pack()[4:],
        HEAD.pack(b"PPSL", VERSION, 2**32 - 1) + b"{}",
        HEAD.pack(b"PPSL", VERSION, 2) + b"{}",
        HEAD.pack(b"PPSL", VERSION, 2) + b"[]",
        HEAD.pack(b"PPSL", VERSION, 2) + b"\xff\xff",
        HEAD.pack(b"PPSL", VERSION, 100_000) + b"[" * 100_000,
        repacked({"frames": 2**40}),
        repacked({"frames": -1}),
        repacked({"kept": 2**40}),
        repacked({"kept": 10}),
        repacked({"kept": 0, "voice_bytes": 5 + 3 * FRAME_SIZE * 4}),  # no sound of the last frame
        repacked({"frames": 9.0}),
        repacked({"frames": True}),
        repacked({"voice_bytes": -5}),
        repacked({"token_bytes": 8}),
        repacked({"token_bytes": 0}),
        repacked({"voice": None}),
        repacked({"extra": 1}),
        repacked({}, cut=("voice",)),
        repacked({}, cut=("sampling",)),
        repacked({}, sampling={"text_topk": "5"}),
        repacked({}, sampling={"more": 1}),
    ],
)
def test_what_is_no_log_is_refused(data: bytes) -> None:
    with pytest.raises(LogRefused):
        SessionLog.unpack(data)


def test_random_damage_is_refused_or_harmless() -> None:
    """Any byte of the head changed: a typed error, or a log of the same size."""
    data, rng = log(frames=3, kept=1).pack(), np.random.default_rng(3)
    for _ in range(2_000):
        damaged = bytearray(data)
        for at in rng.integers(0, 420, rng.integers(1, 4)):
            damaged[at] = rng.integers(256)
        with contextlib.suppress(LogRefused):
            assert SessionLog.unpack(bytes(damaged)).tokens.nbytes <= 2 * len(data)


def test_the_recorder_keeps_what_was_heard_last() -> None:
    recorder = SessionRecorder(Persona(), audio_s=0.25, voice=b"v", voice_digest="d")
    assert recorder.log().frames == 0
    for number in range(6):
        recorder.answered(np.full(FRAME_SIZE, number, np.float32), np.full(STREAMS, number))
    kept = recorder.log()
    assert kept.sound[:, 0].tolist() == [2, 3, 4, 5]  # 0.25 s, whole frames
    assert kept.tokens[:, 0].tolist() == list(range(6))
    assert kept.forced.tolist() == [True] + [False] * 5
    again = SessionRecorder.of(SessionLog.unpack(kept.pack()), audio_s=0.25)
    for one in (recorder, again):
        one.answered(np.full(FRAME_SIZE, 6, np.float32), np.full(STREAMS, 6))
    assert again.log().pack() == recorder.log().pack()
    assert kept.frames == 6  # a log does not grow


@pytest.mark.parametrize("limit", [1, 63, 64, 65, 130])
def test_the_sound_kept_is_the_newest_whatever_was_appended_and_cleared(limit: int) -> None:
    recorder, draw = SessionRecorder(Persona(), audio_s=limit * FRAME_SECONDS), random.Random(limit)
    expected: deque[int] = deque(maxlen=limit)
    for number in range(3 * limit + 5):
        known = draw.random() > 0.02
        pcm = np.full(FRAME_SIZE, number, np.float32)
        recorder.answered(pcm if known else None, np.full(STREAMS, number))
        pcm.fill(-1)  # the caller's to use again
        if known:
            expected.append(number)
        else:
            expected.clear()
        count = draw.randint(0, len(expected))
        frames = recorder.sound_since(number + 1 - count)
        assert [int(frame[0]) for frame in frames] == list(expected)[len(expected) - count :]
        with pytest.raises(LogRefused):
            recorder.sound_since(number - len(expected))
    if expected:
        assert recorder.log().sound[:, -1].tolist() == list(expected)


CODES = torch.randint(0, CONFIG.lm.card, (8, 6), generator=torch.Generator().manual_seed(1))


def voices() -> dict[str, Voice]:
    from golden import model

    embeddings, cache = embed_voice(model().lm, CODES)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = {name: Voice.from_embeddings(embeddings.to(kind), cache) for name, kind in kinds.items()}
    return {"codes": Voice.from_codes(CODES)} | found


@pytest.mark.parametrize("kind", ["codes", "float32", "bfloat16", "float16"])
def test_a_voice_as_bytes(kind: str) -> None:
    voice = voices()[kind]
    data = voice.pack()
    back = Voice.unpack(data, CONFIG.lm)
    assert back.digest == voice.digest
    assert back.frames == voice.frames
    for bad in (
        data[:-1],
        data + b"x",
        data[:5],
        b"",
        bytes([7]) + data[1:],
        data[:1] + b"\xff" * 8 + data[9:],
    ):
        with pytest.raises(CheckpointError):
            Voice.unpack(bad, CONFIG.lm)


def test_a_voice_with_impossible_numbers() -> None:
    good = voices()
    codes = Voice.from_codes(torch.full_like(CODES, CONFIG.lm.card))
    assert good["float32"].embeddings is not None
    assert good["float32"].cache is not None
    nan = Voice.from_embeddings(good["float32"].embeddings * torch.nan, good["float32"].cache)
    cells = Voice.from_embeddings(good["float32"].embeddings, good["float32"].cache + 5_000)
    for bad in (codes, nan, cells, Voice.from_codes(CODES.repeat(1, 7))):  # the last: longer than the window
        with pytest.raises(CheckpointError):
            Voice.unpack(bad.pack(), CONFIG.lm)
