"""A model's tensors in few bytes: matrices as int8 rows with a scale each, repeated rows once.

A packed file is a safetensors file. A tensor NAME stands there as it is, as `NAME|q` (int8 [R, ...]) with
`NAME|scale` (float32 [R]), or as `NAME|f` (float32 [R, ...]). With `NAME|rows` (int32 [R - 1]) its last row
fills all rows but those named, and `NAME|count` (int32 [1]) says how many rows there are.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SUFFIX = ".packed"
_LEAST = 4_096  # elements a tensor must have to be worth it


def pack(tensors: dict[str, Tensor], path: Path, exact: tuple[str, ...] = ()) -> None:
    """Writes `tensors`; those whose names end like one of `exact` keep their float32 values."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or tensor.numel() < _LEAST:
            stored[name] = tensor.float().contiguous()
        else:
            stored |= _packed(name, tensor.float(), name.endswith(exact))
    save_file(stored, path)


def _packed(name: str, tensor: Tensor, exact: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    fill = tensor.flatten(1).mode(0).values.view(tensor.shape[1:])  # of a table, the row of unused ids
    differs = (tensor != fill).flatten(1).any(1)
    if int(differs.sum()) < len(tensor) // 2:
        out[f"{name}|count"] = torch.tensor([len(tensor)], dtype=torch.int32)
        out[f"{name}|rows"] = differs.nonzero()[:, 0].to(torch.int32)
        tensor = torch.cat([tensor[differs], fill[None]])
    if exact:
        return out | {f"{name}|f": tensor.contiguous()}
    scale = tensor.flatten(1).abs().amax(1).clamp(min=1e-20) / 127
    wide = scale.view(-1, *[1] * (tensor.dim() - 1))
    return out | {f"{name}|q": torch.round(tensor / wide).to(torch.int8).contiguous(), f"{name}|scale": scale}


def unpack(path: Path) -> dict[str, Tensor]:
    """All tensors of a packed file in float32. Raises SafetensorError, OSError, or ValueError if damaged."""
    with safe_open(path, framework="pt", device="cpu") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return {name: _unpacked(name, stored) for name in {key.partition("|")[0] for key in stored}}


def _unpacked(name: str, stored: dict[str, Tensor]) -> Tensor:
    if name in stored:
        return stored[name]
    try:
        if f"{name}|f" in stored:
            tensor = stored[f"{name}|f"]
        else:
            q = stored[f"{name}|q"]
            tensor = q.float() * stored[f"{name}|scale"].view(-1, *[1] * (q.dim() - 1))
        if f"{name}|rows" not in stored:
            return tensor
        rows, count = stored[f"{name}|rows"].long(), int(stored[f"{name}|count"])
        full = tensor[-1:].repeat(count, *[1] * (tensor.dim() - 1))
        full[rows] = tensor[:-1]
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"{name} is incomplete") from error
    return full
