"""The capacity planner: the service's own policies in simulated time, against formulas and by hand."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.policy import Candidate, rank
from deployments.settings import Settings
from k8s import inplace
from loadtest import arrivals, continuity, plan
from loadtest.arrivals import Arrival
from loadtest.autoscaler import Autoscaler, History
from loadtest.continuity import Peak, log_bytes, talked_s
from loadtest.failures import Failures, Measured, fit
from loadtest.fleet import SimulatedFleet, SimulatedReplica
from loadtest.forecast import Forecast, Timing
from loadtest.planner import Goals, Prices, erlang_c, fewest_gpus, make
from loadtest.simulation import Simulation
from personaplex.engine.simulated import VOICE_POSITIONS, prompt_positions
from personaplex.engine.steptimes import StepTimes
from personaplex.errors import ConfigError
from personaplex.persona import PROMPTS

EXAMPLE = Path(__file__).parents[2] / "benchmarks" / "results" / "steps-example.json"
TEXT = prompt_positions(PROMPTS["assistant"].text)


@pytest.fixture(autouse=True)
def no_sleeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may wait for a clock on a wall."""

    def refuse(seconds: float) -> None:
        raise AssertionError("slept")

    monkeypatch.setattr(time, "sleep", refuse)


@pytest.fixture
def steps() -> StepTimes:
    return StepTimes.load(EXAMPLE)


def settings(**values: Any) -> Settings:
    return Settings.load({"slots": 2, "replicas_min": 1, "queue_timeout_s": 10.0, **values})


def calls(*times: tuple[float, float]) -> list[Arrival]:
    """Sessions by moment and length."""
    return [Arrival(n, at, length, "NATF2", "assistant", n) for n, (at, length) in enumerate(times)]


def simulate(sessions: list[Arrival], chosen: Settings, steps: StepTimes, **timing: float) -> Forecast:
    return Simulation(sessions, chosen, steps, Timing(**timing)).run()


# Replicas that die


def fail(sessions: list[Arrival], steps: StepTimes, *at: float, seed: int = 1, **values: Any) -> Forecast:
    failures = Failures(at=at, seed=seed, noticed_s=0.1, rebuild_s=0.5, rebuild_per_s=0.01)
    chosen = settings(**values)
    return Simulation(sessions, chosen, steps, Timing(startup_s=20.0), failures=failures).run()


def test_sessions_of_a_dead_replica_go_on_the_shortest_first(steps: StepTimes) -> None:
    sessions = calls(*((float(at), 100.0) for at in (0, 10, 20, 30)))
    runs = [
        fail(sessions, steps, 60.0, seed=seed, slots=4, replicas_min=2, replicas_max=2) for seed in range(6)
    ]
    assert all((seen.deaths, seen.lost) == (1, 0) for seen in runs)
    hit = [seen for seen in runs if seen.gaps]  # all of them are on one replica: the other one died in some
    rebuilds = np.cumsum([0.5 + 0.01 * (60.0 - at) for at in (30, 20, 10, 0)])
    assert 0 < len(hit) < len(runs)
    for seen in hit:
        assert seen.gaps == pytest.approx(0.1 + rebuilds, abs=0.1)


def test_without_a_slot_they_wait_for_the_replica_that_comes_instead(steps: StepTimes) -> None:
    patient = fail(calls((0, 100.0), (1, 100.0)), steps, 50.0, replicas_max=1, queue_timeout_s=30.0)
    assert (patient.lost, len(patient.gaps)) == (0, 2)
    assert patient.gaps[0] == pytest.approx(20.0 + 0.5 + 0.01 * 48, abs=0.1)
    assert patient.figures()["failover_gap_p95_s"] == max(patient.gaps)
    short = fail(calls((0, 100.0), (1, 55.0)), steps, 50.0, replicas_max=1, queue_timeout_s=10.0)
    assert (short.lost, len(short.gaps)) == (1, 0)  # the other one had ended by then


