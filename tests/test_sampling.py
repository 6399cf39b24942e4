"""Draws against the reference's semantics: given noise exactly, own noise in distribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from golden import arrays

from personaplex.config import Sampling
from personaplex.model.sampling import Caps, Rule, SamplingState, draw, draw_keys, log_noise, pick

VECTORS = arrays("sampling")
LOGITS = torch.from_numpy(VECTORS["logits"])
RULES = {"audio": (0.8, 250), "text": (0.7, 25), "k0": (0.8, 0)}


def rule(temperature: float, topk: int, rows: int, cap: int) -> Rule:
    return Rule.of(torch.full((rows,), temperature), torch.full((rows,), topk), cap)


def noise_of(keys: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tokens: log_noise(keys, tokens)


def keys(seeds: list[int] | torch.Tensor, steps: list[int] | torch.Tensor, stream: int) -> torch.Tensor:
    """Keys of one stream for audio seeds (text seeds stay 0)."""
    seeds, steps = torch.as_tensor(seeds), torch.as_tensor(steps)
    state = SamplingState.allocate(len(seeds), torch.device("cpu"))
    state.audio_seed[:] = seeds
    return draw_keys(state, steps, stream + 1)[:, stream]


@pytest.mark.parametrize("name", ["audio", "text", "k0"])
def test_given_noise(name: str) -> None:
    noise = torch.from_numpy(VECTORS[f"{name}_noise"])
    values, tokens = LOGITS.topk(noise.shape[1], dim=-1)
    if name == "k0":  # this noise is in vocabulary order
        noise = noise.gather(1, tokens)
    choice = pick(values, rule(*RULES[name], rows=3, cap=noise.shape[1]), noise.log())
    assert tokens.gather(1, choice[:, None])[:, 0].tolist() == VECTORS[f"{name}_tokens"].tolist()


@pytest.mark.parametrize("cap", [0, 250])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy(cap: int, temperature: float) -> None:
    tokens = draw(LOGITS, rule(temperature, 25, 3, cap), noise_of(torch.arange(3)))
    assert tokens.tolist() == VECTORS["greedy"].tolist()


def test_greedy_takes_the_lowest_index_on_a_tie() -> None:
    assert draw(torch.zeros(2, 50), rule(0.0, 5, 2, 5), noise_of(torch.arange(2))).tolist() == [0, 0]


@pytest.mark.parametrize(("temperature", "topk"), [(0.8, 20), (0.7, 5), (1.3, 0), (0.8, 1)])
def test_distribution(temperature: float, topk: int) -> None:
    """Chi-squared of 40,000 draws against softmax over the top k, at five standard deviations."""
    draws, size = 40_000, 40
    logits = LOGITS[0, :size]
    p = torch.softmax(logits / temperature, -1).numpy().astype(np.float64)
    if topk:
        p[np.argsort(-p)[topk:]] = 0
    p /= p.sum()
    chosen = rule(temperature, topk, draws, topk or size)
    noise = noise_of(keys(torch.full((draws,), 7), torch.arange(draws), 3))
    tokens = draw(logits.expand(draws, -1), chosen, noise)
    counts = np.bincount(tokens.numpy(), minlength=size)
    assert counts[p == 0].sum() == 0
    expected = draws * p[p > 0]
    statistic, freedom = ((counts[p > 0] - expected) ** 2 / expected).sum(), (p > 0).sum() - 1
    assert statistic <= freedom + 5 * np.sqrt(2 * freedom)


def test_noise_is_exponential_and_uncorrelated() -> None:
    some = keys(torch.arange(200), torch.arange(200) % 7, 2)
    noise = log_noise(some, torch.arange(2_048)).double().exp().numpy()
    assert noise.min() > 0
    assert abs(noise.mean() - 1) < 0.01
    assert abs(noise.var() - 1) < 0.03
    rows = np.corrcoef(noise[:50])[~np.eye(50, dtype=bool)]
    assert np.abs(rows).max() < 6 / np.sqrt(2_048)
    assert abs(np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel())[0, 1]) < 0.01


def test_noise_depends_on_seed_step_and_stream_only() -> None:
    tokens = torch.arange(64)
    base = log_noise(keys([5, 5, 5], [1, 1, 1], 4), tokens)
    assert torch.equal(base[0], base[2])
    for seed, step, stream in [(6, 1, 4), (5, 2, 4), (5, 1, 5), (5, 1, 0)]:
        assert not torch.equal(base[:1], log_noise(keys([seed], [step], stream), tokens))


def test_candidates_beyond_a_rows_own_do_not_matter() -> None:
    """A neighbour with a larger top-k widens the step; this row's token stays."""
    some, size = noise_of(torch.arange(3)), LOGITS.shape[1]
    narrow, wide = draw(LOGITS, rule(0.8, 25, 3, 25), some), draw(LOGITS, rule(0.8, 25, 3, size), some)
    assert torch.equal(narrow, wide)


def test_caps() -> None:
    plain, whole, greedy = Sampling(), Sampling(text_topk=0, audio_topk=0), Sampling().greedy()
    assert Caps.of([greedy], 100, 200) == Caps(0, 0, greedy=True)
    assert Caps.of([greedy, plain], 100, 300) == Caps(25, 250, greedy=True)
    assert Caps.of([plain, whole], 100, 300) == Caps(100, 300, greedy=False)
