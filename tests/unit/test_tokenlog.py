"""The per-frame record: growth, layout, saving whole or not at all."""

from __future__ import annotations

import io
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mutation import memory_within, mutants

from personaplex.errors import CheckpointError
from personaplex.tokenlog import TokenLog, save_arrays


def filled(frames: int, capacity: int = 256) -> tuple[TokenLog, np.ndarray]:
    rows = np.random.default_rng(0).integers(-1, 32_000, (frames, 17))
    log = TokenLog(capacity)
    for i, row in enumerate(rows):
        log.append(row, forced=i % 3 == 0)
    return log, rows


@pytest.mark.parametrize("capacity", [0, 1, 7, 1000])
def test_grows_and_keeps_every_frame(capacity: int) -> None:
    log, rows = filled(100, capacity)
    assert len(log) == 100
    np.testing.assert_array_equal(log.tokens, rows)
    np.testing.assert_array_equal(log.text, rows[:, 0])
    np.testing.assert_array_equal(log.agent_codes, rows[:, 1:9].T)
    np.testing.assert_array_equal(log.user_codes, rows[:, 9:].T)
    np.testing.assert_array_equal(log.forced, np.arange(100) % 3 == 0)


@pytest.mark.parametrize("frames", [0, 1, 300])
def test_saved_and_loaded(tmp_path: Path, frames: int) -> None:
    log, rows = filled(frames)
    log.save(tmp_path / "session.npz")
    again = TokenLog.load(tmp_path / "session.npz")
    np.testing.assert_array_equal(again.tokens, rows)
    np.testing.assert_array_equal(again.forced, log.forced)
    again.append(np.arange(17))
    assert len(again) == frames + 1
    assert [p.name for p in tmp_path.iterdir()] == ["session.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "session.npz"
    filled(3)[0].save(path)

    def disk_full(file: object, **arrays: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", disk_full)
    with pytest.raises(OSError, match="no space"):
        filled(9)[0].save(path)
    assert len(TokenLog.load(path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["session.npz"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    save_arrays(tmp_path / "keys.npz", text=np.zeros(3, np.int64))
    save_arrays(
        tmp_path / "shapes.npz",
        text=np.zeros(3, np.int64),
        agent_codes=np.zeros((8, 3), np.int64),
        user_codes=np.zeros((7, 3), np.int64),
        forced=np.zeros(3, bool),
    )
    for path in tmp_path.iterdir():
        with pytest.raises(CheckpointError, match="token log"):
            TokenLog.load(path)


def packed(**arrays: bytes | np.ndarray) -> bytes:
    """A token log of three frames with other arrays, or the bytes of arrays, in place of its own."""
    good = {
        "text": np.zeros(3, np.int32),
        "agent_codes": np.zeros((8, 3), np.int32),
        "user_codes": np.zeros((8, 3), np.int32),
        "forced": np.zeros(3, bool),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in {**good, **arrays}.items():
            data = io.BytesIO()
            if isinstance(array, bytes):
                data.write(array)
            else:
                np.save(data, array)
            file.writestr(f"{name}.npy", data.getvalue())
    return out.getvalue()


def claim(shape: str, dtype: str = "<i4") -> bytes:
    """An array of no bytes whose header claims `shape`."""
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head


OTHERS = {
    "claimed": packed(text=claim("(1099511627776,)")),
    "claimed nothing": packed(text=claim("(0, 1099511627776)")),
    "negative": packed(text=claim("(-1,)")),
    "objects": packed(text=claim("(3,)", "|O")),
    "nested header": packed(text=b"\x93NUMPY\x01\x00" + (9_000).to_bytes(2, "little") + b"[" * 9_000),
    "no header": packed(text=b""),
    "text": packed(text=np.array(["a", "b", "c"])),
    "floats": packed(text=np.zeros(3)),
    "complex": packed(agent_codes=np.zeros((8, 3), complex)),
    "large tokens": packed(text=np.full(3, 2**31, np.int64)),
    "small tokens": packed(text=np.full(3, -3)),
    "forced numbers": packed(forced=np.zeros(3, np.int32)),
    "forced longer": packed(forced=np.zeros(4, bool)),
    "scalar": packed(text=np.int32(3)),
    "three axes": packed(agent_codes=np.zeros((8, 3, 1), np.int32)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_hostile_files_are_refused_within_bounds(tmp_path: Path, kind: str) -> None:
    (tmp_path / "session.npz").write_bytes(OTHERS[kind])
    with memory_within(64), pytest.raises(CheckpointError, match="token log"):
        TokenLog.load(tmp_path / "session.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """256 MiB of zeros in as many KiB."""
    path = tmp_path / "session.npz"
    path.write_bytes(packed())
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("text.npy", "w") as entry,
    ):
        for _ in range(256):
            entry.write(bytes(2**20))
    with memory_within(32), pytest.raises(CheckpointError, match="token log"):
        TokenLog.load(path)


def test_names_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    for name in ("pipe.npz", "folder.npz", "missing.npz", "\0"):
        with pytest.raises(CheckpointError, match="token log"):
            TokenLog.load(tmp_path / name)


def test_other_integers_and_orders_are_read(tmp_path: Path) -> None:
    codes = np.arange(24).reshape(8, 3)
    (tmp_path / "session.npz").write_bytes(
        packed(
            agent_codes=np.asfortranarray(codes), user_codes=codes.astype(">i2"), text=np.full(3, -2, np.int8)
        )
    )
    log = TokenLog.load(tmp_path / "session.npz")
    np.testing.assert_array_equal(log.agent_codes, codes)
    np.testing.assert_array_equal(log.user_codes, codes)
    np.testing.assert_array_equal(log.text, -2)


def test_damaged_files_raise_nothing_else(tmp_path: Path) -> None:
    """Half of them in the archive as it is, half in an array, where its sums cannot give them away."""
    rng, path = random.Random(11), tmp_path / "session.npz"
    filled(20)[0].save(path)
    array = io.BytesIO()
    np.save(array, np.zeros(3, np.int32))
    damaged = [*mutants(path.read_bytes(), 200, rng)]
    damaged += [packed(text=data) for data in mutants(array.getvalue(), 200, rng)]
    refused = 0
    with memory_within(64):
        for content in damaged:
            path.write_bytes(content)
            try:
                TokenLog.load(path)
            except CheckpointError:
                refused += 1
    assert refused > 200
