"""Who calls when, for how long and as what: sessions as the world makes them, whatever the service does.

Open loop: arrivals are a Poisson process whose rate follows a profile, drawn once from a seed, so that a slow
service gets no fewer of them and a planner can be given the very sessions a live run had. Pure: no clock.

    profile    comma-separated pieces SECONDS@RATE or SECONDS@RATE-RATE, in sessions a second:
               "60@0.5" constant, "60@0-2" a ramp, "60@0.5,5@8,60@0.5" a spike
    lengths    "fixed:S", "uniform:FROM:TO", "exponential:MEAN", "lognormal:MEAN:SIGMA", in seconds
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from personaplex.errors import ConfigError
from personaplex.persona import PROMPTS, VOICES

SHORTEST_S = 1.0  # no session is meant to last less
MOST = 1e7  # sessions of a profile, all of which are held in memory
WIDEST = 10.0  # sigma of a lognormal distribution; far below, its exponentials are still finite


@dataclass(frozen=True)
class Piece:
    """Part of a profile: the rate, in sessions a second, goes in a straight line from `first` to `last`."""

    seconds: float
    first: float
    last: float


@dataclass(frozen=True)
class Arrival:
    """One session to be: `at_s` after the start, wishing to talk for `length_s` once it is live."""

    number: int
    at_s: float
    length_s: float
    voice: str
    prompt: str  # key of PROMPTS
    seed: int


Lengths = Callable[[random.Random], float]


def profile(text: str) -> tuple[Piece, ...]:
    """Reads a profile. Raises ConfigError for anything but the form above."""
    pieces = []
    for part in text.split(","):
        try:
            seconds, rates = part.split("@")
            first, _, last = rates.partition("-")
            piece = Piece(float(seconds), float(first), float(last or first))
        except ValueError as error:
            raise ConfigError(f"arrivals: {part!r} is not SECONDS@RATE or SECONDS@RATE-RATE") from error
        if not (0 < piece.seconds < math.inf and 0 <= piece.first < math.inf and 0 <= piece.last < math.inf):
            raise ConfigError(f"arrivals: {part!r} needs a positive time and rates of 0 or more")
        pieces.append(piece)
    if sum(piece.seconds * (piece.first + piece.last) / 2 for piece in pieces) > MOST:
        raise ConfigError(f"arrivals: {text!r} makes more than {MOST:.0e} sessions")
    return tuple(pieces)


def duration(pieces: Sequence[Piece]) -> float:
    """Seconds from the start to the end of a profile."""
    return sum(piece.seconds for piece in pieces)


def lengths(text: str) -> Lengths:
    """A distribution of session lengths. Raises ConfigError for anything but the forms above."""
    name, *parts = text.split(":")
    try:
        values = [float(part) for part in parts]
        if not all(0 < value < math.inf for value in values):
            raise ValueError
        match name, values:
            case "fixed", [seconds]:
                return lambda random: seconds
            case "uniform", [low, high] if low <= high:
                return lambda random: random.uniform(low, high)
            case "exponential", [mean]:
                return lambda random: random.expovariate(1 / mean)
            case "lognormal", [mean, sigma] if sigma <= WIDEST:
                return lambda random: random.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
            case _:
                raise ValueError
    except ValueError as error:
        raise ConfigError(f"lengths: {text!r} is no distribution of positive seconds") from error


def draw(
    pieces: Sequence[Piece],
    length: Lengths,
    seed: int,
    *,
    longest_s: float = math.inf,
    voices: Sequence[str] = VOICES,
    prompts: Sequence[str] = tuple(PROMPTS),
) -> list[Arrival]:
    """All sessions of a profile in order of arrival; the same seed gives the same sessions.

    Voices and prompts are drawn evenly from those given; lengths are kept within SHORTEST_S and `longest_s`.
    """
    for name in (*(set(voices) - set(VOICES)), *(set(prompts) - set(PROMPTS))):
        raise ConfigError(f"arrivals: no voice or prompt is called {name!r}")
    chance = random.Random(seed)
    arrivals: list[Arrival] = []
    start = 0.0
    for piece in pieces:
        for at in _times(piece, chance):
            arrivals.append(
                Arrival(
                    number=len(arrivals),
                    at_s=start + at,
                    length_s=min(max(length(chance), SHORTEST_S), longest_s),
                    voice=chance.choice(voices),
                    prompt=chance.choice(prompts),
                    seed=chance.getrandbits(32),
                )
            )
        start += piece.seconds
    return arrivals


def _times(piece: Piece, chance: random.Random) -> list[float]:
    """Moments of a Poisson process of the piece's changing rate, by thinning one of its highest rate."""
    highest = max(piece.first, piece.last)
    times, at = [], 0.0
    while highest:
        at += chance.expovariate(highest)
        if at >= piece.seconds:
            break
        rate = piece.first + (piece.last - piece.first) * at / piece.seconds
        if chance.random() * highest < rate:
            times.append(at)
    return times


def share(arrivals: Sequence[Arrival], index: int, count: int) -> list[Arrival]:
    """The sessions that process `index` of `count` makes: every `count`-th, so that all stay Poisson-like."""
    return list(arrivals[index::count])
