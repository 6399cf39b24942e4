"""The page's jitter buffer, run by hand: what it plays of pages that come late."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from views import Views

pytestmark = pytest.mark.browser

SPEECH, QUIET = 0.25, 0.0
COUNT = 60
# Pages of 80 ms, one by one: {at: ms of its arrival, level}. Gives the underruns, and before which pages it
# put silence.
RUN = """(async () => {
  const made = {};
  Object.assign(globalThis, {
    AudioWorkletProcessor: class { port = { postMessage: (told) => globalThis.told.push(told) }; },
    registerProcessor: (name, processor) => { made[name] = processor; },
    sampleRate: 48_000,
    currentFrame: 0,
    told: [],
  });
  await import("./audio/worklets.js");
  const player = new made.playback();
  const waiting = PAGES.map(({ at, level }, number) => ({ from: 48 * at, number, level }));
  const end = waiting.at(-1).from + 3_840;
  for (; globalThis.currentFrame < end; globalThis.currentFrame += 128) {
    while (waiting.length && waiting[0].from <= globalThis.currentFrame) {
      const { number, level } = waiting.shift();
      player.port.onmessage({ data: { samples: new Float32Array(3_840).fill(level), at: 3_840 * number } });
    }
    player.process([], [[new Float32Array(128)]]);
  }
  const marks = globalThis.told.flatMap((told) => told.marks);
  return {
    underruns: globalThis.told.at(-1).underruns,
    silences: marks.map(([frame, at], number) => [at, marks[number + 1]])
      .filter(([at, following]) => at === -1 && following).map(([, [frame, at]]) => at / 3_840),
  };
})()"""


def _run(
    page: Views, late_ms: Callable[[int], float], quiet: Sequence[int] = (), count: int = COUNT
) -> dict[str, Any]:
    pages = [
        {"at": 80 * number + late_ms(number), "level": QUIET if number in quiet else SPEECH}
        for number in range(count)
    ]
    found: dict[str, Any] = page.run(RUN.replace("PAGES", json.dumps(pages)))
    return found


def _twice_later(number: int) -> float:
    """Each time by more than half of the reserve, for good."""
    return 50.0 * (number >= 10) + 50.0 * (number >= 30)


def test_a_reserve_that_pages_have_used_up_is_filled_again_where_it_is_quiet(page: Views) -> None:
    found = _run(page, _twice_later, quiet=(20, 21))
    assert found["underruns"] == 0
    assert [20 <= place < 22 for place in found["silences"]] == [True]


def test_speech_is_not_held_up_for_it(page: Views) -> None:
    found = _run(page, _twice_later)
    assert found["underruns"] == 1
    assert len(found["silences"]) == 1


def test_one_late_page_changes_nothing(page: Views) -> None:
    found = _run(page, lambda number: 60.0 * (number == 10), quiet=range(15, 60))
    assert found == {"underruns": 0, "silences": []}


def test_a_page_that_is_late_every_two_minutes_makes_no_gap(page: Views) -> None:
    """In ten minutes: the reserve is not tried out by making it smaller while nothing happens."""
    found = _run(page, lambda number: 75.0 * (number % 1_500 == 1_499), count=7_500)
    assert found == {"underruns": 0, "silences": []}