def test_spare_slots_save_the_sessions_of_a_dead_replica(steps: StepTimes) -> None:
    """And a plan whose goal is that none is lost is met only with them."""
    pieces = arrivals.profile("600@0.2")
    sessions = arrivals.draw(pieces, arrivals.lengths("exponential:60"), 1, longest_s=300.0)
    failures = Failures(at=tuple(range(60, 600, 60)))

    def planned(spare: int) -> Any:
        values = {"slots": 4, "queue_timeout_s": 5.0, "spare_slots": spare}
        goals, timing = Goals(5.0, 1.0, 0.0), Timing(startup_s=20.0)
        return make(
            sessions,
            *(pieces, values, steps, timing, goals, Prices()),
            tick_limit_s=0.064,
            gpus=40,
            failures=failures,
        )

    none, some = planned(0), planned(8)
    assert none.forecast.deaths == some.forecast.deaths == 9
    assert (none.forecast.lost > 0, none.met) == (True, False)
    assert (some.forecast.lost, some.met) == (0, True)


def test_a_mean_time_is_kept(steps: StepTimes) -> None:
    sessions = calls(*((float(at), 1.0) for at in range(0, 100_000, 500)))
    failures = Failures(mtbf_s=5_000.0)
    chosen = settings(replicas_min=4, replicas_max=4, replicas_initial=4)
    seen = Simulation(sessions, chosen, steps, Timing(startup_s=1.0), failures=failures).run()
    assert seen.deaths == pytest.approx(4 * 100_000 / 5_000, rel=0.3)


def test_gaps_are_fitted_death_by_death() -> None:
    talks = [[5.0, 80.0, 20.0], [40.0], [10.0, 15.0]]
    deaths = [
        [Measured(talk, 0.1 + 0.3 * place + 0.02 * sum(sorted(hit)[:place]))
         for place, talk in enumerate(sorted(hit), start=1)]
        for hit in talks
    ]  # fmt: skip
    assert fit(deaths) == pytest.approx((0.1, 0.3, 0.02))
    assert min(fit([[Measured(5.0, 0.9), Measured(10.0, 0.5)]])) == 0.0
    with pytest.raises(ValueError, match="no session"):
        fit([[]])


# Queue, slots and prompts


def test_a_lone_session_waits_for_its_prompt_and_a_known_voice_less(steps: StepTimes) -> None:
    forecast = simulate(calls((1.0, 10.0), (30.0, 10.0)), settings(), steps, grant_s=0.5)
    first, second = forecast.sessions
    assert first.ready_s == pytest.approx(0.5 + steps.prefill(VOICE_POSITIONS) + steps.prefill(TEXT))
    assert second.ready_s == pytest.approx(0.5 + steps.prefill(TEXT))
    assert forecast.live_seconds == pytest.approx(20.0)


def test_a_third_session_on_two_slots_waits_until_one_leaves(steps: StepTimes) -> None:
    chosen = settings(slots=2)
    timing = {"grant_s": 0.0, "close_s": 0.5, "handover_s": 0.25}
    forecast = simulate(calls((0.0, 5.0), (0.0, 20.0), (1.0, 5.0)), chosen, steps, **timing)
    third = forecast.sessions[2]
    assert (third.waited, third.refused) == (True, False)
    free = 1.1 + 5.0 + 0.5  # handshake, conversation, close
    prompt = steps.prefill(TEXT) + steps.tick(1, VOICE_POSITIONS + 12.5 * (free - 1.1))
    assert third.ready_s == pytest.approx(free - 1.0 + 0.25 + prompt)


def test_who_waits_too_long_or_finds_the_queue_full_is_refused(steps: StepTimes) -> None:
    chosen = settings(slots=1, queue_limit=1, queue_timeout_s=10.0)
    forecast = simulate(calls((0.0, 60.0), (1.0, 5.0), (2.0, 5.0), (12.0, 5.0)), chosen, steps)
    assert [one.refused for one in forecast.sessions] == [False, True, True, True]
    assert [one.waited for one in forecast.sessions] == [False, True, False, True]
    figures = forecast.figures()
    assert (figures["refused_share"], figures["queued"]) == (0.75, 2)


def test_the_queue_is_first_come_first_served_even_when_a_slot_is_free_at_once(steps: StepTimes) -> None:
    chosen = settings(slots=1, queue_timeout_s=100.0)
    forecast = simulate(calls((0.0, 5.0), (1.0, 5.0), (2.0, 5.0), (3.0, 5.0)), chosen, steps)
    ready = [one.arrival.at_s + (one.ready_s or 0.0) for one in forecast.sessions]
    assert ready == sorted(ready)


