"""What a checkpoint's weights are, as one digest: equal digests, equal tensors.

An adapter carries those of its base. A digest covers each tensor's name, type, shape and bytes, in order of
the names, so that it does not depend on how a file lays its tensors out. 17 GB take some ten seconds.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from personaplex.errors import CheckpointError
from personaplex.model import tiny
from personaplex.model.hub import Checkpoint
from personaplex.model.lm import LM
from personaplex.model.mimi import Mimi

_HEADER_LIMIT = 2**27  # bytes
_THREADS = 4  # hashing lets go of the interpreter's lock


@dataclass(frozen=True)
class Base:
    """A checkpoint: what it was called, and the digests of its parts."""

    name: str
    lm: str
    codec: str
    tokenizer: str
    repo: str = ""
    revision: str = ""


def base_of(checkpoint: Checkpoint) -> Base:
    """What the checkpoint is without its adapter. Raises CheckpointError for damaged files."""
    config = checkpoint.config
    if checkpoint.lm is None or checkpoint.mimi is None:
        with torch.device("meta"):
            lm_shapes, mimi_shapes = _shapes(LM(config.lm)), _shapes(Mimi(config.mimi))
        lm, codec = digest_of(tiny.lm_weights(lm_shapes)), digest_of(tiny.mimi_weights(mimi_shapes))
    else:
        lm, codec = digest_of_file(checkpoint.lm), digest_of_file(checkpoint.mimi)
    tokenizer = hashlib.sha256(checkpoint.tokenizer.read_bytes()).hexdigest()
    return Base(checkpoint.name, lm, codec, tokenizer, checkpoint.repo, checkpoint.revision)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def digest_of_file(path: Path) -> str:
    """Of a safetensors file. Raises CheckpointError for a damaged one."""
    try:
        with _mapped(path) as data:
            spans = _spans(data)
            with ThreadPoolExecutor(_THREADS) as pool:
                each = pool.map(
                    lambda span: hashlib.sha256(data[span[0] : span[1]]).hexdigest(), spans.values()
                )
                return _joined(dict(zip(spans, each, strict=True)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError) as error:
        raise CheckpointError(f"{path.name} is damaged or only partly there: fetch it again") from error


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Of float32 tensors on the CPU, as a file of them would have."""
    found = {}
    for name, tensor in tensors.items():
        content = tensor.contiguous().numpy().tobytes()
        found[_described(name, "F32", tensor.shape)] = hashlib.sha256(content).hexdigest()
    return _joined(found)


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        try:
            yield view
        finally:
            view.release()


def _spans(data: memoryview) -> dict[str, tuple[int, int]]:
    """Each tensor's description and where its bytes are."""
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(_HEADER_LIMIT, len(data) - 8):
        raise ValueError("the header is longer than the file")
    header = json.loads(bytes(data[8 : 8 + length]))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
        if not 8 + length <= start <= stop <= len(data):
            raise ValueError("a tensor lies outside the file")
        found[_described(name, entry["dtype"], entry["shape"])] = (start, stop)
    return found


def _described(name: str, dtype: str, shape: Iterator[int] | tuple[int, ...] | list[int]) -> str:
    return f"{name} {dtype} {'x'.join(str(int(size)) for size in shape)}"


def _joined(digests: Mapping[str, str]) -> str:
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
