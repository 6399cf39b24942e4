"""Hostile voice files and archives: a bad one is a CheckpointError of whoever asks for that voice."""

from __future__ import annotations

import gzip
import io
import logging
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from golden import CONFIG, GOLDEN, model
from mutation import memory_within, mutants
from torch import Tensor, nn

from deployments.replica import models
from deployments.settings import Settings
from personaplex import voicearchive
from personaplex.audio.voicewav import load_voice_wav
from personaplex.config import FRAME_SIZE, PRESET_TINY, EngineConfig
from personaplex.engine.engine import Engine
from personaplex.errors import BadAudio, CheckpointError
from personaplex.persona import DEFAULT_VOICE, Persona
from personaplex.text import Tokenizer
from personaplex.voicearchive import unpack
from personaplex.voices import VoiceLibrary, load_voice, save_voice

LM = CONFIG.lm
DIM = LM.temporal.dim
CONTEXT = LM.temporal.context


def saved(embeddings: Any = None, cache: Any = None, **options: Any) -> bytes:
    """A voice file of 30 frames, with other tensors where they are given."""
    content = {
        "embeddings": torch.ones(29, 1, 1, DIM) if embeddings is None else embeddings,
        "cache": torch.zeros(1, 17, 4, dtype=torch.int64) if cache is None else cache,
    }
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def repacked(data: bytes, change: Callable[[str, bytes], bytes], **options: Any) -> bytes:
    """The same archive with its entries changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def with_pickle(content: bytes) -> bytes:
    return repacked(saved(), lambda name, data: content if name.endswith("data.pkl") else data)


class Odd(Tensor):
    """A subclass."""


def subclassed() -> Tensor:
    return torch.ones(29, 1, 1, DIM).as_subclass(Odd)


def tagged() -> Tensor:
    tensor = torch.ones(29, 1, 1, DIM)
    tensor.mood = "odd"  # type: ignore[attr-defined]
    return tensor


def claiming(count: int) -> bytes:
    """A file whose pickle claims a storage of `count` numbers where there are 928."""
    claim = b"\x8a\x08" + struct.pack("<q", count)

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert b"M" + struct.pack("<H", 29 * DIM) in data
        return data.replace(b"M" + struct.pack("<H", 29 * DIM), claim, 1)

    return repacked(saved(), change)


def compressed() -> bytes:
    """128 MiB of zeros in less than a megabyte."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved())) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            if name != "archive/data/0":
                new.writestr(name, old.read(name))
        with new.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(128):
                entry.write(bytes(2**20))
    return out.getvalue()


def nested(depth: int) -> bytes:
    """A dict whose key is a tuple in a tuple in a tuple: hashing it overflows the stack of the process."""
    return with_pickle(b"\x80\x02})" + b"\x85" * depth + b"K\x01s.")


