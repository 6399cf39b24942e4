"""The configuration of a `/v1/realtime` session: read from the client's updates, told back as it came to be.

Unknown fields are ignored, as clients of every version send some. What the model cannot do is refused when it
is asked for by name (tools, answers in text) and told back as it is otherwise (`transcription`: null). Once
the agent's prompt is in the model, it is what it is: equal values stay welcome, others are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from deployments.gateway.protocols.openai_events import (
    check_role,
    name_of,
    number_of,
    object_of,
    refuse,
    role_with,
    text_of,
)
from deployments.gateway.protocols.realtime_dialect import Dialect
from deployments.gateway.protocols.voices import our_voice
from personaplex.audio.pcm import PcmFormat
from personaplex.errors import UnknownVoice
from personaplex.persona import Persona

PCM, MU_LAW, A_LAW = PcmFormat("pcm16", 24_000), PcmFormat("mulaw", 8_000), PcmFormat("alaw", 8_000)
_GA_FORMATS = {"audio/pcm": PCM, "audio/pcmu": MU_LAW, "audio/pcma": A_LAW}
_BETA_FORMATS = {"pcm16": PCM, "g711_ulaw": MU_LAW, "g711_alaw": A_LAW}
_EAGERNESS = ("auto", "low", "medium", "high")


@dataclasses.dataclass(frozen=True)
class TurnDetection:
    """Whether and how the client is told that its user speaks; the model listens all the time."""

    kind: Literal["server_vad", "semantic_vad"] = "server_vad"
    silence_ms: int = 500
    threshold: float = 0.5
    prefix_ms: int = 300
    eagerness: str = "auto"

    def shown(self) -> dict[str, Any]:
        answers = {"create_response": True, "interrupt_response": False}
        if self.kind == "semantic_vad":
            return {"type": self.kind, "eagerness": self.eagerness, **answers}
        times = {"prefix_padding_ms": self.prefix_ms, "silence_duration_ms": self.silence_ms}
        return {"type": self.kind, "threshold": self.threshold, **times, **answers}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """`voice_name` is the voice in the client's words, `persona.voice` in ours."""

    persona: Persona
    voice_name: str
    model: str = ""
    heard: PcmFormat = PCM
    said: PcmFormat = PCM
    turn_detection: TurnDetection | None = TurnDetection()
    temperature: float = 0.8
    transcribes: bool = False  # whether the service can
    transcription: str | None = None  # the model's name, in the client's words, of one that wants it
    system: tuple[str, ...] = ()  # texts of system messages, which join the role

    @property
    def role(self) -> Persona:
        """The persona with what system messages add to it."""
        return dataclasses.replace(self.persona, text_prompt=role_with(self.persona.text_prompt, self.system))

    def updated(
        self, session: Mapping[str, Any], dialect: Dialect, voices: Mapping[str, str]
    ) -> Configuration:
        """With the fields of one `session.update`. Raises Refused, and then nothing of it counts."""
        kind = session.get("type", "realtime")
        if dialect is Dialect.GA and kind != "realtime":
            refuse("invalid_value", "sessions are of type realtime", "session.type")
        if session.get("tools"):
            refuse("tools_not_supported", "the model calls no tools", "session.tools")
        fields = _ga(session) if dialect is Dialect.GA else _beta(session)
        return self._with(fields, voices)

    def _with(self, fields: Mapping[str, Any], voices: Mapping[str, str]) -> Configuration:
        if isinstance(fields.get("modalities"), list) and "audio" not in fields["modalities"]:
            refuse("modality_not_supported", "the model answers in audio, with a transcript", "modalities")
        new = self
        if fields.get("instructions") is not None:
            text = text_of(fields["instructions"], "session.instructions")
            new = dataclasses.replace(new, persona=dataclasses.replace(new.persona, text_prompt=text))
            check_role(new.role.text_prompt, "session.instructions")
        if fields.get("voice") is not None:
            new = new._with_voice(fields["voice"], voices)
        if fields.get("temperature") is not None:
            new = new._with_temperature(number_of(fields["temperature"], "session.temperature", 0.0, 2.0))
        if "turn_detection" in fields:
            new = dataclasses.replace(new, turn_detection=_turn_detection(fields["turn_detection"]))
        if self.transcribes and "transcription" in fields:
            wanted = fields["transcription"]
            name = object_of(wanted, "transcription").get("model") if wanted is not None else None
            named = name_of(name, "transcription.model") if name is not None else "default"
            new = dataclasses.replace(new, transcription=None if wanted is None else named)
        if isinstance(fields.get("model"), str):
            new = dataclasses.replace(new, model=name_of(fields["model"], "session.model"))
        heard = self.heard if fields.get("heard") is None else fields["heard"]
        said = self.said if fields.get("said") is None else fields["said"]
        return dataclasses.replace(new, heard=heard, said=said)

    def _with_voice(self, wanted: Any, voices: Mapping[str, str]) -> Configuration:
        try:
            voice = our_voice(wanted, voices)
        except UnknownVoice as error:
            refuse("unknown_voice", str(error), "session.audio.output.voice")
        name = wanted["id"] if isinstance(wanted, dict) else wanted
        return dataclasses.replace(
            self, voice_name=name, persona=dataclasses.replace(self.persona, voice=voice)
        )

    def _with_temperature(self, value: float) -> Configuration:
        sampling = dataclasses.replace(self.persona.sampling, text_temperature=value, audio_temperature=value)
        persona = dataclasses.replace(self.persona, sampling=sampling)
        return dataclasses.replace(self, temperature=value, persona=persona)

    def check_frozen(self, new: Configuration) -> None:
        """Raises Refused when `new` differs in what the model has been given."""
        if new.persona.voice != self.persona.voice:
            refuse("cannot_update_voice", "the voice is fixed for the session", "session.voice")
        if new.persona.text_prompt != self.persona.text_prompt:
            refuse(
                "instructions_immutable", "the instructions are fixed for the session", "session.instructions"
            )
        if (new.heard, new.said) != (self.heard, self.said):
            refuse("format_immutable", "the audio formats are fixed for the session", "session.audio")
        if new.persona.sampling != self.persona.sampling:
            refuse("temperature_immutable", "the temperature is fixed for the session", "session.temperature")

    # As the client is told

    def shown(self, dialect: Dialect, session_id: str, expires_at: int) -> dict[str, Any]:
        common = {
            "id": session_id,
            "object": "realtime.session",
            "expires_at": expires_at,
            "instructions": self.persona.text_prompt,
            "tools": [],
            "tool_choice": "none",
        }
        turn = None if self.turn_detection is None else self.turn_detection.shown()
        transcription = None if self.transcription is None else {"model": self.transcription}
        if dialect is Dialect.BETA:
            return {
                **common,
                "modalities": ["audio", "text"],
                "voice": self.voice_name,
                "input_audio_format": _name(_BETA_FORMATS, self.heard),
                "output_audio_format": _name(_BETA_FORMATS, self.said),
                "input_audio_transcription": transcription,
                "turn_detection": turn,
                "temperature": self.temperature,
                "max_response_output_tokens": "inf",
            }
        return {
            **common,
            "type": "realtime",
            "model": self.model,
            "output_modalities": ["audio"],
            "max_output_tokens": "inf",
            "audio": {
                "input": {
                    "format": _shown(self.heard),
                    "transcription": transcription,
                    "noise_reduction": None,
                    "turn_detection": turn,
                },
                "output": {"format": _shown(self.said), "voice": self.voice_name, "speed": 1.0},
            },
        }

    def in_response(self, dialect: Dialect) -> dict[str, Any]:
        """What a response repeats of it."""
        if dialect is Dialect.BETA:
            return {
                "modalities": ["audio", "text"],
                "voice": self.voice_name,
                "output_audio_format": _name(_BETA_FORMATS, self.said),
                "temperature": self.temperature,
            }
        output = {"format": _shown(self.said), "voice": self.voice_name}
        return {"output_modalities": ["audio"], "audio": {"output": output}}


