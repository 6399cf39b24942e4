"""Packed files: few bytes for a model's tensors, and nothing read from a damaged one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from personaplex.errors import CheckpointError
from personaplex.model import packed
from personaplex.model.hub import resolve
from personaplex.model.weights import load_model

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_what_was_packed_comes_back_nearly_as_it_was(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.full((2_048, 96), -3.5)  # most ids are never used
    table[40:104] = torch.randn(64, 96, generator=generator)
    mixed = torch.randn(64, 128, generator=generator)
    mixed[:, 64:] *= 1e-3
    tensors = {
        "bias": torch.randn(7, generator=generator),
        "conv": torch.randn(64, 32, 5, generator=generator) * torch.logspace(-4, 2, 64)[:, None, None],
        "table": table,
        "mixed": mixed,
    }
    packed.pack(tensors, tmp_path / "m.packed", exact=("mixed",))
    found = packed.unpack(tmp_path / "m.packed")
    assert set(found) == set(tensors)
    for name in ("bias", "mixed"):
        assert torch.equal(found[name], tensors[name])
    for name in ("conv", "table"):
        error = (found[name] - tensors[name]).flatten(1).abs().amax(1)
        assert (error <= tensors[name].flatten(1).abs().amax(1) / 250).all()
    assert (tmp_path / "m.packed").stat().st_size < 70_000  # 0.9 MB in float32


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """The golden model with packed weights."""
    for part, source in (("model", "model"), ("mimi", "mimi")):
        packed.pack(load_file(GOLDEN / f"{source}.safetensors"), tmp_path / f"{part}.packed")
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    return tmp_path


def test_a_packed_model_loads_like_the_one_it_was_made_of(golden: Path) -> None:
    model = load_model(resolve(str(golden)), "cpu", torch.float32)
    whole = load_model(resolve(str(GOLDEN)), "cpu", torch.float32)
    for made, wanted in ((model.lm, whole.lm), (model.mimi, whole.mimi)):
        for name, tensor in wanted.state_dict().items():
            found = made.state_dict()[name]
            assert found.shape == tensor.shape
            assert (found - tensor).abs().max() <= tensor.abs().max() / 100 + 1e-6, name


def test_a_damaged_packed_file_is_refused_by_name(golden: Path) -> None:
    path = golden / "model.packed"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("|scale"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=r"model\.packed is damaged \(.* is incomplete\)"):
        load_model(resolve(str(golden)), "cpu", torch.float32)
    path.write_bytes(path.read_bytes()[:1_000])
    with pytest.raises(CheckpointError, match=r"model\.packed is damaged"):
        load_model(resolve(str(golden)), "cpu", torch.float32)
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith("out_norm")}, path)
    with pytest.raises(CheckpointError, match="missing: out_norm"):
        load_model(resolve(str(golden)), "cpu", torch.float32)
