"""The language model against the reference's runs: stages, prompts, ring wraps, forced and free tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from golden import CONFIG, CPU, GOLDEN, arrays, build_lm, difference, model, with_context
from safetensors.torch import load_file
from sessions import library, speak, tokenizer

from personaplex.config import SILENCE_CODES, SINE_CODES, STREAMS, USER, EngineConfig, ModelConfig
from personaplex.engine.engine import Engine
from personaplex.engine.script import Script, compose, embed_voice
from personaplex.kernels import kvring, numba_cpu, ops
from personaplex.model import Model, lm
from personaplex.model.depth import DepthPass
from personaplex.model.lm import LM, LMInputs, LMState
from personaplex.model.sampling import SamplingState
from personaplex.voices import Voice

HIDDEN, TEXT, AUDIO, KV = 2e-5, 5e-5, 2e-4, 8e-6
LONG = {"longctx": 256}  # runs with a context of their own


def config_of(name: str) -> ModelConfig:
    return with_context(CONFIG, LONG[name]) if name in LONG else CONFIG


def script_of(name: str) -> Script:
    inputs = arrays("prompt_inputs")
    text = inputs["text2_tokens" if name in LONG else "text_tokens"].tolist()
    return compose(golden_voice(embeddings=name == "voiceemb"), text, CONFIG.lm)


def golden_voice(embeddings: bool) -> Voice:
    codes = torch.from_numpy(arrays("prompt_inputs")["voice_codes"][0])
    if not embeddings:
        return Voice.from_codes(codes)
    return Voice.from_embeddings(*embed_voice(model().lm, codes))


def frames_of(script: Script, text: list[int], voice: Voice) -> torch.Tensor:
    """The prompt as frames [17, P], for stepping through it as the reference does."""
    assert voice.codes is not None
    count, length = script.frames, voice.codes.shape[1]
    frames = torch.full((STREAMS, count), 3)
    frames[0, length + 6 : length + 6 + len(text)] = torch.tensor(text)
    frames[1:9] = torch.tensor(SILENCE_CODES)[:, None]
    frames[1:9, :length] = voice.codes
    frames[USER] = torch.tensor(SINE_CODES)[:, None]
    return frames


def stepped(net: LM, state: LMState, frames: torch.Tensor) -> None:
    slots = state.offset.shape[0]
    sampling, active = SamplingState.allocate(slots, CPU), torch.ones(slots, dtype=torch.bool)
    given = torch.ones(slots, STREAMS, dtype=torch.bool)
    for frame in frames.t():
        lm.step(net, state, LMInputs(frame.expand(slots, -1), given), sampling, active, 8)


def prefilled(net: LM, state: LMState, script: Script, chunk: int) -> None:
    for slot in range(state.offset.shape[0]):
        start = 0
        while start < script.frames - 1:
            stop = min(start + chunk, script.prefix if start < script.prefix else script.frames - 1)
            net.transformer.prefill(script.inputs(net, start, stop), state.ring, slot, start)
            start = stop
        state.tokens[slot], state.provided[slot] = script.ring, script.provided
        state.offset[slot] = script.frames


def forced_tokens(name: str, call: int) -> dict[int, int]:
    """Stream -> token, as the `forced` run gave them."""
    if name != "forced":
        return {}
    return {
        6: {0: 9},
        7: {0: 3} | {1 + k: k * 37 + 5 for k in range(8)},
        8: {1 + k: k * 11 + 900 for k in range(8)},
        15: {0: 4},
    }.get(call, {})


def conversation(
    net: LM, state: LMState, name: str, vectors: dict[str, Any], depth_steps: int
) -> Iterator[lm.LMOutput]:
    slots = state.offset.shape[0]
    sampling, active = SamplingState.allocate(slots, CPU), torch.ones(slots, dtype=torch.bool)
    for call in range(len(vectors["outputs"])):
        tokens = torch.zeros(slots, STREAMS, dtype=torch.int64)
        given = torch.zeros(slots, STREAMS, dtype=torch.bool)
        if "user_codes" in vectors:
            tokens[:, USER] = torch.from_numpy(vectors["user_codes"][:slots, :, call])
            given[:, USER] = True
        for stream, token in forced_tokens(name, call).items():
            tokens[:, stream], given[:, stream] = token, True
        yield lm.step(net, state, LMInputs(tokens, given), sampling, active, depth_steps)


def check_run(net: LM, state: LMState, name: str, vectors: dict[str, Any], depth_steps: int) -> None:
    ran = 0
    for call, out in enumerate(conversation(net, state, name, vectors, depth_steps)):
        assert out.valid.tolist() == [bool(vectors["output_valid"][call])] * len(out.valid)
        if vectors["output_valid"][call]:
            assert (out.tokens.numpy() == vectors["outputs"][call]).all()
        if name == "cold" and call == 0:
            continue  # the first call after a reset runs nothing
        assert difference(out.text_logits, vectors["text_logits"][ran]) < TEXT
        audio = torch.stack(out.audio_logits, 1)
        assert (audio.argmax(-1).numpy() == vectors["dep_argmax"][ran][:, :depth_steps]).all()
        if "transformer_out" in vectors:
            assert difference(out.hidden, vectors["transformer_out"][ran]) < HIDDEN
            expected = vectors["dep_logits_every128"][ran][:, :depth_steps]
            assert difference(audio[..., ::128], expected) < AUDIO
        if ran in vectors.get("full_steps", []):
            at = vectors["full_steps"].tolist().index(ran)
            assert difference(audio[:1], vectors["dep_logits_full"][at : at + 1, 0, :depth_steps]) < AUDIO
        ran += 1


RUNS = ["cold", "voicewav", "voiceemb", "forced", "selfplay", "batch", "longctx"]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("route", ["stepped", "prefilled", "prefilled in chunks"])
def test_run(name: str, route: str) -> None:
    """Greedy runs, token for token: the prompt stepped frame by frame, or prefilled at once or in chunks."""
    vectors, net = arrays(f"lm_run_{name}"), build_lm(config_of(name))
    state = net.allocate(2 if name == "batch" else 1)
    with torch.inference_mode():
        if name != "cold":
            script = script_of(name)
            assert script.frames == vectors["offset_after_prompt"]
            if route == "stepped":
                text = arrays("prompt_inputs")["text2_tokens" if name in LONG else "text_tokens"].tolist()
                stepped(net, state, frames_of(script, text, golden_voice(embeddings=False)))
            else:
                prefilled(net, state, script, 13 if "chunks" in route else 10_000)
            assert (state.tokens.numpy() == vectors["cache_after_prompt"]).all()
            assert (state.provided.numpy() == vectors["provided_after_prompt"]).all()
            if "kv_after_prompt" in vectors:
                ours = torch.stack([state.ring.k, state.ring.v]).permute(2, 0, 1, 3, 4, 5)
                assert difference(ours, vectors["kv_after_prompt"]) < KV
        check_run(net, state, name, vectors, depth_steps=16)


def test_a_step_does_not_wait_for_what_the_user_says() -> None:
    """Codes given after a step leave tokens and state as codes given to it, from the very first step on."""
    net = build_lm(CONFIG)
    both = net.allocate(2), net.allocate(2)
    sampling, given = SamplingState.allocate(2, CPU), torch.zeros(2, STREAMS, dtype=torch.bool)
    given[:, USER] = True
    random = torch.Generator().manual_seed(2)
    with torch.inference_mode():
        for call in range(9):
            tokens = torch.randint(0, 2048, (2, STREAMS), generator=random)
            active = torch.tensor([True, call not in (0, 1, 4)])
            before, after = (
                lm.step(net, state, inputs, sampling, active, 8)
                for state, inputs in zip(both, (LMInputs(tokens, given), None), strict=True)
            )
            lm.append_user_codes(net, both[1], tokens[:, USER], active)
            assert torch.equal(before.tokens[before.valid], after.tokens[after.valid])
            assert torch.equal(before.valid, after.valid)
            for name in ("tokens", "provided", "offset"):
                assert torch.equal(getattr(both[0], name), getattr(both[1], name)), (call, name)
    assert before.valid.all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ["voicewav", "batch"])
def test_eight_depth_steps_are_enough_when_the_user_is_heard(name: str) -> None:
    vectors, net = arrays(f"lm_run_{name}"), build_lm()
    state = net.allocate(2 if name == "batch" else 1)
    with torch.inference_mode():
        prefilled(net, state, script_of(name), 10_000)
        check_run(net, state, name, vectors, depth_steps=8)


def record(compiled: bool, patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What each layer gives, one after the other, as the temporal transformer steps."""
    kept: list[torch.Tensor] = []
    if compiled:
        step_layer = numba_cpu.step_layer

        def watched(x: Any, *rest: Any) -> None:
            step_layer(x, *rest)
            kept.append(torch.from_numpy(x.copy()))

        patch.setattr(numba_cpu, "step_layer", watched)
    else:
        finish = ops.finish_layer
        patch.setattr(ops, "finish_layer", lambda *parts: kept.append(finish(*parts)) or kept[-1])
    return kept


