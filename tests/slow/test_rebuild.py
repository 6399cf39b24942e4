"""A session rebuilt from its log goes on as if it had never stopped."""

from __future__ import annotations

import dataclasses
import functools
import time

import numpy as np
import pytest
import torch
from golden import CONFIG, CPU, model
from numpy.typing import NDArray
from sessions import PERSONAS, engine, library, speech, tokenizer

from personaplex.config import STREAMS
from personaplex.engine.engine import Engine
from personaplex.engine.interface import Output, Slot
from personaplex.engine.script import embed_voice
from personaplex.errors import LogRefused, NoCapacity, SessionLost, UnknownVoice
from personaplex.kernels import ops
from personaplex.model import Model, lm
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog, SessionRecorder
from personaplex.voices import Voice

FRAMES = 70  # past the wrap of the temporal ring of 40 and of the codec's, 10 frames
LONG_AUDIO_S = 60.0  # more than any talk here


def built(slots: int = 1, net: Model | None = None, **config: object) -> Engine:
    """An engine that rebuilds everything it is given, unless told otherwise."""
    return engine(slots, net, **{"rebuild_windows": 10, "rebuild_audio_s": LONG_AUDIO_S, **config})  # type: ignore[arg-type]


def heard(machine: Engine, slot: Slot, sound: NDArray[np.float32]) -> list[Output]:
    outputs = []
    for frame in sound:
        machine.feed(slot, frame)
        outputs += [out for out in machine.step() if out.slot == slot]
    return outputs


@dataclasses.dataclass(frozen=True)
class Talk:
    """An uninterrupted session: its sound, its outputs and who it was."""

    persona: Persona
    sound: NDArray[np.float32]
    outputs: list[Output]
    voice: bytes = b""
    digest: str = ""

    def log(self, frames: int, audio_s: float = LONG_AUDIO_S) -> SessionLog:
        """As it was after so many frames, through its bytes."""
        recorder = SessionRecorder(self.persona, audio_s, self.voice, self.digest)
        for frame, output in zip(self.sound[:frames], self.outputs, strict=False):
            recorder.answered(frame, output.tokens)
        return SessionLog.unpack(recorder.log().pack())


def talk(index: int, machine: Engine, frames: int = FRAMES, voice: Voice | None = None) -> Talk:
    persona, sound = PERSONAS[index], speech(index, frames)
    slot = machine.open(persona, voice)
    digest = machine.voice_digest(slot)
    outputs = heard(machine, slot, sound)
    machine.close(slot)
    return Talk(persona, sound, outputs, b"" if voice is None else voice.pack(), digest)


@functools.cache
def told(index: int) -> Talk:
    return talk(index, engine(1))


def assert_goes_on(outputs: list[Output], whole: list[Output]) -> None:
    """The same tokens, codes and text frame by frame, and the same sound."""
    assert [out.frame for out in outputs] == [out.frame for out in whole]
    for ours, theirs in zip(outputs, whole, strict=True):
        assert (ours.tokens == theirs.tokens).all(), ours.frame
        assert (ours.user_codes == theirs.user_codes).all(), ours.frame
        assert ours.text == theirs.text
        assert np.abs(ours.pcm - theirs.pcm).max() < 1e-4


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("frames", [0, 1, 2, 3, 4, 5, 33, 61])
def test_the_same_from_any_frame_on(index: int, frames: int) -> None:
    """Greedy and sampled; before the first frame, in the shadow of the prompt's delays, before and after the
    rings are full. In chunks of 7 positions and 3 frames.
    """
    whole, machine = told(index), built(prefill_chunk=7, rebuild_chunk=3)
    slot = machine.rebuild(whole.log(frames))
    stop = min(FRAMES, frames + 12)
    assert_goes_on(heard(machine, slot, whole.sound[frames:stop]), whole.outputs[frames:stop])


def test_a_rebuilt_session_is_rebuilt_again() -> None:
    whole = told(0)
    frames = 0
    for lost in (9, 10, 23, 46):
        machine = built()
        recorder = SessionRecorder.of(whole.log(frames), LONG_AUDIO_S)
        slot = machine.rebuild(recorder.log())
        outputs = heard(machine, slot, whole.sound[frames:lost])
        assert_goes_on(outputs, whole.outputs[frames:lost])
        frames = lost


