"""Where settings come from and which go together; the only file that reads environment variables.

Contract: one flat, frozen model of what `fields` declares. A value comes from, first to last: an argument
(`serve run deployments:build slots=8`, `args:` in a Serve config, a flag of `python -m personaplex.server`),
a `PERSONAPLEX_<NAME>` environment variable, the default of the field. Unknown keys and unknown
`PERSONAPLEX_*` variables are refused. Lists and maps are JSON in the environment; lists of keys, origins and
networks may also be comma-separated. Knows no Ray and no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from deployments.addresses import Network, network
from deployments.fields import Fields
from personaplex.config import EngineConfig, frames_in
from personaplex.errors import ConfigError
from personaplex.persona import voice_name

ENV_PREFIX = "PERSONAPLEX_"
AUTO = "auto"
CLOSE_MARGIN_S = 5.0  # for the close of the last session of a drain
LEAST_PER_ADDRESS = 2  # sessions: a caller, and the one it is about to replace

HAPROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"  # Serve's own
PROXY_CALLBACK = "PERSONAPLEX_PROXY_CALLBACK"  # not a setting: what Ray's processes were given, for gateways

# Kubernetes adds these to every pod when a Service is called "personaplex" (or "personaplex-..."); no field
# may have such a name.
_SERVICE_LINK = re.compile(r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)")

PROTOCOLS = ("live", "realtime", "twilio", "telnyx", "asterisk")  # beside chat, which is always served

_PORTS = {"http": 80, "https": 443}


class Settings(BaseSettings, Fields):
    """Settings of one application; raises pydantic's ValidationError, or ConfigError through `load`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    @field_validator("api_keys", "allowed_origins", "unlimited_networks", "protocols", mode="before")
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

    @field_validator("protocols")
    @classmethod
    def _check_protocols(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(PROTOCOLS))
        if unknown:
            raise ValueError(f"there is no protocol {', '.join(unknown)}; there are {', '.join(PROTOCOLS)}")
        return value

    @field_validator("voice_aliases")
    @classmethod
    def _check_voices(cls, value: dict[str, str]) -> dict[str, str]:
        for voice in value.values():
            voice_name(voice)
        return value

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
        if "twilio" in self.protocols and not (self.public_url and self.twilio_token_file):
            raise ValueError("twilio needs public_url and twilio_token_file")
        if self.record != "off" and self.record_dir is None:
            raise ValueError("record needs record_dir")
        if self.media_tls == "files" and self.media_tls_dir is None:
            raise ValueError("media_tls=files needs media_tls_dir")
        if self.stall_limit_s < 3 * self.failover_after_s:
            raise ValueError("stall_limit_s is less than three times failover_after_s")
        if self.replicas_max < self.replicas_min:
            raise ValueError("replicas_max is less than replicas_min")
        if (
            self.replicas_initial is not None
            and not self.replicas_min <= self.replicas_initial <= self.replicas_max
        ):
            raise ValueError("replicas_initial is not between replicas_min and replicas_max")
        if self.gateways_max < self.gateways_min:
            raise ValueError("gateways_max is less than gateways_min")
        if self.transcribers_max < self.transcribers_min:
            raise ValueError("transcribers_max is less than transcribers_min")
        if self.media_port_max < self.media_port_min:
            raise ValueError("media_port_max is less than media_port_min")
        if self.media_port_min == 0 and self.media_port_max != 0:
            raise ValueError("media_port_max needs media_port_min")
        return self

    @property
    def drain_timeout_s(self) -> float:
        """How long a gateway that is being removed waits for its sessions: the longest session, its wait for
        a slot and a margin for its close; or until sessions that were at a replica which goes too have found
        another one, or none."""
        longest = self.session_limit_s + self.queue_timeout_s + CLOSE_MARGIN_S
        if self.drain_limit_s is None:
            return longest
        return min(longest, self.drain_limit_s + self.queue_timeout_s + CLOSE_MARGIN_S)

    @property
    def replica_drain_timeout_s(self) -> float:
        """The same for a replica."""
        if self.drain_limit_s is None:
            return self.drain_timeout_s
        return min(self.drain_timeout_s, self.drain_limit_s)

    @property
    def engine_config(self) -> EngineConfig:
        """The configuration of a replica's engine."""
        return EngineConfig(
            slots=self.slots,
            kv=self.kv,
            graphs=self.graphs,
            prompt_tokens=self.prompt_tokens,
            voice_memory=self.voice_memory,
            rebuilds=self.rebuilds,
            rebuild_windows=self.rebuild_windows,
            rebuild_audio_s=self.rebuild_audio_s,
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
