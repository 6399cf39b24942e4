"""The server's side of one conversation, without a protocol's bytes, a socket, a clock or an engine.

    OPENING   connected; parameters are checked, the session may be queued
    PRIMING   it has a slot; the persona is being prefilled, or the client's decoder is still starting
    LIVE      handshake sent; audio and text flow both ways
    CLOSING   Close was asked for; nothing more is sent
    CLOSED    the connection is gone

Laws:

1. `TABLE` names every event that may happen in a state and the states it may lead to. Any other event is a
   fault of the shell and raises IllegalEvent. What the peer does never raises: it closes the session.
2. The handshake is sent once, on entering LIVE, followed by the two header pages of the agent's stream and
   the session's details. Stock clients take the first message for the handshake, so nothing comes before it;
   but a client that asked for `status` gets its place in the queue, the details once they are known, and
   every notice; others get no notices.
   LIVE waits for Ready and for HANDSHAKE_DELAY_S since the upgrade: a browser needs that to start its
   decoder. Clients that talk first wait for no handshake, so get it at once.
3. Audio is handed on in order, whenever it comes: a client's stream starts with headers that cannot be had
   twice. What the shell keeps of it until LIVE is its own affair.
4. In LIVE the peer is sent something every KEEP_ALIVE_S, if only a keep-alive. Agent pages leave by the
   Pacer, text right after the page it belongs to.
5. A peer may send MESSAGES_PER_S and BYTES_PER_S on average, in bursts of MESSAGE_BURST and BYTE_BURST, which
   grow with a `burst_s` beyond BURST_S. What is not audio only counts against that. Messages the protocol
   does not know are also counted (`ignored`), and end nothing.
6. A peer must send audio that can be decoded: within `first_audio_s` of the handshake, then every `idle_s`.
   For one that was heard before the handshake `idle_s` holds at once. Nothing else it sends counts, so that a
   byte now and then does not hold a slot; silence is audio.
7. What the user said goes to peers that asked for it (`user_text`) as soon as it is known, but not before
   the handshake. Nothing waits for it.
8. A peer that says only after the upgrade what session it wants (`begin_s`) has that long for it, and a slot
   is asked for once it has (Begun). One that is done (PeerEnds) gets a close with code 1000.
9. Every end on our side is an error message, for people, and then a close with a code and a reason; where
   there was no room both say when to come back. After Close nothing is sent; what the engine still delivers
   is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from personaplex.allowance import Allowance
from personaplex.config import BURST_S
from personaplex.errors import (
    NoCapacity,
    PersonaplexError,
    ProtocolError,
    SessionExpired,
    SessionIdle,
    SessionLost,
)
from personaplex.session.events import (
    AgentAudio,
    AgentText,
    AudioHeard,
    Begun,
    Close,
    Command,
    EngineLost,
    Event,
    Failed,
    FeedAudio,
    LeaseGranted,
    PeerAudio,
    PeerClosed,
    PeerEnds,
    PeerMessage,
    Queued,
    Ready,
    Send,
    SendAudio,
    SendDetails,
    SendError,
    SendHandshake,
    SendKeepAlive,
    SendNotice,
    SendPlace,
    SendText,
    SendUserText,
    SessionNotice,
    Tick,
    UserText,
    UserTextLost,
)
from personaplex.session.pacer import Pacer

HANDSHAKE_DELAY_S = 1.1
WARNING_S = 60.0  # before a session's time is up
KEEP_ALIVE_S = 5.0  # stock web clients leave after 10 s
MESSAGES_PER_S = 500.0  # 400 is a page of one 2.5 ms packet per message
MESSAGE_BURST = 3_200.0  # more than 60 s of 20 ms pages, by a phone that slept
BYTES_PER_S = 65_536.0  # 510 kb/s, the most Opus has, in pages of one 20 ms packet
BYTE_BURST = 1_048_576.0  # more than 15 s at 510 kb/s


class State(Enum):
    OPENING = auto()
    PRIMING = auto()
    LIVE = auto()
    CLOSING = auto()
    CLOSED = auto()


class IllegalEvent(RuntimeError):
    """The shell reported something that cannot happen in this state."""


OPENING, PRIMING, LIVE, CLOSING, CLOSED = State


def after(
    state: State, event: object, table: Mapping[State, Mapping[Any, tuple[State, ...]]]
) -> tuple[State, ...]:
    """The states `event` may lead to in `state`. Raises IllegalEvent for one that `table` does not list."""
    allowed = table[state].get(type(event))
    if allowed is None:
        legal = ", ".join(sorted(kind.__name__ for kind in table[state]))
        raise IllegalEvent(f"{type(event).__name__} in {state.name}; expected one of: {legal}")
    return allowed


_LATE = (
    Begun,
    Queued,
    LeaseGranted,
    Ready,
    AgentAudio,
    AgentText,
    UserText,
    UserTextLost,
    AudioHeard,
    SessionNotice,
    Failed,
    EngineLost,
    Tick,
)

TABLE: Mapping[State, Mapping[type[Event], tuple[State, ...]]] = {
    OPENING: {
        PeerAudio: (OPENING, CLOSING),
        PeerMessage: (OPENING, CLOSING),
        PeerEnds: (CLOSING,),
        AudioHeard: (OPENING,),
        Begun: (OPENING,),
        SessionNotice: (OPENING,),
        Queued: (OPENING,),
        LeaseGranted: (PRIMING,),
        Failed: (CLOSING,),
        EngineLost: (CLOSING,),
        Tick: (OPENING, CLOSING),
        PeerClosed: (CLOSED,),
    },
    PRIMING: {
        PeerAudio: (PRIMING, LIVE, CLOSING),
        PeerMessage: (PRIMING, CLOSING),
        PeerEnds: (CLOSING,),
        AudioHeard: (PRIMING,),
        UserText: (PRIMING,),
        UserTextLost: (PRIMING,),
        SessionNotice: (PRIMING,),
        Ready: (PRIMING, LIVE),
        Failed: (CLOSING,),
        EngineLost: (CLOSING,),
        Tick: (PRIMING, LIVE),
        PeerClosed: (CLOSED,),
    },
    LIVE: {
        PeerAudio: (LIVE, CLOSING),
        PeerMessage: (LIVE, CLOSING),
        PeerEnds: (CLOSING,),
        AgentAudio: (LIVE,),
        AgentText: (LIVE,),
        UserText: (LIVE,),
        UserTextLost: (LIVE,),
        AudioHeard: (LIVE,),
        SessionNotice: (LIVE,),
        Failed: (CLOSING,),
        EngineLost: (CLOSING,),
        Tick: (LIVE, CLOSING),
        PeerClosed: (CLOSED,),
    },
    CLOSING: {
        **dict.fromkeys(_LATE, (CLOSING,)),
        PeerAudio: (CLOSING,),
        PeerMessage: (CLOSING,),
        PeerEnds: (CLOSING,),
        PeerClosed: (CLOSED,),
    },
    CLOSED: {**dict.fromkeys(_LATE, (CLOSED,)), PeerClosed: (CLOSED,)},
}


@dataclass(frozen=True)
class Limits:
    """Seconds; `math.inf` for no limit of the first two."""

    session_s: float = 3_600.0  # of conversation, from the handshake on
    idle_s: float = 60.0  # without audio from the peer, while live
    first_audio_s: float = 15.0  # the same from the handshake on; idle_s where that is less
    burst_s: float = BURST_S  # of audio that a peer may send at once
    bytes_per_s: float = BYTES_PER_S

    @property
    def burst_share(self) -> float:
        """What limits made for bursts of BURST_S are multiplied by, so that longer ones fit; at least 1."""
        return max(1.0, self.burst_s / BURST_S)


class SessionCore:
    """One session; `receive` is its only entry point. Times are seconds of one monotonic clock."""

    def __init__(
        self,
        headers: Sequence[bytes],
        limits: Limits,
        now: float,
        *,
        status: bool = False,
        user_text: bool = False,
        handshake_delay_s: float = HANDSHAKE_DELAY_S,
        begin_s: float = float("inf"),
        talked_s: float = 0.0,
    ) -> None:
        """`headers`: header pages of the agent's stream. `now`: when the connection was accepted. `status`:
        the peer wants to know how it stands before the handshake. `user_text`: it wants the transcript of its
        own speech. `handshake_delay_s`: 0 for one whose decoder runs already. `begin_s`: law 8; leave it out
        where the session is known at the upgrade. `talked_s`: conversation before, of a peer that has come
        back; it counts towards the session's limit."""
        self.state = OPENING
        self.error: PersonaplexError | None = None  # why our side ended it
        self.ignored = 0  # messages the protocol does not know
        self.pacer = Pacer(limits.burst_s)
        self._status = status
        self._user_text = user_text
        self._details: list[Command] = []  # to be sent once live, with what the user said before
        self._headers = headers
        self._limits = limits
        self._handshake_at = now + handshake_delay_s
        self._begin_s, self._begin_due = begin_s, now + begin_s
        self._queued = False
        self._ready = False
        self._talked_s = talked_s
        self._ends_at = float("inf")
        self._warn_at = float("inf")  # when the peer is told how long it has
        self._last_sent = now
        self._heard = False  # any audio yet
        self._audio_limit_s = 0.0  # for the next audio, and when it ends
        self._audio_due = float("inf")
        self._messages = Allowance(MESSAGES_PER_S, MESSAGE_BURST * limits.burst_share, now=now)
        self._bytes = Allowance(limits.bytes_per_s, BYTE_BURST * limits.burst_share, now=now)

    def receive(self, event: Event, now: float) -> list[Command]:
        """What to do about `event`, in order. Raises IllegalEvent for one that TABLE does not list."""
        allowed = after(self.state, event, TABLE)
        if isinstance(event, PeerClosed):
            self.state = CLOSED
            commands: list[Command] = []
        elif self.state in (CLOSING, CLOSED):
            commands = []
        else:
            try:
                commands = self._handle(event, now)
            except PersonaplexError as error:
                commands = self._end(error)
        assert self.state in allowed, (type(event).__name__, self.state)  # an event may be what was said
        for command in commands:
            if isinstance(command, Send):
                self._last_sent = now
                break
        return commands

    def deadline(self) -> float | None:
        """When the next Tick is due, or None when only an event can change anything."""
        if self.state is PRIMING and self._ready:
            return self._handshake_at
        if self.state is OPENING and self._begin_due < float("inf"):
            return self._begin_due
        if self.state is not LIVE:
            return None
        page = self.pacer.deadline()
        times = [self._last_sent + KEEP_ALIVE_S, self._ends_at, self._warn_at, self._audio_due]
        return min(times if page is None else [page, *times])

    def _handle(self, event: Event, now: float) -> list[Command]:
        match event:  # what comes with every frame first
            case PeerAudio(data, size):
                self._spend(size, now)
                self._handshake_at = min(self._handshake_at, now)
                return [*self._go_live_when_due(now), FeedAudio(data)]
            case AgentAudio(page, quiet):
                self.pacer.push(page, now, quiet)
                return self._release(now)
            case AgentText(text):
                self.pacer.add_text(text)
                return []
            case Tick():
                return self._tick(now)
            case PeerMessage(size, known):
                self._spend(size, now)
                self.ignored += not known
                return []
            case PeerEnds():
                self.state = CLOSING
                return [Close(1000, "")]
            case Begun():
                self._begin_due = float("inf")
                return []
            case Queued(position, wait_s):
                self._queued = True
                return [SendPlace(position, wait_s)] if self._status else []
            case LeaseGranted():
                self.state = PRIMING
                return [SendPlace(0)] if self._status and self._queued else []
            case Ready(details):
                self._ready = True
                if self._status:
                    return [SendDetails(details), *self._go_live_when_due(now)]
                self._details.insert(0, SendDetails(details))
                return self._go_live_when_due(now)
            case UserText() | UserTextLost():
                return self._tell_user_text(SendUserText(event)) if self._user_text else []
            case AudioHeard():
                self._heard = True
                if self.state is LIVE:
                    self._await_audio(self._limits.idle_s, now)
                return []
            case SessionNotice(kind, data):
                return [SendNotice(kind, data)] if self._status else []
            case Failed(error):
                raise error
            case EngineLost():
                raise SessionLost("the server running this session failed; please connect again")
            case _:
                raise AssertionError(f"{type(event).__name__} is in no state's row of TABLE")

    def _tell_user_text(self, command: SendUserText) -> list[Command]:
        if self.state is LIVE:
            return [command]
        self._details.append(command)
        return []

    def _spend(self, size: int, now: float) -> None:
        if not self._messages.spend(1, now):
            raise ProtocolError(f"more than {MESSAGES_PER_S:g} messages per second")
        if not self._bytes.spend(size, now):
            raise ProtocolError(f"more than {self._limits.bytes_per_s / 1_024:g} KiB per second")

    def _go_live_when_due(self, now: float) -> list[Command]:
        if self.state is not PRIMING or not self._ready or now < self._handshake_at:
            return []
        self.state = LIVE
        self._ends_at = now + self._limits.session_s - self._talked_s
        if self._status and self._limits.session_s > WARNING_S:
            self._warn_at = self._ends_at - WARNING_S
        idle_s = self._limits.idle_s
        self._await_audio(idle_s if self._heard else min(self._limits.first_audio_s, idle_s), now)
        return [SendHandshake(), *map(SendAudio, self._headers), *self._details]

    def _tick(self, now: float) -> list[Command]:
        if self.state is not LIVE:
            if now >= self._begin_due:
                raise SessionIdle(f"no session was begun for {self._begin_s:g} s")
            return self._go_live_when_due(now)
        if now >= self._ends_at:
            raise SessionExpired("the session reached its time limit")
        if now >= self._audio_due:
            raise SessionIdle(f"no audio was received for {self._audio_limit_s:g} s")
        commands = self._release(now)
        if now >= self._warn_at:
            self._warn_at = float("inf")
            commands.append(SendNotice("ending", {"in_s": round(self._ends_at - now)}))
        if not commands and now >= self._last_sent + KEEP_ALIVE_S:
            commands = [SendKeepAlive()]
        return commands

    def _await_audio(self, limit_s: float, now: float) -> None:
        self._audio_limit_s, self._audio_due = limit_s, now + limit_s

    def _release(self, now: float) -> list[Command]:
        released = self.pacer.release(now)
        if released is None:
            return []
        page, text = released
        return [SendAudio(page), *([SendText(text)] if text else [])]

    def _end(self, error: PersonaplexError) -> list[Command]:
        self.state, self.error = CLOSING, error
        words = str(error)
        if isinstance(error, NoCapacity):
            words += f"; try again in {error.retry_after_s:g} s"
        return [SendError(words, error), Close(error.close_code, words)]
