"""Low-rank adapters: what they change, their file, and the weights they make of a base's.

    safetensors   KEY.a [rank, in] and KEY.b [out, rank], float32, for each adapted matrix [out, in]
    metadata      `personaplex_adapter`: JSON with format, rank, scale, base and training

KEY is the checkpoint's own tensor name; of a tensor that stacks the depth steps' matrices it is NAME@STEP.
The matrix then is W + scale * b a, computed on the CPU in float32 and rounded to the type the checkpoint
stores: on one machine a model with an adapter and the checkpoint merged from both have the same weights, bit
by bit. `base` names the checkpoint and holds digests (identity.py); on any other base an adapter is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from personaplex.config import CODEBOOKS, LMConfig
from personaplex.errors import CheckpointError, ConfigError
from personaplex.files import LFS_ADVICE, is_lfs_pointer, replacing
from personaplex.model.hub import Checkpoint
from personaplex.model.identity import Base, base_of

METADATA = "personaplex_adapter"
FORMAT = 1
KINDS = (
    "temporal-attention",
    "temporal-feedforward",
    "depth-attention",
    "depth-feedforward",
    "depth-inputs",
    "heads",
    "embeddings",
)
DEFAULT_KINDS = KINDS[:4]
_RANK_LIMIT = 4_096
_METADATA_LIMIT = 2**20
_KEY = re.compile(r"(?P<tensor>[0-9a-z_.]+)(?:@(?P<step>\d{1,2}))?")


@dataclass(frozen=True)
class Target:
    """One matrix [rows, columns] of a checkpoint; with `step` that of one depth step in a stacked tensor."""

    tensor: str
    rows: int
    columns: int
    kind: str
    step: int | None = None

    @property
    def key(self) -> str:
        return self.tensor if self.step is None else f"{self.tensor}@{self.step}"


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as its file has it: by key a [rank, in] and b [out, rank], float32 on the CPU."""

    base: Base
    rank: int
    scale: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    training: Mapping[str, Any] = field(default_factory=dict)

    def touches(self, tensor: str) -> bool:
        """Whether it changes the checkpoint's tensor of that name."""
        return any(key.partition("@")[0] == tensor for key in self.pairs)

    def adapted(self, tensor: str, weight: Tensor) -> Tensor:
        """The checkpoint's tensor `weight`, on the CPU, of its type, with the adapter in it."""
        out = weight.clone()
        for key, (a, b) in self.pairs.items():
            name, _, step = key.partition("@")
            if name != tensor:
                continue
            rows = slice(int(step) * len(b), (int(step) + 1) * len(b)) if step else slice(None)
            block = out[rows]
            block.copy_((block.float() + self.scale * (b @ a)).to(weight.dtype))
        return out


def targets(
    config: LMConfig, kinds: Sequence[str] = DEFAULT_KINDS, layers: Sequence[int] | None = None
) -> list[Target]:
    """The matrices that adapters of these kinds change, in a fixed order; `layers` are those of the temporal
    transformer, all by default.

    Of the depth transformer's steps those for the agent's codes. Raises ConfigError for an unknown kind or
    layer.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} cannot be adapted: one of {', '.join(KINDS)}")
    count = config.temporal.layers
    if layers is not None and not all(0 <= layer < count for layer in layers):
        raise ConfigError(f"layers must be between 0 and {count - 1}, got {', '.join(map(str, layers))}")
    return [
        target for target in _all(config, range(count) if layers is None else layers) if target.kind in kinds
    ]


def _all(config: LMConfig, layers: Sequence[int]) -> Iterator[Target]:
    temporal, depth = config.temporal, config.depth
    steps = range(min(CODEBOOKS, config.depth_steps))
    for index in layers:
        name, dim = f"transformer.layers.{index}", temporal.dim
        yield Target(f"{name}.self_attn.in_proj_weight", 3 * dim, dim, "temporal-attention")
        yield Target(f"{name}.self_attn.out_proj.weight", dim, dim, "temporal-attention")
        yield Target(f"{name}.gating.linear_in.weight", 2 * temporal.hidden, dim, "temporal-feedforward")
        yield Target(f"{name}.gating.linear_out.weight", dim, temporal.hidden, "temporal-feedforward")
    for index in range(depth.layers):
        name, dim = f"depformer.layers.{index}", depth.dim
        for step in steps:
            yield Target(f"{name}.self_attn.in_proj_weight", 3 * dim, dim, "depth-attention", step)
            yield Target(f"{name}.self_attn.out_proj.weight", dim, dim, "depth-attention", step)
            gating = f"{name}.gating.{step}"
            yield Target(f"{gating}.linear_in.weight", 2 * depth.hidden, dim, "depth-feedforward")
            yield Target(f"{gating}.linear_out.weight", dim, depth.hidden, "depth-feedforward")
    for step in steps:
        yield Target(f"depformer_in.{step}.weight", depth.dim, temporal.dim, "depth-inputs")
    yield Target("text_linear.weight", config.text_card, temporal.dim, "heads")
    for step in steps:
        yield Target(f"linears.{step}.weight", config.card, depth.dim, "heads")
    yield Target("text_emb.weight", config.text_card + 1, temporal.dim, "embeddings")
    for stream in range(2 * CODEBOOKS):
        yield Target(f"emb.{stream}.weight", config.card + 1, temporal.dim, "embeddings")
    yield Target("depformer_text_emb.weight", config.text_card + 1, depth.dim, "embeddings")
    for step in steps[:-1]:
        yield Target(f"depformer_emb.{step}.weight", config.card + 1, depth.dim, "embeddings")


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Writes the file, all or nothing; equal adapters give equal bytes. Raises OSError."""
    described = {
        "format": FORMAT,
        "rank": adapter.rank,
        "scale": adapter.scale,
        "base": vars(adapter.base),
        "training": dict(adapter.training),
    }
    tensors = {}
    for key, (a, b) in adapter.pairs.items():
        tensors[f"{key}.a"] = a.detach().float().cpu().contiguous()
        tensors[f"{key}.b"] = b.detach().float().cpu().contiguous()
    with replacing(path) as part:
        part.write_bytes(save(tensors, {METADATA: json.dumps(described, sort_keys=True)}))


