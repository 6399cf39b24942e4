"""A conversation in the page: lanes, transcript, a lost connection, and what is kept of it afterwards."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from chromium import Chromium
from staged import AGENT, DETAILS, USER, Staged, sound
from views import Views
from web_service import INFO, WebService

from personaplex.config import SAMPLE_RATE
from personaplex.session.moshi import Metadata, encode

pytestmark = pytest.mark.browser

SAID = [
    ("You", "What is the capital of France?"),
    ("Agent", "It is Paris, as everybody knows. Well, from the city to the coast it takes three"),
    ("You", "Wait, actually, tell me about the weather in Oslo."),
    ("Agent", "It is cold there, with heavy rain."),
]
PIXELS = """(() => {
  const canvas = document.getElementById("lanes");
  const { width, height } = canvas;
  const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
  const tall = (from, until) => {
    let columns = 0;
    for (let x = 0; x < width - 40; x++) {
      let count = 0;
      for (let y = from; y < until; y++) count += data[4 * (y * width + x) + 3] > 200;
      columns += count > (until - from) / 5;
    }
    return columns;
  };
  return [tall(0, height / 2), tall(height / 2, height)];
})()"""


def turns(page: Views) -> list[tuple[str, str]]:
    """Who said what, as it is shown."""
    script = (
        "[...document.querySelectorAll('.turn')].filter((one) => one.checkVisibility())"
        ".map((one) => [one.querySelector('.who').textContent, one.querySelector('.said').textContent])"
    )
    return [(who, said) for who, said in page.run(script)]


def likeness(part: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """Where `part` is in `whole`, in seconds, and the correlation there."""
    size = 1 << (len(whole) + len(part)).bit_length()
    scores = np.fft.irfft(np.fft.rfft(whole, size) * np.conj(np.fft.rfft(part, size)), size)[: len(whole)]
    at = int(np.argmax(scores))
    there = whole[at : at + len(part)]
    norm = float(np.linalg.norm(there) * np.linalg.norm(part[: len(there)]))
    return at / SAMPLE_RATE, float(scores[at]) / norm if norm else 0.0


def exported(page: Views) -> tuple[np.ndarray, np.ndarray]:
    """Agent and user of the talk that is shown, float32 [samples] at 24 kHz, from the file that is saved."""
    page.click("#export-wav")
    pcm, rate = soundfile.read(page.browser.downloaded(".wav"), dtype="float32", always_2d=True)
    assert (rate, pcm.shape[1]) == (48_000, 2)
    agent, user = (soxr.resample(pcm[:, channel], rate, SAMPLE_RATE) for channel in (0, 1))
    return agent, user


def test_a_whole_conversation(page: Views, service: WebService) -> None:
    staged = Staged()
    service.chat = staged
    page.run(
        "window.states = []; new MutationObserver(() => states.push(state.textContent))"
        ".observe(state, { childList: true })"
    )
    for name in ("echo", "noise", "gain"):  # which take from the user's voice while both speak
        page.click(f"#{name}")
    page.start()
    service.info = {**INFO, "used": 2}
    page.talk_until("0:05")
    assert min(page.run(PIXELS)) > 8, "both lanes are drawn"
    assert not page.shown("#start")
    assert page.text("#left").startswith("29:5")
    assert page.text("#session-line").startswith(
        "session=4f6c1d09a3e24b57 model=7b version=0.1.0 voice=NATF2"
    )
    page.talk_until("0:13")
    assert turns(page)[:4] == SAID
    assert page.text(".turn:nth-of-type(3) .overlap") == "while the agent spoke"
    assert page.run("/^[0-9]+ ms$/.test(document.getElementById('figure-latency').textContent)")
    latency = int(page.text("#figure-latency").removesuffix(" ms"))
    assert 0 < latency < 2_000

    page.click("#mute")
    assert page.run("[mute.getAttribute('aria-pressed'), mute.textContent.trim()]") == ["true", "Muted"]
    count = len(staged.heard)
    page.wait(f"document.getElementById('clock').textContent >= {json.dumps('0:16')}", 30.0)
    quiet = staged.heard[count + 5 :]
    assert len(quiet) > 12, "a muted microphone goes on with silence"
    assert max(float(np.abs(frame).max()) for frame in quiet) < 1e-3
    page.click("#mute")
    page.talk_until("0:20")
    page.end()
    assert page.text("#notice-end p").startswith("The conversation is over after 0:2")
    assert page.run("document.getElementById('notice-end').role") == "status", "an ordinary end is no fault"
    clock = page.text("#clock")
    page.wait("document.getElementById('service').textContent === '7b · 2 of 4 slots free'")
    assert page.text("#clock") == clock, "it stands still"
    seen = page.run("states")
    assert [words for number, words in enumerate(seen) if words not in seen[:number]] == [
        *("Waiting for the microphone", "Connecting", "Getting ready", "Live", "Over"),
    ]

    page.load("#history")
    assert page.text(".talk-row").split("\n")[0] == "Assistant (default)"
    page.click(".talk-row")
    page.wait("document.getElementById('stored-words')")
    assert turns(page)[:4] == SAID
    agent, user = exported(page)
    spoken = check_user(user, staged)
    check_agent(agent)
    page.click("#export-json")
    about = json.loads(page.browser.downloaded(".json").read_text())
    assert about["session"] == DETAILS["session"]
    assert (about["text_seed"], about["audio_seed"], about["voice"]) == (90210, 90210, "NATF2")
    assert [entry["side"] for entry in about["entries"][:4]] == ["user", "agent", "user", "agent"]
    starts = [entry["start"] for entry in about["entries"] if entry["side"] == "user"]
    assert np.allclose(starts[:3], spoken, atol=0.3), "times are those of the sound"

    page.click("#play")
    page.wait("Number(position.value) > 1.0")
    page.click("#play")
    page.set("position", "12")
    assert page.text(".playbar .time").startswith("0:12 / 0:2")
    page.click("#delete")
    page.wait("document.getElementById('dialog').open")
    page.click("#dialog [type=submit]")
    page.wait("document.querySelector('#talks .hint')")
    assert page.run(
        "import('./store/history.js').then((store) => store.openHistory())"
        ".then(async (history) => [(await history.talks()).length])"
    ) == [0]


def check_user(user: np.ndarray, staged: Staged) -> list[float]:
    """The user's channel is what the service heard, without a hole; gives where three lines begin in it."""
    heard, said = np.concatenate(staged.heard), sound(USER)
    places, shifts = [], []
    for line in USER[:3]:
        begin, end = round(line.start * SAMPLE_RATE), round(line.end * SAMPLE_RATE)
        came, alike = likeness(said[begin:end], heard)
        assert alike > 0.6, f"{line} reached the service"
        begin = round(came * SAMPLE_RATE)
        place, alike = likeness(heard[begin : begin + end - round(line.start * SAMPLE_RATE)], user)
        assert alike > 0.95, f"{line} is kept as it was sent"
        places.append(place)
        shifts.append(place - came)
    assert max(shifts) - min(shifts) < 0.02, shifts
    return places