def test_in_company_bit_for_bit() -> None:
    """Rebuilt between the ticks of others: it and they are what each is alone, to the last bit."""
    whole, alone = told(1), built(prefill_chunk=16, rebuild_chunk=8)
    expected = heard(alone, alone.rebuild(whole.log(40)), whole.sound[40:60])
    machine = built(3, prefill_chunk=16, rebuild_chunk=8)
    others = [machine.open(PERSONAS[index]) for index in (0, 2)]
    slot, ours, beside = machine.admit_rebuild(whole.log(40)), list[Output](), list[Output]()
    live, fed = False, 40
    for turn in range(50):
        for other, index in zip(others, (0, 2), strict=True):
            machine.feed(other, told(index).sound[turn])
        if live and fed < 60:
            machine.feed(slot, whole.sound[fed])
            fed += 1
        for out in machine.step():
            (ours if out.slot == slot else beside).append(out)
        live = machine.rebuild_chunk() == slot or live
    assert [out.frame for out in ours] == list(range(40, 60))
    assert all(
        (a.pcm == b.pcm).all() and (a.tokens == b.tokens).all() for a, b in zip(ours, expected, strict=True)
    )
    for place, index in enumerate((0, 2)):
        for out, theirs in zip(beside[place::2], told(index).outputs, strict=False):
            assert (out.pcm == theirs.pcm).all()
            assert (out.tokens == theirs.tokens).all()


def given(net: Model, log: SessionLog, start: int, codes: list[NDArray], voice: Voice) -> NDArray:
    """The uninterrupted model, stepped from the prompt on over the log's frames, then with these user codes.

    Up to frame `start` the agent's tokens are those of the log by force.
    """
    from personaplex.engine.script import compose
    from personaplex.model.sampling import SamplingState

    script = compose(voice, tokenizer().encode_prompt(log.persona.text_prompt), CONFIG.lm)
    state, active = net.lm.allocate(1), torch.ones(1, dtype=torch.bool)
    sampling, out = SamplingState.allocate(1, CPU), []
    sampling.write(0, log.persona.sampling)
    user = [*log.tokens[1 : start + 1, 9:], *codes]
    with torch.inference_mode():
        for position in script.positions:
            net.lm.transformer.step(net.lm.embed(position)[None], state.ring, active)
        state.tokens[0], state.provided[0], state.offset[0] = script.ring, script.provided, script.frames
        for code in user:
            tokens, known = torch.zeros(1, STREAMS, dtype=torch.int64), torch.zeros(1, STREAMS, dtype=bool)
            tokens[0, 9:], known[0, 9:] = torch.from_numpy(np.array(code)), True
            out.append(lm.step(net.lm, state, lm.LMInputs(tokens, known), sampling, active, 8).tokens[0])
    return torch.stack(out).numpy()


@pytest.mark.parametrize("index", [0, 2])
def test_with_less_sound_the_tokens_are_those_of_the_codes_it_hears(index: int) -> None:
    """Of 45 frames the last 12 were kept: codes of the user may differ, nothing else does."""
    whole, machine = told(index), built()
    log = whole.log(45, audio_s=12 * 0.08)
    assert len(log.sound) == 12
    outputs = heard(machine, machine.rebuild(log), whole.sound[45:])
    # the codes of frame 44, fed again, are the user's half of the first output
    codes = [outputs[0].tokens[9:], *(out.user_codes for out in outputs)]
    expected = given(model(), log, 44, codes, library().get(whole.persona.voice))
    assert (np.stack([out.tokens for out in outputs]) == expected[45:]).all()
    first = np.stack([out.tokens for out in whole.outputs])[:45]
    assert (expected[:45] == first).all()  # the replay itself is the talk


def test_one_window_is_enough_for_one_layer_and_two_for_two() -> None:
    """What bounds a rebuild: with as many windows as layers it is exact however long the talk was."""
    net, frames = model(), 170
    whole = talk(2, engine(1), frames=200)
    exact = heard(*started(built(net=net, rebuild_windows=2), whole, frames), whole.sound[frames:])
    assert_goes_on(exact, whole.outputs[frames:])
    machine = built(net=net, rebuild_windows=1)
    slot = machine.rebuild(whole.log(frames))
    exact_ring = started(built(net=net), whole, frames)[0]._state.lm.ring.k[0]
    ours = machine._state.lm.ring.k[slot.index]
    assert torch.allclose(ours[0], exact_ring[0], atol=1e-5)  # keys of the first layer are its inputs'
    assert not torch.allclose(ours[1], exact_ring[1], atol=1e-5)


def started(machine: Engine, whole: Talk, frames: int) -> tuple[Engine, Slot]:
    return machine, machine.rebuild(whole.log(frames))


def test_rings_in_int8() -> None:
    """A quantized past rounds as stepping rounded it, but for numbers at the edge of a step."""
    whole = talk(2, engine(1, kv="int8"))  # type: ignore[arg-type]
    machine = built(kv="int8")
    slot = machine.rebuild(whole.log(50))
    outputs = heard(machine, slot, whole.sound[50:])
    equal = [(a.tokens == b.tokens).all() for a, b in zip(outputs, whole.outputs[50:], strict=True)]
    assert np.mean(equal) > 0.8