def test_stages(compiled: bool) -> None:
    """One parallel call: embeddings (with -1 entries), every layer, the depth transformer's 16 steps."""
    z, net = arrays("lm_stage"), build_lm()
    with torch.inference_mode():
        x = net.embed(torch.from_numpy(z["codes"]).transpose(1, 2))
        assert difference(x, z["embeddings"]) < 1e-6
        state, active = net.allocate(2), torch.ones(2, dtype=torch.bool)
        with pytest.MonkeyPatch.context() as patch:
            kept = record(compiled, patch)
            for position in range(x.shape[1]):
                net.transformer.step(x[:, position].clone(), state.ring, active)
        assert len(kept) == 2 * x.shape[1]
        for index in (0, 1):
            assert difference(torch.stack(kept[index::2], 1), z[f"transformer.layers.{index}"]) < HIDDEN
        normed = net.out_norm(torch.stack(kept[1::2], 1))
        assert difference(normed, z["out_norm"]) < HIDDEN
        assert difference(net.text_linear(normed), z["text_logits"]) < TEXT

        hidden = torch.from_numpy(z["dep_transformer_out"])[:, 0]
        tokens = torch.from_numpy(np.concatenate([z["dep_text_token"][:, None], z["dep_audio_tokens"]], 1))
        depth, logits = DepthPass(net.depformer), []
        for step, part in enumerate(net.depth_hidden(hidden, 16)):
            logits.append(net.linears[step](depth.step(net.depth_input(step, part, tokens[:, step]))))
        assert difference(torch.stack(logits, 1), z["dep_logits"]) < AUDIO


