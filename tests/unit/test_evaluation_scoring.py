"""Scores of speech whose times are given: Full-Duplex-Bench's figures and ours, side by side."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from personaplex.evaluation import event, official
from personaplex.evaluation.dataset import TASKS, Sample
from personaplex.evaluation.results import results
from personaplex.evaluation.scoring import profiles
from personaplex.evaluation.speech import Span, Track, Word, merge
from personaplex.evaluation.statistics import distribution, mean, share, wilson

EVEN = [0.01] * 100  # backchannels as likely everywhere
PAUSE = Sample("synthetic_pause_handling", "0", Path(), pauses=(Span(1.74, 2.74),))
E = 2.176
TURN = Sample("candor_turn_taking", "0", Path(), end=E)
INTERRUPTION = Sample("synthetic_user_interruption", "0", Path(), marked=Span(6.0, 8.578))
BACKCHANNEL = Sample("icc_backchannel", "0", Path())
USER = Track(20.0, (Span(0.5, 2.1), Span(6.0, 8.578)))


def says(*utterances: tuple[int, float, float], seconds: float = 20.0) -> Track:
    """Each: so many words, evenly from start to end."""
    spans = tuple(Span(start, end) for _, start, end in utterances)
    words = []
    for count, start, end in utterances:
        size = (end - start) / count
        words += [Word("word", start + i * size, start + (i + 1) * size) for i in range(count)]
    return Track(seconds, spans, tuple(words))


@pytest.mark.parametrize(
    ("agent", "expected", "right", "nvidia"),
    [
        (says(), 0, 0, 0),
        (says((2, 2.04, 2.49)), 0, 0, 1),  # "uh huh"
        (says((14, 1.94, 5.9)), 1, 1, 1),
        (says((4, 1.94, 2.8)), 1, 1, 1),  # short, but more than three words
        (says((8, 4.26, 6.0)), 1, 0, 0),  # the right answer, after the turn
        (says((1, 1.0, 1.4), (1, 1.94, 2.4)), 1, 0, 1),  # two backchannels
    ],
)
def test_a_pause(agent: Track, expected: int, right: int, nvidia: int) -> None:
    scores = profiles(PAUSE, USER, agent)
    assert scores["official"] == {"takeover": expected}
    assert scores["event"] == {"takeover": right, "nvidia": nvidia}


TURNS = [
    (says((6, E + 0.4, E + 2.2)), 1, 0.40, 0.40),
    (says((6, E - 0.5, E + 1.3)), 1, 0.0, -0.50),
    (says(), 0, None, None),
    (says((1, E + 1, E + 1.5)), 0, None, 1.00),  # "Paris"
    (says((2, 0.9, 1.35), (6, E + 0.6, E + 2.4)), 1, 0.0, 0.60),
]


@pytest.mark.parametrize(("agent", "taken", "latency", "right"), TURNS)
def test_a_turn(agent: Track, taken: int, latency: float | None, right: float | None) -> None:
    scores = profiles(TURN, USER, agent)
    assert scores["official"]["takeover"] == taken
    assert scores["official"]["latency"] == (None if latency is None else pytest.approx(latency))
    assert scores["event"]["latency"] == (None if right is None else pytest.approx(right))
    assert scores["event"]["answered"] == (right is not None)


def test_all_turns_together() -> None:
    records = [
        {"task": TURN.task, "id": str(n), "repeat": 0, "error": None, **profiles(TURN, USER, agent)}
        for n, (agent, *_) in enumerate(TURNS)
    ]
    figures = figures_of(records)
    assert figures["official"]["takeover"]["value"] == pytest.approx(0.6)
    assert figures["official"]["latency"]["value"] == pytest.approx(0.4 / 3)
    assert figures["official"]["clamped"]["value"] == pytest.approx(2 / 3)
    assert figures["event"]["answered"]["value"] == pytest.approx(4 / 5)
    assert figures["event"]["latency"]["negative"]["value"] == pytest.approx(1 / 4)
    assert figures["event"]["latency"]["histogram"] == {"-0.5": 1, "0.4": 1, "0.6": 1, "1.0": 1}


def figures_of(records: list[dict]) -> dict:
    from personaplex.evaluation.dataset import Dataset

    found = results(records, Dataset((), (), {}), {}, "file")
    return found["tasks"][records[0]["task"]]


END = 8.578


@pytest.mark.parametrize(
    ("agent", "taken", "latency", "stop", "censored", "response"),
    [
        (says((12, 3.0, 6.4), (7, END + 0.5, END + 2.6)), 1, 0.50, 0.40, 0, 0.50),
        (says((50, 3.0, 19.0)), 1, "soon", END - 6.0, 1, None),  # never stops
        (says((12, 3.0, 6.4)), 0, None, 0.40, 0, None),
        (says(), 0, None, None, 0, None),
    ],
)
def test_an_interruption(
    agent: Track,
    taken: int,
    latency: float | str | None,
    stop: float | None,
    censored: int,
    response: float | None,
) -> None:
    scores = profiles(INTERRUPTION, USER, agent)
    assert scores["official"]["takeover"] == taken
    if latency == "soon":
        assert 0 <= scores["official"]["latency"] < 0.35
    else:
        assert scores["official"]["latency"] == (None if latency is None else pytest.approx(latency))
    found = scores["event"]
    assert found["stop"] == (None if stop is None else pytest.approx(stop))
    assert found["censored"] == censored
    assert found["response"] == (None if response is None else pytest.approx(response))
    assert found["spoke"] == (stop is not None)


def test_whoever_did_not_stop_has_no_time_to_stop() -> None:
    """A censored time is a lower bound, and no part of the distribution."""
    agents = (says((12, 3.0, 6.4)), says((50, 3.0, 19.0)), says())
    records = [
        {"task": INTERRUPTION.task, "id": str(n), "repeat": 0, "error": None}
        | profiles(INTERRUPTION, USER, agent)
        for n, agent in enumerate(agents)
    ]
    figures = figures_of(records)["event"]
    stop = figures["stop"]["mean"]
    assert (stop["value"], stop["n"]) == (pytest.approx(0.4), 1)
    assert (figures["never_stopped"]["value"], figures["never_stopped"]["n"]) == (0.5, 2)
    assert figures["spoke"]["value"] == pytest.approx(2 / 3)


def test_the_onset_is_looked_up_where_the_mark_is_early() -> None:
    """The benchmark's own marks lie up to 0.58 s before the voice."""
    user = Track(20.0, (Span(0.5, 2.1), Span(6.58, END)))
    agent = says((12, 3.0, 7.0))
    found = event.interruption(user, agent, Span(6.0, END))
    assert found["onset"] == 6.58
    assert found["stop"] == pytest.approx(0.42)
    assert event.interruption(Track(20.0), agent, Span(6.0, END))["onset"] == 6.0


