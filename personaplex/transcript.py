"""What both sides said in one conversation: the file of the client's --transcript and offline --transcribe.

    {"session": ..., "transcription": true,
     "segments": [{"speaker": "user", "text": ..., "start_ms": ..., "end_ms": ..., "words": [...]}, ...],
     "lost": [{"start_ms": ..., "end_ms": ..., "reason": ...}, ...]}

Segments of both are in order of time, on the conversation's own clock; see docs/transcription.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from personaplex.session.moshi import USER_TEXT, USER_TEXT_LOST
from personaplex.words import Segment, as_json, from_json, segments, spelled


class Transcript:
    """Grows as the conversation goes on."""

    def __init__(self) -> None:
        self._agent: list[tuple[int, str]] = []
        self._user: list[Segment] = []
        self._lost: list[Mapping[str, Any]] = []

    def add_agent(self, frame: int, text: str) -> None:
        """Text that came with the agent's frame."""
        self._agent.append((max(0, frame), text))

    def add_user(self, segment: Segment) -> None:
        self._user.append(segment)

    def add_notice(self, data: Mapping[str, Any]) -> Segment | None:
        """Metadata of any type; what the user said, if it is that. What a service of another kind sends is
        left out."""
        if data.get("type") == USER_TEXT_LOST:
            self._lost.append({name: data.get(name) for name in ("start_ms", "end_ms", "reason")})
        if data.get("type") != USER_TEXT:
            return None
        try:
            segment = from_json(data)
        except ValueError:
            return None
        self._user.append(segment)
        return segment

    def json(self, session: Mapping[str, Any]) -> str:
        """The file; `session` is what the service said of itself."""
        agent = segments(spelled(self._agent))
        rows = [*(("user", one) for one in self._user), *(("agent", one) for one in agent)]
        rows.sort(key=lambda row: row[1].start)
        data = {
            "session": session.get("session"),
            "transcription": session.get("transcription") is True,
            "segments": [{"speaker": speaker, **as_json(segment)} for speaker, segment in rows],
            "lost": self._lost,
        }
        return json.dumps(data, ensure_ascii=False, indent=1) + "\n"
