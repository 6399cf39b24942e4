"""An own voice in the engine: the recording uploaded, the prompt offline makes of it, a log that goes on with
it. With the golden model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import GOLDEN, model
from sessions import PERSONAS, engine, speech
from test_own_voices import asking_of, in_a_loop, replica

from deployments.gateway.recording import Reader
from personaplex.audio.voicewav import load_voice_wav
from personaplex.config import FRAME_SIZE
from personaplex.engine.engine import VOICE_CHUNK
from personaplex.engine.interface import PackedVoice
from personaplex.engine.script import compose, encode_voice
from personaplex.errors import BadAudio, UnknownVoice
from personaplex.persona import Persona, own_voice
from personaplex.sessionlog import SessionLog, SessionRecorder
from personaplex.voices import Voice


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


def offline() -> Voice:
    """What `personaplex.offline --voice-prompt voice.wav` hears."""
    return Voice.from_codes(encode_voice(model(), torch.from_numpy(load_voice_wav(GOLDEN / "voice.wav"))))


def encoded(machine: object, pcm: np.ndarray) -> PackedVoice:
    encoding = machine.encode_voice(pcm)  # type: ignore[attr-defined]
    for _ in range(len(pcm) // FRAME_SIZE // VOICE_CHUNK + 2):
        done = encoding.run_chunk()
        if done is not None:
            return done
    raise AssertionError("it never ends")


def own(packed: PackedVoice, persona: Persona = PERSONAS[0]) -> Persona:
    return replace(persona, voice=own_voice(packed.digest), own=packed.packed)


def test_the_voice_of_the_upload_is_heard(reader: Reader) -> None:
    """All the way: the file as a client sends it, read in a child, over a link to a replica and its engine's
    thread. The prompt is the one that offline makes of the same file, token for token."""

    async def run() -> None:
        async with replica(lambda: engine(1)) as place:
            recording = await asyncio.to_thread(reader.read, (GOLDEN / "voice.wav").read_bytes())
            digest, packed = await asking_of(place).encode(recording.pcm)
        expected, lm = offline(), model().config.lm
        assert digest == expected.digest
        live = Voice.unpack(packed, lm)
        text = [5, 6, 7]
        assert torch.equal(compose(live, text, lm).positions, compose(expected, text, lm).positions)
        assert torch.equal(compose(live, text, lm).ring, compose(expected, text, lm).ring)

    in_a_loop(run)


def test_a_session_says_what_it_says_offline_with_the_same_voice() -> None:
    machine = engine(2)
    packed = encoded(machine, load_voice_wav(GOLDEN / "voice.wav"))

    def said(persona: Persona, voice: Voice | None) -> np.ndarray:
        slot = machine.open(persona, voice)
        rows = []
        for frame in speech(1, 6):
            machine.feed(slot, frame)
            rows.append(machine.step()[0].tokens)
        machine.close(slot)
        return np.stack(rows)

    np.testing.assert_array_equal(said(own(packed), None), said(PERSONAS[0], offline()))
    assert packed.digest in machine.usage.voices, "cached beside the named ones, by digest"
    before = machine.usage.voice_hits
    said(own(packed), None)
    assert machine.usage.voice_hits == before + 1


def test_an_own_voice_goes_on_from_its_log() -> None:
    """What failover and resume send: the log alone, to an engine that never saw the upload."""
    first, second = engine(1), engine(1)
    persona = own(encoded(first, load_voice_wav(GOLDEN / "voice.wav")))
    slot, sound = first.open(persona), speech(2, 12)
    recorder = SessionRecorder(persona, voice_digest=first.voice_digest(slot))
    for frame in sound[:8]:
        first.feed(slot, frame)
        recorder.answered(frame, first.step()[0].tokens)
    there = second.rebuild(SessionLog.unpack(recorder.log().pack()))
    for frame in sound[8:]:
        first.feed(slot, frame)
        second.feed(there, frame)
        np.testing.assert_array_equal(first.step()[0].tokens, second.step()[0].tokens)


def test_other_bytes_than_the_named_voice_are_refused() -> None:
    machine = engine(1)
    packed = encoded(machine, load_voice_wav(GOLDEN / "voice.wav"))
    for wrong in (
        Persona(own_voice(packed.digest), "", own=packed.packed[:-2]),
        Persona(own_voice(packed.digest), "", own=b"nothing"),
        Persona(own_voice("00" * 32), "", own=packed.packed),
        Persona("NATF0", "", own=packed.packed),
        Persona(own_voice(packed.digest), ""),
    ):
        with pytest.raises(UnknownVoice):
            machine.admit(wrong)
    assert machine.free == 1
    for pcm in (np.zeros(0, np.float32), np.full(9_600, np.nan, np.float32), np.zeros(10**7, np.float32)):
        with pytest.raises(BadAudio):
            machine.encode_voice(pcm)