def test_no_session_outlasts_the_services_limit(steps: StepTimes) -> None:
    forecast = simulate(calls((0.0, 900.0)), settings(session_limit_s=60.0), steps)
    assert forecast.live_seconds == pytest.approx(60.0)


# Against what queueing theory knows


def test_erlangs_formula_on_known_values() -> None:
    assert erlang_c(1, 0.5) == pytest.approx(0.5)  # one server: the share of time it is busy
    assert erlang_c(10, 8.0) == pytest.approx(0.409, abs=5e-4)  # from printed tables
    assert erlang_c(4, 4.0) == 1.0
    assert 0 < erlang_c(64_000, 63_000.0) < 1e-3


def test_the_simulation_waits_as_erlang_says(steps: StepTimes) -> None:
    drawn = arrivals.draw(arrivals.profile("100000@0.07"), arrivals.lengths("exponential:100"), seed=11)
    chosen = settings(slots=10, queue_limit=10_000, queue_timeout_s=10_000.0)
    timing = {"grant_s": 0.0, "handover_s": 0.0, "close_s": 0.0, "control_s": 100.0}
    forecast = simulate(drawn, chosen, steps, **timing)
    waited = [sum(one.ready_s > limit for one in forecast.sessions if one.ready_s) for limit in (0.3, 20.0)]
    load = forecast.live_seconds / 100_000
    held = forecast.live_seconds / len(drawn)
    for count, limit in zip(waited, (0.0, 20.0), strict=True):
        expected = erlang_c(10, load) * math.exp(-(10 - load) / held * limit)
        assert count / len(drawn) == pytest.approx(expected, rel=0.15)


# Placement


@pytest.mark.parametrize("placement", ["pack", "spread"])
def test_the_fleet_chooses_as_the_policy_does_over_all_replicas(placement: str) -> None:
    fleet, chance = SimulatedFleet(3, placement), np.random.default_rng(1)
    for number in range(9):
        fleet.add(SimulatedReplica(f"{number:02d}", 0.0))
    held: list[SimulatedReplica] = []
    for _ in range(400):
        voice = f"voice{chance.integers(40)}"
        if held and chance.random() < 0.5:
            fleet.leave(held.pop(int(chance.integers(len(held)))))
            continue
        everybody = [
            Candidate(one.key, one.sessions, 3, not one.draining, frozenset(one.voices))
            for one in fleet.replicas.values()
        ]
        ranked = rank(everybody, voice, placement)
        found = fleet.place(voice)
        assert (found[0].key if found else None) == (ranked[0].key if ranked else None)
        if found:
            assert found[1] == (voice in ranked[0].voices)
            held.append(found[0])


def test_a_draining_replica_takes_nobody_and_goes_with_its_last_session() -> None:
    fleet = SimulatedFleet(2, "pack")
    for key in ("0", "1"):
        fleet.add(SimulatedReplica(key, 0.0))
    first, _ = fleet.place("NATF0") or pytest.fail("no room")
    assert [one.key for one in fleet.drain(1)] == ["1"]  # the newest, and empty: gone at once
    assert list(fleet.replicas) == ["0"]
    fleet.drain(1)
    assert fleet.place("NATF0") is None
    fleet.leave(first)
    assert not fleet.replicas


# Scaling


def test_an_average_of_steps_is_exact() -> None:
    history = History()
    history.set(2.0, 4.0)
    history.set(6.0, 1.0)
    assert history.mean(0.0, 8.0) == pytest.approx((0 * 2 + 4 * 4 + 1 * 2) / 8)
    assert history.mean(5.0, 7.0) == pytest.approx(2.5)


def scaler(**values: Any) -> Autoscaler:
    chosen = {"slots": 10, "replicas_max": 5, "target_utilisation": 0.8, "autoscaling_lookback_s": 10.5}
    return Autoscaler(settings(**{**chosen, **values}), push_s=1.0)


def test_replicas_are_added_once_the_wish_has_lasted_and_not_before() -> None:
    chosen, load = scaler(upscale_delay_s=3.0), History()
    load.set(0.0, 30.0)
    targets = [chosen.decide(float(now), load, 1) for now in range(1, 5)]
    assert targets == [1, 1, 1, 4]  # 30 sessions / (10 slots * 0.8)


