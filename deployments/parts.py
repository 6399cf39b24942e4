"""The part of the settings that each deployment gets: the values it reads, under their own names.

What a deployment was made with says what it depends on: a value that a replica does not read is not in its
part, and the other way round. Serve makes no use of that: it has one code version for all of an application,
so any change replaces every deployment (docs/resume.md).

Derived values (`gather_s`, `address_limit`) are in a part as what they came to. What depends on the process
(keys in a file, HAProxy's environment) is left to the process: `gateway.keys`, `settings.proxies_in_front`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import SecretStr

from deployments.addresses import Network
from deployments.settings import Settings
from personaplex.config import EngineConfig

P = TypeVar("P", bound="_Part")


@dataclass(frozen=True)
class _Part:
    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["text", "json"]

    @classmethod
    def of(cls: type[P], settings: Settings) -> P:
        """This part of `settings`."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class GatewaySettings(_Part):
    """What a gateway reads; see `Settings` for each."""

    burst_frames: int
    stall_limit_s: float
    lease_timeout_s: float
    resume_grace_s: float
    rebuild_audio_s: float
    media_tls: Literal["off", "own", "files"]
    media_tls_dir: Path | None
    queue_limit: int
    queue_timeout_s: float
    failover_after_s: float
    session_limit_s: float
    idle_limit_s: float
    first_audio_s: float
    burst_s: float
    sessions_per_gateway: int
    api_keys: tuple[SecretStr, ...]
    api_keys_file: Path | None
    admin_keys_file: Path | None
    guarded: bool
    allowed_origins: tuple[str, ...]
    sessions_per_key: int
    revoke_ends_sessions: bool
    own_voices: bool
    own_voice_ttl_s: float
    prompt_tokens: int
    address_limit: int
    unlimited: tuple[Network, ...]
    trusted_proxies: int | None
    query_limit_bytes: int
    static: str
    content_security_policy: str
    hsts_s: int
    token_log_dir: Path | None
    metrics_page: bool
    tracing: bool
    protocols: tuple[str, ...]
    voice_aliases: dict[str, str]
    speech_dbfs: float
    pause_s: float
    barge_in: Literal["model", "client"]
    public_url: str
    twilio_token_file: Path | None
    record: Literal["off", "allowed", "always"]
    record_dir: Path | None
    record_keep_days: float
    record_keep_bytes: int
    record_upload: str
    transcription: Literal["off", "on"]
    transcription_backlog_s: float
    transcribers_max: int


@dataclass(frozen=True)
class ReplicaSettings(_Part):
    """What a replica reads; see `Settings` for each."""

    burst_frames: int
    stall_limit_s: float
    lease_timeout_s: float
    resume_grace_s: float
    rebuild_audio_s: float
    media_tls: Literal["off", "own", "files"]
    media_tls_dir: Path | None
    model: str
    step_times: Path | None
    hf_repo: str
    hf_revision: str
    moshi_weight: Path | None
    mimi_weight: Path | None
    tokenizer: Path | None
    voice_prompt_dir: Path | None
    lora: Path | None
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16"]
    weights: Literal["auto", "int8"]
    kv: Literal["auto", "int8"]
    cpu_offload: bool
    slots: int
    prompt_tokens: int
    engine_config: EngineConfig
    gather_s: float
    rebuild_share: float
    replica_num_cpus: float
    load_timeout_s: float
    media_host: str
    media_port_min: int
    media_port_max: int


@dataclass(frozen=True)
class TranscriberSettings(_Part):
    """What a transcriber reads; see `Settings` for each."""

    transcription_model: str
    transcription_language: str
    transcriber_num_cpus: float
