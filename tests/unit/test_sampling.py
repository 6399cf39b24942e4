"""Draws against the reference's semantics: given noise exactly, own noise in distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import arrays

from personaplex.kernels.torch_reference import choose, log_noise, noise_keys, sample

VECTORS = arrays("sampling")
LOGITS = torch.from_numpy(VECTORS["logits"])
RULES = {"audio": (0.8, 250), "text": (0.7, 25), "k0": (0.8, 0)}


def rule(temperature: float, topk: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((rows,), temperature), torch.full((rows,), topk)


def keys(seeds: list[int] | torch.Tensor, steps: list[int] | torch.Tensor, stream: int) -> torch.Tensor:
    """Keys of one stream for audio seeds (text seeds stay 0)."""
    seeds, steps = torch.as_tensor(seeds), torch.as_tensor(steps)
    return noise_keys(torch.zeros_like(seeds), seeds, steps, stream + 1)[:, stream]


@pytest.mark.parametrize("name", ["audio", "text", "k0"])
def test_given_noise(name: str) -> None:
    noise = torch.from_numpy(VECTORS[f"{name}_noise"])
    if name != "k0":  # this noise is in the order of the candidates, not of the vocabulary
        candidates = LOGITS.topk(noise.shape[1], dim=-1).indices
        noise = torch.ones_like(LOGITS).scatter(1, candidates, noise)
    assert (
        choose(LOGITS, *rule(*RULES[name], rows=3), noise.log()).tolist()
        == VECTORS[f"{name}_tokens"].tolist()
    )


@pytest.mark.parametrize("topk", [0, 25, 250])
@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy(topk: int, temperature: float) -> None:
    tokens = sample(LOGITS, *rule(temperature, topk, 3), torch.arange(3))
    assert tokens.tolist() == VECTORS["greedy"].tolist()


def test_greedy_takes_the_lowest_index_on_a_tie() -> None:
    assert sample(torch.zeros(2, 50), *rule(0.0, 5, 2), torch.arange(2)).tolist() == [0, 0]


@pytest.mark.parametrize(("temperature", "topk"), [(0.8, 20), (0.7, 5), (1.3, 0), (0.8, 1)])
def test_distribution(temperature: float, topk: int) -> None:
    """Chi-squared of 40,000 draws against softmax over the top k, at five standard deviations."""
    draws, size = 40_000, 40
    logits = LOGITS[0, :size]
    p = torch.softmax(logits / temperature, -1).numpy().astype(np.float64)
    if topk:
        p[np.argsort(-p)[topk:]] = 0
    p /= p.sum()
    some = keys(torch.full((draws,), 7), torch.arange(draws), 3)
    tokens = sample(logits.expand(draws, -1), *rule(temperature, topk, draws), some)
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


def test_a_neighbours_topk_does_not_matter() -> None:
    """Beside a slot that samples from the whole vocabulary this row's token stays."""
    some = torch.arange(3)
    alone = sample(LOGITS, *rule(0.8, 25, 3), some)
    mixed = sample(LOGITS, torch.tensor([0.8, 0.8, 0.0]), torch.tensor([25, 0, 25]), some)
    assert mixed[0] == alone[0]
    assert mixed[2] == LOGITS[2].argmax()