@pytest.mark.parametrize(
    ("agent", "expected", "right"),
    [
        (
            says((2, 4.0, 4.45), (1, 9.0, 9.38), (2, 14.0, 14.45)),
            (0, 0.15, pytest.approx(0.734, abs=5e-4)),
            (0, 0.15, pytest.approx(0.734, abs=5e-4)),
        ),
        (says(), (0, 0.0, 1.0), (0, 0.0, None)),
        (says((12, 5.0, 8.8)), (1, 0.0, 1.0), (1, 0.0, None)),
        (says((6, 5.0, 6.6), (1, 12.0, 12.4)), (0, 0.10, None), (1, 0.05, None)),
    ],
)
def test_backchannels(agent: Track, expected: tuple, right: tuple) -> None:
    scores = profiles(BACKCHANNEL, USER, agent, EVEN)
    for profile, (taken, frequency, jsd) in (("official", expected), ("event", right)):
        found = scores[profile]
        assert (found["takeover"], found["frequency"]) == (taken, pytest.approx(frequency))
        if jsd is not None or not found["events"]:
            assert found["jsd"] == jsd


@pytest.mark.parametrize(("k", "expected"), [(1, 0.8155), (4, 0.7800), (50, 0.4645)])
def test_divergence_of_flat_distributions(k: int, expected: float) -> None:
    """k of 100 windows against all of them, by the closed form too."""
    n, seconds = 100, 19.9
    found = official.divergence([Span(0.1, 0.2 * k - 0.1)], seconds, EVEN)
    share_ = k / n
    closed = math.sqrt(
        0.5 * math.log(2 * n / (n + k))
        + 0.5 * (share_ * math.log(2 * k / (n + k)) + (1 - share_) * math.log(2))
    )
    assert found == pytest.approx(expected, abs=5e-5)
    assert found == pytest.approx(closed, abs=1e-6)