def crowded() -> bytes:
    out = io.BytesIO(saved())
    with zipfile.ZipFile(out, "a") as archive:
        for number in range(200):
            archive.writestr(f"archive/more/{number}", b"")
    return out.getvalue()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "sparse": lambda: saved(torch.ones(29, 1, 1, DIM).to_sparse()),
    "sparse rows": lambda: saved(torch.eye(DIM).to_sparse_csr()),
    "meta": lambda: saved(torch.empty(29, 1, 1, DIM, device="meta")),
    "nested": lambda: saved(torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)])),
    "quantized": lambda: saved(torch.quantize_per_tensor(torch.ones(29, 1, 1, DIM), 0.1, 0, torch.qint8)),
    "subclass": lambda: saved(subclassed()),
    "attributes": lambda: saved(tagged()),
    "complex": lambda: saved(torch.ones(29, 1, 1, DIM, dtype=torch.complex64)),
    "conjugate": lambda: saved(torch.ones(29, 1, 1, DIM, dtype=torch.complex64).conj()),
    "bool": lambda: saved(torch.ones(29, 1, 1, DIM, dtype=torch.bool)),
    "float64": lambda: saved(torch.ones(29, 1, 1, DIM, dtype=torch.float64)),
    "float8": lambda: saved(torch.ones(29, 1, 1, DIM).to(torch.float8_e4m3fn)),
    "hugely expanded": lambda: saved(torch.ones(1, 1, 1, DIM).expand(2**33, 1, 1, DIM)),
    "expanded ring": lambda: saved(cache=torch.zeros(1, 1, 1, dtype=torch.int64).expand(2**40, 17, 4)),
    "longer than the context": lambda: saved(torch.ones(CONTEXT, 1, 1, DIM)),
    "scalar": lambda: saved(torch.tensor(1.0)),
    "empty": lambda: saved(torch.ones(29, 0, 1, DIM)),
    "infinite": lambda: saved(torch.full((29, 1, 1, DIM), torch.inf)),
    "infinite in float16": lambda: saved(torch.full((29, 1, 1, DIM), 1e38)),
    "not a number": lambda: saved(torch.full((29, 1, 1, DIM), torch.nan, dtype=torch.bfloat16)),
    "token": lambda: saved(cache=torch.full((1, 17, 4), 2**62)),
    "numpy": lambda: saved(np.ones((29, 1, 1, DIM), np.float32)),
    "module": lambda: saved(nn.Linear(2, 2)),
    "storage beyond its end": lambda: claiming(2**40),
    "storage shorter": lambda: claiming(8),
    "zip bomb": compressed,
    "too many entries": crowded,
    "big-endian": lambda: repacked(saved(), lambda n, d: b"big" if n.endswith("byteorder") else d),
    "no tensors": lambda: repacked(b"PK\x05\x06" + bytes(18), lambda n, d: d),
    "older format": lambda: saved(_use_new_zipfile_serialization=False),
    "protocol 5": lambda: saved(pickle_protocol=5),
    "pickle": lambda: pickle.dumps({"embeddings": [1.0], "cache": [0]}),
    "pickle that calls": lambda: with_pickle(b"cos\nsystem\n(S'true'\ntR."),
    "memo of 64 GiB": lambda: with_pickle(b"\x80\x02Nr\xf0\xff\xff\xff."),
    "deep tuple": lambda: nested(3_000),
    "deeper tuple": lambda: nested(500_000),
    "no pickle": lambda: with_pickle(b""),
    "long pickle": lambda: with_pickle(b"\x80\x02" + b"N0" * 2**20 + b"N."),
    "git-lfs": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "html": lambda: b"<!DOCTYPE html>" * 100,
    "larger than any voice": lambda: saved() + bytes(2**21),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of what it is asked to save
@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_a_file_holds_is_a_typed_error(tmp_path: Path, kind: str) -> None:
    """Within 64 MiB, with its name and no path."""
    (tmp_path / "NATF2.pt").write_bytes(HOSTILE[kind]())
    refusal = r"voice NATF2\.pt (cannot be read|does not fit)"
    with memory_within(64), pytest.raises(CheckpointError, match=refusal) as caught:
        load_voice(tmp_path / "NATF2.pt", LM)
    assert str(tmp_path) not in str(caught.value)


def test_what_to_do_about_a_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "NATF2.pt").write_bytes(HOSTILE["git-lfs"]())
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_voice(tmp_path / "NATF2.pt", LM)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "dangling link", "circular link", "missing"])
def test_names_that_are_no_files(tmp_path: Path, kind: str) -> None:
    """A pipe without a writer is not waited for."""
    path = tmp_path / "NATF2.pt"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "dangling link":
            path.symlink_to(tmp_path / "nothing")
        case "circular link":
            path.symlink_to(path)
    with pytest.raises(CheckpointError, match=r"voice NATF2\.pt cannot be read") as caught:
        load_voice(path, LM)
    assert str(tmp_path) not in str(caught.value)


def test_a_link_to_a_voice_is_that_voice(tmp_path: Path) -> None:
    (tmp_path / "NATF2.pt").symlink_to(GOLDEN / "voice.pt")
    assert load_voice(tmp_path / "NATF2.pt", LM).digest == load_voice(GOLDEN / "voice.pt", LM).digest


def embeddings() -> Tensor:
    return torch.arange(29.0 * DIM).reshape(29, 1, 1, DIM) / 100


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(lambda: embeddings().requires_grad_(), id="with a gradient"),
        pytest.param(lambda: nn.Parameter(embeddings()), id="parameter"),
        pytest.param(lambda: torch.cat([embeddings() + 1, embeddings()])[29:], id="part of a larger one"),
        pytest.param(lambda: embeddings().permute(3, 0, 1, 2).clone().permute(1, 2, 3, 0), id="transposed"),
    ],
)
def test_the_same_numbers_are_the_same_voice(tmp_path: Path, same: Callable[[], Tensor]) -> None:
    (tmp_path / "plain.pt").write_bytes(saved(embeddings()))
    (tmp_path / "same.pt").write_bytes(saved(same()))
    plain, other = (load_voice(tmp_path / f"{name}.pt", LM) for name in ("plain", "same"))
    assert plain.digest == other.digest
    assert other.embeddings is not None
    assert torch.equal(other.embeddings, embeddings()[:, 0, 0])
    assert other.embeddings.is_contiguous()


