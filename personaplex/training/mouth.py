"""The agent's side of the codec: what a locked frame's codes are, and the decoder that sounds them.

A frame's features are the log band energies of four quarters, the periods in it and how periodic it is;
their principal components are quantised by a residual chain of eight codebooks. The decoder is Mimi's: the
upsampling lays this and the last frame's vector out for each half frame, the transformer turns them into
coefficients, and SEANet, by weights computed here, turns coefficients into samples over a fixed basis of
half frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import CODEBOOKS, FRAME_SIZE, SAMPLE_RATE, MimiConfig
from personaplex.training.ear import k_means, nearest
from personaplex.training.lm import CODES, SILENCE
from personaplex.training.nets import CausalConv, Transformer

HALF = FRAME_SIZE // 2
LATENT = 64
_BANDS, _QUARTERS, _WINDOW = 32, 4, 960
_PERIODS = 34  # numbers of periods told apart, from the lowest
_LOWEST = 4
_ENERGY, _PITCH, _PERIODIC = 0.35, 6.0, 4.0  # weights of the features
_FLOOR = 1e-5


def features(wave: np.ndarray, periods: np.ndarray) -> np.ndarray:
    """wave [F * 1920] locked, periods [F] -> [F, features] float32."""
    count = len(periods)
    padded = np.concatenate([np.zeros(480, np.float32), wave, np.zeros(1440, np.float32)])
    window = np.hanning(_WINDOW).astype(np.float32)
    bank = _mel_bank()
    energies = []
    for quarter in range(_QUARTERS):
        start = np.arange(count) * FRAME_SIZE + 240 + 480 * quarter
        blocks = padded[start[:, None] + np.arange(_WINDOW)] * window
        energies.append(np.log(np.abs(np.fft.rfft(blocks, axis=1)) ** 2 @ bank.T + _FLOOR))
    frames = wave.reshape(count, FRAME_SIZE)
    lags = np.round(FRAME_SIZE / periods).astype(int)
    index = (np.arange(FRAME_SIZE)[None] - lags[:, None]) % FRAME_SIZE
    product = (frames * np.take_along_axis(frames, index, 1)).sum(1)
    periodic = np.clip(product / (np.square(frames).sum(1) + 1e-6), 0, 1)[:, None]
    place = np.clip(periods - _LOWEST, 0, _PERIODS - 1)
    one = np.eye(_PERIODS)[place] + 0.5 * np.eye(_PERIODS, k=1)[place] + 0.5 * np.eye(_PERIODS, k=-1)[place]
    parts = [np.concatenate(energies, 1) * _ENERGY, one * _PITCH * periodic, periodic * _PERIODIC]
    return np.concatenate(parts, 1).astype(np.float32)


def _mel_bank() -> np.ndarray:
    hertz = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    edges = 700 * (10 ** (np.linspace(_mel(60), _mel(11_500), _BANDS + 2) / 2595) - 1)
    up = (hertz - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - hertz) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(up, down)).astype(np.float32)


def _mel(hertz: float) -> float:
    return float(2595 * np.log10(1 + hertz / 700))


@dataclass
class Analysis:
    """From features to codes: principal components and codebooks. Code SILENCE is the mean of silence."""

    mean: Tensor  # [features]
    components: Tensor  # [features, LATENT]
    books: Tensor  # [8, CODES, LATENT]

    @classmethod
    def fit(cls, rows: Tensor, generator: torch.Generator, rounds: int = 12) -> Analysis:
        """Of features [M, features]."""
        mean = rows.mean(0)
        centred = rows - mean
        _, vectors = torch.linalg.eigh(centred.t() @ centred)
        components = vectors.flip(1)[:, :LATENT].contiguous()
        residual = centred @ components
        books = []
        for _ in range(CODEBOOKS):
            sample = residual[
                torch.randint(len(residual), (min(len(residual), 40_000),), generator=generator)
            ]
            book = k_means(sample, CODES, generator, rounds)
            residual = residual - book[_nearest(residual, book)]
            books.append(book)
        return cls(mean, components, torch.stack(books))

    def latents(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) @ self.components

    def codes(self, rows: Tensor) -> Tensor:
        """features [M, features] -> [M, 8] int64."""
        residual = self.latents(rows)
        found = []
        for book in self.books:
            code = _nearest(residual, book)
            residual = residual - book[code]
            found.append(code)
        return torch.stack(found, 1)

    def vectors(self, codes: Tensor) -> Tensor:
        """codes [..., 8] -> their sums [..., LATENT]; SILENCE gives the vector of silence at once."""
        quiet = (codes == SILENCE).all(-1, keepdim=True)
        total = sum(
            book[code.clamp(max=CODES - 1)] for book, code in zip(self.books, codes.unbind(-1), strict=True)
        )
        return torch.where(quiet, self.silence, total)

    @property
    def silence(self) -> Tensor:
        """The latent of digital silence."""
        rows = torch.zeros_like(self.mean)
        rows[: _BANDS * _QUARTERS] = _ENERGY * float(np.log(_FLOOR))
        return self.latents(rows)

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "components": self.components, "books": self.books}


def _nearest(x: Tensor, book: Tensor) -> Tensor:
    return torch.cat([nearest(part, book) for part in x.split(8192)])


def basis(frames: Tensor, count: int) -> Tensor:
    """The `count` principal vectors [count, 960] of the half frames of frames [M, 1920]."""
    halves = frames.reshape(-1, HALF)
    _, vectors = torch.linalg.eigh(halves.t() @ halves)
    return vectors.flip(1)[:, :count].t().contiguous()


class Mouth(nn.Module):
    """vectors [N, T, LATENT] of frames -> coefficients [N, 2 T, 16 * filters] of half frames."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.groups = config.dim // LATENT
        assert (config.dim, self.groups) == (4 * LATENT, 4)
        self.mix = nn.Parameter(torch.eye(config.dim))  # becomes the quantiser's output projection
        self.transformer = Transformer(config.transformer)
        self.last = CausalConv(config.dim, 16 * config.filters, 7)

    def halves(self, vectors: Tensor) -> Tensor:
        """[N, T, LATENT] -> [N, 2 T, dim]: this and the last frame's vector, even and odd halves apart."""
        wide = F.linear(torch.cat([vectors] * 4, -1), self.mix)
        now = wide.unflatten(-1, (4, LATENT))
        past = F.pad(now, (0, 0, 0, 0, 1, 0))[:, :-1]
        none = torch.zeros_like(now[:, :, 0])
        even = torch.cat([now[:, :, 0], none, past[:, :, 2], none], -1)
        odd = torch.cat([none, now[:, :, 1], none, past[:, :, 3]], -1)
        return torch.stack([even, odd], 2).flatten(1, 2)

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.transformer(self.halves(vectors))
        out: Tensor = self.last(x.transpose(1, 2))
        return out.transpose(1, 2)