def test_without_a_distribution_there_is_no_divergence() -> None:
    scores = profiles(BACKCHANNEL, USER, says((2, 4.0, 4.45)), None)
    assert scores["official"]["jsd"] is None
    assert scores["event"]["jsd"] is None


def test_words_without_an_end_are_no_fault() -> None:
    track = Track(10.0, (Span(3.0, 5.0),), (Word("so", 3.0, 3.2), Word("it", 3.4, None)))
    assert official.pause(track) == {"takeover": 0}
    late = Track(10.0, (Span(3.0, 5.0),), (Word("so", 3.0, 3.2), Word("it", 4.2, None)))
    assert official.pause(late) == {"takeover": 1}


def test_an_overlap() -> None:
    """The user talks over the agent, which stops, answers, and resumes."""
    sample = Sample("user_interruption", "0", Path(), marked=Span(6.0, 8.0))
    user = Track(20.0, (Span(0.5, 2.1), Span(6.0, 8.0)))
    agent = says((8, 2.5, 6.5), (8, 8.7, 12.0))
    scores = profiles(sample, user, agent)
    assert scores["official"]["stop"] == pytest.approx([0.5])
    assert scores["official"]["response"] == pytest.approx([0.4, 0.7])
    found = scores["event"]
    assert (found["stop"], found["response"]) == (pytest.approx(0.5), pytest.approx(0.7))
    assert (found["held"], found["answered"], found["censored"]) == (1, 1, 0)
    assert found["pace_before"] == pytest.approx(60 * 7 / 3.5)
    silent = profiles(sample, user, says((8, 2.5, 6.5)))
    assert silent["event"]["held"] == 0
    assert silent["official"]["response"] == pytest.approx([0.4])


def test_a_service_is_judged_by_its_answer() -> None:
    sample = Sample("service_duplex", "0", Path())
    scores = profiles(sample, Track(9.0, (Span(0.5, 3.0),)), says((6, 3.4, 5.0)))
    assert scores == {"official": {}, "event": {"answered": 1, "latency": pytest.approx(0.4)}}


def test_an_answer_after_five_seconds_is_none() -> None:
    found = event.turn(says((6, 7.5, 9.0)), 2.0)
    assert (found["answered"], found["latency"]) == (0, pytest.approx(5.5))


def test_gaps_of_half_a_second_do_not_end_an_utterance() -> None:
    spans = [Span(1.0, 1.4), Span(1.9, 2.2), Span(2.71, 3.0)]
    assert merge(spans, 0.5) == [Span(1.0, 2.2), Span(2.71, 3.0)]


def test_intervals() -> None:
    assert wilson(80, 137) == pytest.approx((0.500, 0.663), abs=5e-4)
    once = share({str(n): [float(n < 80)] for n in range(137)})
    assert (once["method"], once["low"]) == ("wilson", pytest.approx(0.500, abs=5e-4))
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    assert all(wilson(0, n)[0] == 0 and wilson(n, n)[1] == 1 for n in range(1, 50))


def test_repeats_of_one_sample_do_not_make_an_interval_narrower() -> None:
    samples = {str(n): [float(n % 2)] for n in range(40)}
    repeated = {name: 3 * values for name, values in samples.items()}
    once, thrice = mean(samples), mean(repeated)
    assert (thrice["n"], thrice["value"]) == (120, once["value"])
    assert thrice["high"] - thrice["low"] == pytest.approx(once["high"] - once["low"])
    assert share(repeated)["method"] == "bootstrap"
    assert once["high"] - once["low"] == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.1)


def test_figures_of_nothing_are_none() -> None:
    assert share({})["value"] is None
    assert mean({"a": [1.0]})["low"] is None
    empty = distribution({})
    assert empty["p50"] is None
    assert empty["histogram"] == {}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_figures_when_nobody_speaks(task: str) -> None:
    sample = Sample(task, "0", Path(), pauses=(Span(1, 2),), end=2.0, marked=Span(6.0, 8.0))
    silent = Track(20.0)
    record = {"task": task, "id": "0", "repeat": 0, "error": None, **profiles(sample, silent, silent, EVEN)}
    figures = figures_of([record])
    assert figures["scored"] == 1