def test_the_reader_agrees_with_torch(tmp_path: Path) -> None:
    voice = load_voice(GOLDEN / "voice.pt", LM)
    theirs = torch.load(GOLDEN / "voice.pt", weights_only=True)
    assert voice.embeddings is not None
    assert voice.cache is not None
    assert torch.equal(voice.embeddings, theirs["embeddings"][:, 0, 0])
    assert torch.equal(voice.cache, theirs["cache"][0])


def test_mutated_files_raise_nothing_else(tmp_path: Path) -> None:
    """Half of them in the archive as it is, half in its pickle, where its sums cannot give them away."""
    rng, path, refused = random.Random(11), tmp_path / "voice.pt", 0
    whole = (GOLDEN / "voice.pt").read_bytes()
    with zipfile.ZipFile(GOLDEN / "voice.pt") as archive:
        pickled = archive.read("voice/data.pkl")
    content = [*mutants(whole, 250, rng), *map(with_pickle, mutants(pickled, 250, rng))]
    with memory_within(64):
        for data in content:
            path.write_bytes(data)
            try:
                load_voice(path, LM)
            except CheckpointError:
                refused += 1
    assert refused > 300


# libraries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A voice folder with a good voice and three bad ones."""
    voices = tmp_path / "voices"
    voices.mkdir()
    (voices / "good.pt").write_bytes((GOLDEN / "voice.pt").read_bytes())
    (voices / "sparse.pt").write_bytes(HOSTILE["sparse"]())
    (voices / "pointer.pt").write_bytes(HOSTILE["git-lfs"]())
    os.mkfifo(voices / "pipe.pt")
    return voices


def test_a_verified_library_names_its_bad_voices_in_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = VoiceLibrary(LM, folder)
    assert len(library.names()) == 4
    library.verify()
    assert library.names() == ["good"]
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("3 of 4 voices cannot be used: ")
    for name in ("sparse.pt", "pointer.pt", "pipe.pt"):
        assert line.count(name) == 1


def test_after_verification_no_file_is_opened(folder: Path) -> None:
    """A fault is remembered, and a voice kept, whatever becomes of the files."""
    library = VoiceLibrary(LM, folder)
    library.verify()
    for path in folder.iterdir():
        path.unlink()
    assert library.get("good").frames == 30
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"voice sparse\.pt cannot be read"):
            library.get("sparse")


def test_a_voice_that_was_not_verified_is_remembered_all_the_same(folder: Path) -> None:
    library = VoiceLibrary(LM, folder)
    with pytest.raises(CheckpointError):
        library.get("sparse")
    (folder / "sparse.pt").write_bytes((GOLDEN / "voice.pt").read_bytes())
    with pytest.raises(CheckpointError):
        library.get("sparse")


def test_a_bad_voice_ends_no_engine_and_no_neighbour(folder: Path) -> None:
    engine = Engine(
        model(),
        VoiceLibrary(LM, folder),
        Tokenizer(GOLDEN / "tokenizer.model", size=LM.text_card),
        EngineConfig(slots=2),
    )
    neighbour = engine.open(Persona("good", ""))
    for name in ("sparse", "pointer", "pipe"):
        with pytest.raises(CheckpointError):
            engine.admit(Persona(name, ""))
        engine.feed(neighbour, np.zeros(FRAME_SIZE, np.float32))
        assert len(engine.step()) == 1
    assert engine.free == 1


def test_the_longest_voice_can_be_spoken_with(tmp_path: Path) -> None:
    """Nearly as long as what the model remembers, and with the largest values there may be."""
    (tmp_path / "long.pt").write_bytes(saved(torch.full((CONTEXT - 1, 1, 1, DIM), 65_504.0)))
    tokenizer = Tokenizer(GOLDEN / "tokenizer.model", size=LM.text_card)
    engine = Engine(model(), VoiceLibrary(LM, tmp_path), tokenizer, EngineConfig())
    slot = engine.open(Persona("long", "You are a guide."))
    engine.feed(slot, np.zeros(FRAME_SIZE, np.float32))
    (output,) = engine.step()
    assert np.isfinite(output.pcm).all()