def test_saved_voice_is_the_reference_file() -> None:
    codes = torch.from_numpy(arrays("prompt_inputs")["voice_codes"][0])
    theirs = load_file(GOLDEN / "voice_pt.safetensors")
    embeddings, cache = embed_voice(model().lm, codes)
    assert torch.equal(embeddings, theirs["embeddings"][:, 0, 0])
    assert torch.equal(cache, theirs["cache"][0])


def test_full_ring_shows_all_but_its_oldest_position() -> None:
    for capacity, steps in [(5, 1), (6, 2)]:
        for written in range(steps, 20, steps):
            queries = torch.arange(written - steps, written)[None]
            seen = kvring.visible(torch.tensor([written]), queries, capacity)[0]
            for query, row in zip(range(written - steps, written), seen, strict=True):
                expected = {
                    k % capacity
                    for k in range(max(0, written - capacity), query + 1)
                    if written < capacity or k > written - capacity
                }
                assert set(row.nonzero()[:, 0].tolist()) == expected


def test_a_voice_file_gives_the_codes_route_its_tokens() -> None:
    """Whole engine, greedy: the voice as codes and as embeddings speak the same."""
    logs = []
    for embeddings in (False, True):
        engine = Engine(model(), library(), tokenizer(), EngineConfig(slots=1))
        logs.append(speak(engine, frames=20, voice=golden_voice(embeddings)))
    assert (logs[0] == logs[1]).all()


def test_model_holds_device_and_parts() -> None:
    assert isinstance(model(), Model)
    assert model().device == CPU
