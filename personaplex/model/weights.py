"""Loads a checkpoint's tensors into modules: all of them, of the right shape, or an error naming each fault.

Safetensors are read through a memory map, tensor by tensor, straight to their device and dtype. The modules
are built on the meta device with the checkpoint's names and shapes; no tensor is left uninitialized. The
language model is loaded in the dtype asked for, the codec always in float32. A checkpoint's adapter is merged
on the way, before any other rounding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from personaplex.config import CODEBOOKS, LMConfig, MimiConfig
from personaplex.errors import CheckpointError, ConfigError
from personaplex.model import Model, packed, tiny
from personaplex.model.hub import Checkpoint
from personaplex.model.lm import LM
from personaplex.model.lora import Adapter, adapter_of
from personaplex.model.mimi import Mimi
from personaplex.model.offload import place, place_quantized
from personaplex.sizing import WORKSPACE, footprint

Network = TypeVar("Network", LM, Mimi)
Shapes = dict[str, tuple[int, ...]]

_FAULTS_SHOWN = 2_000  # all of a whole model; a hostile header may have a million
_FLOATS = ("F64", "F32", "F16", "BF16")

# Tensors of one depth step N each; a Moshi checkpoint has them for the first 8 of 16 steps.
_PER_STEP = re.compile(
    r"(?P<head>depformer\.layers\.\d+\.gating|linears|depformer_in|depformer_emb)\.(?P<step>\d{1,4})\."
)
_STACKED = re.compile(r"depformer\.layers\.\d+\.self_attn\.(in_proj_weight|out_proj\.weight)")

_CODEBOOK_NAMES = {
    "inited": "_initialized",
    "cluster_size": "cluster_usage",
    "embed_avg": "embedding_sum",
    "embed_sum": "embedding_sum",
}


def load_model(
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    offload_slots: int = 0,
    weights: str = "auto",
    kv: str = "auto",
) -> Model:
    """Loads a resolved checkpoint.

    With `offload_slots` > 0 weights that do not fit a GPU beside that many sessions with `kv` (see
    EngineConfig) stay in host memory. With `weights` "int8" the temporal transformer's are quantized. Raises
    CheckpointError for a damaged file or one with other tensors, ConfigError for options that exclude each
    other.
    """
    if weights not in ("auto", "int8") or (weights == "int8" and offload_slots):
        raise ConfigError("weights must be auto or int8; int8 leaves nothing to offload")
    device, config = torch.device(device), checkpoint.config
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the thread's current device
    adapter = adapter_of(checkpoint)
    mimi = load_mimi(checkpoint.mimi, config.mimi, device)
    if weights == "int8":
        lm = load_lm(checkpoint.lm, config.lm, torch.device("cpu"), dtype, adapter)
        place_quantized(lm, device)
    elif offload_slots and device.type == "cuda":
        lm = load_lm(checkpoint.lm, config.lm, torch.device("cpu"), dtype, adapter)
        session = footprint(config, str(dtype).removeprefix("torch."), weights, kv).session
        free, _ = torch.cuda.mem_get_info(device)
        place(lm, device, free - offload_slots * session - WORKSPACE)
    else:
        lm = load_lm(checkpoint.lm, config.lm, device, dtype, adapter)
    return Model(lm, mimi, config)


def load_lm(
    path: Path | None,
    config: LMConfig,
    device: torch.device,
    dtype: torch.dtype,
    adapter: Adapter | None = None,
) -> LM:
    """The language model from a file, or tiny's when `path` is None, with the adapter merged."""
    with torch.device("meta"):
        lm = LM(config)
    expected = _shapes(lm)
    if path is None:
        weights = {n: w.to(device, dtype) for n, w in _adapted(tiny.lm_weights(expected), adapter).items()}
    else:
        weights = _read(path, expected, device, dtype, depth_plan, adapter)
    return _fill(lm, weights)


def merged_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The language model's tensors with the checkpoint's adapter, on the CPU, in the types of its file.

    Raises CheckpointError.
    """
    adapter = adapter_of(checkpoint)
    with torch.device("meta"):
        expected = _shapes(LM(checkpoint.config.lm))
    if checkpoint.lm is None:
        return _adapted(tiny.lm_weights(expected), adapter)
    return _read(checkpoint.lm, expected, torch.device("cpu"), None, depth_plan, adapter)


def _adapted(weights: dict[str, Tensor], adapter: Adapter | None) -> dict[str, Tensor]:
    if adapter is None:
        return weights
    return {n: adapter.adapted(n, w) if adapter.touches(n) else w for n, w in weights.items()}


def load_mimi(path: Path | None, config: MimiConfig, device: torch.device) -> Mimi:
    """The codec from a file, or tiny's when `path` is None; float32."""
    with torch.device("meta"):
        mimi = Mimi(config)
    expected = _shapes(mimi)
    if path is None:
        weights = {name: w.to(device) for name, w in tiny.mimi_weights(expected).items()}
    else:
        weights = _read(path, expected, device, torch.float32, codebook_plan)
    return _fill(mimi, weights)


@dataclass(frozen=True)
class Piece:
    """How one expected tensor is built: `times` copies of the file's tensor `name` along dimension 0."""

    name: str
    times: int = 1


# (expected, found) -> which expected tensor comes from which
MakePlan = Callable[[Shapes, Shapes], dict[str, Piece]]