@pytest.mark.parametrize("bad", ["other", DEFAULT_VOICE])
def test_a_service_starts_without_its_bad_voices(
    tmp_path: Path, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    dim = PRESET_TINY.lm.temporal.dim
    save_voice(tmp_path / "mine.pt", torch.zeros(9, dim), torch.zeros(17, 4, dtype=torch.int64))
    (tmp_path / f"{bad}.pt").write_bytes(HOSTILE["meta"]())
    settings = Settings.load({"model": "tiny", "device": "cpu", "voice_prompt_dir": tmp_path})
    loaded = models.load(settings)
    assert list(loaded.voices) == ["mine"]
    assert f"1 of 2 voices cannot be used: voice {bad}.pt" in caplog.text
    (tmp_path / "mine.pt").unlink()  # an engine that serves opens no file
    loaded.engine.close(loaded.engine.admit(Persona("mine", "")))
    with pytest.raises(CheckpointError):
        loaded.engine.admit(Persona(bad, ""))


# archives


def member(name: str, size: int = 0, mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uid, info.gid = size, mode, 4_711, 4_711
    return info


def test_an_archive_gives_bytes_and_names_and_no_rights(tmp_path: Path) -> None:
    content = (GOLDEN / "voice.pt").read_bytes()
    with tarfile.open(tmp_path / "voices.tgz", "w:gz") as tar:
        top = member("voices", mode=0o7777)
        top.type = tarfile.DIRTYPE
        tar.addfile(top)
        tar.addfile(member("voices/A.pt", len(content), 0o6777), io.BytesIO(content))
        tar.addfile(member("./voices/B.pt", len(content), 0o000), io.BytesIO(content))
        tar.addfile(member("README", 2), io.BytesIO(b"hi"))
        tar.addfile(member("voices/old/C.pt", 2), io.BytesIO(b"hi"))
    folder = unpack(tmp_path / "voices.tgz")
    assert folder.stat().st_mode & 0o7777 == 0o755
    assert sorted(path.name for path in folder.iterdir()) == ["A.pt", "B.pt"]
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        state = path.stat()
        assert (state.st_mode & 0o7777, state.st_uid) == (0o666 & ~mask, os.geteuid())
        assert path.read_bytes() == content
    assert VoiceLibrary(LM, tmp_path / "voices.tgz").names() == ["A", "B"]


def bomb(path: Path, kind: str) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        match kind:
            case "large file":
                file.write(member("voices/A.pt", 2**26).tobuf())
                for _ in range(64):
                    file.write(bytes(2**20))
            case "large header":  # which tarfile takes into memory whole
                header = member("pax", 2**26)
                header.type = tarfile.XHDTYPE
                file.write(header.tobuf())
                file.write(bytes(2**26))
            case "many headers":
                for number in range(1_100):
                    file.write(member(f"voices/{number}.pt").tobuf())
        file.write(bytes(2**11))


@pytest.mark.parametrize("kind", ["large file", "large header", "many headers"])
def test_an_archive_that_unpacks_to_too_much(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb(tmp_path / "voices.tgz", kind)
    if kind == "large file":
        monkeypatch.setattr(voicearchive, "UNPACKED_LIMIT", 2**25)
    monkeypatch.setattr(voicearchive, "HEADER_LIMIT", 1_000)
    with memory_within(32), pytest.raises(CheckpointError, match="cannot be unpacked"):
        unpack(tmp_path / "voices.tgz")
    assert [path.name for path in tmp_path.iterdir()] == ["voices.tgz"]


def test_mutated_archives_raise_nothing_else(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "plain", "w") as tar:
        for number in range(3):
            tar.addfile(member(f"voices/V{number}.pt", 700), io.BytesIO(bytes(700)))
    for number, data in enumerate(mutants((tmp_path / "plain").read_bytes(), 150, random.Random(11))):
        place = tmp_path / str(number)
        place.mkdir()
        content = gzip.compress(data, 1) if number % 2 else data
        (place / "voices.tgz").write_bytes(content)
        try:
            unpack(place / "voices.tgz")
        except CheckpointError:
            assert [path.name for path in place.iterdir()] == ["voices.tgz"]


def test_an_archive_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "voices.tgz")
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        VoiceLibrary(LM, tmp_path / "voices.tgz")


# recordings


def test_a_recording_longer_than_the_model_remembers(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(240 * 4_000 + 1), 4_000)
    with pytest.raises(BadAudio, match="at most 240 s"):
        load_voice_wav(tmp_path / "long.wav")
