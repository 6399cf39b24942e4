"""Numba's kernels against torch, and their law: what a row gives does not depend on its company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from personaplex.config import Sampling
from personaplex.kernels import numba_cpu, ops
from personaplex.model.sampling import SamplingState

SHAPES = [(32, 96), (64, 512), (37, 5), (352, 129), (128, 2_048)]


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_product(inputs: int, outputs: int) -> None:
    random = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(n, inputs, generator=random) for n in (9, outputs))
    whole = numba_cpu.matmul(x, weight)
    assert (whole - F.linear(x, weight)).abs().max() < 1e-4
    for rows in range(1, 9):
        assert torch.equal(numba_cpu.matmul(x[:rows], weight), whole[:rows])
        assert torch.equal(numba_cpu.matmul(x[rows:], weight), whole[rows:])


def test_threads_share_a_large_product(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(4)
    x, weight = (torch.randn(n, 64, generator=random) for n in (3, 101))
    alone = numba_cpu.matmul(x, weight)
    monkeypatch.setattr(numba_cpu, "LARGE_MATRIX", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(numba_cpu.matmul(x, weight), alone)


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = torch.randn(4, 64), torch.randn(48, 64)
    whole = numba_cpu.matmul(x, weight)
    poisoned = x.clone()
    poisoned[1] = torch.nan
    poisoned[2, 5] = torch.inf
    out = numba_cpu.matmul(poisoned, weight)
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 3]], whole[[0, 3]])


def test_draws_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of rule in one batch, over many steps: the token torch would draw, but for rounding."""
    rules = [(0.0, 0), (0.8, 250), (0.7, 25), (1.3, 0), (0.01, 1), (0.8, 2_048), (2.0, 2)]
    state = SamplingState.allocate(len(rules), torch.device("cpu"))
    samplings = [Sampling(t, k, t, k, 11, 12) for t, k in rules]
    for slot, sampling in enumerate(samplings):
        state.write(slot, sampling)
    random = torch.Generator().manual_seed(5)
    drawn: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    logits = [3 * torch.randn(len(rules), 2_048, generator=random) for _ in range(60)]
    for compiled, tokens in drawn.items():
        monkeypatch.setattr(ops, "uses_numba", lambda _, compiled=compiled: compiled)
        for step, row in enumerate(logits):
            keys = ops.noise_keys(state.text_seed, state.audio_seed, torch.full((len(rules),), step), 9)
            tokens.append(ops.sample(row, state.text_temperature, state.text_topk, keys[:, 0]))
            tokens.append(ops.sample(row, state.audio_temperature, state.audio_topk, keys[:, 1 + step % 8]))
    ours, theirs = torch.stack(drawn[True]), torch.stack(drawn[False])
    assert (ours == theirs).float().mean() > 0.998  # two scores may be as near as the logarithms' rounding
    assert torch.equal(ours[:, 0], theirs[:, 0])
    assert len(ours[:, 3].unique()) > 60


def test_equal_logits_leave_as_many_candidates_as_asked_for() -> None:
    logits, keys = torch.zeros(400, 64), torch.arange(400) * 7_919
    logits[:, 3] = 1.0
    drawn = numba_cpu.sample(logits, torch.full((400,), 5.0), torch.full((400,), 4), keys)
    assert set(drawn.tolist()) == {0, 1, 2, 3}
    assert numba_cpu.sample(
        logits[:1], torch.zeros(1), torch.zeros(1, dtype=torch.int64), keys[:1]
    ).tolist() == [3]
    nothing = numba_cpu.sample(torch.full((1, 64), torch.nan), torch.ones(1), torch.full((1,), 4), keys[:1])
    assert 0 <= int(nothing) < 64


def test_it_runs_where_compiled_code_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only image: Numba refuses to cache when it finds no folder to write to."""

    def njit(_: str | None, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, options)

    monkeypatch.setattr(numba_cpu, "njit", njit)
    function, options = numba_cpu.kernel("void()")(len)
    assert function is len
    assert options["nogil"]