def check_agent(agent: np.ndarray) -> None:
    """The agent's channel has what the service said, in its order."""
    said, lates = sound(AGENT), []
    for line in AGENT[:3]:
        place, alike = likeness(said[round(line.start * SAMPLE_RATE) : round(line.end * SAMPLE_RATE)], agent)
        assert alike > 0.5, line
        lates.append(place - line.start)
    assert max(lates) - min(lates) < 1.5, lates


def test_a_lost_connection_is_resumed(page: Views, service: WebService) -> None:
    """The first socket breaks after 3 s, two tries are refused, then it goes on where it stood."""
    frames: list[int] = []  # messages of the user, of each socket

    async def lossy(socket: Any) -> None:
        number = len(frames)
        frames.append(0)
        resumed = (
            {} if not number else {"resumed": {"frame": 40, "lost_frames": 3, "lost_text": " lost words"}}
        )
        talk = Staged(details={**DETAILS, "resume": f"token-{number}", "grace_s": 30, **resumed})
        receive = socket.recv

        async def recv() -> bytes | str:
            message = await receive()
            frames[number] += 1
            if number == 0 and frames[0] > 38:
                service.refusal, service.status = "no replica is there", 503
                await socket.close(1012)
            return message

        socket.recv = recv
        await talk(socket)

    service.chat, before = lossy, len(service.chats)
    page.start()
    page.wait("state.textContent === 'One moment, the connection is being restored'", 20.0)
    while len(service.chats) < before + 3:
        page.run("0")
    service.refusal = ""
    page.live()
    chat = service.chats[-1]
    assert chat["resume"] == "token-0"
    assert int(chat["heard"]) > 30
    assert int(chat["heard"]) - int(chat["read"]) in (0, 1), "the text of the last page may not have come"
    assert chat["text_prompt"].startswith("You are a wise")
    page.wait("document.querySelector('.turn.agent')?.textContent.includes('lost words')")
    count = frames[-1]
    page.talk_until("0:08")
    assert frames[-1] > count + 10, "what is said goes on"
    page.end()
    page.listen()
    assert float(page.run("position.max")) > 6
    page.browser.console.clear()  # the browser's own lines about the status


