"""Agent frameworks and SDKs that speak OpenAI's protocols, unmodified, against a real gateway: part of
`make test-clients`. Each runs in an environment of its own.

The agent speaks by script, two utterances with a pause between them, while the user murmurs over the first.
A client passes when it heard every frame of them sample for sample, has one message with the whole text of
each, and was not interrupted; and when, at a full service, it makes at most ATTEMPTS attempts and ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from protocol_service import SILENCE, ProtocolService, utterance

from personaplex.config import FRAME_SIZE, Pcm

HERE = Path(__file__).parent
KEY = "sk-clients"
ATTEMPTS = 4
UTTERANCES = (
    (15, 40, (" Good", " morning,", " what", " would", " you", " like?")),
    (62, 80, (" Still", " there?")),
)
OPENAI = ("openai[realtime]==3.57.0", "numpy")
AGENTS = ("openai-agents==0.24.0", "websockets>=13,<16", "numpy")
LIVEKIT = ("livekit-agents==1.8.9", "livekit-plugins-openai==1.8.9", "numpy")
PIPECAT = ("pipecat-ai[openai,websocket]==1.14.0", "uvicorn", "numpy")


@dataclasses.dataclass(frozen=True)
class Framework:
    """`environment` is the folder of what pip installs; several clients share one."""

    name: str
    what: str
    environment: str
    packages: tuple[str, ...]


FRAMEWORKS = (
    Framework("openai-live", "`client.live`", "openai", OPENAI),
    Framework("openai-realtime", "`client.realtime`", "openai", OPENAI),
    Framework("openai-beta", "`client.beta.realtime`", "openai", OPENAI),
    Framework("openai-agents", "`RealtimeRunner`", "agents", AGENTS),
    Framework("livekit-live", "`AgentSession` with `GPTLiveModel`", "livekit-openai", LIVEKIT),
    Framework("livekit-realtime", "`AgentSession` with `RealtimeModel`", "livekit-openai", LIVEKIT),
    Framework("pipecat-live", "a pipeline with `OpenAILiveLLMService`", "pipecat", PIPECAT),
    Framework("pipecat-realtime", "a pipeline with `OpenAIRealtimeLLMService`", "pipecat", PIPECAT),
)


def agent(number: int, heard: Pcm) -> tuple[Pcm, str]:
    for first, end, words in UTTERANCES:
        if first <= number < end:
            place, phase = divmod(number - first, 3)
            return utterance(number), words[place] if phase == 0 and place < len(words) else ""
    return SILENCE, ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    client: str
    version: str
    what: str
    frames: int  # heard sample for sample
    messages: tuple[str, ...]
    interrupted: bool
    attempts: int  # at a full service
    error: str = ""

    @property
    def passed(self) -> bool:
        texts = tuple("".join(words).strip() for _, _, words in UTTERANCES)
        whole = self.frames == sum(end - first for first, end, _ in UTTERANCES)
        told = tuple(" ".join(text.split()) for text in self.messages) == texts
        return whole and told and not self.interrupted and 1 <= self.attempts <= ATTEMPTS


def frames_heard(audio: bytes) -> int:
    """How many of the script's frames are in `audio`, whole and in order."""
    at = found = 0
    for first, end, _ in UTTERANCES:
        for number in range(first, end):
            place = audio.find((utterance(number) * 32_768).astype("<i2").tobytes(), at)
            if place >= 0:
                found, at = found + 1, place + 2 * FRAME_SIZE
    return found


def run(python: Path, framework: Framework, base: str, folder: Path, timeout_s: float) -> dict[str, object]:
    result = folder / f"{framework.name}.json"
    result.unlink(missing_ok=True)
    command = [str(python), str(HERE / "framework.py"), framework.name, base, KEY, str(result)]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, env=bare
        )
    except subprocess.TimeoutExpired:
        return {"error": f"still running after {timeout_s:g} s"}
    if not result.exists():
        return {"error": (done.stderr.strip().splitlines() or ["no result"])[-1][:200]}
    return dict(json.loads(result.read_text()))


def verdicts(environment: Callable[[str, tuple[str, ...]], Path], names: Sequence[str]) -> list[Verdict]:
    """Of the frameworks called so. `environment` makes the Python for a folder's name and its packages."""
    chosen = [one for one in FRAMEWORKS if one.name in names]
    pythons = {one.name: environment(one.environment, one.packages) for one in chosen}
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ProtocolService(agent, slots=8, api_keys=KEY, sessions_per_address=0) as service:
            heard = {one.name: run(pythons[one.name], one, service.base, folder, 90) for one in chosen}
        attempts = {}
        for one in chosen:
            with ProtocolService(agent, slots=0, queue_limit=0, api_keys=KEY) as full:
                run(pythons[one.name], one, full.base, folder, 90)
                attempts[one.name] = round(
                    sum(
                        n
                        for key, n in full.metrics.totals.items()
                        if key[0] == "personaplex_sessions_refused"
                    )
                )
    for one in chosen:
        told = heard[one.name]
        audio = bytes.fromhex(str(told.get("audio", "")))
        messages = told.get("messages", ())
        assert isinstance(messages, (list, tuple))
        found.append(
            Verdict(
                one.name,
                str(told.get("version", "?")),
                one.what,
                frames_heard(audio),
                tuple(map(str, messages)),
                bool(told.get("interrupted", True)),
                attempts[one.name],
                str(told.get("error", "")),
            )
        )
    return found


def table(found: list[Verdict]) -> str:
    total = sum(end - first for first, end, _ in UTTERANCES)
    lines = [
        f"| client | version | what ran | frames of {total} | messages | attempts when full | |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        result = "passes" if one.passed else f"**fails**: {one.error or _why(one)}"
        cells = (one.client, one.version, one.what, one.frames, len(one.messages), one.attempts, result)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _why(one: Verdict) -> str:
    return "interrupted" if one.interrupted else f"messages {one.messages}"
