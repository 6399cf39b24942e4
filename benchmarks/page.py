"""The web page in a browser: how long after a sound is made it is heard, and whether a long talk stays small.

    PYTHONPATH=tests python -m benchmarks.page [--seconds 40] [--minutes 10] [--output FILE]

A headless Chromium talks with the echo engine; chirps from a wav file are its microphone. The page's own
record has both sides on the clock of its audio device, so a chirp's delay is read from the stereo file it
saves: everything between microphone and loudspeaker but the devices. Beside it, in the same run, a probe of
`benchmarks.mouth_to_ear` measures the service with pages of the same length and a player without a buffer.
Then one talk of `--minutes`: memory after each minute, and the underruns.

Where PulseAudio is installed the browser plays through that, else at the pace of a timer (`loudspeaker`).
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
import soxr
from chromium import Chromium
from loudspeaker import can_sound, loudspeaker
from views import Views

from benchmarks.live import service
from benchmarks.machine import machine, publish
from benchmarks.mouth_to_ear import CLEAR, LONGEST_S, Pcm, Probe, chirps
from loadtest.target import address
from personaplex.config import SAMPLE_RATE

RATE = 48_000
CLOCK = "clock.textContent.split(':').reduce((sum, part) => 60 * sum + Number(part), 0)"  # seconds
PLAIN = ("echo", "noise", "gain")  # what a browser does to speech, which would disturb chirps


def delays(heard: Pcm, spoken: Pcm, kinds: list[Pcm], count: int) -> list[float]:
    """Milliseconds from each chirp in `spoken` to the same in `heard`, float32 [samples] at SAMPLE_RATE.

    `kinds` come in turn, `count` of them; those that are not clear on both sides are left out.
    """
    found = []
    at = 0
    for number in range(count):
        kind = kinds[number % len(kinds)]
        start = locate(spoken[at : at + 2 * SAMPLE_RATE], kind)
        if start is None:
            continue
        at += start
        back = locate(heard[at : at + round(LONGEST_S * SAMPLE_RATE)], kind)
        if back is not None:
            found.append(1e3 * back / SAMPLE_RATE)
        at += len(kind)
    return found


def locate(part: Pcm, chirp: Pcm) -> int | None:
    """Where `chirp` begins in `part`; None where it is not clear."""
    if len(part) < len(chirp):
        return None
    energy = np.convolve(part**2, np.ones(len(chirp)), "valid")
    scores = np.correlate(part, chirp, "valid") / np.sqrt(energy * (chirp**2).sum() + 1e-9)
    best = int(scores.argmax())
    return best if scores[best] > CLEAR else None


def talk(browser: Chromium, base: str, seconds: float) -> tuple[Pcm, dict[str, Any]]:
    """The stereo sound at SAMPLE_RATE that the page saves of one talk, and what it says of its timing."""
    page = Views(browser, f"{base}/")
    page.fresh()
    for name in PLAIN:
        page.click(f"#{name}")
    page.start()
    buffers = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1.0)
        shown = page.text("#figure-buffer").split()  # "93 ms", or a dash
        buffers += [int(shown[0])] if len(shown) == 2 else []
    page.end()
    page.listen()
    page.click("#export-wav")
    pcm, rate = soundfile.read(browser.downloaded(".wav", 60.0), dtype="float32", always_2d=True)
    summary = page.run(
        "import('./store/history.js').then(({ openHistory }) => openHistory())"
        ".then((history) => history.talks()).then(([talk]) => talk.timing)"
    )
    return soxr.resample(pcm, rate, SAMPLE_RATE), {**summary, "buffer_p50_ms": float(np.median(buffers))}


def mouth_to_ear(base: str, seconds: float, sound: Mapping[str, str]) -> dict[str, Any]:
    recording, kinds, starts = chirps(seconds, 7)
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "chirps.wav"
        soundfile.write(wav, soxr.resample(recording, SAMPLE_RATE, RATE), RATE, subtype="PCM_16")
        flags = (f"--use-file-for-fake-audio-capture={wav}%noloop", "--lang=en")
        with Chromium(loudspeaker=sound, flags=flags) as browser:
            pcm, timing = talk(browser, base, seconds - 2.0)
    agent, user = pcm.T
    found = delays(agent, user, kinds, len(starts))
    probe = Probe(address(base), seconds, 7)
    probe.join()
    service_ms = probe.delays()
    figures = {
        "chirps": len(starts),
        "page_found": len(found),
        "page_p50_ms": round(float(np.median(found)), 1),
        "page_p95_ms": round(float(np.percentile(found, 95)), 1),
        "service_found": len(service_ms),
        "service_p50_ms": round(float(np.median(service_ms)), 1),
        **timing,
    }
    figures["above_service_p50_ms"] = round(figures["page_p50_ms"] - figures["service_p50_ms"], 1)
    figures["above_buffer_p50_ms"] = round(figures["above_service_p50_ms"] - figures["buffer_p50_ms"], 1)
    return figures


def long_talk(base: str, minutes: float, sound: Mapping[str, str]) -> dict[str, Any]:
    """Memory of one talk after each minute, or each half of a short one: of scripts (after a collection) and
    of the page's process."""
    times, heaps, processes = [], [], []
    total_s = 60 * minutes
    step_s = min(60.0, total_s / 2)
    with Chromium(loudspeaker=sound, flags=("--lang=en",)) as browser:
        page = Views(browser, f"{base}/")
        page.fresh()
        page.start()
        for number in range(1, round(total_s / step_s) + 1):
            page.wait(f"{CLOCK} >= {number * step_s:g}", step_s + 30.0)
            browser.call("HeapProfiler.collectGarbage")
            times.append(number * step_s)
            heaps.append(round(browser.call("Runtime.getHeapUsage")["usedSize"] / 1e6, 2))
            processes.append(round(renderer(browser) / 1e6, 1))
        underruns = page.text("#figure-underruns")
        page.end()
    return {"at_s": times, "heap_mb": heaps, "process_mb": processes, "underruns": underruns}


def renderer(browser: Chromium) -> int:
    """Resident bytes of the largest of the browser's page processes."""
    children = psutil.Process(browser.pid).children(recursive=True)
    pages = [child for child in children if "--type=renderer" in child.cmdline()]
    return max(child.memory_info().rss for child in pages)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of chirps")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the long talk; 0 for none")
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    with contextlib.ExitStack() as held:
        sound = held.enter_context(loudspeaker()) if can_sound() else {}
        settings = {"slots": 8, "replica_num_cpus": 0.1, "gateway_num_cpus": 0.1}
        base = held.enter_context(service("echo", settings))
        time.sleep(3.0)  # HAProxy learns of the service
        result = {
            "benchmark": "page",
            "machine": machine("ray", "websockets"),
            "loudspeaker": "PulseAudio" if sound else "timer",
            "mouth_to_ear": mouth_to_ear(base, options.seconds, sound),
            **({"long_talk": long_talk(base, options.minutes, sound)} if options.minutes else {}),
        }
    publish(result, options.output)


if __name__ == "__main__":
    main()
