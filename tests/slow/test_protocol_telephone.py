"""The telephone: carriers' messages, signatures with Twilio's own validator as the oracle, whole calls."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import requests
import websockets
from clients import carrier, telephone
from clients.telephone import ACCOUNT, PUBLIC, ring, webhook
from protocol_service import ProtocolService, ScriptedReplica
from twilio.request_validator import RequestValidator
from websockets.exceptions import InvalidStatus

from deployments.gateway.protocols import twilio
from deployments.gateway.protocols.asterisk import AsteriskTranslator
from deployments.gateway.protocols.carriers import TELNYX, TWILIO, CarrierTranslator, Dialect, Pieces
from deployments.gateway.protocols.tickets import Tickets
from deployments.gateway.protocols.translator import Begin
from personaplex.audio.g711 import MU_LAW
from personaplex.audio.pcm import PcmFormat
from personaplex.errors import BadAudio, ConfigError, ProtocolError, SessionLost, Unauthorized
from personaplex.persona import Persona
from personaplex.session.events import (
    Failed,
    PeerAudio,
    PeerEnds,
    PeerMessage,
    SendAudio,
    SendError,
    SendText,
)

MU = PcmFormat("mulaw", 8_000)

# Signatures


@pytest.mark.parametrize(
    ("url", "form"),
    [
        (f"{PUBLIC}/twilio/voice", {"CallSid": "CA1", "From": "+14155550100", "Digits": "1 2"}),
        (f"{PUBLIC}/twilio/voice?voice_prompt=NATF0&text_prompt=You%20sell%20bread.", {"a": "é", "A": ""}),
        (f"{PUBLIC}:8443/twilio/voice", {}),
    ],
)
@pytest.mark.parametrize("port", [False, True])
def test_twilios_own_signatures_match(url: str, form: dict[str, str], port: bool) -> None:
    signed = url.replace(".org/", ".org:443/") if port else url
    signatures = twilio.Signatures([ACCOUNT, "WK1 shared"])
    sha1 = RequestValidator(ACCOUNT).compute_signature(signed, form)
    assert signatures.match({"x-twilio-signature": sha1}, [url], list(form.items()))
    sha256 = RequestValidator("shared").compute_signature(signed, form, "HMAC_SHA256")
    settings = "key=WK1,algorithm=HMAC_SHA256"
    headers = {"x-twilio-signature": sha256, "x-twilio-webhooks-signature-settings": settings}
    assert signatures.match(headers, [url], list(form.items()))
    headers["x-twilio-webhooks-signature-settings"] = "key=WK2,algorithm=HMAC_SHA256"
    assert not signatures.match(headers, [url], list(form.items()))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-twilio-signature": ""},
        {"x-twilio-signature": "é"},
        {"x-twilio-signature": "AAAA", "x-twilio-webhooks-signature-settings": "algorithm=HMAC_MD5"},
        {"x-twilio-signature": "AAAA", "x-twilio-webhooks-signature-settings": ",,=,key"},
    ],
)
def test_other_signatures_do_not(headers: Mapping[str, str]) -> None:
    assert not twilio.Signatures([ACCOUNT]).match(headers, [f"{PUBLIC}/twilio/voice"], [])


@pytest.mark.parametrize("lines", [[], ["two words"], [ACCOUNT, "only-an-id"], [ACCOUNT, "a b c"]])
def test_a_token_file_of_another_form_is_refused(lines: list[str]) -> None:
    with pytest.raises(ConfigError, match="twilio_token_file"):
        twilio.Signatures(lines)


# Tickets


def test_a_ticket_is_good_until_its_end_and_for_its_service() -> None:
    tickets = Tickets("call", [b"secret"])
    ticket = tickets.make({"text_prompt": "You sell bread. " * 40}, 100.0)
    nonce, content = Tickets("call", [b"secret"]).read(ticket, 99.0)
    assert content == {"text_prompt": "You sell bread. " * 40}
    assert nonce != tickets.read(tickets.make({}, 100.0), 99.0)[0]
    for other, now in (
        (tickets, 100.0),
        (Tickets("call", [b"other"]), 99.0),
        (Tickets("other", [b"secret"]), 99.0),
    ):
        with pytest.raises(Unauthorized):
            other.read(ticket, now)
    for forged in ("", "A", "é", ticket[:-4], ticket[4:], "A" * 60_000, ticket.swapcase()):
        with pytest.raises(Unauthorized):
            tickets.read(forged, 99.0)


def test_a_ticket_travels_in_parameters_of_twilios_length() -> None:
    ticket = Tickets("call", [b"secret"]).make(
        {"text_prompt": np.random.default_rng(0).bytes(2_000).hex()}, 1.0
    )
    document = ElementTree.fromstring(twilio.connect_stream("wss://h/twilio/media", ticket))
    (stream,) = document.iter("Stream")
    parameters = {one.attrib["name"]: one.attrib["value"] for one in stream}
    assert stream.attrib == {"url": "wss://h/twilio/media"}
    assert len(parameters) > 2
    assert all(len(name) + len(value) < 500 for name, value in parameters.items())
    assert twilio.ticket_of(dict(reversed(parameters.items()))) == ticket


# Pieces


def test_pieces_come_in_order_and_gaps_are_silence() -> None:
    pieces, silence = Pieces(0), b"\xff"
    said = [pieces.push(number, b"%d" % number, MU) for number in (3, 4, 7, 5, 8)]
    assert said == [b"3", b"4", silence * 2 + b"7", b"", b"8"]
    assert pieces.push(10**9, b"x", MU) == b"x"


def test_pieces_out_of_order_are_waited_for() -> None:
    pieces = Pieces(2)
    assert [pieces.push(n, b"%d" % n, MU) for n in (1, 3, 2, 2)] == [b"1", b"", b"23", b""]
    assert [pieces.push(n, b"%d" % n, MU) for n in (5, 6, 7)] == [b"", b"", b"\xff567"]


# Messages


def translator(
    dialect: Dialect = TWILIO, begin: Any = lambda parameters: Begin(Persona())
) -> CarrierTranslator:
    return CarrierTranslator(dialect, begin, clock=lambda: 0.0, burst_s=6.0)


def start(**form: Any) -> dict[str, Any]:
    values = {"encoding": "audio/x-mulaw", "sampleRate": 8_000, "channels": 1, **form}
    fields = {"streamSid": "MZ1", "callSid": "CA1", "tracks": ["inbound"], "mediaFormat": values}
    return {
        "event": "start",
        "sequenceNumber": "1",
        "streamSid": "MZ1",
        "start": {**fields, "customParameters": {}},
    }


def media(number: int, data: bytes, **fields: Any) -> dict[str, Any]:
    payload = base64.b64encode(data).decode()
    piece = {"track": "inbound", "chunk": str(number), "timestamp": str(20 * number), "payload": payload}
    return {
        "event": "media",
        "sequenceNumber": str(number + 1),
        "streamSid": "MZ1",
        "media": {**piece, **fields},
    }


def test_a_call_of_twilios() -> None:
    call = translator()
    for known in (
        {"event": "connected", "protocol": "Call", "version": "1.0.0"},
        {"event": "mark", "mark": {}},
    ):
        assert [*call.read(json.dumps(known))] == [PeerMessage(len(json.dumps(known)))]
    assert [*call.read(json.dumps(start()))][1] == Begin(Persona())
    (heard,) = call.read(json.dumps(media(1, b"\x10" * 160)))
    assert isinstance(heard, PeerAudio)
    assert heard.data == b"\x10" * 160
    assert [*call.write(SendText("unheard"))] == []
    (said,) = call.write(SendAudio(b"\x20" * 640))
    assert json.loads(said) == {
        "event": "media",
        "streamSid": "MZ1",
        "media": {"payload": base64.b64encode(b"\x20" * 640).decode()},
    }
    (clear,) = call.write(SendError("gone", SessionLost("gone")))
    assert json.loads(clear) == {"event": "clear", "streamSid": "MZ1"}
    assert [*call.read('{"event": "stop", "streamSid": "MZ1"}')][1] == PeerEnds()


def test_a_call_of_telnyxs_may_choose_its_codec() -> None:
    call = translator(TELNYX)
    form = {"encoding": "L16", "sample_rate": 16_000, "channels": 1}
    begin = {"event": "start", "sequence_number": "1", "stream_id": "s1", "start": {"media_format": form}}
    assert [*call.read(json.dumps(begin))][1] == Begin(Persona())
    for number, expected in ((1, 640), (3, None), (2, 1_280)):
        (heard,) = call.read(json.dumps(media(number, bytes(640))))
        assert (len(heard.data) if isinstance(heard, PeerAudio) else None) == expected
    (said,) = call.write(SendAudio(bytes(2_560)))
    assert set(json.loads(said)) == {"event", "media"}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (b"\x00", ProtocolError),
        ("", ProtocolError),
        ("[]", ProtocolError),
        ("[" * 100_000, ProtocolError),
        ('{"a":' * 20_000, ProtocolError),
        ("x" * 200_000, ProtocolError),
        (json.dumps(media(2, b"") | {"media": None}), ProtocolError),
        (json.dumps(media(2, b"", payload="AAA")), BadAudio),
        (json.dumps(media(2, b"", payload=5)), BadAudio),
        (json.dumps(media(2, b"", payload="A" * 120_000)), BadAudio),
        (json.dumps(media(2, b"", chunk="-1")), ProtocolError),
        (json.dumps(media(2, b"", chunk="9" * 16)), ProtocolError),
        (json.dumps(media(2, b"", chunk=[1])), ProtocolError),
        (json.dumps(start()), ProtocolError),
    ],
)
def test_what_no_carrier_sends_ends_the_call(message: Any, error: type[Exception]) -> None:
    call = translator()
    assert [*call.read(json.dumps(start()))][1:]
    meanings = [*call.read(message)]
    (failed,) = [one for one in meanings if isinstance(one, Failed)]
    assert isinstance(failed.error, error)
    assert sum(isinstance(one, (PeerAudio, PeerMessage)) for one in meanings) == 1


@pytest.mark.parametrize(
    "form",
    [
        {"encoding": "audio/opus"},
        {"encoding": 5},
        {"sampleRate": "x"},
        {"sampleRate": 44_100},
        {"channels": 2},
    ],
)
def test_formats_that_are_none_of_a_telephones(form: Any) -> None:
    (_, failed) = translator().read(json.dumps(start(**form)))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, BadAudio)


def test_a_call_that_is_not_admitted() -> None:
    def begin(parameters: Mapping[str, str]) -> Begin:
        raise Unauthorized("no ticket")

    (_, failed) = translator(begin=begin).read(json.dumps(start()))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, Unauthorized)
    (_, before) = translator().read(json.dumps(media(1, b"")))
    assert isinstance(before, Failed)


@pytest.mark.parametrize("plain", [False, True])
def test_a_call_of_asterisks(plain: bool) -> None:
    call = AsteriskTranslator(Persona(), clock=lambda: 0.0, burst_s=6.0)
    fields = {"connection_id": "c", "channel_id": "1", "format": "slin24", "optimal_frame_size": 960}
    begin = (
        "MEDIA_START " + " ".join(f"{name}:{value}" for name, value in fields.items())
        if plain
        else json.dumps({"event": "MEDIA_START", **fields})
    )
    assert [*call.read(begin)] == [PeerMessage(len(begin)), Begin(Persona())]
    assert [*call.read(bytes(960))] == [PeerAudio(bytes(960), 960)]
    dtmf = "DTMF_END digit:1" if plain else '{"event": "DTMF_END", "digit": "1"}'
    assert [*call.read(dtmf)] == [PeerMessage(len(dtmf))]
    assert [*call.write(SendAudio(b"ab"))] == [b"ab"]
    (flush,) = call.write(SendError("gone"))
    assert flush == ("FLUSH_MEDIA" if plain else '{"command":"FLUSH_MEDIA"}')


@pytest.mark.parametrize(
    "message",
    [
        b"\x00",
        bytes(3),
        "{",
        "[" * 5_000,
        "{" * 9_000,
        '{"event": "MEDIA_START", "format": "opus"}',
        "MEDIA_START",
    ],
)
def test_what_no_asterisk_sends_ends_the_call(message: Any) -> None:
    call = AsteriskTranslator(Persona(), clock=lambda: 0.0, burst_s=6.0)
    meanings = [*call.read(message)]
    assert sum(isinstance(one, (PeerAudio, PeerMessage)) for one in meanings) == 1
    assert any(isinstance(one, Failed) for one in meanings) or message == "[" * 5_000


# The simulated carrier; Pipecat is its judge, in `make test-clients`


@pytest.mark.parametrize(
    "message",
    [
        b"\x00",
        "{",
        '{"event": "media", "streamSid": "MZ2", "media": {"payload": "AAAA"}}',
        '{"event": "media", "media": {"payload": "AAAA"}}',
        '{"event": "media", "streamSid": "%s", "media": {"payload": ""}}',
        '{"event": "media", "streamSid": "%s", "media": {"payload": "AA"}}',
        '{"event": "media", "streamSid": "%s", "media": {"payload": "AAAA", "chunk": "1"}}',
        '{"event": "mark", "streamSid": "%s"}',
        '{"event": "clear", "streamSid": "%s", "media": {}}',
        '{"event": "stop", "streamSid": "%s"}',
    ],
)
def test_the_carrier_takes_nothing_but_what_twilio_does(message: str | bytes) -> None:
    call = carrier.Call(carrier.TWILIO)
    with pytest.raises(carrier.CarrierError):
        call.take(message.replace("%s", call.stream) if isinstance(message, str) else message)
    assert not call.line.heard


def test_the_carrier_plays_in_its_own_time() -> None:
    now = [10.0]
    line = carrier.Line(lambda: now[0])
    for piece in (b"a", b"b", b"c"):
        line.play(piece * 800)
    line.mark("end")
    now[0] += 0.15
    assert line.due_marks() == []
    line.clear()
    assert line.due_marks() == ["end"]
    assert line.heard == b"a" * 800 + b"b" * 800
    assert (line.cleared, round(line.buffered_s, 3)) == (1, 0.3)
    line.play(b"d" * 80)
    now[0] += 1.0
    assert (line.due_marks(), line.heard[-80:]) == ([], b"d" * 80)


# Whole calls


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProtocolService]:
    settings = telephone.settings(tmp_path_factory.mktemp("twilio"))
    protocols = ("twilio", "telnyx", "asterisk")
    with ProtocolService(protocols=protocols, api_keys="key", **settings) as running:
        yield running


def stream(service: ProtocolService, token: str = ACCOUNT) -> Any:
    signature = RequestValidator(token).compute_signature("wss://talk.example.org/twilio/media", {})
    headers = {"X-Twilio-Signature": signature}
    return websockets.connect(f"ws://{service.base}/twilio/media", additional_headers=headers)


async def call(
    service: ProtocolService, parameters: Mapping[str, str], said: bytes
) -> tuple[carrier.Line, int | None]:
    """What the carrier plays while the caller says `said` in real time, and the close code."""
    talk = carrier.Call(carrier.TWILIO)
    async with stream(service) as socket:
        await carrier.talk(socket, talk, carrier.pieces(said), parameters=parameters, digits="1#")
        return talk.line, socket.close_code


def test_a_simulated_carrier_holds_a_talk(service: ProtocolService) -> None:
    seconds = np.arange(8_000 * 2) / 8_000
    tone = (6_000 * np.sin(2 * np.pi * (300 + 200 * seconds) * seconds)).astype(np.int16)
    _, parameters = ring(service.base, "?voice_prompt=NATM1&text_prompt=You%20sell%20bread.")
    line, code = asyncio.run(call(service, parameters, MU_LAW.encode(tone)))
    assert code == 1000
    assert line.cleared == 0
    assert line.buffered_s < 0.5, "a busy machine; 80 ms on an idle one"
    assert ScriptedReplica.personas[-1].voice == "NATM1"
    assert ScriptedReplica.personas[-1].text_prompt == "You sell bread."
    said = MU_LAW.decode(line.heard).astype(float)
    late = 32  # samples: 2 ms each way
    count = min(len(said), len(tone)) - late - 640
    assert count > 8_000
    likeness = np.corrcoef(said[late : late + count], tone[:count])[0, 1]
    assert likeness > 0.99


def test_a_ticket_is_spent_once_and_a_forged_or_old_one_never(
    service: ProtocolService, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, parameters = ring(service.base)
    quiet = b"\xff" * 1_600
    assert asyncio.run(call(service, parameters, quiet))[1] == 1000
    began = len(ScriptedReplica.personas)
    forged = {**parameters, "token0": parameters["token0"][::-1]}
    for refused in (parameters, forged, {}):
        assert asyncio.run(call(service, refused, quiet * 4))[1] == 1008
    _, fresh = ring(service.base)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert asyncio.run(call(service, fresh, quiet * 4))[1] == 1008
    assert len(ScriptedReplica.personas) == began


def test_a_request_without_twilios_signature_is_refused(service: ProtocolService) -> None:
    assert webhook(service.base, account="other").status_code == 401
    assert requests.post(f"http://{service.base}/twilio/voice", timeout=10).status_code == 401
    assert webhook(service.base, "?voice_prompt=../x").status_code == 400

    async def upgrade() -> int:
        with pytest.raises(InvalidStatus) as refused:
            await stream(service, "other")
        return int(refused.value.response.status_code)

    assert asyncio.run(upgrade()) == 401


def test_a_full_service_is_busy(service: ProtocolService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.gateway._leases, "slots", 0)
    assert '<Reject reason="busy"/>' in webhook(service.base).text


@pytest.mark.parametrize(
    ("path", "key"), [("telnyx", "key"), ("asterisk", "key"), ("telnyx", "no"), ("asterisk", "no")]
)
def test_telnyx_and_asterisk_show_a_key(service: ProtocolService, path: str, key: str) -> None:
    async def run() -> None:
        url = f"ws://{service.base}/{path}/media?voice_prompt=VARM1"
        headers = {"Authorization": f"Bearer {key}"}
        options: Any = {
            "additional_headers": headers,
            **({"subprotocols": ["media"]} if path == "asterisk" else {}),
        }
        if key == "no":
            with pytest.raises(InvalidStatus, match="401"):
                await websockets.connect(url, **options)
            return
        async with websockets.connect(url, **options) as socket:
            if path == "asterisk":
                assert socket.subprotocol == "media"
                await socket.send('{"event": "MEDIA_START", "format": "slin24"}')
                for _ in range(10):
                    await socket.send(bytes(960))
                assert len(await asyncio.wait_for(socket.recv(), 10)) == 3_840
            else:
                form = {"encoding": "PCMA", "sample_rate": 8_000, "channels": 1}
                begin = {"event": "start", "stream_id": "s", "start": {"media_format": form}}
                await socket.send(json.dumps(begin))
                for number in range(1, 12):
                    await socket.send(json.dumps(media(number, b"\xd5" * 160)))
                event = json.loads(await asyncio.wait_for(socket.recv(), 10))
                assert len(base64.b64decode(event["media"]["payload"])) == 640
        assert ScriptedReplica.personas[-1].voice == "VARM1"

    asyncio.run(run())
