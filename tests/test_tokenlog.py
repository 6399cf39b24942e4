"""The per-frame record: growth, layout, saving whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
