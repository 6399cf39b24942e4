"""Strict loading: every tensor right or named; Moshi checkpoints; older names; offloading; `tiny`."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import CONFIG, CPU, GOLDEN
from mutation import memory_within, mutants
from safetensors.torch import load_file, save_file
from torch import Tensor

from personaplex.config import PRESET_7B, PRESET_TINY, EngineConfig, Sampling
from personaplex.engine.engine import Engine
from personaplex.errors import CheckpointError
from personaplex.kernels.ops import linear
from personaplex.model import Model
from personaplex.model.hub import resolve
from personaplex.model.lm import LM
from personaplex.model.mimi import Mimi
from personaplex.model.offload import place, resident_bytes
from personaplex.model.weights import load_lm, load_mimi, load_model
from personaplex.persona import VOICES, Persona
from personaplex.text import Tokenizer
from personaplex.voices import VoiceLibrary

LISTS = {"lm": GOLDEN.parent / "tensors-lm.txt", "mimi": GOLDEN / "mimi_full" / "tensors-mimi.txt"}

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def lm_tensors() -> Tensors:
    return load_file(GOLDEN / "model.safetensors")


@pytest.fixture(scope="module")
def mimi_tensors() -> Tensors:
    return load_file(GOLDEN / "mimi.safetensors")


def load_lm_from(tensors: Tensors, folder: Path) -> LM:
    save_file(tensors, folder / "model.safetensors")
    return load_lm(folder / "model.safetensors", CONFIG.lm, CPU, torch.float32)


def load_mimi_from(tensors: Tensors, folder: Path) -> Mimi:
    save_file(tensors, folder / "mimi.safetensors")
    return load_mimi(folder / "mimi.safetensors", CONFIG.mimi, CPU)


def weights_of(lm: LM) -> Tensors:
    """Everything a prepared model reads, attention's per-step matrices included."""
    found = dict(lm.named_parameters()) | dict(lm.named_buffers())
    for name, module in lm.named_modules():
        for side in ("inputs", "outputs"):
            for step, matrix in enumerate(getattr(module, side, ())):
                found[f"{name}.{side}.{step}"] = matrix
    return found


def assert_same(a: LM, b: LM) -> None:
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("part", ["lm", "mimi"])
def test_the_modules_have_the_names_and_shapes_of_the_released_checkpoint(part: str) -> None:
    lines = LISTS[part].read_text().splitlines()
    expected = {name: shape for name, shape, _ in (line.split("\t") for line in lines)}
    with torch.device("meta"):
        module = LM(PRESET_7B.lm) if part == "lm" else Mimi(PRESET_7B.mimi)
    assert {name: str(list(t.shape)) for name, t in module.state_dict().items()} == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_language_model_takes_the_dtype_and_the_codec_stays_float32(dtype: torch.dtype) -> None:
    model = load_model(resolve(str(GOLDEN)), "cpu", dtype)
    assert {t.dtype for t in weights_of(model.lm).values() if t.is_floating_point()} == {dtype}
    floats = {t.dtype for t in (*model.mimi.parameters(), *model.mimi.buffers()) if t.is_floating_point()}
    assert floats == {torch.float32}


def drop(tensors: Tensors, *names: str) -> None:
    for name in names:
        del tensors[name]


