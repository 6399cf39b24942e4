"""The load test's callers on every protocol, against a real gateway whose agent echoes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from protocol_service import ProtocolService, ScriptedReplica

from loadtest.arrivals import Arrival
from loadtest.caller import Caller
from loadtest.listener import Listener
from loadtest.outcome import Outcome
from loadtest.protocols import PROTOCOLS, Pause
from loadtest.speech import DEFAULT, load
from loadtest.target import target
from personaplex.errors import ConfigError, ProtocolError
from personaplex.persona import PROMPTS

ACCOUNT, KEY, PUBLIC = "0123456789abcdef", "sk-load", "https://talk.example.org"
ALL = ("live", "realtime", "twilio", "telnyx", "asterisk")
OPTIONS: dict[str, Any] = {
    "api_key": KEY,
    "twilio_token": ACCOUNT,
    "public_url": PUBLIC,
    "insecure": False,
    "dialogues": "",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProtocolService]:
    file: Path = tmp_path_factory.mktemp("twilio") / "token"
    file.write_text(ACCOUNT + "\n")
    file.chmod(0o600)
    with ProtocolService(
        protocols=ALL, public_url=PUBLIC, twilio_token_file=file, api_keys=KEY, sessions_per_address=0
    ) as running:
        yield running


def caller(service: ProtocolService, protocol: str, number: int = 0, **options: Any) -> Caller:
    arrival = Arrival(number, 0.0, 1.2, f"VARM{number % 5}", "assistant", seed=7)
    where = target({**OPTIONS, **options, "protocol": protocol, "host": f"ws://{service.base}"})
    return Caller(where, arrival, load([DEFAULT], PROTOCOLS[protocol]({}).audio))


def test_every_protocol_is_spoken_and_heard(service: ProtocolService) -> None:
    callers = {name: caller(service, name, number) for number, name in enumerate(PROTOCOLS)}
    threads = [threading.Thread(target=one.run) for one in callers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for name, one in callers.items():
        outcome = one.outcome
        assert (name, outcome.cause, outcome.live, outcome.deficit) == (name, "", True, 0)
        assert 8 <= outcome.sent <= 16, name
        assert outcome.heard >= (5 if "realtime" in name else outcome.sent - 2), (name, outcome)
        assert outcome.first_audio_s is not None
        assert (sum(outcome.answers.values()) == outcome.heard) is outcome.continuous
    begun = ScriptedReplica.personas
    assert sorted(one.voice for one in begun) == sorted(f"VARM{n % 5}" for n in range(len(PROTOCOLS)))
    assert {one.text_prompt for one in begun} == {PROMPTS["assistant"].text}
    assert {one.sampling.text_seed for one in begun} == {7}


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_refusals_are_typed(service: ProtocolService, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert caller(service, name, api_key="no", twilio_token="no").run().cause == "Unauthorized"
    monkeypatch.setattr(service.gateway._leases, "slots", 0)
    one = caller(service, name).run()
    assert (one.cause, one.refused) == ("NoCapacity", True)


def test_options_that_do_not_go_together_are_refused() -> None:
    plain = {**OPTIONS, "host": "ws://h", "protocol": "twilio"}
    for change in ({"twilio_token": ""}, {"public_url": ""}, {"protocol": "live", "dialogues": "folder"}):
        with pytest.raises(ConfigError):
            target({**plain, **change})
    assert target({**plain, "host": "wss://h/x/"}).url == "wss://h/x/twilio/media"


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in ("chat", "asterisk")])
@pytest.mark.parametrize("text", ["", "[]", "{", '{"type": 1, "event": 1}'])
def test_what_is_no_message_is_the_services_fault(name: str, text: str) -> None:
    with pytest.raises(ProtocolError):
        list(PROTOCOLS[name]({}).read(text))


@pytest.mark.parametrize("audio", [None, 5, "!!!"])
def test_audio_that_is_none_is_too(audio: Any) -> None:
    for name, kind in (("live", "session.output_audio.delta"), ("realtime", "response.output_audio.delta")):
        with pytest.raises(ProtocolError):
            list(PROTOCOLS[name]({}).read(json.dumps({"type": kind, "delta": audio})))
    with pytest.raises(ProtocolError):
        list(PROTOCOLS["twilio"]({}).read(json.dumps({"event": "media", "media": {"payload": audio}})))


def test_a_pause_of_the_agent_is_no_underrun() -> None:
    assert list(PROTOCOLS["realtime"]({}).read('{"type": "response.done"}')) == [Pause()]
    listener = Listener()
    for at in (1.0, 1.08):
        listener.hear(at)
    listener.pause()
    for at in (9.0, 9.08, 9.4):
        listener.hear(at)
    assert (listener.pages, listener.first_s, listener.underruns) == (5, 1.0, 1)
    assert sorted(listener.intervals) == [80, 320]


def test_frames_without_an_answer_count_only_where_every_frame_has_one() -> None:
    lost = Outcome(0, 0.0, live=True, sent=100, heard=50)
    assert not lost.good
    assert replace(lost, continuous=False).good
