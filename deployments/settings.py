"""Every setting of the service, and the only file that reads environment variables.

Contract: one flat, frozen model. A value comes from, first to last: an argument (`serve run deployments:build
slots=8`, `args:` in a Serve config, a flag of `python -m personaplex.server`), a `PERSONAPLEX_<NAME>`
environment variable, the default here. Unknown keys and unknown `PERSONAPLEX_*` variables are refused. Units
are part of the names: `_s` seconds, `_ms` milliseconds. Lists and maps are JSON in the environment; the lists
of keys and origins may also be comma-separated. Knows no Ray and no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from deployments.addresses import Network, network
from personaplex.config import BURST_S, EngineConfig, frames_in
from personaplex.errors import ConfigError
from personaplex.files import key_lines

ENV_PREFIX = "PERSONAPLEX_"
SLOTS_LIMIT = 512
AUTO = "auto"
LEAST_PER_ADDRESS = 2  # sessions: a caller, and the one it is about to replace

HAPROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"  # Serve's own
PROXY_CALLBACK = "PERSONAPLEX_PROXY_CALLBACK"  # not a setting: what Ray's processes were given, for gateways

# Kubernetes adds these to every pod when a Service is called "personaplex" (or "personaplex-..."); no field
# may have such a name.
_SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)")

_PORTS = {"http": 80, "https": 443}

Resources = dict[str, float]
WordList = Annotated[tuple[str, ...], NoDecode]
SecretList = Annotated[tuple[SecretStr, ...], NoDecode]


class Settings(BaseSettings):
    """Settings of one application; raises pydantic's ValidationError, or ConfigError through `load`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    # Model
    model: str = Field(
        "auto",
        description="auto (7b when CUDA and weights are there, else talk in packages that bring it, else "
        "tiny), 7b, talk, tiny, echo (no model: returns the caller's audio), simulated (echo with the timing of step_times), or a directory that holds a "
        "checkpoint.",
    )
    step_times: Path | None = Field(None, description="Step-time table of the simulated model (JSON).")
    hf_repo: str = Field("nvidia/personaplex-7b-v1", description="Hugging Face repository of the weights.")
    hf_revision: str = Field("main", description="Revision of hf_repo: branch, tag or commit.")
    moshi_weight: Path | None = Field(None, description="Language model weights; replaces the repository's.")
    mimi_weight: Path | None = Field(None, description="Codec weights; replaces the repository's.")
    tokenizer: Path | None = Field(None, description="Text tokenizer model; replaces the repository's.")
    voice_prompt_dir: Path | None = Field(None, description="Directory of voices; replaces the repository's.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where replicas compute.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Number type of weights and caches; auto is bfloat16 on CUDA, float32 on the CPU."
    )
    weights: Literal["auto", "int8"] = Field(
        "auto",
        description="int8 quantises the temporal transformer's weights, 6.6 GB less for 7b at some cost in "
        "quality; auto leaves them as dtype.",
    )
    kv: Literal["auto", "int8"] = Field(
        "auto",
        description="int8 halves the memory of a session's keys and values, for twice the slots and a little "
        "noise; auto keeps them as dtype.",
    )
    graphs: bool = Field(True, description="On CUDA, replay ticks as captured graphs.")
    voice_memory: Literal["device", "host"] = Field(
        "device", description="Where the prefixes of voices used last are kept: host saves GPU memory."
    )
    cpu_offload: bool = Field(False, description="Keep part of the weights in host memory; slower, smaller.")

    # Sessions
    slots: int = Field(
        4,
        ge=1,
        le=SLOTS_LIMIT,
        description="Sessions one replica holds at once; `python -m personaplex.server` also takes auto, as "
        "many as fit the GPU.",
    )
    prompt_tokens: int = Field(1_000, ge=0, le=2_500, description="Longest role text, in tokens.")
    session_limit_s: float = Field(
        1_800.0, gt=0, description="Longest session; it ends with close code 1000."
    )
    queue_limit: int = Field(
        64, ge=0, description="Sessions one gateway lets wait for a slot; 0 refuses at once."
    )
    queue_timeout_s: float = Field(60.0, gt=0, description="Longest wait for a slot, then close code 1013.")
    idle_limit_s: float = Field(
        60.0, gt=0, description="A live session that sends no audio for this long ends with close code 1000."
    )
    first_audio_s: float = Field(
        15.0, gt=0, description="As idle_limit_s, from the handshake to the first audio."
    )
    low_latency: bool = Field(
        False,
        description="Trade efficiency for delay: step each frame on arrival instead of gathering a batch.",
    )

    # Replicas
    replicas_min: int = Field(1, ge=0, description="Fewest model replicas.")
    replicas_max: int = Field(1, ge=1, description="Most model replicas.")
    replicas_initial: int | None = Field(None, ge=0, description="Replicas at start; unset is replicas_min.")
    replica_num_cpus: float = Field(1.0, ge=0, description="Ray CPUs of a replica.")
    replica_num_gpus: float | None = Field(
        None, ge=0, description="Ray GPUs of a replica; unset is 1 where device and cluster have one, else 0."
    )
    replica_resources: Resources = Field(
        default_factory=dict, description='Custom Ray resources of a replica, as {"name": amount}.'
    )
    placement: Literal["pack", "spread"] = Field(
        "pack",
        description="pack fills the busiest replica first (frees others to scale down); spread the idlest.",
    )
    load_timeout_s: float = Field(
        1_800.0, gt=0, description="Longest time a replica may take to load its weights and warm up."
    )
    stall_limit_s: float = Field(
        10.0,
        gt=0,
        description="A tick longer than this makes the replica report itself unhealthy, and a gateway or "
        "replica that stands still for longer is given up by the other. A shorter stall is a gap.",
    )
    burst_s: float = Field(
        BURST_S,
        ge=0.16,
        le=60,
        description="Longest burst of a client (long pages, a stall): all of it is answered; of what waits "
        "beyond it the oldest is dropped and counted.",
    )
    gather_ms: float = Field(
        4.0, ge=0, le=40, description="How long a tick waits for frames of other slots; 0 in low_latency."
    )

    # Autoscaling on sessions
    spare_slots: int = Field(0, ge=0, description="Free slots the autoscaler keeps ready across replicas.")
    target_utilisation: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Share of slots in use the autoscaler aims at, replicas and gateways alike.",
    )
    upscale_delay_s: float = Field(
        3.0, ge=0, description="Demand must last this long before replicas are added."
    )
    downscale_delay_s: float = Field(
        300.0, ge=0, description="Slack must last this long before a replica goes."
    )
    autoscaling_lookback_s: float = Field(
        11.0, gt=10, description="Load is averaged over this time before replicas or gateways are added."
    )

    # Media link between gateways and replicas
    media_host: str = Field(
        "",
        description="Address replicas listen on for media; empty is the node's own address in the cluster.",
    )
    media_port_min: int = Field(0, ge=0, le=65_535, description="First media port; 0 lets the system choose.")
    media_port_max: int = Field(
        0, ge=0, le=65_535, description="Last media port; unset with media_port_min 0."
    )
    lease_timeout_s: float = Field(
        5.0, gt=0, description="A slot whose gateway does not connect within this time is freed."
    )

    # Gateways
    gateways_min: int = Field(1, ge=1, description="Fewest gateways.")
    gateways_max: int = Field(1, ge=1, description="Most gateways.")
    sessions_per_gateway: int = Field(
        64, ge=1, description="Sessions one gateway holds, waiting ones included: what one core carries."
    )
    gateway_num_cpus: float = Field(1.0, ge=0, description="Ray CPUs of a gateway.")
    gateway_resources: Resources = Field(
        default_factory=dict, description='Custom Ray resources of a gateway, as {"name": amount}.'
    )
    route_prefix: str = Field("/", pattern=r"^/", description="URL prefix the application is served under.")
    static: str = Field(
        "", description="Directory of the web page; empty is the built-in page, none serves no page at all."
    )
    token_log_dir: Path | None = Field(
        None, description="Directory where each session's tokens are saved, on gateways; unset saves nothing."
    )

    # Records: see docs/records.md
    record: Literal["off", "allowed", "always"] = Field(
        "off",
        description="Records of sessions, on gateways: allowed keeps those that ask for it (record=1), "
        "always all of them. Clients are told.",
    )
    record_dir: Path | None = Field(None, description="Directory where records are kept; record needs it.")
    record_keep_days: float = Field(
        30.0, ge=0, description="Records older than this are deleted; 0 is no limit."
    )
    record_keep_bytes: int = Field(
        10 * 2**30, ge=0, description="Beyond so many bytes the oldest records are deleted; 0 is no limit."
    )
    record_upload: str = Field(
        "",
        description="Directory or URL (s3://, gs://, what fsspec knows) where records are brought after "
        "their end; record_dir then holds only what is on its way.",
    )

    # Access
    api_keys: SecretList = Field((), description="Keys that open a session; unset: anyone may connect.")
    api_keys_file: Path | None = Field(
        None, description="File of further keys, one a line; # starts a comment."
    )
    allowed_origins: WordList = Field(
        (),
        description="Browser origins that may connect, such as https://example.org; unset allows all.",
    )
    sessions_per_key: int = Field(
        0, ge=0, description="Sessions one key may hold per gateway; 0 is no limit."
    )
    sessions_per_address: int | None = Field(
        None,
        ge=0,
        description="Sessions one client address may hold per gateway, waiting ones included; unset is a "
        "quarter of the slots, shared among the gateways, and at least 2; 0 is no limit. Counts only where "
        "the client's own address is known: see trusted_proxies.",
    )
    unlimited_networks: WordList = Field(
        ("127.0.0.0/8", "::1"),
        description="Networks (CIDR) or addresses that sessions_per_address does not count; loopback unless "
        "set.",
    )
    trusted_proxies: int | None = Field(
        None,
        ge=0,
        le=8,
        description="Proxies in front that append to X-Forwarded-For, HAProxy of this service included; 0 "
        "ignores that header; unset is 1 behind personaplex-haproxy, else 0.",
    )
    content_security_policy: str = Field(
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        description="Content-Security-Policy of every page; a page of your own (static) may need another. "
        "Empty sends none.",
    )
    hsts_s: int = Field(
        0,
        ge=0,
        description="Strict-Transport-Security for this many seconds; 0 sends none, localhost never gets it.",
    )
    query_limit_bytes: int = Field(16_384, ge=1_024, description="Longest query string from a client.")

    # Observation; the fleet's metrics are Ray's and always there
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    log_format: Literal["text", "json"] = Field("text", description="json: an object a line, for collectors.")
    metrics_page: bool = Field(
        False, description="Gateways show their own series at /metrics too: for one machine without Ray's."
    )
    tracing: bool = Field(
        False, description="Gateways export a span per session by OTLP; OTEL_* variables say where to."
    )

    @field_validator("api_keys", "allowed_origins", "unlimited_networks", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Accepts `a,b` and JSON arrays, as environment variables and `serve run` arguments are text."""
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return _json_list(value)
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @field_validator("allowed_origins")
    @classmethod
    def _as_browsers_send(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_origin, origins))

    @field_validator("slots", mode="before")
    @classmethod
    def _need_a_number(cls, value: Any) -> Any:
        """The head of a cluster sees no card; `personaplex.server` replaces auto before it gets here."""
        if value == AUTO:
            raise ValueError("auto is for one machine: `python -m k8s slots --help` gives a card's number")
        return value

    @field_validator("unlimited_networks")
    @classmethod
    def _check_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            network(text)
        return value

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_variables(cls, data: Any) -> Any:
        known = {f"{ENV_PREFIX}{name.upper()}" for name in cls.model_fields} | {PROXY_CALLBACK}
        unknown = sorted(
            name
            for name in (key.upper() for key in os.environ)
            if name.startswith(ENV_PREFIX)
            and name not in known
            and not _SERVICE_LINK.fullmatch(name.removeprefix(ENV_PREFIX))
        )
        if unknown:
            raise ValueError(f"unknown environment variables: {', '.join(unknown)}")
        return data

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if (self.model == "simulated") != (self.step_times is not None):
            raise ValueError("step_times belongs to the simulated model, and the simulated model needs it")
        if self.weights == "int8" and self.cpu_offload:
            raise ValueError("weights=int8 leaves nothing for cpu_offload: choose one of the two")
        if self.record != "off" and self.record_dir is None:
            raise ValueError("record needs record_dir")
        if self.replicas_max < self.replicas_min:
            raise ValueError("replicas_max is less than replicas_min")
        if (
            self.replicas_initial is not None
            and not self.replicas_min <= self.replicas_initial <= self.replicas_max
        ):
            raise ValueError("replicas_initial is not between replicas_min and replicas_max")
        if self.gateways_max < self.gateways_min:
            raise ValueError("gateways_max is less than gateways_min")
        if self.media_port_max < self.media_port_min:
            raise ValueError("media_port_max is less than media_port_min")
        if self.media_port_min == 0 and self.media_port_max != 0:
            raise ValueError("media_port_max needs media_port_min")
        return self

    @property
    def drain_timeout_s(self) -> float:
        """How long a replica or gateway that is being removed waits for its sessions: the longest session,
        its wait for a slot and a margin for its close."""
        return self.session_limit_s + self.queue_timeout_s + 5.0

    @property
    def engine_config(self) -> EngineConfig:
        """The configuration of a replica's engine."""
        return EngineConfig(
            slots=self.slots,
            kv=self.kv,
            graphs=self.graphs,
            prompt_tokens=self.prompt_tokens,
            voice_memory=self.voice_memory,
        )

    @property
    def burst_frames(self) -> int:
        """The longest burst in frames."""
        return frames_in(self.burst_s)

    @property
    def gather_s(self) -> float:
        return 0.0 if self.low_latency else self.gather_ms / 1_000

    @property
    def address_limit(self) -> int:
        """Sessions one address may hold per gateway; 0 is no limit."""
        if self.sessions_per_address is not None:
            return self.sessions_per_address
        return max(LEAST_PER_ADDRESS, math.ceil(self.slots * self.replicas_max / 4 / self.gateways_max))

    @property
    def unlimited(self) -> tuple[Network, ...]:
        """The networks whose addresses are not counted."""
        return tuple(map(network, self.unlimited_networks))

    @property
    def guarded(self) -> bool:
        """Whether sessions need a key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    def public(self) -> dict[str, Any]:
        """All settings as plain JSON values, with the keys masked: fit for logs."""
        values: dict[str, Any] = self.model_dump(mode="json")
        values["api_keys"] = f"{len(self.api_keys)} hidden"
        return values

    def keys(self) -> tuple[str, ...]:
        """All keys that open a session. Raises ConfigError when api_keys_file is unreadable or empty."""
        return all_keys(self.api_keys, self.api_keys_file)

    @classmethod
    def wants_auto_slots(cls, values: Mapping[str, Any]) -> bool:
        """True when `values` over the environment ask for slots=auto, which `load` refuses."""
        return bool(values.get("slots", os.environ.get(f"{ENV_PREFIX}SLOTS")) == AUTO)

    @classmethod
    def load(cls, values: Mapping[str, Any] | None = None) -> Settings:
        """Settings from `values` over the environment. Raises ConfigError, which never shows a value."""
        try:
            return cls(**(values or {}))
        except ValidationError as error:
            problems = (
                f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg']}"
                for problem in error.errors(include_input=False, include_url=False)
            )
            raise ConfigError("; ".join(problems)) from error
        except SettingsError as error:  # a variable that is not JSON; names the field only
            raise ConfigError(str(error)) from error


def all_keys(api_keys: Sequence[SecretStr], api_keys_file: Path | None) -> tuple[str, ...]:
    """The keys given and those in the file. Raises ConfigError when the file is unreadable or empty."""
    keys = [key.get_secret_value() for key in api_keys]
    if api_keys_file is not None:
        try:
            keys += key_lines(api_keys_file)
        except ConfigError as error:
            raise ConfigError(f"api_keys_file: {error}") from error
    return tuple(keys)


def proxies_in_front(trusted_proxies: int | None) -> int:
    """How many entries at the end of X-Forwarded-For are our proxies' own: `trusted_proxies`, or when unset 1
    in a process behind personaplex-haproxy, else 0."""
    return int(haproxy_adds_address()) if trusted_proxies is None else trusted_proxies


def proxy_callback() -> str:
    """The import path of the function that Serve calls in its proxies; empty where there is none."""
    return os.environ.get(PROXY_CALLBACK, "")


def refuse_keys_among(arguments: Sequence[str]) -> None:
    """Raises ConfigError when a key is among a command's arguments, which the process list shows."""
    if any(re.match(r"(--?set=)?api_keys=", argument) for argument in arguments):
        raise ConfigError(
            "api_keys on the command line show in the process list: use api_keys_file or PERSONAPLEX_API_KEYS"
        )


def behind_haproxy() -> bool:
    """Whether Serve hands sockets to HAProxy, so that a gateway's peer is HAProxy."""
    return os.environ.get(HAPROXY_SWITCH) == "1"


def haproxy_adds_address() -> bool:
    """Whether that HAProxy is started by `personaplex-haproxy`, which makes it append to X-Forwarded-For."""
    return behind_haproxy() and Path(os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH", "")).name == (
        "personaplex-haproxy"
    )


def _json_list(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError("not a JSON array") from error


def _origin(text: str) -> str:
    """An origin as browsers spell it: lower case, no slash at the end, no default port. Raises ValueError."""
    if text == "null":  # of pages without an origin, such as local files
        return text
    try:
        parts = urlsplit(text.strip())
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port
    except ValueError as error:  # UnicodeError is one
        raise ValueError(f"an origin has another form: {error}") from error
    if not parts.scheme or not host or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("an origin is SCHEME://HOST or SCHEME://HOST:PORT; leave them all out to allow any")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}" + ("" if port in (None, _PORTS.get(parts.scheme)) else f":{port}")
