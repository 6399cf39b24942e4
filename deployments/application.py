"""The Serve application: `deployments:app` from the environment, `deployments:build` from arguments.

    serve run deployments:app
    serve run deployments:build model=tiny slots=8
    serveConfigV2:  import_path: deployments:build   args: {model: 7b, slots: 16}

No `from __future__ import annotations` here: Serve reads the builder's annotation to make the settings.
"""

import json
import logging
import sys
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.deployment import Application

from deployments import ingress
from deployments.fleet import Fleet
from deployments.gateway.app import ServedGateway
from deployments.parts import GatewaySettings, ReplicaSettings, TranscriberSettings
from deployments.policy import SessionScaling
from deployments.replica.replica import Replica
from deployments.settings import PROXY_CALLBACK, Settings, refuse_keys_among
from deployments.transcriber import AT_ONCE, Transcriber

logger = logging.getLogger(__name__)

GATEWAY_HEADROOM = 32  # page and status requests a gateway answers beside its sessions
FLEET_CALLS = 1_000  # at once
STATS_PERIOD_S = 1.0  # how often routers read the replicas' statistics
LONGEST_RETRY_S = 0.2  # between two looks for a free slot, for whoever waits


GATEWAY_ENVIRONMENT = {
    # What the proxies got, as Ray fills it in; and the same limits for a gateway's own server (HAProxy mode).
    PROXY_CALLBACK: f"${{{ingress.VARIABLE}}}",
    ingress.VARIABLE: ingress.CALLBACK,
    # One event loop for sockets, sessions and the router: a third less CPU than Serve's three threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    **ingress.REQUEST_LINE,  # where Serve's HAProxy hands connections straight to gateways
}
# One line a session is written at its end, by the gateway; Serve's own of level INFO say that a client left.
QUIET_LOGS = {"enable_access_log": False, "log_level": "WARNING"}


def build(settings: Settings) -> Application:
    """The application for `settings`: gateways in front, replicas behind, the fleet beside them, and with
    transcription=on transcribers."""
    refuse_keys_among(sys.argv[1:])  # of `serve run deployments:build`, and of our own command
    logger.info("settings: %s", json.dumps(settings.public(), sort_keys=True))
    if not settings.guarded:
        logger.info("no API key is needed: whoever reaches this service may use it")
    slots = settings.slots * settings.replicas_max
    room = settings.sessions_per_gateway * settings.gateways_max
    if slots > room:
        logger.warning("gateways hold %d sessions at most, replicas %d: see gateways_max", room, slots)
    fleet = _fleet().bind()
    replicas = _replica(settings).bind(ReplicaSettings.of(settings), fleet)
    transcribers = None
    if settings.transcription == "on":
        transcribers = _transcriber(settings).bind(TranscriberSettings.of(settings))
    application: Application = _gateway(settings).bind(
        GatewaySettings.of(settings), replicas, fleet, transcribers
    )
    return application


def _replica(settings: Settings) -> serve.Deployment:
    scaling = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function=SessionScaling,
        policy_kwargs={
            "slots": settings.slots,
            "spare_slots": settings.spare_slots,
            "target_utilisation": settings.target_utilisation,
        },
    )
    routing: dict[str, Any] = {
        "request_router_class": "deployments.gateway.router.SessionRouter",
        "request_router_kwargs": {"placement": settings.placement},
        "request_routing_stats_period_s": STATS_PERIOD_S,
        "max_backoff_s": LONGEST_RETRY_S,
    }
    return serve.deployment(
        name="replica",
        max_ongoing_requests=settings.slots,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.replicas_min,
            max_replicas=settings.replicas_max,
            initial_replicas=settings.replicas_initial,
            target_ongoing_requests=settings.slots * settings.target_utilisation,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            look_back_period_s=settings.autoscaling_lookback_s,
            policy=scaling,
        ),
        request_router_config=RequestRouterConfig(**routing),
        ray_actor_options={
            "num_cpus": settings.replica_num_cpus,
            "num_gpus": replica_gpus(settings),
            "resources": settings.replica_resources,
        },
        graceful_shutdown_timeout_s=settings.replica_drain_timeout_s,
        logging_config=QUIET_LOGS,
        health_check_period_s=2.0,
        health_check_timeout_s=max(10.0, settings.stall_limit_s),
    )(Replica)


def _gateway(settings: Settings) -> serve.Deployment:
    return serve.deployment(
        name="gateway",
        max_ongoing_requests=settings.sessions_per_gateway + GATEWAY_HEADROOM,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.gateways_min,
            max_replicas=settings.gateways_max,
            target_ongoing_requests=settings.sessions_per_gateway * settings.target_utilisation,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            look_back_period_s=settings.autoscaling_lookback_s,
        ),
        ray_actor_options={
            "num_cpus": settings.gateway_num_cpus,
            "resources": settings.gateway_resources,
            "runtime_env": {"env_vars": GATEWAY_ENVIRONMENT},
        },
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        logging_config=QUIET_LOGS,
        health_check_period_s=2.0,  # until a dead one is replaced its clients wait to come back
    )(serve.ingress()(ServedGateway))


def _fleet() -> serve.Deployment:
    return serve.deployment(
        name="fleet",
        max_ongoing_requests=FLEET_CALLS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=1.0,
        logging_config=QUIET_LOGS,
    )(Fleet)


def _transcriber(settings: Settings) -> serve.Deployment:
    waiting: dict[str, Any] = {"max_backoff_s": LONGEST_RETRY_S}
    return serve.deployment(
        name="transcriber",
        max_ongoing_requests=AT_ONCE,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.transcribers_min,
            max_replicas=settings.transcribers_max,
            # One at a time is worked on: the mean of those waiting or worked on is utilisation and backlog.
            target_ongoing_requests=settings.target_utilisation,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            look_back_period_s=settings.autoscaling_lookback_s,
        ),
        request_router_config=RequestRouterConfig(**waiting),
        ray_actor_options={
            "num_cpus": settings.transcriber_num_cpus,
            "resources": settings.transcriber_resources,
        },
        graceful_shutdown_timeout_s=5.0,
        logging_config=QUIET_LOGS,
    )(Transcriber)


def replica_gpus(settings: Settings) -> float:
    """GPUs of a replica: as set, else 1 where the model and the cluster can use one."""
    if settings.replica_num_gpus is not None:
        return settings.replica_num_gpus
    if settings.device == "cpu" or settings.model in ("echo", "simulated", "talk", "tiny"):
        return 0.0
    if settings.device == "cuda":
        return 1.0
    return float(ray.is_initialized() and _cluster_gpus() >= 1.0)


def _cluster_gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
