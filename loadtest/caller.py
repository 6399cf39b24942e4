"""One session of a load test over a real WebSocket: the client's own core, a protocol, a socket and a clock.

One loop does all of it: it reads until the next page is due, sends that page, and reads on, so that a session
costs one greenlet (or thread) and no queue. Pages leave every 80 ms by the clock; after a delay of our own
there is no catching up, as a microphone would not either, and the page is counted as sent late. What is heard
is checked page by page but not decoded.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from urllib.parse import urlencode

from websockets.exceptions import InvalidHandshake, InvalidURI

from loadtest.arrivals import Arrival
from loadtest.connection import Connection
from loadtest.dialogue import Dialogue
from loadtest.listener import Listener
from loadtest.outcome import Outcome
from loadtest.protocols import PROTOCOLS, Message, Pause
from loadtest.speech import PlainSpeech, Speech
from loadtest.target import Target
from personaplex.client_io import ending, refusal
from personaplex.config import FRAME_SECONDS
from personaplex.errors import PersonaplexError, ProtocolError, SessionLost
from personaplex.persona import PROMPTS
from personaplex.session.core import CLOSED, CLOSING, LIVE
from personaplex.session.events import Close, PeerClosed, Tick
from personaplex.session.moshi import Handshake, encode
from personaplex.session.pacer import SLACK_S
from personaplex.session.peer import (
    ClientCore,
    Connected,
    HangUp,
    Live,
    Notice,
    OwnAudio,
    PeerEvent,
    Play,
    Received,
    Send,
    Show,
)

READY_TIMEOUT_S = 600.0  # for the handshake: the service's own limit on waiting is what is tested
CLOSE_TIMEOUT_S = 2.0
TAIL_S = 1.0  # longest wait for the last answers


class Caller:
    """`run` makes the session; `outcome` holds what came of it, at every moment."""

    def __init__(
        self,
        target: Target,
        arrival: Arrival,
        speech: Speech | PlainSpeech,
        *,
        late_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        dialogue: Dialogue | None = None,
    ) -> None:
        """With a `dialogue`, says it once from its beginning, and keeps what is heard in it."""
        self.outcome = Outcome(
            arrival.number, arrival.at_s, late_s=late_s, length_s=arrival.length_s, voice=arrival.voice
        )
        self.error: PersonaplexError | None = None  # what ended it against its wish
        self._target, self._arrival, self._clock = target, arrival, clock
        self._dialect = PROTOCOLS[target.protocol]({})
        self.outcome.continuous = self._dialect.continuous
        self._core, self._listener = ClientCore(self._dialect.patience_s), Listener()
        start = arrival.seed if dialogue is None else -1  # the first frame
        self._headers, self._pages = speech.stream(start)
        self._headers_due = len(self._headers)  # a stream of theirs has as many as one of ours
        self._dialogue = dialogue
        self._answers: Counter[int] = Counter()
        self._unanswered: deque[float] = deque()  # when each page left that has no answer yet
        self._opened = self._ready = self._live_at = self._next_page = self._ends = 0.0
        self._hangs_up = float("inf")

    def run(self) -> Outcome:
        """Holds the session from the connection to its end; never raises for what the service does."""
        try:
            self._run()
        except PersonaplexError as error:
            self.error, self.outcome.cause = error, type(error).__name__
        self._conclude()
        return self.outcome

    def _run(self) -> None:
        began = self._clock()
        try:
            connection = self._connect()
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise refusal(error) from error
        self._opened = self._ready = self._clock()
        self.outcome.connect_s = self._opened - began
        with contextlib.closing(connection):
            self._tell(connection, Connected())
            for message in self._dialect.open():
                connection.send(message)
            if not self._dialect.says_live:
                self._tell(connection, Received(encode(Handshake())))
            while self._core.state is not CLOSED:
                self._send_what_is_due(connection)
                for message in connection.receive(self._patience()):
                    self._read(connection, message)
                if connection.closed:
                    self._closed(connection)
        if self._core.error:
            raise self._core.error

    def _connect(self) -> Connection:
        """The upgrade; for Twilio's calls the webhook before it. Raises what either is refused with."""
        target, query = self._target, self._query()
        headers = {**target.headers, **self._dialect.headers}
        if target.webhook is not None:
            self._dialect = PROTOCOLS[target.protocol](target.webhook.ring(target.url, query))
            headers |= target.webhook.headers(target.url)
            return Connection(target.url, headers, target.insecure)
        return Connection(f"{target.url}?{query}", headers, target.insecure)

    def _read(self, connection: Connection, message: Message) -> None:
        for event in self._dialect.read(message):
            if isinstance(event, Pause):
                self._listener.pause()
            else:
                self._tell(connection, event)

    def _query(self) -> str:
        arrival = self._arrival
        prompt = PROMPTS[arrival.prompt].text if self._dialogue is None else self._dialogue.prompt
        query = {
            "voice_prompt": f"{arrival.voice}.pt",
            "text_prompt": prompt,
            "seed": arrival.seed,
            "status": 1,
        }
        return urlencode(query)

    def _patience(self) -> float:
        """Seconds to read for, until something of our own is due."""
        if self._core.state is LIVE:
            due = min(self._next_page, self._hangs_up, self._core.deadline() or float("inf"))
        elif self._core.state is CLOSING:
            due = self._ends + CLOSE_TIMEOUT_S
        else:
            due = self._opened + READY_TIMEOUT_S
        return due - self._clock()

    def _send_what_is_due(self, connection: Connection) -> None:
        now, state = self._clock(), self._core.state
        if state is LIVE:
            if now >= self._hangs_up or self._answered_all():
                self._tell(connection, HangUp())
            elif now >= self._next_page:
                self._speak(connection, now)
            self._tell(connection, Tick())
        elif state is CLOSING and now >= self._ends + CLOSE_TIMEOUT_S:
            connection.abandon()
        elif now >= self._opened + READY_TIMEOUT_S:
            self._tell(connection, HangUp())
            raise SessionLost("the session was never ready")

    def _speak(self, connection: Connection, now: float) -> None:
        late = now - self._next_page
        self.outcome.sent_late += late > SLACK_S
        self._tell(connection, OwnAudio(next(self._pages)))
        self._unanswered.append(now)
        self.outcome.sent += 1
        self._next_page = (self._next_page if late <= SLACK_S else now) + FRAME_SECONDS
        if self._next_page >= self._live_at + self._arrival.length_s:
            self._next_page = float("inf")
            self._hangs_up = now + TAIL_S

    def _answered_all(self) -> bool:
        # Both codecs' look-ahead keeps part of the last frames back.
        if not self._dialect.continuous:
            return False
        return self._hangs_up < float("inf") and self._listener.pages >= self.outcome.sent - 2

    def _tell(self, connection: Connection, event: PeerEvent) -> None:
        """Hands an event to the core and does what it asks for."""
        now = self._clock()
        for command in self._core.receive(event, now):
            match command:
                case Send(data):
                    for message in self._dialect.write(data):
                        connection.send(message)
                case Close(code, reason):
                    self._ends = now
                    for message in self._dialect.close():
                        connection.send(message)
                    connection.close_politely(code, reason)
                case Live():
                    self._go_live(connection, now)
                case Play(data):
                    self._hear(data, now)
                case Show(text) if self._dialogue is not None:
                    self._dialogue.heard.texts.append((now, text))
                case Notice(details):
                    self._notice(details, now)

    def _go_live(self, connection: Connection, now: float) -> None:
        self.outcome.live = True
        self.outcome.handshake_s = now - self._opened
        if self.outcome.ready_s is None:  # nobody said so before
            self.outcome.ready_s = self.outcome.handshake_s
        self._live_at = self._next_page = now
        if self._dialogue is not None:
            self._dialogue.heard.live_at = now
        for page in self._headers:
            self._tell(connection, OwnAudio(page))

    def _hear(self, page: bytes, now: float) -> None:
        form = self._dialect.audio
        if form is None and not page.startswith(b"OggS"):
            raise ProtocolError("audio that is no whole Ogg page")
        if form is not None and len(page) != form.frame_bytes:
            raise ProtocolError("audio that is no whole frame")
        if self._dialogue is not None:
            self._dialogue.heard.pages.append((now, page))
        if self._headers_due:
            self._headers_due -= 1
            return
        self._listener.hear(now)
        if self._dialect.continuous and self._unanswered:
            self._answers[round(1e3 * (now - self._unanswered.popleft()))] += 1

    def _notice(self, details: Mapping[str, object], now: float) -> None:
        kind, position = details.get("type"), details.get("position")
        if kind == "queue" and isinstance(position, int) and position > 0:
            self.outcome.queued = self.outcome.queued or position
        elif kind == "session":
            self.outcome.ready_s = now - self._opened

    def _closed(self, connection: Connection) -> None:
        wished = self._core.state is CLOSING
        self._core.receive(PeerClosed(), self._clock())
        if not wished:
            self.outcome.code = connection.code
            raise ending(connection.code, connection.reason)

    def _conclude(self) -> None:
        outcome, listener = self.outcome, self._listener
        outcome.heard, outcome.underruns, outcome.audible = (
            listener.pages,
            listener.underruns,
            listener.audible,
        )
        outcome.silence_s = listener.silence_s
        outcome.intervals, outcome.answers = dict(listener.intervals), dict(self._answers)
        outcome.talked_s = outcome.sent * FRAME_SECONDS
        if listener.first_s is not None:
            outcome.first_audio_s = listener.first_s - self._live_at
