"""The two cores, alone and joined by a fake wire."""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Callable

import pytest

from personaplex.audio.transcoder import SAVED_S
from personaplex.errors import BadAudio, NoCapacity, ProtocolError, SessionIdle, SessionLost
from personaplex.session import core as server
from personaplex.session import peer as client
from personaplex.session.core import (
    CLOSED,
    CLOSING,
    LIVE,
    OPENING,
    PRIMING,
    IllegalEvent,
    Limits,
    SessionCore,
    State,
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
    SendError,
    SendUserText,
    SessionNotice,
    Tick,
    UserText,
    UserTextLost,
)
from personaplex.session.moshi import (
    MESSAGE_LIMIT,
    Action,
    Audio,
    Control,
    Error,
    Handshake,
    Kind,
    Message,
    Metadata,
    Ping,
    Text,
    bytes_of,
    decode,
    encode,
    event_of,
    event_of_text,
)
from personaplex.session.pacer import LEAD_S
from personaplex.session.peer import (
    ClientCore,
    Complain,
    Connected,
    HangUp,
    Live,
    Notice,
    OwnAudio,
    PeerCommand,
    PeerEvent,
    Play,
    Received,
    ReceivedText,
    Send,
    Show,
)
from personaplex.words import Segment, Word

HEADERS = [b"head", b"tags"]
HELLO = UserText(Segment.of([Word("Hello", 0.5, 0.9), Word("there.", 0.9, 1.2)]))
DEFAULT = Limits()
EVERY_EVENT: list[Event] = [
    PeerAudio(b"OggS", 5),
    PeerMessage(1),
    PeerEnds(),
    Begun(),
    PeerClosed(),
    Queued(1),
    LeaseGranted(),
    Ready(),
    AgentAudio(b"page"),
    AgentText("hi"),
    HELLO,
    UserTextLost(0.5, 1.2, "behind"),
    AudioHeard(),
    Failed(BadAudio("no sound")),
    EngineLost(),
    SessionNotice("recording"),
    Tick(),
]
EVERY_PEER_EVENT: list[PeerEvent] = [
    Connected(),
    OwnAudio(b"page"),
    HangUp(),
    Received(encode(Ping())),
    ReceivedText("{}"),
    PeerClosed(),
    Tick(),
]


def in_state(
    state: State, limits: Limits = DEFAULT, *, status: bool = False, user_text: bool = False
) -> SessionCore:
    """A server core driven into `state` at time 2.0 by the shortest way."""
    core = SessionCore(HEADERS, limits, now=0.0, status=status, user_text=user_text)
    if state in (PRIMING, LIVE):
        core.receive(LeaseGranted(), 2.0)
    if state is LIVE:
        core.receive(Ready(), 2.0)
    if state is CLOSING:
        core.receive(Failed(BadAudio("no sound")), 2.0)
    if state is CLOSED:
        core.receive(PeerClosed(), 2.0)
    assert core.state is state
    return core


def peer_in_state(state: State) -> ClientCore:
    core = ClientCore()
    if state in (PRIMING, LIVE):
        core.receive(Connected(), 2.0)
    if state is LIVE:
        core.receive(Received(encode(Handshake())), 2.0)
    if state is CLOSING:
        core.receive(HangUp(), 2.0)
    if state is CLOSED:
        core.receive(PeerClosed(), 2.0)
    assert core.state is state
    return core


def sent(commands: list[Command]) -> list[Message]:
    return [decode(data) for data in messages(commands)]


def messages(commands: list[Command]) -> list[bytes]:
    """What the client gets, as bytes."""
    return [bytes_of(command) for command in commands if not isinstance(command, (FeedAudio, Close))]


def closes(commands: list[Command]) -> list[Close]:
    return [command for command in commands if isinstance(command, Close)]


