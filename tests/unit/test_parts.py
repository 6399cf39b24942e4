"""Each deployment is made with its own part of the settings, and a change of the rest leaves it alone."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from ray import cloudpickle
from ray.serve.deployment import Application

from deployments.application import build
from deployments.settings import Settings

BASE: dict[str, Any] = {
    "model": "echo",
    "sessions_per_address": 4,
    "replicas_max": 2,
    "gateways_max": 2,
    "media_port_min": 40_000,
    "media_port_max": 40_100,
    "record_dir": Path("first"),
    "public_url": "https://first.example.org",
    "twilio_token_file": Path("first"),
    "transcription": "on",
    "transcribers_max": 2,
}
GATEWAY: dict[str, Any] = {
    "queue_limit": 7,
    "failover_after_s": 0.7,
    "idle_limit_s": 7.0,
    "first_audio_s": 7.0,
    "gateways_min": 2,
    "gateways_max": 3,
    "sessions_per_gateway": 7,
    "gateway_num_cpus": 0.5,
    "gateway_resources": {"gateway": 1.0},
    "static": "none",
    "token_log_dir": Path("logs"),
    "api_keys": (SecretStr("key"),),
    "api_keys_file": Path("keys"),
    "admin_keys_file": Path("admin"),
    "allowed_origins": ("https://example.org",),
    "sessions_per_key": 7,
    "revoke_ends_sessions": True,
    "own_voices": True,
    "own_voice_ttl_s": 7.0,
    "sessions_per_address": 7,
    "unlimited_networks": ("10.0.0.0/8",),
    "trusted_proxies": 2,
    "content_security_policy": "",
    "hsts_s": 7,
    "query_limit_bytes": 7_000,
    "metrics_page": True,
    "tracing": True,
    "protocols": ("live", "twilio"),
    "voice_aliases": {"marin": "NATF3"},
    "speech_dbfs": -50.0,
    "pause_s": 1.0,
    "barge_in": "client",
    "public_url": "https://talk.example.org",
    "twilio_token_file": Path("token"),
    "record": "allowed",
    "record_dir": Path("records"),
    "record_keep_days": 7.0,
    "record_keep_bytes": 7,
    "record_upload": "s3://bucket/records",
    "transcription_backlog_s": 7.0,
}
TRANSCRIBER: dict[str, Any] = {
    "transcription_model": "small",
    "transcription_language": "de",
    "transcribers_min": 2,
    "transcriber_num_cpus": 2.0,
    "transcriber_resources": {"words": 1.0},
}
REPLICA: dict[str, Any] = {
    "model": "tiny",
    "hf_repo": "someone/else",
    "hf_revision": "v2",
    "moshi_weight": Path("lm"),
    "mimi_weight": Path("codec"),
    "tokenizer": Path("tokenizer"),
    "voice_prompt_dir": Path("voices"),
    "lora": Path("adapter"),
    "device": "cpu",
    "dtype": "float32",
    "weights": "int8",
    "kv": "int8",
    "graphs": False,
    "voice_memory": "host",
    "cpu_offload": True,
    "slots": 7,
    "low_latency": True,
    "replicas_min": 2,
    "replicas_max": 3,
    "replicas_initial": 2,
    "replica_num_cpus": 2.0,
    "replica_num_gpus": 0.5,
    "replica_resources": {"card": 1.0},
    "placement": "spread",
    "load_timeout_s": 7.0,
    "gather_ms": 7.0,
    "rebuild_windows": 7,
    "rebuilds": 7,
    "rebuild_share": 0.7,
    "spare_slots": 7,
    "media_host": "192.0.2.1",
    "media_port_min": 40_001,
    "media_port_max": 40_101,
}
BOTH: dict[str, Any] = {
    "session_limit_s": 7.0,
    "queue_timeout_s": 7.0,  # how long a process that is removed waits
    "drain_limit_s": 7.0,
    "stall_limit_s": 70.0,
    "burst_s": 7.0,
    "rebuild_audio_s": 7.0,
    "prompt_tokens": 7,
    "resume_grace_s": 7.0,
    "lease_timeout_s": 7.0,
    "media_tls": "own",
    "media_tls_dir": Path("tls"),
}
ALL: dict[str, Any] = {
    "target_utilisation": 0.5,
    "upscale_delay_s": 7.0,
    "downscale_delay_s": 7.0,
    "autoscaling_lookback_s": 70.0,
    "log_level": "debug",
    "log_format": "json",
}
BESIDE = {"transcription", "transcribers_max"}  # tested below
ELSEWHERE = {"route_prefix", "step_times"}  # the application's; only with model=simulated


def made_with(**changed: Any) -> dict[str, Any]:
    """All that Serve compares of each deployment, by its name."""
    found: dict[str, Any] = {}

    def visit(application: Application) -> None:
        deployment = application._bound_deployment
        found[deployment.name] = (
            [pickle.dumps(one) for one in deployment.init_args if not isinstance(one, Application)],
            deployment._deployment_config.model_dump(),
            deployment._replica_config.ray_actor_options,
        )
        for one in deployment.init_args:
            if isinstance(one, Application):
                visit(one)

    visit(build(Settings(**{**BASE, **changed})))
    return found


@pytest.fixture(scope="module", autouse=True)
def one_router() -> Iterator[None]:
    """Serve pickles the router's class by value for each deployment; here it is always the same one."""
    pickled, whole = cache(cloudpickle.dumps), cloudpickle.dumps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloudpickle, "dumps", lambda one: (pickled if isinstance(one, type) else whole)(one))
        yield


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    return made_with()


@pytest.mark.parametrize(
    ("name", "deployments"),
    [
        *((name, {"gateway"}) for name in GATEWAY),
        *((name, {"replica"}) for name in REPLICA),
        *((name, {"transcriber"}) for name in TRANSCRIBER),
        *((name, {"gateway", "replica"}) for name in BOTH),
        *((name, {"gateway", "replica", "transcriber"}) for name in ALL),
    ],
)
def test_a_setting_changes_the_deployments_that_read_it_and_no_other(
    name: str, deployments: set[str], before: dict[str, Any]
) -> None:
    after = made_with(**{name: {**GATEWAY, **REPLICA, **TRANSCRIBER, **BOTH, **ALL}[name]})
    assert {one for one in before if before[one] != after[one]} == deployments


def test_the_same_settings_make_the_same_deployments(before: dict[str, Any]) -> None:
    assert made_with() == before


def test_every_setting_is_some_deployments() -> None:
    named = {*GATEWAY, *REPLICA, *TRANSCRIBER, *BOTH, *ALL, *BESIDE, *ELSEWHERE}
    assert named == set(Settings.model_fields)


def test_transcription_changes_no_replica(before: dict[str, Any]) -> None:
    after = made_with(transcription="off")
    assert set(before) - set(after) == {"transcriber"}
    assert before["replica"] == after["replica"]
    more = made_with(transcribers_max=3)
    assert {one for one in before if before[one] != more[one]} == {"gateway", "transcriber"}