def test_a_replica_that_is_replaced_is_told(page: Views, service: WebService) -> None:
    go_on = asyncio.Event()

    async def gap(socket: Any) -> None:
        await socket.send(b"\x00")
        await socket.send(encode(Metadata({"type": "interrupted"})))
        await go_on.wait()
        await socket.send(encode(Metadata({"type": "continued", "generation": 1, "frame": 20})))
        await socket.send(encode(Metadata({"type": "ending", "in_s": 60})))
        while True:
            await socket.recv()

    service.chat = gap
    page.click("#connect")
    page.wait("state.textContent === 'One moment, the connection is being restored'")
    service.call(go_on.set)
    page.live()
    page.wait("document.getElementById('notice-ending')")
    assert page.text("#notice-ending p") == "The conversation ends in 60 s."
    page.end()


def test_a_talk_is_asked_over_to_another_server(page: Views, service: WebService) -> None:
    """It comes over at once and says nothing of it; what it does not know it leaves out."""
    left: list[int] = []  # close codes of ours

    async def asks(socket: Any) -> None:
        first = "resume" not in socket.query
        resumed = {} if first else {"resumed": {"frame": 26, "lost_frames": 0, "lost_text": ""}}
        talk = Staged(details={**DETAILS, "resume": "second" if not first else "first", **resumed})
        receive, frames = socket.recv, 0

        async def recv() -> bytes | str:
            nonlocal frames
            frames += 1
            if frames == 25:
                for news in ({"type": "of tomorrow", "much": [1]}, {"type": "window", "frame": 25}):
                    await socket.send(encode(Metadata(news)))
                if first:
                    await socket.send(encode(Metadata({"type": "reconnect", "reason": "rollout"})))
            return await receive()

        socket.recv = recv
        await talk(socket)
        left.append(socket.left)

    service.chat, before = asks, len(service.chats)
    page.run(
        "window.states = []; new MutationObserver(() => states.push(state.textContent))"
        ".observe(state, { childList: true })"
    )
    page.start()
    page.wait("document.getElementById('notice-talk')", 20.0)
    assert "forgets its beginning" in page.text("#notice-talk p")
    page.talk_until("0:06")
    first, second = service.chats[before:]
    assert "resume" not in first
    assert (second["resume"], second["text_prompt"]) == ("first", first["text_prompt"])
    assert int(second["heard"]) > 15
    assert int(second["heard"]) - int(second["read"]) in (0, 1)
    assert left == [4000], "neither 1000 nor 1001, which would end the session"
    assert [words for words in page.run("states") if words.startswith("One moment")] == []
    page.end()
    assert page.text("#notice-end p").startswith("The conversation is over after 0:0")