def test_every_fault_is_named_at_once(lm_tensors: Tensors, tmp_path: Path) -> None:
    tensors = dict(lm_tensors)
    drop(tensors, "text_linear.weight", "linears.12.weight")
    tensors["linears.16.weight"] = torch.zeros(3)
    tensors["out_norm.alpha"] = torch.zeros(1, 1, 31, dtype=torch.bfloat16)
    tensors["emb.3.weight"] = torch.zeros(2049, 32, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        load_lm_from(tensors, tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "(5 differ)" in lines[0]
    assert "missing: text_linear.weight" in lines
    assert "missing: linears.12.weight" in lines  # one lost step is not mistaken for a Moshi checkpoint
    assert "unexpected: linears.16.weight" in lines
    assert any(line.startswith("shape of out_norm.alpha: [1, 1, 31], needed [1, 1, 32]") for line in lines)
    assert any(line.startswith("dtype of emb.3.weight: I8") for line in lines)
    assert str(tmp_path) not in str(caught.value)


def test_each_missing_tensor_is_noticed(lm_tensors: Tensors, tmp_path: Path) -> None:
    for name in ("emb.0.weight", "depformer_in.15.weight", "transformer.layers.1.norm2.alpha"):
        tensors = dict(lm_tensors)
        drop(tensors, name)
        with pytest.raises(CheckpointError, match=f"missing: {name}"):
            load_lm_from(tensors, tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 5_000, -1])
def test_a_file_that_is_only_partly_there(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((GOLDEN / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="only partly there"):
        load_lm(path, CONFIG.lm, CPU, torch.float32)


def header(text: bytes, body: int = 0, length: int | None = None) -> bytes:
    """A safetensors file with a header of our choice and `body` zeros behind it."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(body)


@pytest.mark.parametrize(
    "content",
    [
        header(b"{", length=2**63),
        header(b"{", length=99 * 2**20),
        header(b"[" * 90_000),
        header(b"\xff" * 64),
        header(b'{"emb.0.weight":{"dtype":"F32","shape":[1099511627776,4096],"data_offsets":[0,64]}}', 64),
        header(
            b'{"emb.0.weight":{"dtype":"F32","shape":[4],"data_offsets":[1099511627776,1099511627792]}}', 64
        ),
        header(b'{"emb.0.weight":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}', 16),
        header(b'{"__metadata__":{"a":1}}'),
        header(b'{"linears.%s.x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}' % (b"9" * 5_000), 16),
    ],
)
def test_a_hostile_header_is_refused_within_bounds(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with memory_within(64), pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_lm(path, CONFIG.lm, CPU, torch.float32)


def test_damaged_headers_raise_nothing_else(tmp_path: Path) -> None:
    """Of a file too small to be a model, so that each is refused, whatever was damaged."""
    save_file({"emb.0.weight": torch.zeros(2, 3), "linears.0.weight": torch.zeros(4)}, tmp_path / "good")
    path, rng = tmp_path / "model.safetensors", random.Random(11)
    with memory_within(64):
        for damaged in mutants((tmp_path / "good").read_bytes(), 300, rng):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load_lm(path, CONFIG.lm, CPU, torch.float32)


def test_the_list_of_what_differs_is_bounded(tmp_path: Path) -> None:
    save_file({f"odd.{i}": torch.zeros(1) for i in range(9_000)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="differ") as caught:
        load_lm(tmp_path / "model.safetensors", CONFIG.lm, CPU, torch.float32)
    assert str(caught.value).count("\n") == 2_000


def eight_steps(tensors: Tensors) -> Tensors:
    """The same model as Moshi would store it: no tensors for depth steps 8 to 15."""
    late = [f".{step}." for step in range(8, 16)]
    moshi = {}
    for name, tensor in tensors.items():
        per_step = name.startswith(("linears.", "depformer_in.", "depformer_emb.")) or ".gating." in name
        if name.startswith("depformer.layers.") and "self_attn" in name:
            moshi[name] = tensor[: tensor.shape[0] // 2].clone()
        elif not (per_step and not name.startswith("transformer.") and any(step in name for step in late)):
            moshi[name] = tensor
    return moshi


def test_a_moshi_checkpoint_serves_sixteen_steps(lm_tensors: Tensors, tmp_path: Path) -> None:
    moshi = eight_steps(lm_tensors)
    assert "depformer_emb.7.weight" in moshi
    assert "depformer_emb.8.weight" not in moshi
    doubled = {}
    for name, tensor in lm_tensors.items():
        if name in moshi and moshi[name].shape == tensor.shape:
            doubled[name] = tensor
        elif name in moshi:
            doubled[name] = torch.cat([moshi[name], moshi[name]])
        else:
            earlier = re.sub(r"\.(8|9|1[0-5])\.", lambda match: f".{int(match[1]) - 8}.", name)
            doubled[name] = moshi[earlier].clone()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert_same(load_lm_from(moshi, tmp_path / "a"), load_lm_from(doubled, tmp_path / "b"))


def test_a_moshi_checkpoint_without_the_joining_table_lacks_exactly_that(
    lm_tensors: Tensors, tmp_path: Path
) -> None:
    moshi = eight_steps(lm_tensors)
    drop(moshi, "depformer_emb.7.weight")
    with pytest.raises(CheckpointError, match=r"\(1 differ\):\s+missing: depformer_emb.7.weight$"):
        load_lm_from(moshi, tmp_path)


OLDER = {"_initialized": "inited", "cluster_usage": "cluster_size", "embedding_sum": "embed_avg"}


@pytest.mark.parametrize("sums", ["embed_avg", "embed_sum"])
def test_older_codebook_names(mimi_tensors: Tensors, tmp_path: Path, sums: str) -> None:
    older = {**OLDER, "embedding_sum": sums}
    renamed = {}
    for name, tensor in mimi_tensors.items():
        head, _, tail = name.rpartition(".")
        renamed[f"{head}.{older.get(tail, tail)}"] = tensor
    assert renamed.keys() != mimi_tensors.keys()
    a, b = load_mimi_from(renamed, tmp_path), load_mimi(GOLDEN / "mimi.safetensors", CONFIG.mimi, CPU)
    for side in ("rvq_first", "rvq_rest"):
        left, right = a.quantizer.get_submodule(side), b.quantizer.get_submodule(side)
        assert torch.equal(left.get_buffer("vectors"), right.get_buffer("vectors"))


def test_a_codebook_under_both_names_is_refused(mimi_tensors: Tensors, tmp_path: Path) -> None:
    name = "quantizer.rvq_first.vq.layers.0._codebook."
    tensors = dict(mimi_tensors)
    tensors[f"{name}embed_sum"] = tensors[f"{name}embedding_sum"].clone()
    with pytest.raises(CheckpointError, match=f"unexpected: {name}embed_sum"):
        load_mimi_from(tensors, tmp_path)


def test_a_missing_codebook_is_named_even_if_it_is_not_used(mimi_tensors: Tensors, tmp_path: Path) -> None:
    tensors = dict(mimi_tensors)
    drop(tensors, "quantizer.rvq_rest.vq.layers.30._codebook.embedding_sum")
    with pytest.raises(CheckpointError, match=r"layers.30._codebook.embedding_sum"):
        load_mimi_from(tensors, tmp_path)


def test_offloading_moves_what_fits_and_keeps_the_last_layers() -> None:
    """The meta device stands for a GPU: it holds no values, but what was moved to it can be counted."""
    fits, meta = PRESET_TINY.lm, torch.device("meta")
    whole = resident_bytes(load_lm(None, fits, CPU, torch.float32))
    assert place(load_lm(None, fits, CPU, torch.float32), meta, whole) == 0

    lm = load_lm(None, fits, CPU, torch.float32)
    layer = resident_bytes(lm.transformer.layers[1])
    assert place(lm, meta, whole - layer // 2) == 1
    stayed = {name for name, t in weights_of(lm).items() if t.device.type == "cpu"}
    assert stayed
    assert all(name.startswith("transformer.layers.1.") and "norm" not in name for name in stayed)

    x = torch.zeros(1, 1, fits.temporal.dim, device=meta)
    assert linear(x, lm.transformer.layers[1].self_attn.inputs[0]).shape[-1] == 3 * fits.temporal.dim

    with pytest.raises(CheckpointError, match="too small"):
        place(load_lm(None, fits, CPU, torch.float32), meta, whole // 3)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load_model(resolve("tiny"), "cpu", torch.float32)


def converse(model: Model, voice: str, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Sound and tokens of a session that hears noise at the level of speech."""
    checkpoint = resolve("tiny")
    library = VoiceLibrary(checkpoint.config.lm)
    tokenizer = Tokenizer(checkpoint.tokenizer, size=checkpoint.config.lm.text_card)
    engine = Engine(model, library, tokenizer, EngineConfig())
    slot = engine.open(Persona(voice=voice, sampling=Sampling(text_seed=3, audio_seed=3)))
    rng = np.random.default_rng(0)
    pcm, tokens = [], []
    for _ in range(frames):
        engine.feed(slot, (0.05 * rng.standard_normal(1920)).astype(np.float32))
        (output,) = engine.step()
        pcm.append(output.pcm)
        tokens.append(output.tokens)
    return np.stack(pcm), np.stack(tokens)


def test_tiny_is_the_same_every_time(tiny: Model) -> None:
    assert_same(tiny.lm, load_lm(None, PRESET_TINY.lm, CPU, torch.float32))
    first = weights_of(tiny.lm)["transformer.layers.0.self_attn.inputs.0"][0, :3]
    assert first.tolist() == pytest.approx([-0.172690, -0.043386, 0.022554], abs=1e-6)


def test_tiny_stays_soft_and_speaks_now_and_then(tiny: Model) -> None:
    pcm, tokens = converse(tiny, "NATF2", 150)
    assert np.isfinite(pcm).all()
    assert 0.02 < np.abs(pcm).max() < 0.3
    assert 0.5 < pcm[-50:].std() / pcm[50:100].std() < 2.0
    spoken = np.mean(tokens[:, 0] > 3)
    assert 0.02 < spoken < 0.6
    assert (tokens[:, 0] < 4).sum() + (tokens[:, 0] >= 260).sum() == len(tokens)  # no byte pieces


def test_tiny_voices_differ(tiny: Model) -> None:
    library = VoiceLibrary(PRESET_TINY.lm)
    assert library.names() == sorted(VOICES)
    assert len({library.get(name).digest for name in VOICES}) == 18
    a, b = converse(tiny, "NATF2", 12)[1], converse(tiny, "NATM0", 12)[1]
    assert (a != b).any()


def test_tiny_is_ready_at_once() -> None:
    """From the imports to the first frame, in process time: a busy machine does not count."""
    begin = time.process_time()
    converse(load_model(resolve("tiny"), "cpu", torch.float32), "NATF2", 1)
    assert time.process_time() - begin < 2.0


def test_tiny_is_faster_than_speech(tiny: Model) -> None:
    """On one core, the best of four stretches of two seconds."""
    assert torch.get_num_threads() == 1
    times = []
    for _ in range(4):
        begin = time.process_time()
        converse(tiny, "NATF2", 25)
        times.append(time.process_time() - begin)
    assert min(times) < 25 * 0.08 * 0.5