def read_adapter(path: Path) -> Adapter:
    """Reads and checks a file. Raises CheckpointError, with the file's name and what is wrong with it."""
    try:
        if is_lfs_pointer(path):
            raise CheckpointError(f"{path.name} {LFS_ADVICE}")
        with safe_open(path, framework="pt", device="cpu") as file:
            described = _described(path.name, (file.metadata() or {}).get(METADATA))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        why = (
            error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or incomplete"
        )
        raise CheckpointError(f"the adapter {path.name} cannot be read: {why}") from error
    return Adapter(pairs=_pairs(path.name, tensors, described["rank"]), **described)


def _described(name: str, text: str | None) -> dict[str, Any]:
    if text is None or len(text) > _METADATA_LIMIT:
        raise CheckpointError(f"{name} is no adapter of this project: it does not say what it is for")
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise CheckpointError(f"{name} has format {data['format']!r}, this version reads {FORMAT}")
        base = Base(**{key: str(value) for key, value in data["base"].items()})
        rank, scale = int(data["rank"]), float(data["scale"])
        if not 1 <= rank <= _RANK_LIMIT or not abs(scale) < 1e6:
            raise ValueError("rank or scale")
        return {"base": base, "rank": rank, "scale": scale, "training": dict(data["training"])}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"the adapter {name} has damaged metadata") from error


def _pairs(name: str, tensors: Mapping[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    keys = sorted({found.rpartition(".")[0] for found in tensors})
    pairs = {}
    for key in keys:
        a, b = tensors.get(f"{key}.a"), tensors.get(f"{key}.b")
        whole = a is not None and b is not None and a.dim() == b.dim() == 2
        if not whole or not _KEY.fullmatch(key) or len(a) != rank or b.shape[1] != rank:  # type: ignore
            raise CheckpointError(f"the adapter {name} is damaged: {key} is no pair of rank {rank}")
        assert a is not None
        assert b is not None
        if not (a.dtype == b.dtype == torch.float32 and a.isfinite().all() and b.isfinite().all()):
            raise CheckpointError(f"the adapter {name} is damaged: {key} is not of finite float32 numbers")
        pairs[key] = (a, b)
    if not pairs or len(tensors) != 2 * len(pairs):
        raise CheckpointError(f"the adapter {name} is damaged: tensors are missing or too many")
    return pairs


def adapter_of(checkpoint: Checkpoint) -> Adapter | None:
    """The checkpoint's adapter, checked against all that it was trained on; None where there is none.

    Raises CheckpointError with the reason why it is refused.
    """
    if checkpoint.lora is None:
        return None
    adapter = read_adapter(checkpoint.lora)
    check_shapes(checkpoint.lora.name, adapter, checkpoint.config.lm)
    check_base(checkpoint.lora.name, adapter, base_of(checkpoint))
    return adapter


def check_shapes(name: str, adapter: Adapter, config: LMConfig) -> None:
    """Raises CheckpointError, naming the first matrix that such a model does not have."""
    known = {target.key: target for target in targets(config, KINDS)}
    for key, (a, b) in adapter.pairs.items():
        target = known.get(key)
        if target is None or (b.shape[0], a.shape[1]) != (target.rows, target.columns):
            raise CheckpointError(f"the adapter {name} does not fit this model: {key} {[len(b), a.shape[1]]}")


def check_base(name: str, adapter: Adapter, found: Base) -> None:
    """Raises CheckpointError when the adapter was trained on something else than `found`."""
    wanted = adapter.base
    parts = {"language model": "lm", "codec": "codec", "tokenizer": "tokenizer"}
    other = [part for part, key in parts.items() if getattr(wanted, key) != getattr(found, key)]
    if other:
        raise CheckpointError(
            f"the adapter {name} was trained on {_called(wanted)}, and this is {_called(found)}: "
            f"the {' and the '.join(other)} differ{'s' if len(other) == 1 else ''}"
        )


def _called(base: Base) -> str:
    revision = f" at {base.revision}" if base.revision else ""
    return f"{base.repo or base.name}{revision} ({base.lm[:12]})"