def test_two_servers_that_send_it_to_and_fro(page: Views, service: WebService) -> None:
    async def asks(socket: Any) -> None:
        await socket.send(b"\x00")
        details = {"resume": "again", "grace_s": 30}
        await socket.send(encode(Metadata({"type": "session", **DETAILS, **details})))
        await socket.send(encode(Metadata({"type": "reconnect"})))
        while True:
            await socket.recv()

    service.chat, before, began = asks, len(service.chats), time.monotonic()
    page.click("#connect")
    page.talk_until("0:03")
    tries = (len(service.chats) - before) / (time.monotonic() - began)
    assert 1 < tries < 8, "with pauses, a second"
    page.end()


def test_a_talk_that_finds_no_slot_comes_back(page: Views, service: WebService) -> None:
    """Its replica was lost and no other had room; then it waits in a queue in vain, then a connection that
    told it what was lost brings no page. What it was told it has read."""
    words, count = "no slot became free in time", 0

    async def scarce(socket: Any) -> None:
        nonlocal count
        number, count = count, count + 1
        lost = {"frame": 40, "lost_frames": 3, "lost_text": " lost words"}
        details = {
            **DETAILS,
            "resume": f"token-{number}",
            "grace_s": 30,
            **({"resumed": lost} if number else {}),
        }
        if number == 1:
            await socket.send(encode(Metadata({"type": "queue", "position": 1})))
            await socket.close(1013, words)
        elif number == 2:
            await socket.send(b"\x00")
            await socket.send(encode(Metadata({"type": "session", **details})))
            await socket.close(1013, words)
        else:
            receive, frames = socket.recv, 0

            async def recv() -> bytes | str:
                nonlocal frames
                frames += 1
                if number == 0 and frames == 25:
                    await socket.close(1013, words)
                return await receive()

            socket.recv = recv
            await Staged(details=details)(socket)

    service.chat, before = scarce, len(service.chats)
    page.start()
    page.wait("state.textContent === 'One moment, the connection is being restored'", 20.0)
    while len(service.chats) < before + 4:
        page.run("0")
    page.live()
    tries = service.chats[before + 1 :]
    assert [one["resume"] for one in tries] == ["token-0", "token-0", "token-2"]
    heard = [int(one["heard"]) for one in tries]
    assert heard == heard[:1] * 3
    assert [int(one["read"]) for one in tries[:2]] in ([heard[0]] * 2, [heard[0] - 1] * 2)
    assert tries[2]["read"] == "40"
    page.end()


def test_when_no_slot_becomes_free_within_the_grace_that_is_said(page: Views, service: WebService) -> None:
    async def scarce(socket: Any) -> None:
        if "resume" not in socket.query:
            await socket.send(b"\x00")
            details = {**DETAILS, "resume": "token", "grace_s": 0.7}
            await socket.send(encode(Metadata({"type": "session", **details})))
            await asyncio.sleep(0.5)
        await socket.close(1013, "no slot became free in time")

    service.chat, before = scarce, len(service.chats)
    page.click("#connect")
    page.ended()
    assert page.text("#notice-end p") == "No slot is free: no slot became free in time"
    assert 2 <= len(service.chats) - before <= 6


def test_a_used_token_ends_it(page: Views, service: WebService) -> None:
    async def breaks(socket: Any) -> None:
        await socket.send(b"\x00")
        await socket.send(encode(Metadata({"type": "session", **DETAILS, "resume": "old", "grace_s": 30})))
        service.refusal, service.status = "expired", 410
        await asyncio.sleep(0.5)
        await socket.close(1012)

    service.chat = breaks
    page.click("#connect")
    page.ended()
    assert page.text("#notice-end p") == "The connection to the service was lost."
    page.browser.console.clear()


