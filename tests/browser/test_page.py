"""The web page in a real browser, against an echo: `make test-browser`, or pytest -m browser."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from chromium import Chromium
from echo_service import echo
from mutagen.ogg import OggPage
from web_service import INFO, PAGE, Socket, WebService

from personaplex.audio.ogg import Head, OggDemuxer, OggMuxer
from personaplex.audio.opus import packet_samples
from personaplex.audio.transcoder import Transcoder
from personaplex.persona import PROMPTS, VOICES

pytestmark = pytest.mark.browser

CONNECT = "document.getElementById('connect').click()"
READY = "!document.getElementById('connect').disabled"


def state_is(words: str) -> str:
    return f"document.getElementById('state').textContent === {json.dumps(words)}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def service() -> Iterator[WebService]:
    with WebService() as service:
        yield service


@pytest.fixture
def page(browser: Chromium, service: WebService) -> Iterator[Chromium]:
    """The page, freshly loaded and ready; at the end nothing may have gone wrong in it unnoticed."""
    browser.console.clear()
    browser.open(service.url)
    browser.wait(READY)
    yield browser
    browser.open("about:blank")
    assert browser.console == []


def test_pages_written_in_the_browser(page: Chromium) -> None:
    script = """(async () => {
      const { OggMuxer } = await import("./ogg.js");
      const muxer = new OggMuxer(0xdeadbeef);
      const packets = [0, 1, 254, 255, 256, 600].map((length) => new Uint8Array(length).fill(length));
      const pages = [...muxer.headers(312, 48000), muxer.page(packets, 3840), muxer.page([packets[1]], 5760)];
      return pages.map((page) => btoa(String.fromCharCode(...page)));
    })()"""
    pages = [base64.b64decode(text) for text in page.run(script)]
    packets = [bytes([length & 255]) * length for length in (0, 1, 254, 255, 256, 600)]
    assert OggDemuxer().feed(b"".join(pages)) == [Head(0xDEADBEEF, 1, 312), *packets, packets[1]]
    oracle = [OggPage(io.BytesIO(data)) for data in pages]
    assert [read.sequence for read in oracle] == [0, 1, 2, 3]
    assert [read.position for read in oracle] == [0, 0, 3_840, 5_760]
    assert [read.write() for read in oracle] == pages, "byte for byte, CRC included"


def test_pages_read_in_the_browser(page: Chromium) -> None:
    muxer = OggMuxer(7)
    pages = [muxer.page([b"ab", b"", b"c" * 600], 3_840), muxer.page([b"d"], 7_680)]
    stream = b"".join([*muxer.headers(312), *pages])
    script = """(async () => {
      const { audioPages } = await import("./ogg.js");
      const bytes = Uint8Array.from(atob(BASE64), (letter) => letter.charCodeAt(0));
      const read = (bytes) => [...audioPages(bytes)].map(({ granule, packets }) =>
        [granule, packets.map((packet) => String.fromCharCode(...packet))]);
      const refused = [bytes.subarray(0, -1), bytes.subarray(1)].map((bytes) => {
        try { read(bytes); return null; } catch (error) { return error.message; }
      });
      return { pages: read(bytes), refused };
    })()"""
    result = page.run(script.replace("BASE64", json.dumps(base64.b64encode(stream).decode())))
    assert result["pages"] == [[3_840, ["ab", "", "c" * 600]], [7_680, ["d"]]]
    assert result["refused"] == [
        "The service sent part of an Ogg page.",
        "The service sent audio that is not Ogg.",
    ]


def test_lengths_of_packets_as_the_browser_reads_them(page: Chromium) -> None:
    packets = [bytes([config << 3 | code, 1 + config % 2]) for config in range(32) for code in range(4)]
    script = """(async () => {
      const { packetSamples } = await import("./audio.js");
      return PACKETS.map((packet) => packetSamples(Uint8Array.from(packet)));
    })()"""
    read = page.run(script.replace("PACKETS", json.dumps([list(packet) for packet in packets])))
    assert read == [2 * packet_samples(packet) for packet in packets], "at 48 kHz"


def test_voices_and_roles(page: Chromium) -> None:
    assert page.run("[...voice.options].map((option) => option.value)") == list(VOICES)
    assert page.run("voice.value") == "NATF2"
    assert page.text("#voice-about") == "Suited to teaching"
    assert page.run("role.value") == PROMPTS["assistant"].text
    choose = "(id, value) => { const list = document.getElementById(id); list.value = value; "
    choose = f"({choose} list.dispatchEvent(new Event('change')); }})"
    page.run(f"{choose}('preset', 'service-drone')")
    assert page.run("role.value") == PROMPTS["service-drone"].text
    assert page.run("voice.value") == PROMPTS["service-drone"].voices[0], "the role's advice"
    page.run(f"{choose}('voice', 'VARM4')")
    page.run(f"{choose}('preset', 'bank')")
    assert page.run("voice.value") == "VARM4", "a voice chosen by hand stays"
    page.run("role.value = 'You are a cat.'; role.dispatchEvent(new Event('input'))")
    assert page.run("preset.selectedOptions[0].textContent") == "A role of your own"


def test_a_whole_conversation(browser: Chromium) -> None:
    heard: list[np.ndarray] = []
    watched: list[Transcoder] = []
    closed = threading.Event()

    async def watch(socket: Socket) -> None:
        transcoder, receive = Transcoder(), socket.recv
        watched.append(transcoder)

        async def recv() -> bytes | str:
            message = await receive()
            assert isinstance(message, bytes)
            heard.extend(transcoder.receive(message[1:]))
            return message

        socket.recv = recv  # type: ignore[method-assign]
        await echo(socket)  # type: ignore[arg-type]
        closed.set()

    with WebService(watch) as service:
        browser.console.clear()
        browser.open(service.url)
        browser.wait(READY)
        browser.run(
            "window.seen = []; new MutationObserver(() => seen.push(state.textContent))"
            ".observe(state, { childList: true })"
        )
        browser.run("role.value = 'A cat & a dog'; seed.value = 5")
        browser.run(CONNECT)
        browser.wait(state_is("Live"))
        for meter in ("you", "agent"):  # the fake microphone beeps, and then the echo
            browser.wait(f"{meter}.getAttribute('aria-valuenow') > -40")
        browser.wait("/^[0-9]+ ms$/.test(latency.textContent) && duration.textContent === '0:02'")
        assert 0 < int(browser.text("#latency").removesuffix(" ms")) < 600
        assert browser.run("connect.textContent") == "Disconnect"
        assert browser.run("[...persona.elements].every((control) => control.disabled)")
        assert re.fullmatch("é( é)+", browser.text("#transcript"))

        sent = len(heard)
        browser.run("mute.click()")
        assert browser.run("mute.getAttribute('aria-pressed')") == "true"
        browser.wait("duration.textContent === '0:04'")
        assert len(heard) - sent > 12, "a muted microphone goes on with silence"
        assert max(float(np.abs(frame).max()) for frame in heard[sent + 5 :]) < 1e-3

        browser.run(CONNECT)
        browser.wait(state_is("Not connected"))
        assert not browser.run("problem.textContent"), "an end one asked for is no problem"
        assert browser.run("transcript.textContent"), "the transcript stays"
        browser.wait("role.disabled === false")
        seen = browser.run("seen")

    assert closed.is_set()
    assert [words for number, words in enumerate(seen) if words not in seen[:number]] == [
        "Waiting for the microphone",
        "Connecting",
        "Warming up",
        "In the queue, position 2",
        "Live",
        "Not connected",
    ]
    (query,) = service.chats
    assert query["voice_prompt"] == "NATF2"
    assert query["text_prompt"] == "A cat & a dog"
    assert (query["seed"], query["audio_topk"], query["status"]) == ("5", "250", "1")
    (transcoder,) = watched
    assert (transcoder.dropped_pages, transcoder.resyncs, transcoder.counters.concealed) == (0, 0, 0)
    assert max(float(np.abs(frame).max()) for frame in heard[:sent]) > 0.05
    assert browser.console == []


async def full(socket: Any) -> None:
    await socket.send(b"\x05all 4 slots are taken; try again in 5 s")
    await socket.close(1013, "all 4 slots are taken")


async def restart(socket: Any) -> None:
    await socket.close(1012)


async def not_ogg(socket: Any) -> None:
    await socket.send(b"\x00")
    await socket.send(b"\x01hello")
    await socket.recv()


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (full, "all 4 slots are taken; try again in 5 s"),
        (restart, "The server running this conversation failed or is being replaced. Connect again."),
        (not_ogg, "The service sent audio that is not Ogg."),
    ],
)
def test_errors_are_shown(browser: Chromium, chat: Any, words: str) -> None:
    with WebService(chat) as service:
        browser.open(service.url)
        browser.wait(READY)
        browser.run(CONNECT)
        browser.wait("!problem.hidden")
        assert browser.text("#problem") == words
        assert browser.text("#state") == "Not connected"
        assert browser.run("!connect.disabled && !role.disabled"), "one can try again"
        browser.open("about:blank")


def test_a_refused_upgrade_is_explained(browser: Chromium) -> None:
    """A browser shows a script neither status nor words of it."""
    words = "every slot is taken and the queue is full; try again in 5 s"
    with WebService(refusal=f"{words}\n") as service:
        browser.open(service.url)
        browser.wait(READY)
        browser.run(CONNECT)
        browser.wait("!problem.hidden")
        assert browser.text("#problem") == words
        assert browser.text("#state") == "Not connected"
        browser.open("about:blank")


def test_a_service_that_is_gone(browser: Chromium) -> None:
    with WebService() as service:
        browser.open(service.url)
        browser.wait(READY)
    browser.run(CONNECT)
    browser.wait("!problem.hidden")
    assert browser.text("#problem") == "The service cannot be reached."


def test_a_key_is_asked_for_when_one_is_needed(browser: Chromium) -> None:
    with WebService(full, info={**INFO, "key_needed": True}) as service:
        browser.open(service.url)
        browser.wait(READY)
        assert browser.run("key.checkVisibility() && key.type") == "password"
        browser.run("key.value = 'k-1'")
        browser.run(CONNECT)
        browser.wait("!problem.hidden")
    assert service.chats[0]["worker_auth_id"] == "k-1"


def test_a_wrong_number_is_pointed_out(page: Chromium, service: WebService) -> None:
    before = len(service.chats)
    page.run("text_topk.value = '-1'")
    page.run(CONNECT)
    assert page.run("document.querySelector('details').open && text_topk.matches(':invalid')")
    assert page.text("#state") == "Not connected"
    assert len(service.chats) == before


def test_every_control_has_a_name(page: Chromium) -> None:
    page.call("Accessibility.enable")
    page.run("document.querySelector('details').open = true")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "combobox", "textbox", "spinbutton", "meter", "log", "DisclosureTriangle"}
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored") and node["role"]["value"] in roles
    }
    assert {name for _, name in named} == {
        *("Connect", "Voice", "Role", "Role text", "Sampling", "Seed", "You", "Agent", "What the agent says"),
        *("Text temperature", "Text top-k", "Audio temperature", "Audio top-k"),
    }


def test_the_page_fits_a_phone(page: Chromium) -> None:
    for width in (320, 390, 1_100):
        page.look(width, 800)
        assert page.run("document.documentElement.scrollWidth") <= width
    page.look(1_100, 800)


def test_a_refused_microphone(service: WebService) -> None:
    with Chromium(microphone=False) as browser:
        browser.open(service.url)
        browser.wait(READY)
        browser.run(CONNECT)
        browser.wait("!problem.hidden")
        assert browser.text("#problem").startswith("The microphone was refused. Allow it")
        assert browser.run("!connect.disabled")


def test_pages_that_cannot_talk(service: WebService) -> None:
    rules = "--host-resolver-rules=MAP persona.test 127.0.0.1"
    with Chromium(flags=(rules,)) as browser:
        address = service.url.replace("127.0.0.1", "persona.test")
        browser.open(address)
        browser.wait("!problem.hidden")
        assert "secure pages only" in browser.text("#problem")
        assert address.rstrip("/") in browser.text("#problem")
        assert browser.run("connect.disabled")

        browser.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.AudioEncoder")
        browser.open(service.url)
        browser.wait("!problem.hidden")
        assert "cannot encode speech" in browser.text("#problem")
        assert "Firefox 130" in browser.text("#problem")
        assert browser.run("connect.disabled")


def test_colours_can_be_told_apart() -> None:
    """WCAG 2: 4.5 for text, 3 for borders of controls and signs, in both schemes."""
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", (PAGE / "style.css").read_text(), re.DOTALL)
    )
    assert light.keys() == dark.keys()
    for scheme in (light, dark):
        for ink in ("ink", "quiet", "bad"):
            assert contrast(scheme[ink], scheme["card"]) >= 4.5, ink
        assert contrast(scheme["ink"], scheme["page"]) >= 4.5
        assert contrast(scheme["quiet"], scheme["page"]) >= 4.5
        assert contrast(scheme["bad"], scheme["bad-page"]) >= 4.5
        assert contrast(scheme["accent-ink"], scheme["accent"]) >= 4.5
        for sign in ("field", "accent", "you", "warn", "bad"):
            assert contrast(scheme[sign], scheme["card"]) >= 3, sign
        for level in ("you", "accent"):
            assert contrast(scheme[level], scheme["track"]) >= 3, level


def contrast(one: str, other: str) -> float:
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("record", "agrees"), [("allowed", True), ("allowed", False), ("always", False)])
def test_being_recorded_is_a_choice_and_a_mark(browser: Chromium, record: str, agrees: bool) -> None:
    async def tell(socket: Socket) -> None:
        recorded = record == "always" or agrees
        await echo(socket, **({"recorded": True} if recorded else {}))  # type: ignore[arg-type]

    with WebService(tell, info={**INFO, "record": record}) as service:
        browser.open(service.url)
        browser.wait(READY)
        assert browser.run("document.getElementById('record-field').hidden") == (record != "allowed")
        assert browser.run("document.getElementById('always-recorded').hidden") == (record != "always")
        if agrees:
            browser.run("document.getElementById('record').click()")
        browser.run(CONNECT)
        browser.wait(state_is("Live"))
        marked = agrees or record == "always"
        assert browser.run("document.getElementById('recorded').hidden") != marked
        browser.run(CONNECT)
        browser.wait(state_is("Not connected"))
        assert browser.run("document.getElementById('recorded').hidden")
    assert [chat.get("record") for chat in service.chats] == ["1" if agrees else None]
