"""The page before a conversation, and every way in which one does not come about."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
import soundfile
from chromium import Chromium
from mutagen.ogg import OggPage
from views import Views
from web_service import INFO, OWN_VOICE, PAGE, WebService

from personaplex.audio.ogg import Head, OggDemuxer, OggMuxer
from personaplex.audio.opus import packet_samples
from personaplex.persona import PROMPTS, VOICES

pytestmark = pytest.mark.browser

PAGE_LIMIT = 150_000  # bytes of the whole page on the wire, without the fallback's codec


def test_pages_written_in_the_browser(page: Views) -> None:
    script = """(async () => {
      const { OggMuxer } = await import("./audio/ogg.js");
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


def test_pages_read_in_the_browser(page: Views) -> None:
    muxer = OggMuxer(7)
    pages = [muxer.page([b"ab", b"", b"c" * 600], 3_840), muxer.page([b"d"], 7_680)]
    stream = b"".join([*muxer.headers(312), *pages])
    script = """(async () => {
      const { audioPages } = await import("./audio/ogg.js");
      const bytes = Uint8Array.from(atob(BASE64), (letter) => letter.charCodeAt(0));
      const read = (bytes) => [...audioPages(bytes)].map(({ sequence, granule, packets }) =>
        [sequence, granule, packets.map((packet) => String.fromCharCode(...packet))]);
      const fault = (bytes) => { try { return read(bytes); } catch (error) { return error.message; } };
      return [read(bytes), fault(bytes.subarray(0, -1)), fault(new Uint8Array(40))];
    })()""".replace("BASE64", json.dumps(base64.b64encode(stream).decode()))
    assert page.run(script) == [
        [[2, 3_840, ["ab", "", "c" * 600]], [3, 7_680, ["d"]]],
        "The service sent part of an Ogg page.",
        "The service sent audio that is not Ogg.",
    ]


def test_lengths_of_packets_as_the_browser_reads_them(page: Views) -> None:
    packets = [bytes([config << 3 | code, 1 + config % 2]) for config in range(32) for code in range(4)]
    script = """(async () => {
      const { packetSamples } = await import("./audio/codec.js");
      return PACKETS.map((packet) => packetSamples(Uint8Array.from(packet)));
    })()"""
    read = page.run(script.replace("PACKETS", json.dumps([list(packet) for packet in packets])))
    assert read == [2 * packet_samples(packet) for packet in packets], "at 48 kHz"


def test_voices_and_roles(page: Views) -> None:
    assert page.run("[...document.querySelectorAll('[name=voice]')].map((one) => one.value)") == list(VOICES)
    chosen = "document.querySelector('[name=voice]:checked').value"
    assert page.run(chosen) == "NATF2"
    assert page.text("label:has(#voice-NATF2)").split("\n") == ["NATF2", "Teaching", "suits the role"]
    text = "document.getElementById('role-text').value"
    assert page.run(text) == PROMPTS["assistant"].text
    page.click("[name=role][value=service-drone]")
    assert page.run(text) == PROMPTS["service-drone"].text
    assert page.run(chosen) == PROMPTS["service-drone"].voices[0], "the role's advice"
    page.click("#voice-VARM4")
    page.click("[name=role][value=bank]")
    assert page.run(chosen) == "VARM4", "a voice chosen by hand stays"
    page.set("role-text", "You are a cat.")
    assert page.run("document.querySelector('[name=role]:checked').value") == "own"
    assert page.text("#start-summary") == "A role of your own\nVoice VARM4"

    page.load()
    assert page.run(chosen) == "VARM4", "and is there when one comes back"
    assert page.run(text) == "You are a cat."


def test_roles_are_found_and_kept(page: Views) -> None:
    page.set("role-search", "drone PHOENIX")
    shown = (
        "[...document.querySelectorAll('.role')].filter((one) => one.checkVisibility())"
        ".map((one) => one.querySelector('input').value)"
    )
    assert page.run(shown) == ["service-drone"]
    page.set("role-search", "nobody has this")
    assert page.run(shown) == []
    assert page.shown("#role-none")
    page.set("role-search", "")
    page.set("role-text", "You are a lighthouse keeper.")
    page.click("#role-save")
    page.wait("document.getElementById('dialog').open")
    page.run("document.querySelector('#dialog input').value = 'Keeper'")
    page.click("#dialog [type=submit]")
    page.wait("document.querySelector('.role .name').textContent === 'Keeper'")
    page.load()
    assert page.text(".role:has(:checked) .name") == "Keeper"
    page.click("#role-delete")
    assert "Keeper" not in page.text("#role-list")


def test_the_meter_counts_tokens_as_the_service_does(page: Views, service: WebService) -> None:
    assert page.text("#role-tokens").startswith("about ")
    service.info = {**INFO, "prompt_tokens": 1_000}
    page.load()
    page.set("role-text", "five words are counted exactly")
    page.wait("document.getElementById('role-tokens').textContent === '5 of 1000 tokens'")
    page.set("role-text", "word " * 1_200)
    page.wait("document.getElementById('role-tokens').textContent === 'too long: 1200 of 1000 tokens'")


def test_the_sound_can_be_checked(page: Views) -> None:
    page.click("#check")
    page.wait("Number(document.getElementById('check-level').getAttribute('aria-valuenow')) > -40")
    page.wait("document.getElementById('check-words').textContent === 'The microphone works.'")
    assert page.run("microphone.options.length > 1 && microphone.options[1].label.includes('Fake')"), (
        "named now"
    )
    page.click("#check")
    page.wait("document.getElementById('check-level').getAttribute('aria-valuenow') === '-60'")
    page.click("#noise")
    page.load()
    assert page.run("[echo.checked, noise.checked, gain.checked]") == [True, False, True]


def test_a_voice_of_ones_own(page: Views, service: WebService) -> None:
    assert not page.shown("#own-voice")
    service.info = {
        **INFO,
        "own_voices": {"allowed": "yes", "seconds": 30, "bytes": 2_000_000, "ttl_s": 3_600},
    }
    page.load()
    page.run("document.querySelector('#own-voice details').open = true")
    page.click("#own-record")
    page.wait("document.getElementById('own-record').textContent === 'Stop at 0:02'")
    page.click("#own-record")
    page.wait("document.querySelector('#own-voice').innerText.includes('Recorded: ')")
    assert page.run("document.getElementById('own-use').disabled"), "not without consent"
    page.click("#own-consent")
    page.click("#own-use")
    page.wait("document.querySelector('[name=voice]:checked').value.startsWith('own:')")
    assert page.text("#own-status").startswith(
        "2.0 s at -27 LUFS. The service forgets it after 60 min. It is short"
    )
    (upload,) = service.uploads
    pcm, rate = soundfile.read(io.BytesIO(upload))
    assert rate == 24_000
    assert 1.9 < len(pcm) / rate < 4
    assert abs(pcm).max() > 0.05
    assert page.text("#start-summary") == "Assistant (default)\nVoice Own voice"
    page.click("#own-forget")
    page.wait("document.querySelector('[name=voice]:checked').value === 'NATF2'")
    assert service.forgotten == [OWN_VOICE]


def test_every_choice_is_in_the_query(page: Views, service: WebService) -> None:
    service.info = {**INFO, "key_needed": True, "record": "allowed"}
    page.load()
    page.set("role-text", "A cat & a dog")
    page.set("seed", "5")
    page.set("text_topk", "7", "change")
    page.run("key.value = 'k-1'")
    page.click("#record")
    service.refusal, service.status = "a valid API key is needed", 401
    before = len(service.chats)
    page.click("#connect")
    page.ended()
    assert page.text("#notice-end p") == "A valid API key is needed."
    assert service.chats[before:] == [
        {
            "voice_prompt": "NATF2",
            "text_prompt": "A cat & a dog",
            "seed": "5",
            "text_topk": "7",
            "text_temperature": "0.7",
            "audio_temperature": "0.8",
            "audio_topk": "250",
            "record": "1",
            "worker_auth_id": "k-1",
            "status": "1",
        }
    ]
    page.browser.console.clear()  # the browser's own lines about the status


async def full(socket: Any) -> None:
    await socket.send(b"\x05all 4 slots are taken; try again in 5 s")
    await socket.close(1013, "all 4 slots are taken")


async def restart(socket: Any) -> None:
    await socket.close(1012)


async def over(socket: Any) -> None:
    await socket.close(1000, "no audio came")


async def not_ogg(socket: Any) -> None:
    await socket.send(b"\x00")
    await socket.send(b"\x01hello")
    await socket.recv()


@pytest.mark.parametrize(
    ("chat", "words", "bad"),
    [
        (full, "No slot is free: all 4 slots are taken; try again in 5 s", True),
        (restart, "The server of this conversation failed or is being replaced. Start again.", True),
        (not_ogg, "The conversation broke off: The service sent audio that is not Ogg.", True),
        (over, "The service ended the conversation after 0:00: no audio came", False),
    ],
)
def test_ends_are_told(page: Views, service: WebService, chat: Any, words: str, bad: bool) -> None:
    service.chat = chat
    page.click("#connect")
    page.ended()
    assert page.text("#notice-end p") == words
    assert page.run("document.getElementById('notice-end').role") == ("alert" if bad else "status")
    page.click("#after-new")
    assert page.run("!connect.disabled && connect.checkVisibility()"), "one can try again"


def test_a_refused_upgrade_is_explained(page: Views, service: WebService) -> None:
    """A browser shows a script neither status nor words of it."""
    service.refusal, service.status = "every slot is taken and the queue is full; try again in 5 s", 503
    page.click("#connect")
    page.ended()
    assert page.text("#notice-end p") == f"No slot is free: {service.refusal}"
    page.browser.console.clear()  # the browser's own lines about the status


def test_a_service_that_is_gone(browser: Chromium) -> None:
    with WebService() as service:
        page = Views(browser, service.url)
        page.fresh()
    page.click("#connect")
    page.ended()
    assert page.text("#notice-end p") == "The service cannot be reached."
    browser.open("about:blank")


def test_the_queue(page: Views, service: WebService) -> None:
    async def queue(socket: Any) -> None:
        await socket.send(b'\x04{"type":"queue","position":3,"wait_s":100}')
        await socket.recv()

    service.chat, service.info = queue, {**INFO, "used": 4, "wait_s": 130, "queued": 2}
    page.load()
    assert page.text("#service") == "7b · All 4 slots are taken · 2 waiting"
    assert "the wait is about 2 min" in page.text("#notice-full")
    page.click("#connect")
    page.wait("state.textContent === 'In the queue, position 3, about 2 min'")
    page.end()
    assert page.text("#notice-end p") == "The conversation was ended before it began."


def test_models_that_make_no_sense_are_named(page: Views, service: WebService) -> None:
    assert not page.shown("#notice-toy")
    toys = {"tiny": "a model without training", "talk": "a few sentences", "echo": "you hear yourself"}
    for model, words in toys.items():
        service.info = {**INFO, "model": model}
        page.load()
        assert words in page.text("#notice-toy")
    assert not page.shown(".hear"), "an echo has no voice"


def test_a_wrong_number_is_pointed_out(page: Views, service: WebService) -> None:
    before = len(service.chats)
    page.set("text_topk", "-1")
    page.click("#connect")
    assert page.run("sampling.open && text_topk.matches(':invalid')")
    assert page.shown("#start")
    assert len(service.chats) == before


def test_a_refused_microphone(service: WebService) -> None:
    with Chromium(microphone=False, flags=("--lang=en",)) as browser:
        page = Views(browser, service.url)
        page.fresh()
        page.click("#check")
        page.wait(
            "document.getElementById('check-words').textContent.startsWith('The microphone was refused.')"
        )
        page.click("#connect")
        page.ended()
        assert page.text("#notice-end p").startswith("The microphone was refused. Allow it")


def test_a_loudspeaker_that_never_starts(service: WebService) -> None:
    """As in a browser that waits for a device that is not there."""
    with Chromium(flags=("--lang=en",)) as browser:
        never = "AudioContext.prototype.resume = AudioContext.prototype.close = () => new Promise(() => {});"
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=never)
        page, before = Views(browser, service.url), len(service.chats)
        page.fresh()
        page.click("#connect")
        page.wait("!document.getElementById('after').hidden", 20.0)
        assert page.text("#notice-end p").startswith("The loudspeaker does not start.")
        assert len(service.chats) == before, "no slot is taken for it"


def test_pages_that_cannot_talk(service: WebService) -> None:
    rules = "--host-resolver-rules=MAP persona.test 127.0.0.1"
    with Chromium(flags=(rules, "--lang=en")) as browser:
        address = service.url.replace("127.0.0.1", "persona.test")
        page = Views(browser, address)
        page.load()
        assert "secure pages only" in page.text("#notice-obstacle")
        assert address.rstrip("/") in page.text("#notice-obstacle")
        assert page.run("connect.disabled")

        browser.call(
            "Page.addScriptToEvaluateOnNewDocument",
            source="delete window.AudioEncoder; delete window.WebAssembly",
        )
        page = Views(browser, service.url)
        page.load()
        assert "This browser cannot play and record sound" in page.text("#notice-obstacle")
        assert page.run("connect.disabled")


def test_the_page_is_small_and_asks_nobody_else(page: Views, service: WebService) -> None:
    page.run("import('./ui/ownvoice.js')")
    page.click("#nav-history")
    page.wait("document.getElementById('talks')")
    loaded = page.run(
        "performance.getEntriesByType('resource').map((one) => [one.name, one.encodedBodySize])"
    )
    scripts = {name for name, _ in loaded if name.endswith(".js")}
    files = {
        service.url + str(file.relative_to(PAGE)) for file in PAGE.rglob("*.js") if "vendor" not in file.parts
    }
    lazy = {service.url + "audio/fallback.js", service.url + "audio/worklets.js"}
    assert scripts >= files - lazy
    assert 20_000 < sum(size for _, size in loaded) < PAGE_LIMIT
    origins = {tuple(address.split("/")[:3])[2] for address in page.browser.requests if "://" in address}
    assert origins == {service.url.split("/")[2]}
