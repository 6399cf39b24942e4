"""A tick as a device runs it, without the device: fixed shapes, no word from or to the host, same tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from golden import CONFIG, model
from sessions import PERSONAS, engine, speech
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from personaplex.engine import graph
from personaplex.engine.graph import TickRunner, prefixes
from personaplex.engine.prefill import Prefill
from personaplex.engine.state import EngineState
from personaplex.kernels import ops
from personaplex.model import Model
from personaplex.model.lm import LM
from personaplex.model.mimi import Mimi

pytest.importorskip("triton")

from personaplex.kernels import triton_attention as attention
from personaplex.kernels import triton_pointwise as pointwise


class OnTheDeviceOnly(TorchDispatchMode):
    """Fails at any operation that touches the host's memory or has a shape that depends on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                assert tensor.device.type == "meta", f"{func} touches the host"
        self.operations = getattr(self, "operations", 0) + 1
        return out


def stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Kernel launches without kernels: outputs of the right shape, type and place."""

    def attend(ring: Any, _layer: int, qkv: Tensor, _rope: Any, _active: Tensor) -> Tensor:
        n, steps, _, heads, size = qkv.shape
        return qkv.new_empty(n, steps, heads, size).transpose(1, 2)

    def attend_depth(qkv: Tensor, _keys: Tensor, _values: Tensor, _step: int) -> Tensor:
        n, _, _, heads, size = qkv.shape
        return qkv.new_empty(n, heads, 1, size)

    patch.setattr(attention, "attend", attend)
    patch.setattr(attention, "attend_depth", attend_depth)
    patch.setattr(pointwise, "rms_norm", lambda x, _gain, _eps: torch.empty_like(x))
    patch.setattr(pointwise, "silu_multiply", lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
    patch.setattr(pointwise, "embed", lambda tokens, _, text: text.new_empty(len(tokens), text.shape[1]))
    patch.setattr(pointwise, "add_embedding", lambda x, _table, _tokens: torch.empty_like(x))
    patch.setattr(pointwise, "noise_keys", lambda seeds, _, steps, count: steps.new_empty(len(seeds), count))
    patch.setattr(
        pointwise, "sample", lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64)
    )


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_a_device_tick_has_fixed_shapes_and_leaves_the_host_alone(
    monkeypatch: pytest.MonkeyPatch, kv: str
) -> None:
    """On torch's meta device there are no values: item, tolist, nonzero fail, as does the host's memory."""
    stand_ins(monkeypatch)
    device = torch.device("meta")
    monkeypatch.setattr(ops, "uses_triton", lambda _: True)
    with torch.inference_mode():
        with torch.device("meta"):
            lm, mimi = LM(CONFIG.lm), Mimi(CONFIG.mimi)
        for part, kind in ((lm, torch.bfloat16), (mimi, torch.float32)):
            weights = {
                name: torch.empty(t.shape, dtype=kind, device=device) for name, t in part.state_dict().items()
            }
            part.load_state_dict(weights, assign=True)
            part.prepare()
        net = Model(lm, mimi, CONFIG)
        state = EngineState.allocate(net, 3, kv)
        pcm, active = torch.zeros(3, 1920, device=device), torch.ones(3, dtype=torch.bool, device=device)
        with OnTheDeviceOnly() as watch:
            out = graph.step(net, state, pcm, active)
        assert out.pcm.shape == (3, 1920)
        assert out.tokens.shape == (3, 17)
        assert watch.operations > 500
        with pytest.raises(RuntimeError):
            out.tokens[0, 0].item()


@contextlib.contextmanager
def kernels_everywhere() -> Iterator[None]:
    """The device's path on the CPU: Triton's kernels in the interpreter, convolutions over all slots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "uses_triton", lambda _: True)
        patch.setattr(Prefill, "warm", lambda _: None)
        yield


def test_the_devices_path_speaks_like_the_cpus() -> None:
    """Prompt and two frames of a sampled and a greedy session, over int8 keys and values."""

    def talk() -> tuple[np.ndarray, np.ndarray]:
        machine = engine(2, kv="int8")  # type: ignore[arg-type]
        greedy = dataclasses.replace(PERSONAS[2], text_prompt="")
        slots = [machine.open(persona) for persona in (PERSONAS[1], greedy)]
        tokens, pcm = [], []
        for frame in speech(0, 2):
            for slot in slots:
                machine.feed(slot, frame)
            for out in machine.step():
                tokens.append(out.tokens)
                pcm.append(out.pcm)
        return np.stack(tokens), np.stack(pcm)

    expected_tokens, expected_pcm = talk()
    with kernels_everywhere():
        tokens, pcm = talk()
    assert (tokens == expected_tokens).all()
    assert np.abs(pcm - expected_pcm).max() < 1e-5


@pytest.mark.parametrize("slots", [1, 2, 3, 8, 20, 96, 128, 200])
def test_prefixes_cover_all_slots_without_much_waste(slots: int) -> None:
    widths = prefixes(slots)
    assert widths == sorted(set(widths))
    assert widths[0] == 1
    assert widths[-1] == slots
    for taken in range(1, slots + 1):
        assert min(w for w in widths if w >= taken) < 2 * taken


class Recording:
    """Stands in for a CUDA graph: replays by launching again."""

    made: list[int]

    def __init__(self) -> None:
        self.runner: TickRunner | None = None
        self.width = 0

    def pool(self) -> str:
        return "the pool"

    def replay(self) -> None:
        assert self.runner is not None
        self.runner._launch(self.width)


def test_engine_over_recorded_ticks_is_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of recording, the one pool and the choice of a width, with CUDA's own part replaced."""
    recorded: list[tuple[int, Any]] = []

    class Recorder(TickRunner):
        def _launch(self, width: int) -> None:
            if recording:
                recording[-1].runner, recording[-1].width = self, width
                recorded[-1] = (width, recorded[-1][1])
            else:
                super()._launch(width)

    recording: list[Recording] = []

    @contextlib.contextmanager
    def record(made: Recording, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        recording.append(made)
        recorded.append((0, pool))
        yield
        recording.clear()

    class Stream:
        def __init__(self, *_: Any) -> None: ...
        def wait_stream(self, _: Any) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", record)

    machine, plain = engine(6), engine(6)
    machine._runner = Recorder(model(), machine._state, 6, graphs=False)
    machine._runner._capture()
    assert recorded == [(6, None), (4, "the pool"), (2, "the pool"), (1, "the pool")]
    assert machine._runner.widths == [1, 2, 4, 6]

    greedy = PERSONAS[2]
    for one in (machine, plain):
        for _ in range(3):
            one.open(greedy)
    for frame in speech(2, 3):
        heard = []
        for one in (machine, plain):
            for state in one._open[1:3]:
                assert state is not None
                one.feed(state.slot, frame)
            heard.append(one.step())
        for ours, theirs in zip(*heard, strict=True):
            assert ours.slot == theirs.slot
            assert (ours.tokens == theirs.tokens).all()
            assert (ours.pcm == theirs.pcm).all()
