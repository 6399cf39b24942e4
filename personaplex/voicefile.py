"""The .pt format of voice files: what `torch.save` writes of plain tensors, and nothing else.

`torch.load` believes what a file says of itself: sizes are allocated as claimed, a storage is read past its
end, and sparse, nested or subclassed tensors come back as such. This reader takes a file that holds plain
dense tensors, checks every claim against the bytes that are there, and allocates only then. It refuses
compressed entries, so that nothing unpacks to more than its file.

    archive/data.pkl     a pickle of at most PICKLE_LIMIT bytes, of the few opcodes and names listed below
    archive/data/KEY     the bytes of one storage
    archive/byteorder    "little", or absent
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import re
import zipfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from personaplex.errors import CheckpointError

PICKLE_LIMIT = 4_096  # bytes; two tensors take 300. Deeply nested tuples overflow the stack beyond 100,000
ENTRY_LIMIT = 64  # files in the archive; a voice has 8

_DIRECTORY_ENTRY = b"PK\x01\x02"

# What torch.save writes of dicts, lists, numbers, strings and tensors (protocol 2). LONG_BINPUT is left out:
# its index alone makes the unpickler allocate up to 64 GiB.
_OPCODES = re.compile(
    "PROTO|STOP|MARK|EMPTY_(DICT|LIST|TUPLE)|TUPLE[123]?|BINPUT|BINGET|BINUNICODE|BININT[12]?|LONG1|BINFLOAT"
    "|NONE|NEW(TRUE|FALSE)|GLOBAL|REDUCE|BINPERSID|SETITEMS?|APPENDS?"
)
_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True)
class Storage:
    """A storage as the pickle describes it: `count` elements of `dtype` in the entry `data/key`."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class Described:
    """A tensor as the pickle describes it; nothing of it has been read or checked but the types here."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype


class TensorFile:
    """One opened file: `content` is what was saved, with Described in place of each tensor."""

    def __init__(self, data: bytes) -> None:
        """Raises CheckpointError for what is not in the format, and whatever else damaged bytes lead to."""
        # Every entry of an archive's directory costs memory, and each begins with this mark.
        if data.count(_DIRECTORY_ENTRY) > ENTRY_LIMIT:
            raise CheckpointError("it is an archive of too many files")
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(data))
        except zipfile.BadZipFile as error:
            raise CheckpointError("it is not an archive that torch.save writes, or damaged") from error
        pickles = [name for name in self._archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError("it is an archive without tensors")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in self._archive.namelist() and self._entry("byteorder") != b"little":
            raise CheckpointError("its numbers are not little-endian")
        self.content = _unpickle(self._entry("data.pkl"))

    def tensor(self, described: Described) -> Tensor:
        """The tensor, contiguous and with memory of its own; the caller has bounded its shape.

        Raises CheckpointError when it is not wholly within its storage.
        """
        storage, shape, stride = described.storage, described.shape, described.stride
        data = self._entry(f"data/{storage.key}")
        if len(data) != storage.count * storage.dtype.itemsize:
            raise CheckpointError("a tensor has fewer or more numbers than the file says")
        if not math.prod(shape):
            return torch.empty(shape, dtype=storage.dtype)
        last = described.offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if last >= storage.count:
            raise CheckpointError("a tensor reaches beyond its numbers")
        flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return flat.as_strided(shape, stride, described.offset).clone(memory_format=torch.contiguous_format)

    def _entry(self, name: str) -> bytes:
        entry = self._archive.getinfo(self._root + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError("it is compressed")
        return self._archive.read(entry)


def _unpickle(data: bytes) -> object:
    if len(data) > PICKLE_LIMIT:
        raise CheckpointError("it holds more than a voice")
    for opcode, _, _ in pickletools.genops(data):
        if not _OPCODES.fullmatch(opcode.name):
            raise CheckpointError("it holds other objects than plain tensors")
    return _Unpickler(io.BytesIO(data)).load()


class _Unpickler(pickle.Unpickler):
    """Knows the four names that plain tensors need, and imports none of them."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        match module, name:
            case "torch._utils", "_rebuild_tensor_v2":
                return _describe
            case "torch._utils", "_rebuild_parameter":
                return _parameter
            case "collections", "OrderedDict":
                return collections.OrderedDict
        raise CheckpointError("it holds other objects than plain tensors")

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case "storage", torch.dtype() as dtype, str() as key, str(), int() as count if count >= 0:
                return Storage(dtype, key, count)
        raise CheckpointError("it holds other objects than plain tensors")


def _describe(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Described:
    """Stands for torch._utils._rebuild_tensor_v2. What a gradient would need is of no interest here."""
    grad, _hooks, *metadata = rest
    del grad
    good = isinstance(storage, Storage) and _count(offset) and not any(metadata)
    for sizes in (shape, stride):
        good = good and isinstance(sizes, tuple) and all(map(_count, sizes))
    if not good or len(shape) != len(stride):
        raise CheckpointError("it holds other objects than plain tensors")
    return Described(storage, offset, shape, stride)


def _parameter(data: Any, *grad: Any) -> Any:
    return data


def _count(value: object) -> bool:
    return type(value) is int and value >= 0
