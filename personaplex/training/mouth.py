"""The agent's side of the codec: the decoder that makes locked frames of their codes (see articulation.py).

The decoder is Mimi's, its codebooks learned with it: the upsampling lays this and the last frame's vector
out for each half frame, the transformer turns them into coefficients, and SEANet, by weights computed here,
turns coefficients into samples over a fixed basis of half frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import CODEBOOKS, FRAME_SIZE, MimiConfig
from personaplex.training.articulation import CODES
from personaplex.training.nets import CausalConv, Transformer

HALF = FRAME_SIZE // 2
LATENT = 128
LATE = 1  # frames by which a frame's sound follows its codes: how a phone sounds depends on the next ones


def basis(frames: Tensor, count: int) -> Tensor:
    """The `count` principal vectors [count, 960] of the half frames of frames [M, 1920]."""
    halves = frames.reshape(-1, HALF)
    _, vectors = torch.linalg.eigh(halves.t() @ halves)
    return vectors.flip(1)[:, :count].t().contiguous()


class Mouth(nn.Module):
    """codes [N, T, 8] -> coefficients [N, 2 T, 16 * filters] of half frames."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.books = nn.Parameter(torch.randn(CODEBOOKS, CODES + 1, LATENT) * LATENT**-0.5)
        self.project = nn.Linear(LATENT, config.dim, bias=False)  # the quantiser's output projection
        self.taps = nn.Parameter(torch.randn(config.dim, 4) * 0.7)  # the upsampling's
        self.transformer = Transformer(config.transformer)
        self.last = CausalConv(config.dim, 16 * config.filters, 7)

    def vectors(self, codes: Tensor) -> Tensor:
        """codes [..., 8] -> their sums [..., LATENT]; code SILENCE counts on the first level alone."""
        total = self.books[0][codes[..., 0]]
        for level in range(1, CODEBOOKS):
            total = total + self.books[level][codes[..., level]] * (codes[..., level] < CODES)[..., None]
        return total

    def forward(self, codes: Tensor) -> Tensor:
        now = self.project(self.vectors(codes))
        past = F.pad(now, (0, 0, 1, 0))[:, :-1]
        halves = [now * self.taps[:, k] + past * self.taps[:, k + 2] for k in range(2)]
        x = self.transformer(torch.stack(halves, 2).flatten(1, 2))
        out: Tensor = self.last(x.transpose(1, 2))
        return out.transpose(1, 2)
