"""The engine: sessions do not see each other, slots are reused safely, bad input is refused without loss."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch
from golden import CONFIG, CPU, GOLDEN, arrays, build_lm, build_mimi, model, with_context
from numpy.typing import NDArray
from sessions import PERSONAS, engine, speak, speech

from personaplex.config import FRAME_SIZE, Sampling
from personaplex.engine.interface import Slot
from personaplex.errors import BadParameter, NoCapacity, PromptTooLong, SessionLost, UnknownVoice
from personaplex.model import Model
from personaplex.persona import Persona
from personaplex.voices import Voice


def solo(index: int, frames: int) -> tuple[NDArray, NDArray]:
    machine = engine(1)
    slot = machine.open(PERSONAS[index])
    tokens, pcm = [], []
    for frame in speech(index, frames):
        machine.feed(slot, frame)
        (out,) = machine.step()
        tokens.append(out.tokens)
        pcm.append(out.pcm)
    return np.stack(tokens), np.stack(pcm)


@pytest.mark.parametrize("chunk", [1_000, 5])
def test_batch_equals_solo(chunk: int) -> None:
    """Staggered, randomly paused sessions with different personas: bit for bit what each is alone.

    The ring of 40 positions wraps in every one of them.
    """
    frames, rng = 30, np.random.default_rng(11)
    machine = engine(4, prefill_chunk=chunk)
    slots: dict[int, Slot] = {}
    fed = [0] * 4
    heard: list[list] = [[] for _ in PERSONAS]
    while min(fed) < frames:
        for index, persona in enumerate(PERSONAS):
            if index not in slots and rng.random() < 0.2:
                slots[index] = machine.admit(persona)
        ready = machine.prefill()
        live = {s for s in slots.values() if machine._state_of(s).live}
        assert ready is None or ready in live
        for index, slot in slots.items():
            if slot in live and fed[index] < frames and rng.random() < 0.7:
                machine.feed(slot, speech(index, frames)[fed[index]])
                fed[index] += 1
        for out in machine.step():
            heard[next(i for i, s in slots.items() if s == out.slot)].append(out)
    for index in range(4):
        if chunk == 5:  # other chunks round differently; greedy choices stay
            if PERSONAS[index].sampling.text_temperature > 0:
                continue
            assert (np.stack([o.tokens for o in heard[index]]) == solo(index, frames)[0]).all()
            continue
        tokens, pcm = solo(index, frames)
        assert (np.stack([o.tokens for o in heard[index]]) == tokens).all()
        assert (np.stack([o.pcm for o in heard[index]]) == pcm).all()
        assert [o.frame for o in heard[index]] == list(range(frames))


def test_a_poisoned_slot_leaks_nothing() -> None:
    """Everything a freed slot holds is turned to NaN; its next user and the neighbours hear nothing of it."""
    expected = speak(engine(1), 25)
    machine = engine(3)
    neighbour = machine.open(PERSONAS[1])
    first = machine.open(PERSONAS[2])
    machine.close(first)
    rows = machine._state.rows(first.index, first.index + 1)
    for ring in (rows.lm.ring, rows.mimi.encoder.ring, rows.mimi.decoder.ring):
        ring.k.fill_(torch.nan)
        ring.v.fill_(torch.nan)
    for tensor in (*rows.mimi.encoder.conv_state, *rows.mimi.decoder.conv_state, rows.mimi.encoder.resample):
        tensor.fill_(torch.nan)
    rows.mimi.decoder.resample.fill_(torch.nan)
    slot = machine.open(PERSONAS[0])
    assert slot.index == first.index
    assert slot.generation == first.generation + 1
    alone = solo(1, 25)[0]
    for frame in range(25):
        machine.feed(slot, speech(len(PERSONAS[0].text_prompt) % 5, 25)[frame])
        machine.feed(neighbour, speech(1, 25)[frame])
        beside, ours = machine.step()
        assert (beside.tokens == alone[frame]).all()
        assert (ours.tokens == expected[frame]).all()
        assert np.isfinite(ours.pcm).all()


def test_same_seed_same_conversation_in_any_slot_and_with_a_cached_voice() -> None:
    machine = engine(3)
    first = speak(machine, 15)
    assert (machine.usage.voice_hits, machine.usage.voice_misses) == (0, 1)
    machine.open(PERSONAS[1])  # takes slot 0
    again = speak(machine, 15)
    assert (first == again).all()
    assert (machine.usage.voice_hits, machine.usage.voice_misses) == (1, 2)


def test_seeds_matter() -> None:
    other = dataclasses.replace(PERSONAS[0], sampling=Sampling(text_seed=1, audio_seed=3))
    assert (speak(engine(1), 10) != speak(engine(1), 10, other)).any()


def test_voices_leave_the_cache_oldest_first() -> None:
    machine = engine(1, voice_cache=1)
    for persona in (PERSONAS[0], PERSONAS[1], PERSONAS[0]):
        machine.close(machine.open(persona))
        assert machine.usage.voices == (persona.voice,)
    assert (machine.usage.voice_hits, machine.usage.voice_misses) == (0, 3)


def test_a_callers_own_voice_is_cached_under_its_digest() -> None:
    machine = engine(1)
    own = Voice.from_codes(
        torch.randint(0, CONFIG.lm.card, (8, 5), generator=torch.Generator().manual_seed(1))
    )
    for persona, voice in ((PERSONAS[0], None), (PERSONAS[1], own), (PERSONAS[0], None)):
        machine.close(machine.open(persona, voice))
    assert machine.usage.voices == (own.digest, "NATF0")  # least recently used first
    assert (machine.usage.voice_hits, machine.usage.voice_misses) == (1, 2)


def test_no_slot_left() -> None:
    machine = engine(1)
    slot = machine.open(PERSONAS[0])
    with pytest.raises(NoCapacity):
        machine.admit(PERSONAS[1])
    machine.close(slot)
    machine.close(slot)  # twice is once
    assert machine.free == 1
    assert machine.open(PERSONAS[1]).generation == 1


def test_closed_while_waiting_for_its_prompt() -> None:
    machine = engine(2, prefill_chunk=4)
    gone, stays = machine.admit(PERSONAS[0]), machine.admit(PERSONAS[1])
    machine.prefill()
    machine.close(gone)
    taken = machine.admit(PERSONAS[2])
    assert taken.index == gone.index
    live = [slot for _ in range(100) if (slot := machine.prefill()) is not None]
    assert live == [stays, taken]
    assert not machine.prefilling


def test_a_stale_slot_is_an_error_never_a_delivery() -> None:
    machine = engine(1)
    stale = machine.open(PERSONAS[0])
    machine.feed(stale, speech(0, 1)[0])
    machine.close(stale)
    assert machine.step() == []
    fresh = machine.open(PERSONAS[0])
    with pytest.raises(SessionLost):
        machine.feed(stale, speech(0, 1)[0])
    machine.close(stale)
    machine.feed(fresh, speech(0, 1)[0])
    assert [out.slot for out in machine.step()] == [fresh]


@pytest.mark.parametrize(
    ("persona", "error"),
    [
        (Persona("../NATF0"), UnknownVoice),
        (Persona("NATF0", "word " * 50), PromptTooLong),
        (Persona("NATF0", "", Sampling(text_temperature=float("nan"))), BadParameter),
        (Persona("NATF0", "", Sampling(audio_temperature=float("inf"))), BadParameter),
        (Persona("NATF0", "", Sampling(text_temperature=1e-50)), BadParameter),
        (Persona("NATF0", "", Sampling(text_topk=257)), BadParameter),
        (Persona("NATF0", "", Sampling(audio_topk=-1)), BadParameter),
        (Persona("NATF0", "", Sampling(audio_seed=2**63)), BadParameter),
    ],
)
def test_refused_personas_take_nothing(persona: Persona, error: type[Exception]) -> None:
    machine = engine(1, prompt_tokens=20)
    with pytest.raises(error):
        machine.admit(persona)
    assert machine.free == 1
    assert not machine.prefilling


def test_refused_frames_change_nothing() -> None:
    machine = engine(1)
    waiting = machine.admit(PERSONAS[0])
    with pytest.raises(BadParameter):
        machine.feed(waiting, speech(0, 1)[0])
    while machine.prefill() is None:
        pass
    for bad in (np.zeros(100, np.float32), np.full(FRAME_SIZE, np.nan, np.float32)):
        with pytest.raises(BadParameter):
            machine.feed(waiting, bad)
    machine.feed(waiting, speech(0, 1)[0])
    with pytest.raises(BadParameter):
        machine.feed(waiting, speech(0, 1)[0])
    assert len(machine.step()) == 1


def test_a_tick_keeps_no_memory() -> None:
    """After warm-up the number of living tensors and their bytes stay as they are."""

    def living() -> tuple[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return len(tensors), sum(t.untyped_storage().nbytes() for t in tensors)

    machine = engine(2)
    slots = [machine.open(persona) for persona in PERSONAS[:2]]

    def tick() -> None:
        for slot in slots:
            machine.feed(slot, speech(0, 1)[0])
        machine.step()

    for _ in range(5):
        tick()
    before = living()
    for _ in range(50):
        tick()
    assert living() == before


def test_rings_are_allocated_once() -> None:
    config = with_context(CONFIG, 3_000)
    machine = engine(4, Model(build_lm(config), build_mimi(), config))
    ring = machine._state.lm.ring
    size = ring.k.nbytes + ring.v.nbytes
    temporal = config.lm.temporal
    assert size == 4 * 2 * temporal.layers * 3_000 * temporal.dim * 4
    places = (ring.k.data_ptr(), ring.v.data_ptr())
    speak(machine, 3)
    assert (machine._state.lm.ring.k.data_ptr(), machine._state.lm.ring.v.data_ptr()) == places


def test_long_conversation_stays_exact_to_the_ring_rule() -> None:
    """200 frames over a ring of 40: equal to stepping the model over the same codes, frame by frame."""
    from personaplex.model import lm
    from personaplex.model.sampling import SamplingState

    machine = engine(1)
    slot = machine.open(PERSONAS[2])
    machine_tokens, codes = [], []
    for frame in speech(2, 200):
        machine.feed(slot, frame)
        (out,) = machine.step()
        machine_tokens.append(out.tokens)
        codes.append(out.user_codes)
    script = machine._state_of(slot).prompt.script
    state = model().lm.allocate(1)
    with torch.inference_mode():
        for position in range(script.frames - 1):
            model().lm.transformer.step(
                model().lm.embed(script.positions[position])[None],
                state.ring,
                torch.ones(1, dtype=torch.bool),
            )
        state.tokens[0], state.provided[0], state.offset[0] = script.ring, script.provided, script.frames
        for expected, heard in zip(machine_tokens, codes, strict=True):
            tokens, given = torch.zeros(1, 17, dtype=torch.int64), torch.zeros(1, 17, dtype=torch.bool)
            tokens[0, 9:], given[0, 9:] = torch.from_numpy(heard), True
            out = lm.step(
                model().lm,
                state,
                lm.LMInputs(tokens, given),
                SamplingState.allocate(1, CPU),
                torch.ones(1, dtype=torch.bool),
                8,
            )
            assert (out.tokens[0].numpy() == expected).all()


def test_end_to_end_vector() -> None:
    """The reference's whole pipeline on the golden voice, role and user: tokens and audio."""
    import json

    from personaplex.audio.voicewav import load_voice_wav
    from personaplex.audio.wav import read_wav
    from personaplex.engine.script import encode_voice

    z = arrays("e2e")
    codes = encode_voice(model(), torch.from_numpy(load_voice_wav(GOLDEN / "voice.wav")))
    assert (codes.numpy() == arrays("prompt_inputs")["voice_codes"][0]).all()
    text = json.loads((GOLDEN / "config.json").read_text())["text_prompt"]
    machine = engine(1)
    slot = machine.open(Persona("NATF0", text, Sampling().greedy()), Voice.from_codes(codes))
    user = read_wav(GOLDEN / "user.wav")[0][0]
    user = np.pad(user, (0, -len(user) % FRAME_SIZE)).reshape(-1, FRAME_SIZE)
    pcm = []
    for call, frame in enumerate(user):
        machine.feed(slot, frame)
        (out,) = machine.step()
        assert (out.tokens == z["outputs"][call]).all()
        assert (out.user_codes == z["user_codes"][:, call]).all()
        pcm.append(out.pcm)
    assert np.abs(np.concatenate(pcm)[::16] - z["pcm_every16"][: len(pcm) * 120]).max() < 1e-5
    assert np.abs(pcm[0] - z["pcm_first_frame"]).max() < 1e-5