def test_a_crash_loses_seconds_at_most(page: Views, service: WebService) -> None:
    page.start()
    page.talk_until("0:07")
    page.browser.crash()
    page.load("#history")
    assert page.text(".talk-row .badge") == "cut off"
    page.click(".talk-row")
    page.wait("document.getElementById('stored-words')")
    assert turns(page)[0] == SAID[0]
    assert float(page.run("position.max")) > 4.0
    _, user = exported(page)
    _, alike = likeness(sound(USER)[SAMPLE_RATE : round(USER[0].end * SAMPLE_RATE)], user)
    assert alike > 0.6
    page.browser.console.clear()


def test_full_storage_ends_the_record_not_the_talk(page: Views, service: WebService) -> None:
    used = page.run("navigator.storage.estimate().then(({ usage }) => usage)")
    quota = {"origin": page.url.rstrip("/"), "quotaSize": used + 30_000}
    page.browser.call("Storage.overrideQuotaForOrigin", **quota)
    try:
        page.start()
        page.wait("document.getElementById('notice-talk')", 30.0)
        assert page.text("#notice-talk p").startswith("The browser's storage is full")
        assert page.run("state.dataset.state") == "live"
        page.end()
    finally:
        page.browser.call("Storage.overrideQuotaForOrigin", origin=quota["origin"])


def test_a_window_without_storage(speaker: Any, service: WebService) -> None:
    flags = (f"--use-file-for-fake-audio-capture={speaker}%noloop", "--lang=en")
    with Chromium(flags=flags) as browser:
        source = "IDBFactory.prototype.open = () => { throw new DOMException('no', 'SecurityError'); };"
        source += "Object.defineProperty(window, 'localStorage', { get() { throw new Error('no'); } });"
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=source)
        service.chat, service.info, service.refusal = Staged(), dict(INFO), ""
        page = Views(browser, service.url)
        page.load()
        assert "keeps no history" in page.text("#notice-memory")
        page.start()
        page.talk_until("0:04")
        page.end()
        page.listen()
        agent, user = exported(page)
        assert len(agent) == len(user) > 3 * SAMPLE_RATE
        assert float(np.abs(user).max()) > 0.05
        assert browser.console == []


def test_the_same_persona_and_the_same_seed_again(page: Views, service: WebService) -> None:
    before = len(service.chats)
    page.set("text_topk", "9", "change")
    page.start()
    page.talk_until("0:02")
    page.end()
    page.click("#after-seed")
    page.live()
    page.end()
    page.click("#nav-history")
    page.wait("document.querySelectorAll('.talk-row').length === 2")
    page.click(".talk-row")
    page.wait("document.getElementById('again')")
    page.click("#again")
    page.live()
    page.end()
    first, seeded, free = service.chats[before:]
    assert (seeded["text_seed"], seeded["audio_seed"], seeded["text_topk"]) == ("90210", "90210", "9")
    assert "text_seed" not in first
    assert "text_seed" not in free
    assert {key: free[key] for key in first} == first


def test_talks_are_found_and_named(page: Views, service: WebService) -> None:
    page.start()
    page.talk_until("0:04")
    page.end()
    page.click("#after-persona")
    page.live()
    page.end()
    page.click("#nav-history")
    page.wait("document.querySelectorAll('.talk-row').length === 2")
    page.set("talk-search", "capital france")
    assert page.run("document.querySelectorAll('.talk-row').length") == 1
    page.click(".talk-row")
    page.wait("document.getElementById('rename')")
    page.click("#rename")
    page.run("document.querySelector('#dialog input').value = 'Geography'")
    page.click("#dialog [type=submit]")
    page.wait("document.getElementById('talk-name').textContent === 'Geography'")
    page.set("talk-search", "geo")
    assert page.text(".talk-row .name") == "Geography"
    assert page.text("#usage").startswith("Talks: 2, ")
    page.click("#delete-all")
    page.wait("document.getElementById('dialog').open")
    assert page.text("#dialog h2") == "Delete all 2 talks?"
    page.click("#dialog [type=submit]")
    page.wait("!document.querySelector('.talk-row')")


