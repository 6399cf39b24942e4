"""The load test itself: what it draws, what it hears, what it concludes, and a real run under Locust."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from echo_service import EchoService
from websockets.asyncio.server import ServerConnection

from loadtest import arrivals
from loadtest.arrivals import Arrival, Piece
from loadtest.caller import Caller
from loadtest.chart import chart, ticks
from loadtest.listener import Listener, percentile
from loadtest.outcome import Outcome, causes, quantile, summary
from loadtest.report import REQUIRED, Report, Threshold
from loadtest.speech import DEFAULT, Speech, new_stream
from loadtest.target import Target
from personaplex.audio.transcoder import Transcoder
from personaplex.errors import BadAudio, ConfigError
from personaplex.session.moshi import Error, Metadata, encode

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"


@pytest.fixture(scope="module")
def speech() -> Speech:
    return Speech.load([DEFAULT])


def arrival(length_s: float = 1.0, number: int = 0) -> Arrival:
    return Arrival(number, 0.0, length_s, "NATF2", "assistant", seed=7)


# Arrivals


def test_a_profile_is_read_piece_by_piece() -> None:
    pieces = arrivals.profile("60@0.5,5@8-2")
    assert pieces == (Piece(60, 0.5, 0.5), Piece(5, 8, 2))
    assert arrivals.duration(pieces) == 65


@pytest.mark.parametrize(
    "text", ["", "60", "60@", "@1", "60@a", "-1@1", "0@1", "60@-1", "60@1-2-3", "inf@1", "60@nan"]
)
def test_a_damaged_profile_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="arrivals"):
        arrivals.profile(text)


def test_arrivals_come_at_the_rate_of_the_profile_and_at_random() -> None:
    drawn = arrivals.draw(arrivals.profile("1000@2,1000@0-4"), arrivals.lengths("fixed:1"), seed=3)
    constant = [one.at_s for one in drawn if one.at_s < 1_000]
    ramp = [one.at_s - 1_000 for one in drawn if one.at_s >= 1_000]
    assert len(constant) == pytest.approx(2_000, abs=4 * 2_000**0.5)
    assert sum(at < 500 for at in ramp) == pytest.approx(500, abs=4 * 500**0.5)  # a quarter of the triangle
    gaps = [second - first for first, second in itertools.pairwise(constant)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)  # exponential, not regular
    assert [one.number for one in drawn] == list(range(len(drawn)))


def test_the_same_seed_gives_the_same_sessions_and_another_seed_others() -> None:
    pieces, length = arrivals.profile("100@1"), arrivals.lengths("exponential:30")
    assert arrivals.draw(pieces, length, 1) == arrivals.draw(pieces, length, 1)
    assert arrivals.draw(pieces, length, 1) != arrivals.draw(pieces, length, 2)


def test_voices_and_prompts_are_mixed_and_unknown_ones_refused() -> None:
    drawn = arrivals.draw(
        arrivals.profile("400@1"), arrivals.lengths("fixed:1"), 1, voices=("NATF0", "VARM4")
    )
    assert Counter(one.voice for one in drawn)["NATF0"] == pytest.approx(len(drawn) / 2, rel=0.25)
    assert len({one.prompt for one in drawn}) > 5
    with pytest.raises(ConfigError, match="no voice or prompt"):
        arrivals.draw(arrivals.profile("1@1"), arrivals.lengths("fixed:1"), 1, voices=("../x",))


@pytest.mark.parametrize(
    ("text", "mean"),
    [("fixed:20", 20), ("uniform:10:30", 20), ("exponential:20", 20), ("lognormal:20:0.5", 20)],
)
def test_lengths_have_the_mean_they_name(text: str, mean: float) -> None:
    length, chance = arrivals.lengths(text), random.Random(5)
    assert statistics.mean(length(chance) for _ in range(20_000)) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize(
    "text", ["", "fixed", "fixed:0", "fixed:x", "uniform:3:1", "normal:1", "fixed:1:2", "fixed:inf"]
)
def test_a_damaged_distribution_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="lengths"):
        arrivals.lengths(text)


def test_shares_of_all_processes_are_all_sessions_once() -> None:
    drawn = arrivals.draw(arrivals.profile("50@1"), arrivals.lengths("fixed:1"), 1)
    parts = [arrivals.share(drawn, index, 3) for index in range(3)]
    assert sorted((one for part in parts for one in part), key=lambda one: one.number) == drawn


# Hearing


def test_pages_in_time_play_without_a_gap() -> None:
    listener = Listener()
    for number in range(10):
        listener.hear(5.0 + 0.08 * number + (0.015 if number % 2 else 0.0))
    assert (listener.pages, listener.underruns, listener.first_s) == (10, 0, 5.0)
    assert listener.intervals == {95: 5, 65: 4}


def test_a_late_page_is_an_underrun_and_a_long_one_is_audible() -> None:
    listener = Listener()
    now = 0.0
    for gap in (0.0, 0.08, 0.13, 0.08, 0.30, 0.08):
        now += gap
        listener.hear(now)
    assert (listener.underruns, listener.audible) == (2, 1)
    assert listener.silence_s == pytest.approx((0.13 - 0.08 - 0.02) + (0.30 - 0.08 - 0.02))


def test_percentiles_of_a_histogram_count_its_entries() -> None:
    histogram = Counter({80: 98, 100: 1, 500: 1})
    assert [percentile(histogram, share) for share in (0.5, 0.98, 0.99, 1.0)] == [80, 80, 100, 500]
    assert percentile(Counter(), 0.5) is None


def test_speech_goes_round_in_pages_any_decoder_accepts(speech: Speech) -> None:
    muxer, transcoder = new_stream(), Transcoder()
    for page in speech.headers(muxer):
        assert transcoder.receive(page) == []
    pages = speech.pages(muxer, start=len(speech) - 3)
    heard = [frame for _ in range(10) for frame in transcoder.receive(next(pages))]
    assert len(heard) == 9  # the look-ahead keeps part of the last one back
    assert (transcoder.dropped_pages, transcoder.resyncs, transcoder.counters.concealed) == (0, 0, 0)


def test_speech_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "noise.wav").write_bytes(b"nothing")
    for name in ("noise.wav", "none.wav"):
        with pytest.raises(BadAudio, match=name):
            Speech.load([tmp_path / name])
    with pytest.raises(BadAudio, match="no speech"):
        Speech.load([])


# Sessions


def test_sessions_talk_as_long_as_they_wish_and_are_answered(speech: Speech) -> None:
    with EchoService() as service:
        callers = [Caller(Target(service.url), arrival(1.2, number), speech) for number in range(3)]
        threads = [threading.Thread(target=caller.run) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(service.requests) == 3
        assert "voice_prompt=NATF2.pt&text_prompt=You+are+a+wise" in service.requests[0]
    for caller in callers:
        one = caller.outcome
        assert (one.cause, one.live, one.queued, one.deficit) == ("", True, 2, 0)
        assert 10 <= one.sent <= 16  # fewer on a busy machine: there is no catching up
        assert one.heard >= one.sent - 2
        assert one.handshake_s is not None
        # 1.1 s by the service's clock, which starts first
        assert one.handshake_s > 1.0 > (one.ready_s or 2.0)
        assert sum(one.answers.values()) == one.heard
        # a frame is complete, and answered, with the page after it
        assert (percentile(Counter(one.answers), 0.5) or 0) >= 60


def refusing(code: int, reason: str) -> EchoService:
    async def handler(socket: ServerConnection) -> None:
        await socket.send(encode(Metadata({"type": "queue", "position": 3})))
        await socket.send(encode(Error(reason)))
        await socket.close(code, reason)

    return EchoService(handler)


@pytest.mark.parametrize(
    ("code", "cause"),
    [(1013, "NoCapacity"), (1012, "SessionLost"), (1008, "ClientError"), (1011, "EngineFault")],
)
def test_a_refusal_is_typed_by_its_close_code(speech: Speech, code: int, cause: str) -> None:
    with refusing(code, "no") as service:
        one = Caller(Target(service.url), arrival(), speech).run()
    assert (one.cause, one.code, one.live, one.queued, one.refused, one.lost) == (
        cause,
        code,
        False,
        3,
        True,
        False,
    )


def test_a_service_that_vanishes_loses_the_session(speech: Speech) -> None:
    async def handler(socket: ServerConnection) -> None:
        await socket.send(b"\x00")
        await asyncio.sleep(0.3)
        socket.transport.abort()

    with EchoService(handler) as service:
        one = Caller(Target(service.url), arrival(5.0), speech).run()
    assert (one.cause, one.code, one.live, one.lost) == ("SessionLost", 1006, True, True)
    assert one.deficit > 0


def test_nobody_there_is_a_typed_failure_too(speech: Speech) -> None:
    one = Caller(Target("ws://127.0.0.1:9/api/chat"), arrival(), speech).run()
    assert (one.cause, one.connect_s, one.refused) == ("SessionLost", None, True)


def test_text_frames_and_torn_pages_are_the_services_fault(speech: Speech) -> None:
    for data in ("text", b"\x01OggNot"):

        async def handler(socket: ServerConnection, data: str | bytes = data) -> None:
            await socket.send(b"\x00")
            await socket.send(data)
            await socket.wait_closed()

        with EchoService(handler) as service:
            one = Caller(Target(service.url), arrival(2.0), speech).run()
        assert one.cause == "ProtocolError"


# Figures


def outcome(**values: object) -> Outcome:
    good = {"live": True, "sent": 100, "heard": 99, "talked_s": 8.0, "ready_s": 0.1, "intervals": {80: 98}}
    return Outcome(**{"number": 0, "at_s": 0.0, **good, **values})  # type: ignore[arg-type]


def test_refused_sessions_stay_in_the_denominator() -> None:
    figures = summary(
        [outcome(), outcome(), outcome(live=False, cause="NoCapacity"), outcome(cause="SessionLost")]
    )
    assert figures["offered"] == 4
    assert figures["good_share"] == 0.5
    assert (figures["refused_share"], figures["lost_share"]) == (0.25, 0.25)
    assert causes([outcome(live=False, cause="NoCapacity"), outcome(cause="SessionLost"), outcome()]) == {
        "refused": {"NoCapacity": 1},
        "lost": {"SessionLost": 1},
    }


@pytest.mark.parametrize("fault", [{"heard": 90}, {"audible": 1}, {"cause": "SessionLost"}, {"live": False}])
def test_a_session_is_good_only_without_any_fault(fault: dict[str, object]) -> None:
    assert outcome().good
    assert not outcome(**fault).good


def test_figures_of_nothing_exist_and_meet_no_threshold() -> None:
    figures = summary([])
    assert figures["good_share"] is None
    assert not any(Threshold.parse(text).met(figures) for text in REQUIRED)


def test_outcomes_survive_the_way_to_the_master() -> None:
    one = outcome(intervals={80: 3, 95: 1}, answers={170: 4})
    assert Outcome.unpacked(json.loads(json.dumps(one.packed()))) == one


def test_quantiles_are_values_that_were_there() -> None:
    assert quantile([3.0, None, 1.0, 2.0], 0.5) == 2.0
    assert quantile([None], 0.5) is None


@pytest.mark.parametrize(
    "text", ["good_share", "good_share=1", "unknown>=1", "good_share>=x", "good_share>=1e"]
)
def test_a_threshold_nobody_can_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        Threshold.parse(text)


def test_a_report_says_what_was_missed_and_shows_it(tmp_path: Path) -> None:
    outcomes = [outcome(), outcome(number=1, at_s=2.0, live=False, cause="<NoCapacity>", ready_s=None)]
    report = Report(
        outcomes, [Threshold.parse("good_share>=0.9"), Threshold.parse("lost<=0")], {"host": "<x>"}
    )
    assert not report.passed
    assert report.failures == ["good_share >= 0.9: 0.5"]
    paths = report.write(tmp_path / "run")
    assert [path.name for path in paths] == ["run.json", "run.html"]
    data = json.loads(paths[0].read_text())
    assert [one["met"] for one in data["thresholds"]] == [False, True]
    assert len(data["sessions"]) == data["summary"]["offered"] == 2
    page = paths[1].read_text()
    assert page.count("<svg") == 3
    assert "&lt;NoCapacity&gt;" in page
    assert "<NoCapacity>" not in page
    assert "<x>" not in page


def test_charts_reach_to_round_numbers_and_draw_every_point() -> None:
    assert ticks(7.3) == [0, 2, 4, 6, 8]
    assert ticks(0.0) == [0.0, 1.0]
    assert ticks(1_000)[-1] == 1_000
    assert chart("x", "y", {"a": [(0, 0), (1, 5), (2, 3)]}, "dots").count("<circle") == 3
    assert chart("x", "y", {"a": []}).count("<path") == 0


# Locust


def locust(url: str, output: Path, *options: str) -> tuple[int, dict[str, object]]:
    command = [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", url),
        *("--lengths", "fixed:1", "--output", str(output), *options),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert output.with_suffix(".json").exists(), run.stderr
    return run.returncode, json.loads(output.with_suffix(".json").read_text())


def test_a_run_under_locust_with_workers_counts_every_session_once(tmp_path: Path) -> None:
    with EchoService() as service:
        code, data = locust(
            service.url,
            tmp_path / "run",
            *("--arrivals", "1@8", "--processes", "2", "--require", "good_share>=0", "lost<=0"),
        )
    numbers = [session["number"] for session in data["sessions"]]  # type: ignore[index,attr-defined]
    expected = arrivals.draw(arrivals.profile("1@8"), arrivals.lengths("fixed:1"), 1)
    assert numbers == [one.number for one in expected]
    assert all(session["live"] for session in data["sessions"])  # type: ignore[attr-defined]
    assert (code, data["passed"]) == (0, True)


def test_a_run_that_misses_a_threshold_fails_and_refusals_are_typed(tmp_path: Path) -> None:
    with refusing(1013, "full") as service:
        began = time.monotonic()
        code, data = locust(service.url, tmp_path / "run", "--arrivals", "0.5@8")
        assert time.monotonic() - began < 40
    assert (code, data["passed"]) == (1, False)
    assert list(data["causes"]["refused"]) == ["NoCapacity"]  # type: ignore[index]
    assert data["summary"]["refused_share"] == 1.0  # type: ignore[index]


def test_locust_refuses_options_that_make_no_sense(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(LOCUSTFILE),
        "--headless",
        "--host",
        "ws://127.0.0.1:9",
    ]
    run = subprocess.run([*command, "--arrivals", "soon"], capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    assert "'soon' is not SECONDS@RATE" in run.stderr
