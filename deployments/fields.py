"""The settings, each with its type, its bounds, its default and its description; nothing else.

Where their values come from, how text becomes a value and which values go together is `settings.Settings`.
Units are part of the names: `_s` seconds, `_ms` milliseconds. The descriptions are docs/settings.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import NoDecode

from personaplex.config import BURST_S, FRAME_SECONDS, REBUILD_AUDIO_S

SLOTS_LIMIT = 512

Resources = dict[str, float]
WordList = Annotated[tuple[str, ...], NoDecode]  # `a,b` or a JSON array: read by Settings
SecretList = Annotated[tuple[SecretStr, ...], NoDecode]


class Fields(BaseModel):
    """What can be set. `Settings` adds the rules."""

    # Model
    model: str = Field(
        "auto",
        description="auto (7b when CUDA and weights are there, else talk if its scores are good enough, else "
        "tiny), 7b, talk, tiny, echo (no model: returns "
        "the caller's audio), simulated (echo with the timing of step_times), or a directory that holds a "
        "checkpoint.",
    )
    step_times: Path | None = Field(None, description="Step-time table of the simulated model (JSON).")
    hf_repo: str = Field("nvidia/personaplex-7b-v1", description="Hugging Face repository of the weights.")
    hf_revision: str = Field("main", description="Revision of hf_repo: branch, tag or commit.")
    moshi_weight: Path | None = Field(None, description="Language model weights; replaces the repository's.")
    mimi_weight: Path | None = Field(None, description="Codec weights; replaces the repository's.")
    tokenizer: Path | None = Field(None, description="Text tokenizer model; replaces the repository's.")
    voice_prompt_dir: Path | None = Field(None, description="Directory of voices; replaces the repository's.")
    lora: Path | None = Field(
        None,
        description="Adapter (LoRA) of personaplex.finetune, merged into the weights it was trained on; on "
        "any others it is refused.",
    )
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
    failover_after_s: float = Field(
        1.5,
        gt=0,
        description="A replica that owes a session an answer for this long is silent: another one is looked "
        "for. At most a third of stall_limit_s.",
    )
    rebuild_audio_s: float = Field(
        REBUILD_AUDIO_S,
        ge=FRAME_SECONDS,
        le=300,
        description="Seconds of the user's sound that gateways keep of each session, 96 kB each, and that a "
        "replica runs to go on with it.",
    )
    rebuild_windows: int = Field(
        4,
        ge=1,
        description="Context windows of a conversation that a replica runs to go on with it; what fits into "
        "them is rebuilt exactly.",
    )
    rebuilds: int = Field(
        16, ge=1, description="Sessions one replica rebuilds at once; of more the shortest come first."
    )
    rebuild_share: float = Field(
        0.9, gt=0, le=1, description="Share of its time a replica spends on rebuilds beside live sessions."
    )
    resume_grace_s: float = Field(
        30.0,
        ge=0,
        le=600,
        description="How long a session is kept whose client or gateway was lost, for the client to come "
        "back to; it holds no slot meanwhile. 0 keeps none.",
    )
    drain_limit_s: float | None = Field(
        None,
        ge=0,
        description="How long a replica that goes waits for sessions that find no room elsewhere. Then it is "
        "stopped, and they go on where there is room next, within queue_timeout_s, or end. A gateway that "
        "goes is stopped queue_timeout_s later: who cannot come back loses the session. Unset is as long "
        "as sessions last.",
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
    media_tls: Literal["off", "own", "files"] = Field(
        "off",
        description="TLS 1.3 between gateways and replicas: own makes certificates itself, files takes "
        "tls.crt, tls.key and ca.crt in media_tls_dir. Both ends prove who they are with or without it.",
    )
    media_tls_dir: Path | None = Field(
        None, description="Directory of the certificate for media_tls=files, on gateways and replicas."
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

    # Protocols beside /api/chat: see docs/protocols
    protocols: WordList = Field(
        ("live", "realtime"),
        description="Protocols served beside chat: live and realtime (OpenAI's), twilio, telnyx, asterisk.",
    )
    voice_aliases: dict[str, str] = Field(
        default_factory=dict,
        description='Further names of voices, as {"their name": "our voice"}; they come before the built-in '
        "ones, which stand for every voice of OpenAI's.",
    )
    speech_dbfs: float = Field(
        -45.0,
        ge=-90,
        le=0,
        description="realtime: the agent speaks in a frame that is louder than this, or that brings text.",
    )
    pause_s: float = Field(
        0.8, ge=0.08, le=10, description="realtime: a pause of the agent so long ends a response."
    )
    barge_in: Literal["model", "client"] = Field(
        "model",
        description="realtime: model tells clients of their user's speech only while the agent is silent, "
        "since they stop playing at it and the model yields by itself; client tells them at once.",
    )
    public_url: str = Field(
        "",
        pattern=r"^(https?://[^/?#\s]+)?$",
        description="The service's address as telephone carriers reach it, such as https://talk.example.org; "
        "twilio needs it.",
    )
    twilio_token_file: Path | None = Field(
        None, description="File with the auth token of the Twilio account; twilio needs it."
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

    # Transcription of the user's speech: see docs/transcription.md
    transcription: Literal["off", "on"] = Field(
        "off",
        description="on: what users say is read by Whisper on CPUs, for clients that ask and for records. "
        "Clients are told.",
    )
    transcription_model: str = Field(
        "",
        description="Whisper model: a name that faster-whisper knows or downloads (base.en, small, ...), or "
        "a directory; empty is the embedded tiny.en.",
    )
    transcription_language: str = Field(
        "en",
        pattern=r"^[a-z]{0,3}$",
        description="Language that users speak, as Whisper's code; empty has each piece recognised.",
    )
    transcription_backlog_s: float = Field(
        30.0,
        gt=0,
        description="Speech that one gateway lets wait for a transcriber, and for how long; beyond it the "
        "oldest is dropped, counted, and its client told.",
    )
    transcribers_min: int = Field(1, ge=0, description="Fewest transcribers.")
    transcribers_max: int = Field(1, ge=1, description="Most transcribers.")
    transcriber_num_cpus: float = Field(
        1.0, gt=0, description="Ray CPUs of a transcriber, and its threads, rounded up."
    )
    transcriber_resources: Resources = Field(
        default_factory=dict, description='Custom Ray resources of a transcriber, as {"name": amount}.'
    )

    # Access
    api_keys: SecretList = Field((), description="Keys that open a session; unset: anyone may connect.")
    api_keys_file: Path | None = Field(
        None,
        description="File of further keys, one a line with options; read again when it changes: see "
        "docs/access.md.",
    )
    admin_keys_file: Path | None = Field(
        None,
        description="File of operators' keys, one a line, for /api/admin: see docs/resume.md. They open no "
        "session, and unset there is no such address.",
    )
    revoke_ends_sessions: bool = Field(
        False, description="End the running sessions of a key that is taken out of api_keys_file."
    )
    allowed_origins: WordList = Field(
        (),
        description="Browser origins that may connect, such as https://example.org; unset allows all.",
    )
    own_voices: bool = Field(
        False,
        description="Callers may upload a recording and talk to its voice; a key's own_voices comes first: "
        "see docs/access.md.",
    )
    own_voice_ttl_s: float = Field(
        3_600.0, gt=0, description="How long an uploaded voice is kept for sessions that have not begun."
    )
    sessions_per_key: int = Field(
        0,
        ge=0,
        description="Sessions one key may hold over all gateways, waiting ones included, unless its line "
        "in api_keys_file says otherwise; 0 is no limit.",
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
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
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