@pytest.mark.parametrize("event", EVERY_EVENT, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", State)
def test_every_cell_of_the_server_table(state: State, event: Event) -> None:
    core = in_state(state)
    allowed = server.TABLE[state].get(type(event))
    if allowed is None:
        with pytest.raises(IllegalEvent, match=f"{type(event).__name__} in {state.name}; expected"):
            core.receive(event, 2.0)
        assert core.state is state
        return
    commands = core.receive(event, 2.0)
    assert core.state in allowed
    if state in (CLOSING, CLOSED):
        assert commands == []
    if core.state is CLOSING and state is not CLOSING:
        assert isinstance(commands[-1], Close)
        if not isinstance(event, PeerEnds):
            assert isinstance(sent(commands)[-1], Error)


@pytest.mark.parametrize("event", EVERY_PEER_EVENT, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", State)
def test_every_cell_of_the_client_table(state: State, event: PeerEvent) -> None:
    core = peer_in_state(state)
    allowed = client.PEER_TABLE[state].get(type(event))
    if allowed is None:
        with pytest.raises(IllegalEvent, match=f"{type(event).__name__} in {state.name}; expected"):
            core.receive(event, 2.0)
        assert core.state is state
    else:
        core.receive(event, 2.0)
        assert core.state in allowed


@pytest.mark.parametrize(
    ("start", "events", "end"),
    [
        (OPENING, [event_of(b"\x01OggS")], OPENING),
        (OPENING, [event_of(bytes(MESSAGE_LIMIT + 1))], CLOSING),
        (PRIMING, [Ready()], LIVE),
        (PRIMING, [event_of(bytes(MESSAGE_LIMIT + 1))], CLOSING),
        (PRIMING, [event_of_text("x" * int(server.BYTE_BURST + 1))], CLOSING),
        (LIVE, [event_of(b"\x01OggS")], LIVE),
        (LIVE, [event_of_text("x" * int(server.BYTE_BURST + 1))], CLOSING),
        (LIVE, [event_of(bytes(MESSAGE_LIMIT + 1))], CLOSING),
    ],
)
def test_where_a_cell_may_lead_to_more_than_one_state(start: State, events: list[Event], end: State) -> None:
    core = in_state(start)
    for event in events:
        core.receive(event, 2.0)
    assert core.state is end


def test_the_handshake_waits_for_a_browsers_decoder() -> None:
    core = SessionCore(HEADERS, Limits(), now=10.0)
    core.receive(LeaseGranted(), 10.1)
    assert core.receive(Ready({"slots": 4}), 10.2) == []
    assert core.deadline() == pytest.approx(11.1)
    assert core.receive(Tick(), 11.0) == []
    details = Metadata({"type": "session", "slots": 4})
    assert sent(core.receive(Tick(), 11.1)) == [Handshake(), Audio(b"head"), Audio(b"tags"), details]
    assert core.state is LIVE


def test_who_asked_for_status_knows_the_session_before_the_handshake() -> None:
    core = SessionCore(HEADERS, Limits(), now=10.0, status=True)
    core.receive(LeaseGranted(), 10.1)
    assert sent(core.receive(Ready({"slots": 4}), 10.2)) == [Metadata({"type": "session", "slots": 4})]
    assert sent(core.receive(Tick(), 11.1)) == [Handshake(), Audio(b"head"), Audio(b"tags")]


def test_a_client_that_talks_first_gets_its_handshake_at_once() -> None:
    core = SessionCore(HEADERS, Limits(), now=10.0)
    core.receive(LeaseGranted(), 10.0)
    core.receive(Ready(), 10.1)
    commands = core.receive(event_of(b"\x01OggS"), 10.2)
    assert sent(commands) == [Handshake(), Audio(b"head"), Audio(b"tags"), Metadata({"type": "session"})]
    assert commands[-1] == FeedAudio(b"OggS")


def test_early_audio_is_handed_on_as_it_comes() -> None:
    core = SessionCore(HEADERS, Limits(), now=0.0)
    assert core.receive(event_of(b"\x01one"), 0.1) == [FeedAudio(b"one")]
    core.receive(LeaseGranted(), 0.2)
    assert core.receive(event_of(b"\x01two"), 0.3) == [FeedAudio(b"two")]
    assert sent(core.receive(Ready(), 0.4))[0] == Handshake(), "it talked first"
    assert core.receive(event_of(b"\x01three"), 0.5) == [FeedAudio(b"three")]


def test_who_talks_while_it_waits_may_wait_for_long() -> None:
    """Once, half a megabyte before the handshake ended the session: 8 minutes, or one at 64 kb/s."""
    core = SessionCore(HEADERS, Limits(), now=0.0)
    for number in range(30_000):  # ten minutes at 128 kb/s
        core.receive(event_of(b"\x01" + bytes(320)), number / 50)
    assert core.state is OPENING


def test_nothing_comes_before_the_handshake_unless_it_was_asked_for() -> None:
    core = in_state(OPENING)
    assert core.receive(Queued(3), 1.0) == []
    assert core.receive(LeaseGranted(), 2.0) == []
    assert sent(core.receive(Ready(), 2.0))[0] == Handshake()


def test_notices_go_to_those_who_asked_for_status_and_to_nobody_else() -> None:
    notice = SessionNotice("recording", {"recorded": False})
    for state in (OPENING, PRIMING, LIVE):
        told = sent(in_state(state, status=True).receive(notice, 2.0))
        assert told == [Metadata({"type": "recording", "recorded": False})]
        assert in_state(state).receive(notice, 2.0) == [], "stock clients"
    assert in_state(CLOSING, status=True).receive(notice, 2.0) == []


def test_who_asked_for_status_is_told_a_minute_before_the_end() -> None:
    limits = Limits(session_s=100.0, idle_s=math.inf, first_audio_s=math.inf)
    for status in (True, False):
        core = in_state(LIVE, limits, status=status)
        told = []
        for second in range(3, 102):
            messages = sent(core.receive(Tick(), float(second)))
            told += [(second, message) for message in messages if isinstance(message, Metadata)]
        warning = Metadata({"type": "ending", "in_s": 60})
        assert told == ([(42, warning)] if status else [])
    core = in_state(LIVE, Limits(session_s=30.0), status=True)
    assert not any(isinstance(m, Metadata) for m in sent(core.receive(Tick(), 10.0))), "it is short anyway"


def test_queue_positions_are_metadata() -> None:
    core = in_state(OPENING, status=True)
    assert sent(core.receive(Queued(3), 1.0)) == [Metadata({"type": "queue", "position": 3})]
    assert sent(core.receive(LeaseGranted(), 2.0)) == [Metadata({"type": "queue", "position": 0})]


def test_who_never_waited_hears_nothing_of_a_queue() -> None:
    assert in_state(OPENING, status=True).receive(LeaseGranted(), 1.0) == []


def test_agent_text_is_verbatim_and_never_empty() -> None:
    core = in_state(LIVE)
    told = []
    for event in (AgentText(""), AgentAudio(b"0"), AgentText(" naïve"), AgentAudio(b"1"), Tick()):
        told += sent(core.receive(event, 3.0 + 0.08 * len(told)))
    assert told == [Audio(b"0"), Audio(b"1"), Text(" naïve")]


def test_what_the_user_said_is_for_those_who_asked() -> None:
    lost = UserTextLost(2.0, 3.5, "unavailable")
    core = in_state(LIVE, user_text=True)
    assert core.receive(HELLO, 3.0) == [SendUserText(HELLO)]
    assert core.receive(lost, 4.0) == [SendUserText(lost)]
    assert in_state(LIVE, status=True).receive(HELLO, 3.0) == []


def test_what_the_user_said_before_the_handshake_follows_it() -> None:
    core = SessionCore(HEADERS, DEFAULT, now=0.0, user_text=True)
    core.receive(LeaseGranted(), 0.1)
    assert core.receive(Ready(), 0.2) == []
    assert core.receive(HELLO, 0.9) == []
    told = core.receive(Tick(), 1.1)
    assert sent(told)[0] == Handshake()
    assert told[-1] == SendUserText(HELLO)


def test_what_was_talked_before_the_peer_came_back_counts_towards_the_limit() -> None:
    limits = Limits(session_s=100.0, idle_s=1_000.0, first_audio_s=1_000.0)
    core = SessionCore(HEADERS, limits, 0.0, status=True, handshake_delay_s=0.0, talked_s=90.0)
    core.receive(LeaseGranted(), 1.0)
    core.receive(Ready(), 1.0)
    assert Metadata({"type": "ending", "in_s": 8}) in sent(core.receive(Tick(), 3.0))
    assert core.state is LIVE
    assert closes(core.receive(Tick(), 11.0)) == [Close(1000, "the session reached its time limit")]


def test_text_stays_with_its_page() -> None:
    """In a burst of answers the words would run seconds ahead of the voice."""
    core = in_state(LIVE)
    told = []
    for number in range(4):
        told += core.receive(AgentText(f" {number}"), 3.0)
        told += core.receive(AgentAudio(b"%d" % number), 3.0)
    assert sent(told) == [Audio(b"0"), Text(" 0")]
    while (due := core.deadline()) is not None and due < 3.3:
        told = core.receive(Tick(), due)
        assert [type(message) for message in sent(told)] == [Audio, Text]
    assert sent(told) == [Audio(b"3"), Text(" 3")]


def test_pages_are_paced() -> None:
    core = in_state(LIVE)
    assert sent(core.receive(AgentAudio(b"a"), 3.0)) == [Audio(b"a")]
    assert core.receive(AgentAudio(b"b"), 3.0) == []
    due = 3.08 - LEAD_S
    assert core.deadline() == pytest.approx(due)
    assert core.receive(Tick(), due - 0.01) == []
    assert sent(core.receive(Tick(), due + 0.01)) == [Audio(b"b")]


def test_a_ping_when_there_was_nothing_to_say() -> None:
    core = in_state(LIVE)
    assert core.deadline() == pytest.approx(7.0)
    assert core.receive(Tick(), 6.9) == []
    assert sent(core.receive(Tick(), 7.0)) == [Ping()]
    assert core.deadline() == pytest.approx(12.0)


@pytest.mark.parametrize(
    "message", [Handshake(), Text("hello"), Control(Action.START), Metadata(), Error("?"), Ping(), Audio(b"")]
)
def test_other_messages_of_the_client_change_nothing(message: Message) -> None:
    core = in_state(LIVE)
    assert core.receive(event_of(encode(message)), 3.0) == []
    assert core.state is LIVE


USELESS = [event_of_text("hello"), event_of(b""), event_of(b"\x07"), event_of(b"\xff" * 9_000)]


@pytest.mark.parametrize("event", USELESS)
@pytest.mark.parametrize("state", [OPENING, PRIMING, LIVE])
def test_messages_of_no_use_are_ignored_and_counted(state: State, event: Event) -> None:
    core = in_state(state)
    assert core.receive(event, 3.0) == []
    assert (core.state, core.ignored) == (state, 1)
    assert in_state(PRIMING).receive(Ready(), 1.0) == [], "the handshake waits on"


@pytest.mark.parametrize("event", USELESS)
def test_messages_of_no_use_are_no_sign_of_life(event: Event) -> None:
    core = in_state(LIVE, Limits(idle_s=30, first_audio_s=30))
    for moment in range(3, 32):
        core.receive(event, moment)
    assert closes(core.receive(Tick(), 32.0)) == [Close(1000, "no audio was received for 30 s")]


@pytest.mark.parametrize("event", USELESS)
def test_messages_of_no_use_have_a_budget(event: Event) -> None:
    core = in_state(LIVE)
    told: list[Command] = []
    while core.state is LIVE:
        told = core.receive(event, 3.0)
    assert closes(told)[0].code == 1002
    assert "per second" in closes(told)[0].reason


def test_a_session_ends_at_its_limit() -> None:
    core = in_state(LIVE, Limits(session_s=10, idle_s=math.inf))
    core.receive(Tick(), 11.9)
    assert core.state is LIVE
    assert closes(core.receive(Tick(), 12.0)) == [Close(1000, "the session reached its time limit")]


def test_a_client_without_audio_is_let_go() -> None:
    """Whatever else it sends: a byte a minute held a slot for as long as a session may last once."""
    core = in_state(LIVE, Limits(idle_s=30))
    core.receive(AudioHeard(), 10.0)
    for second in range(11, 40):
        core.receive(event_of(b"\x01x" if second % 2 else b"\x06"), float(second))
        core.receive(Tick(), float(second))
    assert core.state is LIVE
    commands = core.receive(Tick(), 40.0)
    assert isinstance(core.error, SessionIdle)
    assert commands[-1] == Close(1000, "no audio was received for 30 s")


@pytest.mark.parametrize(("first", "idle", "due"), [(15.0, 60.0, 15.0), (15.0, 5.0, 5.0)])
def test_the_first_audio_is_due_sooner(first: float, idle: float, due: float) -> None:
    core = in_state(LIVE, Limits(idle_s=idle, first_audio_s=first))
    core.receive(Tick(), 2.0 + due - 0.01)
    assert core.state is LIVE
    core.receive(Tick(), 2.0 + due)
    assert isinstance(core.error, SessionIdle)


@pytest.mark.parametrize("state", [OPENING, PRIMING])
def test_who_was_heard_before_the_handshake_has_begun(state: State) -> None:
    """Its first audio is no longer due; it may fall silent for as long as any other."""
    core = in_state(state, Limits(idle_s=60, first_audio_s=15))
    core.receive(AudioHeard(), 2.0)
    if state is OPENING:
        core.receive(LeaseGranted(), 2.0)
    core.receive(Ready(), 2.0)
    core.receive(Tick(), 61.9)
    assert core.state is LIVE
    core.receive(Tick(), 62.0)
    assert isinstance(core.error, SessionIdle)


def test_who_says_what_it_wants_after_the_upgrade_has_a_time_for_it() -> None:
    core = SessionCore((), Limits(), 100.0, begin_s=60.0, handshake_delay_s=0.0)
    assert core.deadline() == 160.0
    (error, close) = core.receive(Tick(), 160.0)
    assert isinstance(error, SendError)
    assert isinstance(error.error, SessionIdle)
    assert close == Close(1000, "no session was begun for 60 s")
    core = SessionCore((), Limits(), 100.0, begin_s=60.0, handshake_delay_s=0.0)
    for event in (Begun(), Queued(1), Tick(), LeaseGranted(), Ready()):
        core.receive(event, 200.0)
    assert core.state is LIVE


@pytest.mark.parametrize("state", [OPENING, PRIMING, LIVE])
def test_a_client_that_is_done_is_closed_and_nothing_failed(state: State) -> None:
    core = in_state(state)
    assert core.receive(PeerEnds(), 101.0) == [Close(1000, "")]
    assert (core.state, core.error) == (CLOSING, None)
    assert core.receive(AgentAudio(b"page"), 101.0) == []


def test_a_fault_of_the_core_shows_nothing_that_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    core = in_state(LIVE)
    monkeypatch.setattr(core, "_handle", lambda event, now: setattr(core, "state", OPENING) or [])
    with pytest.raises(AssertionError) as caught:
        core.receive(AgentText("private"), 3.0)
    assert "private" not in str(caught.value)


@pytest.mark.parametrize("state", [OPENING, PRIMING, LIVE])
def test_a_lost_engine_is_not_the_clients_fault(state: State) -> None:
    assert closes(in_state(state).receive(EngineLost(), 2.0))[0].code == 1012


def test_failures_carry_their_own_code_and_words() -> None:
    commands = in_state(LIVE).receive(Failed(SessionLost("it is gone")), 3.0)
    assert commands == [SendError("it is gone"), Close(1012, "it is gone")]


def test_where_there_is_no_room_the_client_is_told_when_to_come_back() -> None:
    commands = in_state(OPENING).receive(Failed(NoCapacity("all slots are taken", 7.5)), 1.0)
    words = "all slots are taken; try again in 7.5 s"
    assert commands == [SendError(words), Close(1013, words)]


def test_a_flood_of_messages_is_refused_and_a_quick_client_is_not() -> None:
    core = in_state(LIVE, Limits(session_s=math.inf))
    for number in range(20_000):  # 400 per second, for 50 s
        core.receive(event_of(b"\x01x"), 2.0 + number / 400)
    assert core.state is LIVE
    with_flood = [core.receive(event_of(b"\x06"), 60.0) for _ in range(int(server.MESSAGE_BURST) + 1)]
    assert closes(with_flood[-1])[0].code == 1002


def test_a_flood_of_bytes_is_refused_and_the_richest_opus_is_not() -> None:
    core = in_state(LIVE, Limits(session_s=math.inf))
    page = bytes((Kind.AUDIO,)) + bytes(1_275 + 33)  # 20 ms at 510 kb/s
    for number in range(5_000):
        core.receive(event_of(page), 2.0 + number / 50)
    assert core.state is LIVE
    piece, now = encode(Audio(bytes(65_535))), 200.0
    for _ in range(int(server.BYTE_BURST) // len(piece)):
        core.receive(event_of(piece), now)
    assert core.state is LIVE
    (close,) = closes(core.receive(event_of(piece), now))
    assert close.code == 1002
    assert close.reason == "more than 64 KiB per second"


def test_a_phone_that_slept_may_catch_up_in_the_smallest_usual_pages() -> None:
    """60 s of 20 ms pages at 128 kb/s, at once: the transcoder allows them, so the budgets must."""
    core = in_state(LIVE, Limits(session_s=math.inf, idle_s=math.inf))
    page = encode(Audio(bytes(320)))
    for _ in range(round(SAVED_S / 0.02)):
        core.receive(event_of(page), 100.0)
    assert core.state is LIVE


@pytest.mark.parametrize(("burst_s", "share"), [(1.0, 1.0), (6.0, 1.0), (60.0, 10.0)])
def test_a_longer_burst_may_have_more_messages_and_bytes(burst_s: float, share: float) -> None:
    """60 s of 20 ms pages were refused for their number where the setting promised an answer to them."""
    core = in_state(LIVE, Limits(session_s=math.inf, burst_s=burst_s))
    for _ in range(int(server.MESSAGE_BURST * share)):
        assert not core.receive(event_of(b"\x06"), 60.0)
    assert closes(core.receive(event_of(b"\x06"), 60.0))[0].code == 1002
    core, piece = in_state(LIVE, Limits(session_s=math.inf, burst_s=burst_s)), encode(Audio(bytes(65_535)))
    for _ in range(int(server.BYTE_BURST * share) // len(piece)):
        core.receive(event_of(piece), 60.0)
    assert core.state is LIVE
    assert closes(core.receive(event_of(piece), 60.0))[0].code == 1002


@pytest.mark.parametrize("data", [b"\x04{", b"\x02\xff\xfe", b"\x03\x09", b"\x04" + b"[" * 90_000])
def test_what_the_server_has_no_use_for_is_not_read(data: bytes) -> None:
    core = in_state(LIVE)
    assert core.receive(event_of(data), 3.0) == []
    assert core.state is LIVE


def test_nothing_but_the_close_follows_an_error() -> None:
    core = in_state(LIVE)
    core.receive(AgentAudio(b"a"), 3.0)
    core.receive(AgentAudio(b"b"), 3.0)
    core.receive(Failed(SessionLost("gone")), 3.0)
    assert core.deadline() is None
    for event in (Tick(), AgentAudio(b"c"), AgentText("late"), event_of(b"\x01x"), EngineLost()):
        assert core.receive(event, 4.0) == []


def test_the_laws_hold_on_random_walks() -> None:
    """Whatever legally happens: one handshake before all sound, only known kinds, nothing after Close."""
    dice = random.Random(0)
    visited: collections.Counter[State] = collections.Counter()
    for _ in range(600):
        status, limits, now = dice.random() < 0.5, Limits(session_s=20, idle_s=5), 0.0
        core = SessionCore(HEADERS, limits, now=0.0, status=status, user_text=dice.random() < 0.5)
        told: list[Command] = []
        for _ in range(60):
            now += dice.choice([0.0, 0.01, 0.08, 0.5])
            legal = [event for event in walk_events(dice) if type(event) in server.TABLE[core.state]]
            told += core.receive(dice.choice(legal), now)
            visited[core.state] += 1
        kinds = [data[0] for data in messages(told)]
        assert all(0 <= kind <= 6 for kind in kinds)
        assert kinds.count(0) <= 1
        before = kinds[: kinds.index(0)] if 0 in kinds else kinds
        assert set(before) <= ({4, 5} if status else {5})
        if 0 in kinds:
            after = sent(told)[len(before) + 1 :]
            assert after[:2] == [Audio(b"head"), Audio(b"tags")]
        ended = [place for place, command in enumerate(told) if isinstance(command, Close)]
        assert ended in ([], [len(told) - 1])
        assert not ended or kinds[-1] == 5
    assert set(visited) == set(State)
    assert visited[LIVE] > 600, "the walks get somewhere"


def walk_events(dice: random.Random) -> list[Event]:
    """What may happen next; the ends are rare, so that most walks get somewhere."""
    usual: list[Event] = [
        event_of(dice.choice([b"\x01OggS", b"\x06", b"\x00"])),
        Queued(dice.randrange(1, 9)),
        LeaseGranted(),
        Ready(),
        AgentAudio(b"page", quiet=dice.random() < 0.5),
        AgentText(dice.choice(["", " hi"])),
        HELLO,
        Tick(),
    ]
    rare: list[Event] = [
        event_of(b""),
        event_of_text("?"),
        event_of(bytes(MESSAGE_LIMIT + 1)),
        PeerClosed(),
        Failed(BadAudio("no sound")),
        EngineLost(),
    ]
    return [*usual, dice.choice(rare)] if dice.random() < 0.1 else usual


# -- the client alone


def test_what_the_client_makes_of_each_message() -> None:
    core = peer_in_state(LIVE)

    def hear(message: Message) -> list[PeerCommand]:
        return core.receive(Received(encode(message)), 3.0)

    assert hear(Audio(b"page")) == [Play(b"page")]
    assert hear(Text(" hi")) == [Show(" hi")]
    assert hear(Metadata({"type": "queue"})) == [Notice({"type": "queue"})]
    assert hear(Error("bad")) == [Complain("bad")]
    assert hear(Ping()) == []
    assert hear(Handshake()) == [], "a second handshake changes nothing"


def test_the_client_leaves_a_silent_server() -> None:
    core = peer_in_state(LIVE)
    assert core.deadline() == pytest.approx(12.0)
    assert core.receive(Tick(), 11.9) == []
    (close,) = core.receive(Tick(), 12.0)
    assert isinstance(close, Close)
    assert isinstance(core.error, SessionLost)


@pytest.mark.parametrize("event", [Received(b"\x07\x00"), Received(b""), ReceivedText("hi")])
def test_the_client_refuses_what_is_not_the_protocol(event: PeerEvent) -> None:
    core = peer_in_state(LIVE)
    (close,) = core.receive(event, 3.0)
    assert isinstance(close, Close)
    assert close.code == 1002
    assert isinstance(core.error, ProtocolError)


# -- both, joined


class Wire:
    """Carries commands of one core to the other as events, and keeps what came out at either end."""

    def __init__(self, limits: Limits = DEFAULT) -> None:
        self.now = 0.0
        self.server = SessionCore(HEADERS, limits, now=self.now, status=True)
        self.client = ClientCore()
        self.fed: list[bytes] = []
        self.out: list[PeerCommand] = []
        self.tell_client(Connected())

    def tell_server(self, event: Event) -> None:
        for command in self.server.receive(event, self.now):
            match command:
                case FeedAudio(data):
                    self.fed.append(data)
                case Close():
                    self._hang_up()
                case _:
                    self.tell_client(Received(bytes_of(command)))

    def tell_client(self, event: PeerEvent) -> None:
        for command in self.client.receive(event, self.now):
            match command:
                case Send(data):
                    self.tell_server(event_of(data))
                case Close():
                    self._hang_up()
                case _:
                    self.out.append(command)

    def wait(self, seconds: float) -> None:
        """Lets time pass; each core gets a Tick exactly when it asked for one."""
        end = self.now + seconds
        tellers: list[tuple[Callable[[], float | None], Callable[[Tick], None]]] = [
            (self.server.deadline, self.tell_server),
            (self.client.deadline, self.tell_client),
        ]
        while True:
            due = [(at, tell) for deadline, tell in tellers if (at := deadline()) is not None and at <= end]
            if not due:
                break
            at, tell = min(due, key=lambda pair: pair[0])
            self.now = max(self.now, at)
            tell(Tick())
        self.now = end

    def _hang_up(self) -> None:
        self.tell_server(PeerClosed())
        self.tell_client(PeerClosed())


def test_a_whole_conversation() -> None:
    wire = Wire()
    wire.tell_server(Queued(1))
    wire.wait(3.0)
    wire.tell_server(LeaseGranted())
    wire.tell_server(Ready())
    assert wire.out == [
        Notice({"type": "queue", "position": 1}),
        Notice({"type": "queue", "position": 0}),
        Notice({"type": "session"}),
        Live(),
        Play(b"head"),
        Play(b"tags"),
    ]
    wire.out.clear()
    for number in range(5):
        wire.tell_client(OwnAudio(b"user %d" % number))
        wire.tell_server(AgentText(f" {number}"))
        wire.tell_server(AgentAudio(b"agent %d" % number))
        wire.wait(0.08)
    assert wire.fed == [b"user %d" % number for number in range(5)]
    assert [out.data for out in wire.out if isinstance(out, Play)] == [b"agent %d" % n for n in range(5)]
    assert "".join(out.text for out in wire.out if isinstance(out, Show)) == " 0 1 2 3 4"
    wire.tell_client(HangUp())
    assert (wire.server.state, wire.client.state) == (CLOSED, CLOSED)
    assert wire.client.error is None


def test_keep_alives_hold_a_quiet_session_together() -> None:
    wire = Wire(Limits(idle_s=math.inf, first_audio_s=math.inf))
    wire.tell_server(LeaseGranted())
    wire.tell_server(Ready())
    wire.wait(60.0)
    assert (wire.server.state, wire.client.state) == (LIVE, LIVE)


def test_an_error_reaches_the_user_in_words() -> None:
    wire = Wire()
    wire.tell_server(Failed(NoCapacity("all slots are taken")))
    assert wire.out == [Complain("all slots are taken; try again in 5 s")]
    assert (wire.server.state, wire.client.state) == (CLOSED, CLOSED)