def test_a_wish_that_pauses_starts_again() -> None:
    chosen, load = scaler(upscale_delay_s=3.0, autoscaling_lookback_s=10.1), History()
    load.set(0.0, 30.0)
    assert [chosen.decide(float(now), load, 1) for now in (1, 2)] == [1, 1]
    assert chosen.decide(3.0, load, 4) == 4  # nothing to wish for
    assert [chosen.decide(float(now), load, 1) for now in (4, 5, 6, 7)] == [1, 1, 1, 4]


def test_bounds_hold_both_ways() -> None:
    load = History()
    load.set(0.0, 300.0)
    assert scaler(upscale_delay_s=0.0).decide(5.0, load, 2) == 5
    assert scaler(downscale_delay_s=0.0, replicas_min=2).decide(5.0, History(), 4) == 2


def test_the_load_is_known_only_as_of_the_last_report() -> None:
    chosen = Autoscaler(settings(slots=10, replicas_max=5, upscale_delay_s=0.0), push_s=10.0)
    load = History()
    load.set(1.0, 40.0)
    assert chosen.decide(9.0, load, 1) == 1
    assert chosen.decide(10.0, load, 1) > 1


def test_a_fleet_grows_under_load_and_shrinks_behind_it(steps: StepTimes) -> None:
    drawn = arrivals.draw(arrivals.profile("600@0.02,600@1,1800@0.02"), arrivals.lengths("exponential:60"), 2)
    chosen = settings(
        slots=16, replicas_max=8, queue_timeout_s=120.0, downscale_delay_s=60.0, autoscaling_lookback_s=30.0
    )
    forecast = simulate(drawn, chosen, steps, startup_s=30.0)
    assert forecast.replicas[0] == 1
    assert forecast.figures()["peak_replicas"] == pytest.approx(6, abs=1)  # about 60 sessions / 12.8
    assert forecast.replicas[-1] <= 2
    assert len(forecast.asked) >= 4
    assert forecast.replica_seconds < 8 * forecast.seconds
    assert all(one.refused or one.ready_s is not None for one in forecast.sessions)


def test_a_slow_start_makes_people_wait_longer(steps: StepTimes) -> None:
    drawn = arrivals.draw(arrivals.profile("300@0.1,300@1"), arrivals.lengths("exponential:60"), 2)
    chosen = settings(slots=8, replicas_max=12, queue_limit=500, queue_timeout_s=300.0)
    quick, slow = (simulate(drawn, chosen, steps, startup_s=startup).figures() for startup in (10.0, 90.0))
    assert (slow["ready_mean_s"] or 0.0) > 1.5 * (quick["ready_mean_s"] or 0.0)


# Plans


def test_a_plan_is_the_smallest_fleet_that_meets_its_goals(steps: StepTimes) -> None:
    pieces = arrivals.profile("1800@0.5")
    drawn = arrivals.draw(pieces, arrivals.lengths("exponential:120"), 4)
    values = {"slots": 8, "downscale_delay_s": 600.0, "target_utilisation": 0.9}
    asked = (drawn, pieces, values, steps, Timing(startup_s=30.0), Goals(2.0, 0.01), Prices(3.6, 0.1))
    made = make(*asked, tick_limit_s=0.064)
    assert made.met
    most = made.settings.replicas_max
    assert abs(most - fewest_gpus(60.0, 120.0, 8, 2.0)) <= 2
    assert not make(*asked, tick_limit_s=0.064, gpus=most - 1).met
    figures = made.forecast.figures()
    hours = made.gateways * made.forecast.seconds / 3_600
    cost = 3.6 * (figures["replica_hours"] or 0) + 0.1 * hours
    assert made.costs["cost"] == pytest.approx(cost)
    assert made.costs["cost_per_session_hour"] == pytest.approx(cost / (figures["session_hours"] or 1))


