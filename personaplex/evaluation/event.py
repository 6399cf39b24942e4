"""Scores of one sample by what happens at its moment: in the pause, after the turn, at the interruption.

Beside the official ones, which count every word of a recording wherever it stands. Seconds throughout;
latencies are signed, a negative one is an answer that began before the user had finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from personaplex.evaluation.official import divergence, is_backchannel, rounded
from personaplex.evaluation.speech import NEAR_S, ROUNDING_S, Span, Track

Record = dict[str, Any]

PAUSE_S = 0.5  # after its end, a pause can still be mistaken for the end of the turn
NVIDIA_PAUSE_S = 1.0  # the same in NVIDIA's scripts
ANSWER_S = 5.0  # who answers later did not answer
RESUME_S = 1.5  # a person who resumes does so within this
LEAD_S = 0.25  # the detector may place an onset this much before the marked one


def pause(agent: Track, pauses: Sequence[Span]) -> Record:
    """`takeover`: a turn starts in a pause or up to 0.5 s after it. `nvidia`: anything does, up to 1 s."""
    utterances = agent.utterances

    def begins(after_s: float, turns_only: bool) -> int:
        return int(
            any(
                one.start <= each.span.start <= one.end + after_s
                for one in pauses
                for each in utterances
                if each.is_turn or not turns_only
            )
        )

    return {"takeover": begins(PAUSE_S, True), "nvidia": begins(NVIDIA_PAUSE_S, False)}


def turn(agent: Track, end: float) -> Record:
    """`latency` of the answer to a turn that ended at `end`, None without one; `answered` within 5 s.

    The answer is the first utterance that ends after `end` and is a turn or starts after it: a short sound
    that began before is no answer, a short answer is one.
    """
    for one in agent.utterances:
        if one.span.end > end and (one.is_turn or one.span.start > end):
            latency = one.span.start - end
            return {"answered": int(latency <= ANSWER_S + ROUNDING_S), "latency": latency}
    return {"answered": 0, "latency": None}


def interruption(user: Track, agent: Track, marked: Span) -> Record:
    """`marked` is the interruption; its end is exact, its start is looked up in the user's speech.

    `spoke`: the agent was speaking then. `stop`: until the end of that utterance, None if it was silent;
    `censored`: it went on past the end of the interruption, and `stop` is a lower bound. `response`: from
    the end to the first turn that starts after the onset and ends after the end, `answered` within 5 s.
    """
    start = onset(user, marked)
    utterances = agent.utterances
    speaking = next((one.span for one in utterances if one.span.start <= start < one.span.end), None)
    censored = speaking is not None and speaking.end > marked.end
    stop = None if speaking is None else min(speaking.end, marked.end) - start
    answers = [one for one in utterances if one.is_turn and one.span.start > start]
    found = next((one.span.start - marked.end for one in answers if one.span.end > marked.end), None)
    return {
        "onset": start,
        "spoke": int(speaking is not None),
        "stop": stop,
        "censored": int(censored),
        "response": found,
        "answered": int(found is not None and found <= ANSWER_S + ROUNDING_S),
    }


def onset(user: Track, marked: Span) -> float:
    """Where the user's speech of a marked interruption begins; the mark itself where none is found."""
    starts = [one.start for one in user.segments if marked.start - LEAD_S <= one.start < marked.end]
    return starts[0] if starts else marked.start


def overlap(user: Track, agent: Track, marked: Span) -> Record:
    """v1.5: as `interruption`; `held`: the agent was speaking, and within 1.5 s of the overlap's end it
    still or again was. `pace_before`, `pace_after`: its words a minute of speech before and after."""
    record = interruption(user, agent, marked)
    window = Span(marked.end, marked.end + RESUME_S)
    record["held"] = int(record["spoke"] and any(one.overlap(window) > 0 for one in agent.segments))
    record["pace_before"] = _pace(agent, Span(0.0, record["onset"]))
    record["pace_after"] = _pace(agent, Span(marked.end, agent.seconds))
    return record


def backchannel(agent: Track, expected: Sequence[float] | None) -> Record:
    """`takeover`: any segment is more than a backchannel. Events are backchannels only; `jsd` is None without
    any, or without `expected` (see `official.backchannel`)."""
    segments = rounded(agent.segments)
    events = [one for one in segments if is_backchannel(one, agent.words)]
    return {
        "takeover": int(len(events) < len(segments)),
        "events": len(events),
        "frequency": len(events) / agent.seconds,
        "jsd": divergence(events, agent.seconds, expected) if events and expected is not None else None,
    }


def _pace(agent: Track, window: Span) -> float | None:
    spoken = sum(one.overlap(window) for one in agent.segments)
    words = sum(window.start <= word.start < window.end for word in agent.words)
    return 60 * words / spoken if spoken >= NEAR_S else None
