"""The user's side of the codec: any voice, any phase, noise and rooms -> codes that tell what is said.

The network is Mimi's encoder. Its first layers are collapsed, in training, into one bank of 128 filters of
10 ms at 200 Hz, which `export` spreads over them again. The bank starts as quadrature pairs of band
filters, each with both signs: ELU(x) + ELU(-x) is |x| for large x and x^2 / 2 for small, so the residual
layer behind it sees band energies, and its own ELU, exponential for negative arguments, compresses them:
two slopes a band, in channels the bank leaves empty.

The first level's code is a state: nobody speaks, somebody speaks, or somebody has asked for something and
is now silent for more than half a second. So the ear takes turns and understands; the other levels describe
the sound. Codes are judged by those states, never by sound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import CODEBOOKS, FRAME_SIZE, SAMPLE_RATE, MimiConfig
from personaplex.training import grammar
from personaplex.training.nets import CausalConv, Residual, Transformer

LABELS = (*grammar.INTENTS, grammar.UNKNOWN)
BANK, TAPS, HOP = 128, 240, 120
_BANDS = 24
_GAIN = 250.0  # of the filters: a loud band of speech comes out near 20
_SLOPES = (0.8, 0.08)  # of a band's two compressed energies: together near a logarithm over 40 dB
_LOUDEST = 3.0  # factor of each of them
_DROPPED, _MASKED = 0.15, 6  # in training: share of features, and most bands, that are taken away
LATENT = 64  # of each side of the quantiser
CODES = 64
QUIET, SPEAKING, ASKED = 0, 1, 2  # codes of the first level; ASKED + n: the intent LABELS[n] is complete
STATES = ASKED + len(LABELS)


@dataclass(frozen=True)
class Heard:
    """What an utterance becomes; T columns at 12.5 Hz, 2 T at 25 Hz."""

    states: Tensor  # [N, T, STATES] logits, the first level's part of the quantiser's input
    rest: Tensor  # [N, T, LATENT], the other levels' part
    front: Tensor  # [N, 2 T, dim] before the transformer
    middle: Tensor  # [N, 2 T, dim] behind it


class Ear(nn.Module):
    """waveform [N, samples] at 24 kHz -> codes, one column a frame of 1920 samples."""

    books: Tensor  # of the levels behind the first

    def __init__(self, config: MimiConfig, phones: int) -> None:
        super().__init__()
        dim = config.dim
        self.bank = nn.Conv1d(1, BANK, TAPS, HOP)
        self.residual = Residual(BANK)
        self.pool = CausalConv(BANK, 16 * config.filters, 16, 8)
        self.last = CausalConv(16 * config.filters, dim, 3)
        self.transformer = Transformer(config.transformer)
        self.down = nn.Conv1d(dim, dim, 4, 2, bias=False)
        self.first_in = nn.Linear(dim, STATES, bias=False)
        self.rest_in = nn.Linear(dim, LATENT, bias=False)
        self.front_head = nn.Linear(dim, phones)
        self.middle_head = nn.Linear(dim, phones)
        self.guess_head = nn.Linear(dim, len(LABELS))
        self.register_buffer("books", torch.zeros(CODEBOOKS - 1, CODES, LATENT))
        self._start_as_filters()

    @torch.no_grad()
    def _start_as_filters(self) -> None:
        """Bands in the bank's first channels, their compressed energies in its last, and a look at those."""
        time = torch.arange(TAPS) / SAMPLE_RATE
        window = torch.hann_window(TAPS) * (2 / TAPS) * _GAIN
        mel = torch.linspace(_mel(150.0), _mel(6500.0), _BANDS)
        centres = 700 * (torch.exp(mel / 1127) - 1)
        wide, narrow = self.residual.first, self.residual.second
        for part in (self.bank, wide, narrow):
            assert part.bias is not None
            part.bias.zero_()
            part.weight.mul_(0.05)
        self.bank.weight[4 * _BANDS :].zero_()
        for band, centre in enumerate(centres.tolist()):
            lift = (1 + centre / 500) ** 1.6  # speech falls with frequency
            for phase in range(4):  # cosine, sine and their negatives
                wave = torch.cos(2 * math.pi * centre * time - phase * math.pi / 2)
                self.bank.weight[4 * band + phase, 0] = wave * window * lift
            for unit, slope in enumerate(_SLOPES):
                wide.weight[2 * band + unit].zero_()
                wide.weight[2 * band + unit, 4 * band : 4 * band + 4] = -slope / 3
                narrow.weight[4 * _BANDS + band, 2 * band + unit] = _LOUDEST
            narrow.bias[4 * _BANDS + band] = 2 * _LOUDEST  # type: ignore[index]
        seen = slice(4 * _BANDS, 5 * _BANDS)
        self.pool.weight.mul_(0.1)
        self.pool.weight[:, seen].normal_(0, (16 * _BANDS) ** -0.5)
        assert self.pool.bias is not None
        self.pool.bias.copy_(-1.5 * _LOUDEST * self.pool.weight[:, seen].sum((1, 2)))  # about their mean

    def energies(self, wave: Tensor) -> Tensor:
        """wave [N, T] -> [N, BANK, T / 120]."""
        padded = F.pad(wave[:, None], (TAPS - HOP, 0))
        out: Tensor = self.residual(self.bank(padded))
        return out

    def forward(self, wave: Tensor) -> Heard:
        """wave [N, T * 1920] -> what is heard in it."""
        energies = self.energies(wave)
        if self.training:
            energies = energies * _masks(energies)
        x = self.pool(F.elu(energies))
        front = F.dropout(self.last(F.elu(x)).transpose(1, 2), _DROPPED, self.training)
        middle = self.transformer(front)
        columns = middle.transpose(1, 2)
        padded = torch.cat([columns[..., :1], columns[..., :1], columns], dim=-1)
        down = self.down(padded).transpose(1, 2)
        return Heard(self.first_in(down), self.rest_in(down), front, middle)

    def codes(self, heard: Heard) -> Tensor:
        """-> [N, T, 8] int64."""
        found, residual = [heard.states.argmax(-1)], heard.rest
        for book in self.books:
            found.append(nearest(residual, book))
            residual = residual - book[found[-1]]
        return torch.stack(found, dim=-1)

    @torch.no_grad()
    def fit(self, rest: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """Codebooks of the levels behind the first by k-means on their latents [M, LATENT]."""
        for level in range(len(self.books)):
            self.books[level] = k_means(rest, CODES, generator, rounds)
            rest = rest - self.books[level][nearest(rest, self.books[level])]


def _masks(energies: Tensor) -> Tensor:
    """[N, BANK, 1] of ones, and zeros where half of the rows lose some neighbouring bands."""
    rows = len(energies)
    width = torch.randint(1, _MASKED + 1, (rows, 1)) * (torch.rand(rows, 1) < 0.5)
    start = torch.randint(0, _BANDS - _MASKED, (rows, 1))
    band = torch.arange(BANK)
    band = torch.where(band < 4 * _BANDS, band // 4, band - 4 * _BANDS)[None]
    kept = (band < start) | (band >= start + width)
    return kept.to(energies)[..., None]


def nearest(x: Tensor, book: Tensor) -> Tensor:
    """x [..., D], book [K, D] -> index of the nearest row [...]."""
    return (book.square().sum(1) / 2 - x @ book.t()).argmin(-1)


def k_means(x: Tensor, count: int, generator: torch.Generator, rounds: int) -> Tensor:
    """x [M, D] -> centres [count, D]; an empty cluster starts again at a random row."""
    centres = x[torch.randint(len(x), (count,), generator=generator)].clone()
    for _ in range(rounds):
        code = nearest(x, centres)
        total = torch.zeros_like(centres).index_add_(0, code, x)
        size = torch.bincount(code, minlength=count)[:, None]
        fresh = x[torch.randint(len(x), (count,), generator=generator)]
        centres = torch.where(size > 0, total / size.clamp(min=1), fresh)
    return centres


def _mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


def frames_of(samples: int) -> int:
    return -(-samples // FRAME_SIZE)


def phones_at(labels: np.ndarray, times: np.ndarray, label_rate: int) -> np.ndarray:
    """Phone at each time in seconds; 0 outside."""
    if not len(labels):
        return np.zeros(len(times), np.int64)
    index = np.floor(times * label_rate).astype(int)
    inside = (index >= 0) & (index < len(labels))
    return np.where(inside, labels[np.clip(index, 0, len(labels) - 1)], 0).astype(np.int64)
