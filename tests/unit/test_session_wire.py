"""Messages and their bytes."""

from __future__ import annotations

import random

import pytest

from personaplex.errors import ProtocolError
from personaplex.session import wire
from personaplex.session.wire import Action, Audio, Control, Error, Handshake, Metadata, Ping, Text

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
def test_bytes_of_every_message(message: wire.Message, data: bytes) -> None:
    assert wire.encode(message) == data
    assert wire.decode(data) == message


def test_handshake_payload_is_ignored() -> None:
    assert wire.decode(bytes(9)) == Handshake()


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
        (b"\x01" + bytes(wire.MESSAGE_LIMIT), "at most"),
    ],
)
def test_messages_outside_the_protocol(data: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        wire.decode(data)


def test_random_bytes_raise_nothing_else() -> None:
    dice = random.Random(0)
    for _ in range(5_000):
        data = dice.randbytes(dice.randrange(40))
        try:
            message = wire.decode(data)
        except ProtocolError:
            continue
        assert wire.decode(wire.encode(message)) == message


def test_metadata_never_carries_what_json_cannot() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        wire.encode(Metadata({"load": float("nan")}))


def test_close_reason_is_cut_between_characters() -> None:
    assert wire.close_reason("short") == "short"
    cut = wire.close_reason("x" + "語" * 100)
    assert cut == "x" + "語" * 40
    assert len(cut.encode()) <= wire.REASON_LIMIT