def codebook_plan(expected: Shapes, found: Shapes) -> dict[str, Piece]:
    """Every name as it is, with the older names of the codebook buffers accepted."""
    plan = {}
    for name in found:
        head, _, tail = name.rpartition("._codebook.")
        current = f"{head}._codebook.{_CODEBOOK_NAMES[tail]}" if head and tail in _CODEBOOK_NAMES else name
        if current == name or current not in found:
            plan[current] = Piece(name)
    return plan


def depth_plan(expected: Shapes, found: Shapes) -> dict[str, Piece]:
    """Every name as it is; a checkpoint with 8 depth steps (Moshi's) serves steps 8..15 with those of 0..7.

    Its stacked attention tensors are repeated along dimension 0, its per-step tensors stand for two steps.
    Table `depformer_emb.7` joins the two halves and has no counterpart: a file without it lacks it.
    """
    plan = {name: Piece(name) for name in found}
    if not _has_eight_steps(expected, found):
        return plan
    for name in expected:
        step = _PER_STEP.match(name)
        if _STACKED.fullmatch(name):
            plan[name] = Piece(name, times=2)
        elif step and name not in found and int(step["step"]) >= CODEBOOKS:
            earlier = f"{step['head']}.{int(step['step']) - CODEBOOKS}.{name[step.end() :]}"
            if earlier in found:
                plan[name] = Piece(earlier)
    return plan


def _has_eight_steps(expected: Shapes, found: Shapes) -> bool:
    """True when every stacked tensor has half its rows and no step after the eighth has its own weights."""
    stacked = [name for name in expected if _STACKED.fullmatch(name) and name in found]
    halved = all(found[n] == (expected[n][0] // 2, *expected[n][1:]) for n in stacked)
    later = any(
        int(step["step"]) >= CODEBOOKS
        for step in map(_PER_STEP.match, found)
        if step and step["head"] != "depformer_emb"
    )
    return bool(stacked) and halved and not later


def _shapes(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _read(
    path: Path,
    expected: Shapes,
    device: torch.device,
    dtype: torch.dtype | None,
    make_plan: MakePlan,
    adapter: Adapter | None = None,
) -> dict[str, Tensor]:
    """All expected tensors from one safetensors file, or a packed one, with the adapter in them, then in
    `dtype`; None leaves the file's."""
    try:
        if path.suffix == packed.SUFFIX:
            return _read_packed(path, expected, device, dtype, make_plan, adapter)
        with safe_open(path, framework="pt", device=str(device)) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found = {name: tuple(view.get_shape()) for name, view in slices.items()}
            other = {
                name: view.get_dtype() for name, view in slices.items() if view.get_dtype() not in _FLOATS
            }
            plan = make_plan(expected, found)
            _check(path.name, expected, found, other, plan)
            loaded: dict[str, Tensor] = {}
            weights: dict[str, Tensor] = {}
            for name, piece in plan.items():
                if adapter is not None and adapter.touches(name):
                    stored = torch.cat([file.get_tensor(piece.name).cpu()] * piece.times)
                    weights[name] = adapter.adapted(name, stored).to(device, dtype)
                    continue
                if piece.name not in loaded:
                    loaded[piece.name] = file.get_tensor(piece.name).to(dtype)
                kept = loaded[piece.name]
                weights[name] = torch.cat([kept] * piece.times) if piece.times > 1 else kept
            return weights
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} is damaged or only partly there ({error}): fetch it again"
        ) from error


def _read_packed(
    path: Path,
    expected: Shapes,
    device: torch.device,
    dtype: torch.dtype | None,
    make_plan: MakePlan,
    adapter: Adapter | None,
) -> dict[str, Tensor]:
    try:
        tensors = packed.unpack(path)
    except ValueError as error:
        raise CheckpointError(f"{path.name} is damaged ({error}): fetch it again") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    plan = make_plan(expected, found)
    _check(path.name, expected, found, {}, plan)
    weights: dict[str, Tensor] = {}
    for name, piece in plan.items():
        tensor = torch.cat([tensors[piece.name]] * piece.times) if piece.times > 1 else tensors[piece.name]
        if adapter is not None and adapter.touches(name):
            tensor = adapter.adapted(name, tensor)
        weights[name] = tensor.to(device, dtype)
    return weights


def _check(
    file: str, expected: Shapes, found: Shapes, other: Mapping[str, str], plan: Mapping[str, Piece]
) -> None:
    """Raises CheckpointError naming every tensor that is unexpected, missing, misshapen or not of floats."""
    used = {piece.name for name, piece in plan.items() if name in expected}
    faults = [f"unexpected: {name}" for name in found if name not in used]
    faults += [f"missing: {name}" for name in expected if name not in plan]
    for name, piece in plan.items():
        if name not in expected:
            continue
        shape = found[piece.name]
        made = (shape[0] * piece.times, *shape[1:]) if shape else shape
        if made != expected[name]:
            faults.append(f"shape of {piece.name}: {list(shape)}, needed {list(expected[name])} for {name}")
    faults += [f"dtype of {name}: {dtype} is no floating-point type" for name, dtype in other.items()]
    if faults:
        raise CheckpointError(
            f"{file} does not hold the tensors of this model ({len(faults)} differ):\n  "
            + "\n  ".join(faults[:_FAULTS_SHOWN])
        )


def _fill(module: Network, weights: dict[str, Tensor]) -> Network:
    """Gives a module built on the meta device its weights and derives what its steps read."""
    module.load_state_dict(weights, strict=True, assign=True)
    module.prepare()
    left = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    assert not left, f"built without weights: {left}"
    return module
