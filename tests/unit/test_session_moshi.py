"""Messages and their bytes."""

from __future__ import annotations

import random

import pytest

from personaplex.errors import ProtocolError
from personaplex.session import moshi
from personaplex.session.events import (
    Event,
    Failed,
    PeerAudio,
    PeerMessage,
    Send,
    SendAudio,
    SendDetails,
    SendError,
    SendHandshake,
    SendKeepAlive,
    SendPlace,
    SendText,
    SendUserText,
    UserText,
    UserTextLost,
)
from personaplex.session.moshi import Action, Audio, Control, Error, Handshake, Metadata, Ping, Text
from personaplex.words import Segment, Word

EVERY_MESSAGE = [
    (Handshake(), b"\x00"),
    (Audio(b"OggS"), b"\x01OggS"),
    (Text(" grüße"), b"\x02 gr\xc3\xbc\xc3\x9fe"),
    (Control(Action.PAUSE), b"\x03\x02"),
    (Metadata({"type": "queue", "position": 2}), b'\x04{"type":"queue","position":2}'),
    (Error("no"), b"\x05no"),
    (Ping(), b"\x06"),
]


@pytest.mark.parametrize(("message", "data"), EVERY_MESSAGE)
def test_bytes_of_every_message(message: moshi.Message, data: bytes) -> None:
    assert moshi.encode(message) == data
    assert moshi.decode(data) == message


@pytest.mark.parametrize(
    ("command", "data"),
    [
        (SendHandshake(), b"\x00"),
        (SendAudio(b"OggS"), b"\x01OggS"),
        (SendText(" grüße"), b"\x02 gr\xc3\xbc\xc3\x9fe"),
        (SendPlace(2), b'\x04{"type":"queue","position":2}'),
        (SendPlace(2, 39.6), b'\x04{"type":"queue","position":2,"wait_s":40}'),
        (SendDetails({"voice": "NATF2"}), b'\x04{"type":"session","voice":"NATF2"}'),
        (SendError("no"), b"\x05no"),
        (
            SendUserText(UserText(Segment.of([Word("Hello,", 0.48, 0.9), Word("Zoë.", 0.9, 1.2004)]))),
            b'\x04{"type":"user_text","text":"Hello, Zo\\u00eb.","start_ms":480,"end_ms":1200,"words":['
            b'{"text":"Hello,","start_ms":480,"end_ms":900},{"text":"Zo\\u00eb.","start_ms":900,"end_ms":1200}]}',
        ),
        (
            SendUserText(UserTextLost(2.0, 3.5, "behind")),
            b'\x04{"type":"user_text_lost","start_ms":2000,"end_ms":3500,"reason":"behind"}',
        ),
        (SendKeepAlive(), b"\x06"),
    ],
)
def test_bytes_of_every_command(command: Send, data: bytes) -> None:
    assert moshi.bytes_of(command) == data


@pytest.mark.parametrize(
    ("data", "event"),
    [
        (b"\x01OggS", PeerAudio(b"OggS", 5)),
        (b"\x01", PeerMessage(1)),
        (b"\x06", PeerMessage(1)),
        (b"\x04{", PeerMessage(2)),
        (b"", PeerMessage(0, known=False)),
        (b"\x07ab", PeerMessage(3, known=False)),
    ],
)
def test_event_of_every_kind_of_message(data: bytes, event: Event) -> None:
    assert moshi.event_of(data) == event


def test_what_is_too_long_or_text_is_an_event_too() -> None:
    failed = moshi.event_of(b"\x01" + bytes(moshi.MESSAGE_LIMIT))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ProtocolError)
    assert moshi.event_of_text("é") == PeerMessage(2, known=False)


def test_handshake_payload_is_ignored() -> None:
    assert moshi.decode(bytes(9)) == Handshake()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "empty"),
        (b"\x07\x01hello", "kind 7"),
        (b"\xff", "kind 255"),
        (b"\x02\xc3", "UTF-8"),
        (b"\x05\xff", "UTF-8"),
        (b"\x03", "control"),
        (b"\x03\x04", "control"),
        (b"\x03\x00\x00", "control"),
        (b"\x04{", "not JSON"),
        (b"\x04[1]", "JSON object"),
        (b"\x04" + b"[" * 100_000, "not JSON"),
        (b"\x01" + bytes(moshi.MESSAGE_LIMIT), "at most"),
    ],
)
def test_messages_outside_the_protocol(data: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        moshi.decode(data)


def test_random_bytes_raise_nothing_else() -> None:
    dice = random.Random(0)
    for _ in range(5_000):
        data = dice.randbytes(dice.randrange(40))
        try:
            message = moshi.decode(data)
        except ProtocolError:
            continue
        assert moshi.decode(moshi.encode(message)) == message


def test_metadata_never_carries_what_json_cannot() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        moshi.encode(Metadata({"load": float("nan")}))


def test_close_reason_is_cut_between_characters() -> None:
    assert moshi.close_reason("short") == "short"
    cut = moshi.close_reason("x" + "語" * 100)
    assert cut == "x" + "語" * 40
    assert len(cut.encode()) <= moshi.REASON_LIMIT