def test_pushing_to_talk_and_the_keyboard(page: Views, service: WebService) -> None:
    staged = Staged()
    service.chat = staged
    page.click("#push-to-talk")
    page.start()
    assert page.shown("#hold")
    assert not page.shown("#mute")
    page.talk_until("0:03")
    assert max(float(np.abs(frame).max()) for frame in staged.heard[5:]) < 1e-3, "not held, not heard"
    count = len(staged.heard)
    page.run("document.activeElement.blur()")
    page.key(" ", up=False)
    page.wait("hold.classList.contains('held')")
    page.wait("document.getElementById('clock').textContent >= '0:09'", 20.0)
    page.key(" ", down=False)
    assert not page.run("hold.classList.contains('held')")
    assert max(float(np.abs(frame).max()) for frame in staged.heard[count:]) > 0.05
    page.key("e")
    page.ended()
    page.click("#after-new")
    page.click("#push-to-talk")
    page.click("#shortcuts")
    page.start()
    page.run("document.activeElement.blur()")
    page.key("m")
    assert page.run("mute.getAttribute('aria-pressed')") == "false", "they can be switched off"
    page.end()


def test_a_sample_of_a_voice_is_made_once(page: Views, service: WebService) -> None:
    service.chat, before = Staged(unprompted=True), len(service.chats)
    page.click("#hear-NATM1")
    page.wait("document.getElementById('hear-NATM1').title === 'Stop NATM1'")
    page.wait("document.getElementById('hear-NATM1').title === 'Hear NATM1'", 30.0)
    assert not page.shown("#notice-sample")
    (chat,) = service.chats[before:]
    assert chat["voice_prompt"] == "NATM1"
    page.click("#hear-NATM1")
    page.wait("document.getElementById('hear-NATM1').title === 'Hear NATM1'", 30.0)
    assert len(service.chats) == before + 1, "the second time it comes from the browser"


@pytest.mark.parametrize("record", ["allowed", "always", "off"])
def test_being_recorded_is_a_choice_and_a_mark(page: Views, service: WebService, record: str) -> None:
    async def tell(socket: Any) -> None:
        recorded = record == "always" or socket.query.get("record") == "1"
        await Staged(details={**DETAILS, **({"recorded": True} if recorded else {})})(socket)

    service.chat, service.info = tell, {**INFO, "record": record}
    page.load()
    assert page.shown("#record-field") == (record == "allowed")
    assert page.shown("#always-recorded") == (record == "always")
    if record == "allowed":
        page.click("#record")
    page.start()
    page.wait(f"document.getElementById('recorded').hidden === {json.dumps(record == 'off')}")
    page.end()
    assert not page.shown("#recorded")


def test_without_webcodecs_the_fallback_is_fetched(speaker: Any, service: WebService) -> None:
    flags = (f"--use-file-for-fake-audio-capture={speaker}%noloop", "--lang=en")
    with Chromium(flags=flags) as browser:
        names = ("AudioEncoder", "AudioDecoder", "AudioData", "EncodedAudioChunk")
        gone = "".join(f"delete window.{name};" for name in names)
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=gone)
        staged = Staged()
        service.chat, service.info, service.refusal = staged, dict(INFO), ""
        page = Views(browser, service.url)
        page.fresh()
        page.start()
        page.talk_until("0:08")
        page.end()
        page.listen()
        agent, user = exported(page)
        check = sound(USER)[SAMPLE_RATE : round(USER[0].end * SAMPLE_RATE)]
        assert likeness(check, np.concatenate(staged.heard))[1] > 0.6
        assert likeness(check, user)[1] > 0.6
        said = sound(AGENT)[3 * SAMPLE_RATE : round(AGENT[0].end * SAMPLE_RATE)]
        assert likeness(said, agent)[1] > 0.5
        assert any("encoderWorker" in address for address in browser.requests)
        assert browser.console == []


def test_with_webcodecs_it_is_not(page: Views, service: WebService) -> None:
    page.start()
    page.talk_until("0:01")
    page.end()
    assert not any("vendor" in address for address in page.browser.requests)