def test_layers_that_wait_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded matrices are fetched by prefills as by steps."""
    fetched: list[int] = []
    whole, machine = told(0), built()
    original = ops._fetched

    def count(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        fetched.append(weight.shape[0])
        return original(weight, x)

    monkeypatch.setattr(ops, "_fetched", count)
    slot = machine.rebuild(whole.log(20))
    assert 3 * CONFIG.lm.temporal.dim in fetched
    assert_goes_on(heard(machine, slot, whole.sound[20:25]), whole.outputs[20:25])


@pytest.mark.parametrize("kind", ["codes", "embeddings"])
def test_a_voice_of_the_sessions_own_travels_in_the_log(kind: str) -> None:
    codes = torch.randint(0, CONFIG.lm.card, (8, 14), generator=torch.Generator().manual_seed(4))
    voice = Voice.from_codes(codes)
    if kind == "embeddings":
        voice = Voice.from_embeddings(*embed_voice(model().lm, codes))
    whole, machine = talk(0, engine(1), 30, voice), built()
    log = whole.log(20)
    assert log.voice
    assert log.voice_digest == voice.digest
    slot = machine.rebuild(log)
    assert machine.voice_digest(slot) == voice.digest
    assert_goes_on(heard(machine, slot, whole.sound[20:]), whole.outputs[20:])


def test_a_cached_voice_is_used_and_a_rebuild_caches_its_own() -> None:
    machine = built(2)
    first, second = machine.rebuild(told(0).log(20)), machine.rebuild(told(0).log(30))
    assert (machine.usage.voice_hits, machine.usage.voice_misses) == (1, 1)
    for slot, start in ((first, 20), (second, 30)):
        outputs = heard(machine, slot, told(0).sound[start : start + 5])
        assert_goes_on(outputs, told(0).outputs[start : start + 5])


def test_the_shortest_first_and_no_more_than_allowed() -> None:
    machine = built(4, rebuilds=3, prefill_chunk=8, rebuild_chunk=4)
    slots = {frames: machine.admit_rebuild(told(0).log(frames)) for frames in (60, 5, 30)}
    with pytest.raises(NoCapacity, match="rebuilt"):
        machine.admit_rebuild(told(0).log(10))
    assert machine.free == 1
    order = [slot for _ in range(200) if (slot := machine.rebuild_chunk()) is not None]
    assert order == [slots[frames] for frames in (5, 30, 60)]
    assert machine.rebuild_chunk() is None


def test_closed_while_it_is_rebuilt() -> None:
    machine = built(2, rebuilds=1, prefill_chunk=8)
    gone = machine.admit_rebuild(told(0).log(40))
    machine.rebuild_chunk()
    machine.close(gone)
    slot = machine.rebuild(told(1).log(20))
    assert slot.index == gone.index
    assert_goes_on(heard(machine, slot, told(1).sound[20:25]), told(1).outputs[20:25])


def test_usage_counts_a_rebuilt_session_as_any() -> None:
    machine, other = built(), engine(1)
    slot = machine.rebuild(told(0).log(12))
    heard(machine, slot, told(0).sound[12:15])
    heard(other, other.open(PERSONAS[0]), told(0).sound[:15])
    assert machine.usage.positions == other.usage.positions


def broken(**changes: object) -> SessionLog:
    return dataclasses.replace(told(0).log(10), **changes)  # type: ignore[arg-type]


def refused_logs() -> dict[str, tuple[type[Exception], dict[str, object]]]:
    log = told(0).log(10)
    tokens, row = log.tokens.copy(), log.tokens.copy()
    tokens[4, 0], row[0, 3] = CONFIG.lm.text_card, -1
    sound = log.sound.copy()
    sound[2, 7] = np.nan
    return {
        "text outside": (LogRefused, {"tokens": tokens}),
        "prompt's codes outside": (LogRefused, {"tokens": row}),
        "sound": (LogRefused, {"sound": sound}),
        "another voice": (LogRefused, {"voice_digest": "0" * 64}),
        "damaged voice": (LogRefused, {"voice": b"nothing"}),
        "unknown voice": (UnknownVoice, {"persona": Persona("NOBODY", "")}),
    }


@pytest.mark.parametrize("name", refused_logs())
def test_refused_logs_take_nothing(name: str) -> None:
    error, changes = refused_logs()[name]
    machine = built()
    with pytest.raises(error):
        machine.admit_rebuild(broken(**changes))
    assert machine.free == 1
    assert machine.rebuild_chunk() is None


def test_no_slot_left() -> None:
    machine = built()
    machine.open(PERSONAS[0])
    with pytest.raises(NoCapacity):
        machine.admit_rebuild(told(0).log(3))
    with pytest.raises(SessionLost):
        machine.voice_digest(Slot(0, 7))


def test_half_a_minute_takes_under_a_second_and_a_half() -> None:
    """Processor time: other programs of the machine do not count."""
    from benchmarks.gpu.setup import log_of
    from benchmarks.rebuild import tiny_engine

    machine = tiny_engine()
    log = log_of(0, 375, machine._model.config.lm, who=Persona())
    began = time.process_time()
    slot = machine.rebuild(log)
    assert time.process_time() - began < 1.5
    assert [out.frame for out in heard(machine, slot, speech(0, 2))] == [375, 376]
