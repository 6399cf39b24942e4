"""Split residual vector quantiser: one semantic codebook and seven acoustic ones, both on the same latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import CODEBOOKS, MimiConfig
from personaplex.kernels import codec_ops, ops
from personaplex.model.layers import Stack

USAGE_FLOOR = 1e-5


class Codebook(nn.Module):
    """Running sums as trained; the vectors are embedding_sum / max(cluster_usage, floor)."""

    _initialized: Tensor
    cluster_usage: Tensor
    embedding_sum: Tensor

    def __init__(self, bins: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("_initialized", torch.empty(1))
        self.register_buffer("cluster_usage", torch.empty(bins))
        self.register_buffer("embedding_sum", torch.empty(bins, dim))

    def vectors(self) -> Tensor:
        """[bins, dim] float32."""
        return self.embedding_sum / self.cluster_usage.clamp(min=USAGE_FLOOR)[:, None]


class _Level(nn.Module):
    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self._codebook = Codebook(config.bins, config.codebook_dim)


class _Levels(nn.Module):
    def __init__(self, config: MimiConfig, layers: int) -> None:
        super().__init__()
        self.layers = Stack(_Level(config) for _ in range(layers))


class Quantizer(nn.Module):
    """One side: projections without bias around a residual chain of codebooks."""

    vectors: Tensor
    half_norms: Tensor

    def __init__(self, config: MimiConfig, layers: int, used: int) -> None:
        super().__init__()
        self.used = used
        self.input_proj = nn.Conv1d(config.dim, config.codebook_dim, 1, bias=False)
        self.output_proj = nn.Conv1d(config.codebook_dim, config.dim, 1, bias=False)
        self.vq = _Levels(config, layers)

    def prepare(self) -> None:
        """Derives the vectors of the used levels, [used, bins, dim], and drops the sums of all."""
        vectors = [level._codebook.vectors() for level in self.vq.layers]
        self.register_buffer("vectors", torch.stack(vectors[: self.used]), persistent=False)
        self.register_buffer(
            "half_norms", self.vectors.double().square().sum(-1).float() / 2, persistent=False
        )
        self.codebooks = codec_ops.Codebooks(self.vectors, self.half_norms)
        self.matrix_in = self.input_proj.weight.detach()[:, :, 0].contiguous()
        self.matrix_out = self.output_proj.weight.detach()[:, :, 0].contiguous()
        del self.vq, self.input_proj, self.output_proj

    def encode(self, latent: Tensor) -> Tensor:
        """latent [N, dim] -> codes [N, used]; nearest vector, lowest index on a tie."""
        return codec_ops.nearest(ops.linear(latent, self.matrix_in), self.codebooks)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [N, levels] -> [N, dim]; as many levels as there are codes."""
        total = F.embedding(codes[:, 0], self.vectors[0])
        for level in range(1, codes.shape[1]):
            total = total + F.embedding(codes[:, level], self.vectors[level])
        return ops.linear(total, self.matrix_out)


class SplitQuantizer(nn.Module):
    """Semantic and acoustic side; codes are ordered semantic first."""

    def __init__(self, config: MimiConfig, used: int = CODEBOOKS) -> None:
        super().__init__()
        self.rvq_first = Quantizer(config, layers=1, used=1)
        self.rvq_rest = Quantizer(config, layers=config.codebooks - 1, used=used - 1)

    def prepare(self) -> None:
        self.rvq_first.prepare()
        self.rvq_rest.prepare()

    def encode(self, latent: Tensor) -> Tensor:
        """latent [N, dim] -> codes [N, used] int64."""
        return torch.cat([self.rvq_first.encode(latent), self.rvq_rest.encode(latent)], dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [N, used] -> summed vectors [N, dim]."""
        return self.rvq_first.decode(codes[:, :1]) + self.rvq_rest.decode(codes[:, 1:])
