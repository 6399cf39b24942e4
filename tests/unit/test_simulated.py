"""The simulated engine and its tables: times as the table says, laws as the real engine's. No test sleeps."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutation import memory_within, mutants

from benchmarks import bound
from personaplex.config import FRAME_SIZE, EngineConfig
from personaplex.engine.simulated import VOICE_POSITIONS, WINDOW, SimulatedEngine, prompt_positions
from personaplex.engine.steptimes import StepTimes
from personaplex.errors import ConfigError, NoCapacity
from personaplex.persona import Persona

TABLE: dict[str, Any] = {
    "table": "steps",
    "source": "derived",
    "contexts": [100, 1_100],
    "batches": [1, 2, 4],
    "tick_ms": [[10, 20, 40], [20, 40, 80]],
    "prefill_positions": [10, 100],
    "prefill_ms": [1, 10],
}
FRAME = np.zeros(FRAME_SIZE, np.float32)


def table(**changes: Any) -> StepTimes:
    return StepTimes.from_json("test", {**TABLE, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"contexts": [0, float("nan")]},
        {"contexts": [float("nan"), 1]},
        {"contexts": [-1, 1]},
        {"batches": [1, 2, 10**300]},
        {"batches": [1, 2, 10**400]},
        {"batches": [1, 2, 1e12]},
        {"batches": {"1": 2}},
        {"batches": None},
        {"tick_ms": [[10, 20, 40], [20, 40]]},
        {"tick_ms": [[10, 20, 40], [20, 40, float("inf")]]},
        {"prefill_ms": [[[]]]},
        {"prefill_ms": 3},
        {"source": ["measured"]},
        {"note": 7},
        {"machine": []},
    ],
)
def test_other_tables_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="step-time table"):
        table(**changes)


@pytest.mark.parametrize("content", [b"", b"[" * 200_000, b"\xff", b"[]", b"1" * 9_000, b" " * 2**25])
def test_files_that_are_no_tables(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "steps.json").write_bytes(content)
    for path in (tmp_path / "steps.json", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="step-time table"):
            StepTimes.load(path)


def test_damaged_tables_raise_nothing_else(tmp_path: Path) -> None:
    path, refused = tmp_path / "steps.json", 0
    with memory_within(32):
        for damaged in mutants(json.dumps(TABLE).encode(), 1_000, random.Random(11)):
            path.write_bytes(damaged)
            try:
                StepTimes.load(path).most_sessions(100.0, 0.05)
            except ConfigError:
                refused += 1
    assert 500 < refused < 1_000


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def engine(clock: Clock, times: StepTimes | None = None, **config: Any) -> SimulatedEngine:
    config = {"slots": 4, "prefill_chunk": 100, **config}
    return SimulatedEngine(times or table(), EngineConfig(**config), clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize(
    ("batch", "context", "ms"),
    [(1, 100, 10), (3, 100, 30), (2, 600, 30), (4, 1_100, 80), (0.5, 0, 10), (1, 9_000, 20)],
)
def test_ticks_are_interpolated_and_held_at_the_edges(batch: float, context: float, ms: float) -> None:
    assert table().tick(batch, context) == pytest.approx(ms / 1e3)


def test_a_batch_beyond_the_table_is_refused_rather_than_guessed() -> None:
    with pytest.raises(ConfigError, match="ends at 4"):
        table().tick(5, 100)
    with pytest.raises(ConfigError, match="ends at 4"):
        engine(Clock(), slots=5)


def test_prompts_take_the_tables_time_and_grow_in_proportion_beyond_it() -> None:
    assert [table().prefill(n) * 1e3 for n in (1, 10, 55, 200)] == pytest.approx([1, 1, 5.5, 20])


def test_most_sessions_is_the_last_batch_within_the_limit() -> None:
    assert [table().most_sessions(1_100, limit) for limit in (0.01, 0.02, 0.061, 0.5)] == [0, 1, 3, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"table": "gpu"},
        {"source": "guessed"},
        {"contexts": [100, 100]},
        {"contexts": None},
        {"batches": [[1, 2, 4]]},
        {"tick_ms": [[10, 20, 40]]},
        {"tick_ms": [[10, 20, 40], [20, 40, float("nan")]]},
        {"tick_ms": "fast"},
        {"prefill_ms": [1, 0]},
        {"prefill_ms": [1]},
    ],
)
def test_a_damaged_table_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        table(**changes)


def test_a_table_that_is_no_file_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        StepTimes.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        StepTimes.load(tmp_path / "bad.json")


def test_the_example_is_what_its_script_derives_and_says_so() -> None:
    data = bound.table(bound.BANDWIDTH, bound.ARITHMETIC)
    assert bound.OUTPUT.read_text() == bound.text(data), "run: python -m benchmarks.bound"
    times = StepTimes.load(bound.OUTPUT)
    assert times.source == "derived"
    assert "Nothing here was measured" in times.note
    assert times.tick(1, 0) == pytest.approx(3.4e-3, rel=0.02)  # the bound of one fresh session
    assert times.tick(64, 3_000) == pytest.approx(27e-3, rel=0.02)  # and of 64 full windows
    assert json.loads(bound.OUTPUT.read_text())["machine"]["name"] == "none"


def test_a_tick_is_held_for_its_sessions_and_what_they_remember() -> None:
    clock = Clock()
    made = engine(clock)
    slots = [made.admit(Persona(text_prompt="")) for _ in range(2)]
    for slot in slots:
        while made.prefill() != slot:
            pass
    began = clock.now
    made.feed(slots[0], FRAME)
    assert [one.slot for one in made.step()] == [slots[0]]
    alone = clock.now - began
    assert alone == pytest.approx(table().tick(1, VOICE_POSITIONS + 12 + 1))
    for slot in slots:
        made.feed(slot, FRAME)
    began = clock.now
    assert len(made.step()) == 2
    assert clock.now - began == pytest.approx(table().tick(2, VOICE_POSITIONS + 12 + 1.5))
    assert made.step() == []


def test_a_window_stops_growing_when_it_is_full() -> None:
    clock = Clock()
    made = engine(clock, table(contexts=[0, WINDOW], tick_ms=[[1, 2, 4], [10, 20, 40]]))
    slot = made.admit(Persona())
    while made.prefill() != slot:
        pass
    for _ in range(WINDOW):
        made.feed(slot, FRAME)
        began = clock.now
        made.step()
    assert clock.now - began == pytest.approx(0.01)


def test_a_prompt_comes_in_pieces_and_a_known_voice_is_not_run_again() -> None:
    clock = Clock()
    made = engine(clock)
    persona = Persona(text_prompt="x" * 400)
    positions = prompt_positions(persona.text_prompt)
    assert positions == 112

    def pieces() -> list[float]:
        slot, taken = made.admit(persona), []
        while True:
            began = clock.now
            ready = made.prefill()
            taken.append(clock.now - began)
            if ready == slot:
                return taken

    prefill = table().prefill
    assert pieces() == pytest.approx([prefill(100), prefill(25), prefill(100), prefill(12)])
    assert pieces() == pytest.approx([prefill(100), prefill(12)])
    assert (made.usage.voice_hits, made.usage.voice_misses) == (1, 1)
    assert made.usage.positions == 2 * (VOICE_POSITIONS + positions)


def test_only_so_many_voices_are_kept() -> None:
    made = engine(Clock(), voice_cache=1)
    for voice in ("NATF0", "NATF1", "NATF0"):
        slot = made.admit(Persona(voice=voice))
        while made.prefill() != slot:
            pass
        made.close(slot)
    assert (made.usage.voice_hits, made.usage.voice_misses) == (0, 3)
    assert made.usage.positions == 0


def test_slots_end_and_a_closed_one_is_never_prefilled_nor_stepped() -> None:
    made = engine(Clock(), slots=2)
    first, second = made.admit(Persona()), made.admit(Persona())
    with pytest.raises(NoCapacity):
        made.admit(Persona())
    made.close(first)
    made.close(first)
    assert made.free == 1
    while (ready := made.prefill()) is None:
        pass
    assert ready == second
    made.feed(second, FRAME)
    made.close(second)
    assert made.step() == []
    assert made.prefill() is None
