"""When pages leave. Time is simulated; every figure is in seconds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest

from personaplex.session.pacer import (
    LEAD_S,
    LONG_STANDING_S,
    SLACK_S,
    STANDING_S,
    Pacer,
)

FRAME = 0.08
STANDING, LONG_STANDING = round(STANDING_S / FRAME), round(LONG_STANDING_S / FRAME)  # pages


def play(
    arrivals: list[float], *, timer_late: float = 0.0, pacer: Pacer | None = None
) -> list[tuple[float, int]]:
    """Drives a pacer as a shell would, with pages numbered by arrival; returns (time, page) as they left."""
    pacer = Pacer() if pacer is None else pacer
    left: list[tuple[float, int]] = []

    def release(now: float) -> None:
        released = pacer.release(now)
        if released is not None:
            left.append((now, int(released[0])))

    def run_until(end: float) -> None:
        while (due := pacer.deadline()) is not None and due + timer_late < end:
            release(due + timer_late)

    for number, arrival in enumerate(arrivals):
        run_until(arrival)
        pacer.push(str(number).encode(), arrival)
        release(arrival)
    run_until(float("inf"))
    return left


def gaps(left: list[tuple[float, int]]) -> list[float]:
    return [after[0] - before[0] for before, after in itertools.pairwise(left)]


def test_a_page_leaves_at_once_when_nothing_waits() -> None:
    assert play([1.0]) == [(1.0, 0)]


def test_steady_pages_leave_steadily_whatever_the_timer_lag() -> None:
    left = play([0.08 * n for n in range(500)], timer_late=0.003)
    assert [page for _, page in left] == list(range(500))
    assert left[-1][0] == pytest.approx(499 * FRAME, abs=0.01)  # lags do not add up


def test_no_burst_after_a_stall() -> None:
    pacer = Pacer()
    left = play([0.0, 0.08, *[0.48] * 4, 0.56], pacer=pacer)
    assert [page for _, page in left] == list(range(7))
    assert min(gaps(left)) >= FRAME - SLACK_S - 1e-9
    assert pacer.dropped == 0


def test_all_of_a_burst_leaves_and_of_more_the_oldest_is_dropped() -> None:
    pacer = Pacer(burst_s=0.4)
    assert [page for _, page in play([0.0] * 12, pacer=pacer)] == list(range(12))
    assert pacer.dropped == 0
    left = play([9.0] * 14, pacer=pacer)
    assert [page for _, page in left] == [0, *range(3, 14)]  # 0 left before the others came
    assert pacer.dropped == 2


@pytest.mark.parametrize("late_s", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("burst_s", [2.0, 6.0])
def test_a_burst_that_meets_the_rest_of_the_one_before_leaves_whole(burst_s: float, late_s: float) -> None:
    """A busy machine answers the first burst late, so that its last pages still wait when the next one comes;
    four pages in a row were lost to that."""
    pacer, size = Pacer(burst_s), round(burst_s / FRAME)
    moments = [burst_s * turn + (late_s if turn == 1 else 0.0) for turn in (1, 2, 3) for _ in range(size)]
    left = play(moments, pacer=pacer)
    assert [page for _, page in left] == list(range(3 * size))
    assert pacer.dropped == 0


def test_what_is_told_beside_a_page_leaves_behind_it_and_is_never_lost() -> None:
    pacer, left = Pacer(burst_s=0.2), list[bytes | str]()
    for number in range(12):
        pacer.add_text(f" {number}")
        pacer.push(b"page %d" % number, 0.0)
        left += pacer.release(0.0) or ()
    while (due := pacer.deadline()) is not None:
        left += pacer.release(due) or ()
    assert "".join(one for one in left if isinstance(one, str)).split() == [str(n) for n in range(12)]
    assert pacer.dropped > 2
    assert left[-2:] == [b"page 11", " 11"]


def _read_of(messages: list[int | str]) -> int:
    """Frames of which a client knows to have read all the text, as ours counts them."""
    following = read = 0
    for message in messages:
        if isinstance(message, str):
            read = following
        else:
            read, following = max(read, min(following, message)), message + 1
    return read


@pytest.mark.parametrize("seed", range(6))
def test_wherever_a_connection_breaks_its_client_knows_which_text_it_has(seed: int) -> None:
    """Stalls and bursts, in which pages are left out in pauses and dropped."""
    dice, pacer, texts, now = random.Random(seed), Pacer(burst_s=0.3), list[str](), 0.0
    left: list[int | str] = []
    for number in range(500):
        now += dice.choice([0.0] * 8 + [1.0]) if number % 100 < 30 else FRAME
        while (due := pacer.deadline()) is not None and due <= now:
            _leave(pacer, due, left)
        texts.append(f" {number}" if dice.random() < 0.5 else "")
        pacer.add_text(texts[-1])
        if dice.random() < 0.95:  # the others were left out before
            pacer.push(b"%d" % number, now, quiet=number % 50 > 30)
        _leave(pacer, now, left)
    assert pacer.trimmed > 3
    assert pacer.dropped > 2
    for end in range(len(left) + 1):
        heard = "".join(one for one in left[:end] if isinstance(one, str))
        assert heard == "".join(texts[: _read_of(left[:end])])


def _leave(pacer: Pacer, now: float, left: list[int | str]) -> None:
    if (released := pacer.release(now)) is not None:
        page, text = released
        left += [int(page), text] if text else [int(page)]


@pytest.mark.parametrize("engine", [2, 5, 50])
@pytest.mark.parametrize("burst_s", [0.5, 1.0, 2.0, 5.0, 6.0])
def test_a_sender_of_bursts_keeps_the_delay_it_needs(burst_s: float, engine: int) -> None:
    """Quiet pages too: were the wait inside a burst taken for standing delay, each burst would end in a gap.
    `engine`: how many times faster than real time it answers."""
    pacer = Pacer()
    moments: list[float] = []
    for number in range(round(300 / FRAME)):
        come = math.ceil((number + 1) * FRAME / burst_s - 1e-9) * burst_s
        moments.append(max(come, (moments[-1] if moments else 0.0) + FRAME / engine))
    for moment in moments:
        while (due := pacer.deadline()) is not None and due < moment:
            pacer.release(due)
        pacer.push(b"", moment, quiet=True)
        pacer.release(moment)
    assert (pacer.trimmed, pacer.dropped) == (0, 0)
    assert pacer.late <= 3, "once, until its delay is known"


def test_delay_beyond_a_senders_own_is_given_back() -> None:
    """Pages of a second, and one stall of two: what it left is gone a few bursts later."""
    pacer = Pacer()
    moments = [math.ceil((number + 1) * FRAME - 1e-9) for number in range(500)]
    stalled = [22 if 20 <= moment < 22 else moment for moment in moments]
    for moment in stalled:
        while (due := pacer.deadline()) is not None and due < moment:
            pacer.release(due)
        pacer.push(b"", moment, quiet=True)
        pacer.release(moment)
    assert pacer.waiting <= 13, "a burst"
    assert 20 <= pacer.trimmed <= 26, "two seconds"
    assert pacer.dropped == 0


def test_never_two_pages_closer_than_the_slack_allows() -> None:
    dice = random.Random(1)
    for _ in range(200):
        moments = [max(0.0, n * FRAME + dice.gauss(0, 0.06)) for n in range(100)]
        left = play(sorted(moments), timer_late=dice.random() * 0.01)
        assert min(gaps(left)) >= FRAME - SLACK_S - 0.01 - 1e-9
        numbers = [page for _, page in left]
        assert numbers == sorted(set(numbers))


def converse(
    pacer: Pacer, frames: int, *, late: float, quiet: Callable[[int], bool], start: int = 0
) -> list[float]:
    """Frames that come `late` seconds after their time, each page leaving as soon as it may. Returns when
    pages left, counted from the time of the frame that came last."""
    left = []
    for number in range(start, start + frames):
        now = number * FRAME + late
        while (due := pacer.deadline()) is not None and due < now:
            pacer.release(due)
            left.append(due - (number - 1) * FRAME)
        pacer.push(b"page", now, quiet(number))
        if pacer.release(now) is not None:
            left.append(late)
    return left


def always(number: int) -> bool:
    return True


def never(number: int) -> bool:
    return False


def test_a_player_is_kept_supplied_ahead_of_its_need() -> None:
    """Pages that come a little earlier than the first leave early, but not by more than a player can hold."""
    pacer = Pacer()
    for number, arrival in enumerate((0.0, FRAME - 0.005, 2 * FRAME - 0.03)):
        pacer.push(b"page", arrival)
        assert (pacer.release(arrival) is not None) == (number < 2)
    assert pacer.deadline() == pytest.approx(2 * FRAME - LEAD_S)


def test_standing_delay_is_given_back_between_quiet_pages() -> None:
    pacer = Pacer()
    converse(pacer, 1, late=0.06, quiet=never)  # something held the first page up, and nothing since
    assert converse(pacer, STANDING + 5, late=0.0, quiet=never, start=1)[-1] == pytest.approx(0.05)
    one = STANDING + 6
    alone = converse(pacer, 3, late=0.0, quiet=lambda number: number == one, start=one)
    assert alone == pytest.approx([0.05] * 3), "what was said before it would be lost"
    delays = converse(pacer, 5, late=0.0, quiet=always, start=one + 3)
    assert delays == pytest.approx([0.05, 0.05, 0.03, 0.01, 0.0], abs=1e-9)
    assert (pacer.trimmed, pacer.late, pacer.dropped) == (0, 0, 0)


def test_delay_that_was_needed_once_is_kept_for_a_whole_period() -> None:
    pacer = Pacer()
    converse(pacer, 1, late=0.05, quiet=always)
    at = 1
    for _ in range(4):  # one frame in each period needs all of it
        converse(pacer, STANDING - 1, late=0.0, quiet=always, start=at)
        assert converse(pacer, 1, late=0.04, quiet=always, start=at + STANDING - 1)[-1] == pytest.approx(0.04)
        at += STANDING
    assert (pacer.trimmed, pacer.late) == (0, 0)
    converse(pacer, 1, late=0.0, quiet=always, start=at)
    assert pacer.deadline() == pytest.approx(at * FRAME + 0.04), "nothing was given back"


def test_a_long_stall_is_made_up_for_within_one_pause() -> None:
    pacer = Pacer()
    converse(pacer, 1, late=0.3, quiet=never)
    converse(pacer, STANDING + 4, late=0.0, quiet=never, start=1)
    assert pacer.waiting == 4
    left = converse(pacer, 8, late=0.0, quiet=always, start=STANDING + 5)
    assert pacer.trimmed == 3, "0.29 s: three pages, and the rest by leaving early"
    assert left[-1] == pytest.approx(0.0, abs=1e-9)


def test_standing_delay_is_given_back_at_last_where_there_is_no_quiet() -> None:
    pacer = Pacer()
    converse(pacer, 1, late=0.3, quiet=never)
    trims = []
    for number in range(1, 5 * LONG_STANDING):
        before = pacer.trimmed
        converse(pacer, 1, late=0.0, quiet=never, start=number)
        trims += [number] * (pacer.trimmed - before)
    assert trims == [n * LONG_STANDING + 4 for n in (1, 2, 3)], "it began 0.3 s late"
    assert (pacer.waiting, pacer.dropped) == (1, 0), "less than a page of it is left"


def test_giving_back_is_never_heard() -> None:
    """Whatever the arrivals: never closer than the slack allows, and less only between two quiet pages."""
    dice = random.Random(2)
    for _ in range(30):
        pacer, left, hushes = Pacer(), [], [dice.random() < 0.3 for _ in range(1_500)]
        for number, quiet in enumerate(hushes):
            late = dice.choice((0.0, 0.01)) + (0.12 if dice.random() < 0.01 else 0.0)
            now = max(number * FRAME + late, left[-1][0] if left else 0.0)
            while (due := pacer.deadline()) is not None and due < now:
                left.append((due, pacer.release(due)))
            pacer.push(b"%d" % number, now, quiet)
            left.append((now, pacer.release(now)))
        pages = [(moment, int(released[0])) for moment, released in left if released is not None]
        for (before, first), (after, second) in itertools.pairwise(pages):
            assert after - before >= FRAME - SLACK_S - 1e-9
            assert second == first + 1 or not any(not hushes[lost] for lost in range(first + 1, second))
        assert pacer.dropped == 0