def _ga(session: Mapping[str, Any]) -> dict[str, Any]:
    audio = object_of(session.get("audio"), "session.audio")
    heard = object_of(audio.get("input"), "session.audio.input")
    said = object_of(audio.get("output"), "session.audio.output")
    fields = {name: session.get(name) for name in ("instructions", "model")}
    fields["modalities"] = session.get("output_modalities")
    fields["voice"] = said.get("voice")
    fields["heard"] = _ga_format(heard.get("format"), "session.audio.input.format")
    fields["said"] = _ga_format(said.get("format"), "session.audio.output.format")
    fields.update((name, heard[name]) for name in ("turn_detection", "transcription") if name in heard)
    return fields


def _beta(session: Mapping[str, Any]) -> dict[str, Any]:
    names = ("instructions", "model", "modalities", "voice", "temperature")
    fields = {name: session.get(name) for name in names}
    fields["heard"] = _beta_format(session.get("input_audio_format"), "session.input_audio_format")
    fields["said"] = _beta_format(session.get("output_audio_format"), "session.output_audio_format")
    if "turn_detection" in session:
        fields["turn_detection"] = session["turn_detection"]
    if "input_audio_transcription" in session:
        fields["transcription"] = session["input_audio_transcription"]
    return fields


def _ga_format(value: Any, param: str) -> PcmFormat | None:
    if value is None:
        return None
    form = object_of(value, param)
    kind = form.get("type", "audio/pcm")
    known = _GA_FORMATS.get(kind) if isinstance(kind, str) else None
    if known is None or form.get("rate", known.rate) not in (None, known.rate):
        refuse("unsupported_format", "formats are audio/pcm at 24000, audio/pcmu and audio/pcma", param)
    return known


def _beta_format(value: Any, param: str) -> PcmFormat | None:
    if value is None:
        return None
    known = _BETA_FORMATS.get(value) if isinstance(value, str) else None
    if known is None:
        refuse("unsupported_format", "formats are pcm16, g711_ulaw and g711_alaw", param)
    return known


def _turn_detection(value: Any) -> TurnDetection | None:
    if value is None:
        return None
    given = object_of(value, "turn_detection")
    default = TurnDetection()
    kind = given.get("type", default.kind)
    if kind not in ("server_vad", "semantic_vad"):
        refuse("invalid_value", "turn_detection is server_vad, semantic_vad or null", "turn_detection.type")
    eagerness = given.get("eagerness") or default.eagerness
    if eagerness not in _EAGERNESS:
        refuse("invalid_value", "eagerness is auto, low, medium or high", "turn_detection.eagerness")

    def number(name: str, otherwise: float, most: float) -> float:
        given_value = given.get(name)
        return otherwise if given_value is None else number_of(given_value, f"turn_detection.{name}", 0, most)

    return TurnDetection(
        kind=kind,
        silence_ms=round(number("silence_duration_ms", default.silence_ms, 60_000)),
        threshold=number("threshold", default.threshold, 1.0),
        prefix_ms=round(number("prefix_padding_ms", default.prefix_ms, 60_000)),
        eagerness=eagerness,
    )


def _shown(form: PcmFormat) -> dict[str, Any]:
    name = _name(_GA_FORMATS, form)
    return {"type": name, "rate": form.rate} if name == "audio/pcm" else {"type": name}


def _name(formats: Mapping[str, PcmFormat], form: PcmFormat) -> str:
    return next(name for name, known in formats.items() if known == form)