def test_users_that_are_transcribed_need_cores(steps: StepTimes) -> None:
    pieces = arrivals.profile("60@0.2")
    drawn = arrivals.draw(pieces, arrivals.lengths("fixed:30"), 4)
    rest = (steps, Timing(), Goals(), Prices(0.0, 1.0))
    off, on = (
        make(drawn, pieces, {"transcription": which, "target_utilisation": 0.5}, *rest, tick_limit_s=0.02)
        for which in ("off", "on")
    )
    assert off.transcriber_cores == 0
    assert on.transcriber_cores == pytest.approx(max(on.forecast.held) * 2 * 0.45 * 0.35, rel=0.2)
    more = (on.costs["cost"] or 0) - (off.costs["cost"] or 0)
    assert more == pytest.approx(on.transcriber_cores * on.forecast.seconds / 3_600)
    names = [name for name, _ in plan.rows(on)]
    assert "transcriber cores per 100 sessions" in names
    assert not any("transcriber" in name for name, _ in plan.rows(off))
    assert on.data()["transcriber_cores"] == on.transcriber_cores


def test_slots_come_from_the_table_unless_they_are_set(steps: StepTimes) -> None:
    pieces = arrivals.profile("60@0.2")
    drawn = arrivals.draw(pieces, arrivals.lengths("fixed:30"), 4)
    rest = (steps, Timing(), Goals(), Prices())
    found = make(drawn, pieces, {}, *rest, tick_limit_s=0.02).settings.slots
    assert found == steps.most_sessions(3_000, 0.02)
    assert make(drawn, pieces, {"slots": 5}, *rest, tick_limit_s=0.02).settings.slots == 5
    with pytest.raises(ConfigError, match="quick enough"):
        make(drawn, pieces, {}, *rest, tick_limit_s=0.001)
    with pytest.raises(ConfigError, match="ends at 64"):
        make(drawn, pieces, {"slots": 65}, *rest, tick_limit_s=0.02)


def test_a_thousand_gpus_and_a_hundred_thousand_sessions_are_planned(steps: StepTimes) -> None:
    """A slice of such a day: the policies see a thousand replicas; the whole is a matter of minutes."""
    chosen = settings(slots=64, replicas_min=1_000, replicas_max=1_000, placement="spread")
    drawn = arrivals.draw(arrivals.profile("2@2000"), arrivals.lengths("exponential:20"), 5)
    forecast = simulate(drawn, chosen, steps)
    assert forecast.figures()["refused"] == 0
    assert max(forecast.held) > 3_500


def test_the_command_plans_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plan"
    asked = ["--arrivals", "600@0.5", "--lengths", "exponential:60", "--steps", str(EXAMPLE)]
    code = plan.main([*asked, "--gpu-hour", "3", "--set", "slots=16", "--output", str(output)])
    printed = capsys.readouterr().out
    data = json.loads(output.with_suffix(".json").read_text())
    assert code == 0
    assert "steps-example (derived)" in printed
    assert data["steps"]["source"] == "derived"
    assert data["settings"]["slots"] == 16
    assert data["forecast"]["offered"] == pytest.approx(300, abs=70)
    page = output.with_suffix(".html").read_text()
    assert page.count("<svg") == 3
    assert "Nothing here was measured" in page


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--set", "slots"], "NAME=VALUE"),
        (["--set", "colour=red"], "colour"),
        (["--arrivals", "1@0"], "no session arrives"),
    ):
        assert plan.main(["--steps", str(EXAMPLE), *arguments]) == 1
        assert words in capsys.readouterr().err


def test_the_command_fails_when_the_goals_cannot_be_met() -> None:
    asked = ["--arrivals", "300@2", "--lengths", "exponential:60", "--steps", str(EXAMPLE)]
    assert plan.main([*asked, "--set", "slots=4", "--gpus", "2"]) == 1


def test_a_session_that_is_met_has_talked_for_half_its_length_and_long_ones_are_met_more_often() -> None:
    assert talked_s(calls((0, 100), (1, 100)), 1_800.0) == 50.0
    assert talked_s(calls((0, 100), (1, 300)), 1_800.0) == pytest.approx((100**2 + 300**2) / 2 / 400)
    assert talked_s(calls((0, 9_000)), 1_800.0) == 900.0, "no session is longer than the limit"
    drawn = np.random.default_rng(3)
    lengths = drawn.exponential(60.0, 20_000)
    met = drawn.choice(lengths, 20_000, p=lengths / lengths.sum()) * drawn.uniform(size=20_000)
    known = talked_s(calls(*enumerate(lengths.tolist())), math.inf)
    assert known == pytest.approx(met.mean(), rel=0.03), "as drawing sessions at random moments does"


def test_a_log_has_the_last_of_the_users_sound_and_all_tokens() -> None:
    chosen = settings(rebuild_audio_s=20.0)
    assert log_bytes(chosen, 10.0) == 10 * 96_000 + 125 * 70
    assert log_bytes(chosen, 100.0) == 20 * 96_000 + 1_250 * 70


def test_a_rollout_needs_room_for_the_replicas_that_stop_at_a_time() -> None:
    """Ten GPUs of 4 slots: two stop at a time, and what they held has to fit on the other eight."""
    failures = Failures(rebuild_s=0.5, rebuild_per_s=0.01)

    def needs(sessions: int, gpus: int = 10) -> dict[str, float | None]:
        peak = Peak(sessions, gpus, 2, talk_s=100.0)
        found = continuity.figures(settings(slots=4), peak, failures, startup_s=60.0, cuts_per_hour=0.0)
        return {name: value for name, value in found.items() if name.startswith("rollout")}

    rebuild = 0.5 + 0.01 * 100
    assert needs(32) == {
        "rollout_gpus_needed": 10,
        "rollout_gpus_missing": 0,
        "rollout_s": 5 * (60 + 1 * rebuild),  # 6.4 sessions come to eight replicas
    }
    assert needs(33) == {"rollout_gpus_needed": 11, "rollout_gpus_missing": 1, "rollout_s": None}
    assert needs(1, gpus=1) == {"rollout_gpus_needed": 2, "rollout_gpus_missing": 1, "rollout_s": None}
    assert needs(4, gpus=2)["rollout_s"] == 2 * (60 + 2 * rebuild)


def test_lost_connections_take_memory_and_a_lost_gateway_takes_rebuilds() -> None:
    failures = Failures(rebuild_s=0.5, rebuild_per_s=0.01)
    peak = Peak(sessions=40, replicas=10, gateways=2, talk_s=100.0)

    def found(cuts: float, peak: Peak = peak, **values: Any) -> dict[str, Any]:
        return dict(continuity.figures(settings(**values), peak, failures, 60.0, cuts))

    often = found(6.0, slots=4, resume_grace_s=30.0)
    assert often["detached_most"] == pytest.approx(40 * 6 / 120)
    size = often["detached_log_mb"]
    assert size == pytest.approx(2.0075)
    assert often["detached_gateway_mb"] == pytest.approx(size)
    assert often["detached_replica_mb"] == pytest.approx(size / 5)
    assert (often["gateway_loss_sessions"], often["gateway_loss_forgotten"]) == (20, 0)
    assert often["gateway_loss_rebuilt_s"] == 2 * 1.5, "two at each replica"
    assert found(0.0)["detached_most"] == 0.0
    crowded = found(0.0, Peak(500, 10, 1, 100.0), slots=50)
    assert crowded["gateway_loss_forgotten"] == 0, "twice its slots"
    assert found(0.0, Peak(500, 10, 1, 100.0), slots=2)["gateway_loss_forgotten"] == 340
    never = found(6.0, resume_grace_s=0.0)
    assert never["detached_most"] == 0.0
    assert "gateway_loss_rebuilt_s" not in never, "nobody can come back"


def test_the_plan_tells_what_sessions_outlive(steps: StepTimes, tmp_path: Path) -> None:
    command = ["--steps", str(EXAMPLE), "--arrivals", "300@0.3", "--lengths", "fixed:60", "--gpus", "3"]
    made = plan.run(plan.parse([*command, "--set", "slots=8", "--cuts-per-hour", "12"]))
    told = dict(plan.rows(made))
    assert {"rollout_s", "rollout_gpus_missing", "detached_most", "gateway_loss_sessions"} <= set(told)
    data = made.data()["continuity"]
    held = made.forecast.figures()["peak_held"]
    assert held is not None
    assert data["detached_most"] == pytest.approx(held * 12 / 3_600 * 30)
    assert data["gateway_loss_sessions"] == math.ceil(held / made.gateways)


def test_planner_and_operators_tool_know_the_same_of_serve() -> None:
    """The tool runs where the service is not installed, so neither imports the other."""
    assert continuity.ROLLING_SHARE == inplace.BATCH
