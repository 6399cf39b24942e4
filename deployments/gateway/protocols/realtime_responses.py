"""A turnless agent's speech as responses: each is one stretch of it, with one item.

    IDLE       no response is open, nothing is sent
    WAITING    the client asked for a response; the agent has not spoken yet
    SPEAKING   the agent speaks; every frame is sent

What is left of a stretch that the client cancelled is withheld: until the next pause nothing is sent.
A frame is active when it is louder than a threshold or brings visible text. The first active frame begins a
stretch, `pause_frames` inactive ones end it; the end is told with the frame after them, since text follows
the audio of its own frame. Every response that is created is done, in the order the client's state needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from deployments.gateway.protocols.openai_events import audio_text
from deployments.gateway.protocols.realtime_dialect import Dialect, usage

WAIT_FRAMES = 50  # 4 s for the agent to speak when it is asked to

Emit = Callable[..., Iterator[str]]  # an event's GA name and fields to its message, if the dialect has it


class Phase(Enum):
    IDLE = auto()
    WAITING = auto()
    SPEAKING = auto()


@dataclass
class _Response:
    id: str
    item_id: str
    previous: str | None  # item
    metadata: dict[str, str] | None
    transcript: str = ""
    spoken: int = 0  # frames


class Responses:
    """One session's. `emit` makes messages; `describe` gives the parts of a response that come from the
    session's configuration; `keep` is told each item that is done."""

    def __init__(
        self,
        session: str,
        dialect: Dialect,
        pause_frames: int,
        emit: Emit,
        describe: Callable[[], dict[str, Any]],
        keep: Callable[[dict[str, Any]], None],
        previous: Callable[[str], str | None],
    ) -> None:
        """`previous(item_id)` puts an item at the end of the conversation and gives the one before it."""
        self.phase = Phase.IDLE
        self.heard = 0  # frames of the user since the last response
        self._session, self._dialect, self._pause = session[:20], dialect, pause_frames
        self._emit, self._describe, self._keep, self._previous = emit, describe, keep, previous
        self._count = 0
        self._response: _Response | None = None
        self._inactive = 0  # frames in a row
        self._waited = 0  # frames
        self._withheld = False
        self._unsent: bytes | None = None  # the newest frame, where no response has it
        self._blank = ""  # text without a visible character that no response has

    @property
    def open(self) -> bool:
        return self._response is not None

    def is_open(self, response_id: object) -> bool:
        return self._response is not None and response_id in (None, self._response.id)

    # From the agent

    def audio(self, page: bytes, active: bool) -> Iterator[str]:
        """One frame of the agent, in the client's format."""
        if self._inactive >= self._pause:
            yield from self._pause_over()
        self._inactive = 0 if active else self._inactive + 1
        self._unsent = None
        if self.phase is Phase.SPEAKING:
            yield from self._delta(page)
        elif active and not self._withheld:
            yield from self._begin_speech(page)
        else:
            self._unsent = None if self._withheld else page
            yield from self._wait()

    def text(self, text: str) -> Iterator[str]:
        """Text of the frame that came last."""
        visible = bool(text.strip())
        if visible:
            self._inactive = 0
        if self._withheld:
            return
        if self.phase is not Phase.SPEAKING:
            self._blank += text
            if not visible:
                self._blank = self._blank[-64:]
                return
            text, self._blank = self._blank, ""
            yield from self._begin_speech(None)
            yield from self._transcript(text)
            if self._unsent is not None:
                yield from self._delta(self._unsent)
                self._unsent = None
            return
        yield from self._transcript(text)

    # From the client and the service

    def create(self, metadata: dict[str, str] | None) -> Iterator[str]:
        """The client asks for a response; none may be open."""
        assert self._response is None
        self._waited = 0
        self.phase = Phase.WAITING
        yield from self._open(metadata)

    def cancel(self) -> Iterator[str]:
        """The client wants no more of the open response."""
        self._withheld = self._withheld or self.phase is Phase.SPEAKING
        yield from self.close("cancelled", "client_cancelled")

    def close(
        self, status: str, reason: str | None = None, error: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """Ends the open response, if there is one, with `status`."""
        response = self._response
        if response is None:
            return
        spoke = self.phase is Phase.SPEAKING
        output = []
        if spoke:
            item = self._item(response, "completed" if status == "completed" else "incomplete")
            output.append(item)
            place = self._place(response)
            part = {"type": "audio", "transcript": response.transcript}
            yield from self._emit("response.output_audio.done", **place)
            yield from self._emit(
                "response.output_audio_transcript.done", **place, transcript=response.transcript
            )
            yield from self._emit("response.content_part.done", **place, part=part)
            yield from self._emit("conversation.item.done", item=item, previous_item_id=response.previous)
            yield from self._emit(
                "response.output_item.done", response_id=response.id, output_index=0, item=item
            )
            self._keep(item)
        details = {"type": status, "reason": reason, "error": error}
        told = {key: value for key, value in details.items() if value is not None}
        counted = usage(self.heard, response.spoken, self._dialect)
        self.heard = 0
        self._response, self.phase = None, Phase.IDLE
        done = self._resource(response, status, output, None if status == "completed" else told, counted)
        yield from self._emit("response.done", response=done)
        yield from self._emit("rate_limits.updated", rate_limits=[])

    # Steps

    def _pause_over(self) -> Iterator[str]:
        self._withheld = False
        if self.phase is Phase.SPEAKING:
            yield from self.close("completed")

    def _wait(self) -> Iterator[str]:
        if self.phase is Phase.WAITING:
            self._waited += 1
            if self._waited >= WAIT_FRAMES:
                yield from self.close("completed")

    def _open(self, metadata: dict[str, str] | None) -> Iterator[str]:
        self._count += 1
        names = (f"resp_{self._session}_{self._count}", f"item_{self._session}_{self._count}")
        self._response = _Response(*names, previous=None, metadata=metadata)
        created = self._resource(self._response, "in_progress", [], None, None)
        yield from self._emit("response.created", response=created)

    def _begin_speech(self, page: bytes | None) -> Iterator[str]:
        if self._response is None:
            yield from self._open(None)
        response = self._response
        assert response is not None
        self.phase = Phase.SPEAKING
        response.previous = self._previous(response.item_id)
        item = self._item(response, "in_progress")
        place = self._place(response)
        yield from self._emit(
            "response.output_item.added", response_id=response.id, output_index=0, item=item
        )
        yield from self._emit("conversation.item.added", item=item, previous_item_id=response.previous)
        part = {"type": "audio", "transcript": ""}
        yield from self._emit("response.content_part.added", **place, part=part)
        if page is not None:
            if self._blank:
                blank, self._blank = self._blank, ""
                yield from self._transcript(blank)
            yield from self._delta(page)

    def _delta(self, page: bytes) -> Iterator[str]:
        assert self._response is not None
        self._response.spoken += 1
        delta = audio_text(page)
        yield from self._emit("response.output_audio.delta", **self._place(self._response), delta=delta)

    def _transcript(self, text: str) -> Iterator[str]:
        assert self._response is not None
        self._response.transcript += text
        place = self._place(self._response)
        yield from self._emit("response.output_audio_transcript.delta", **place, delta=text)

    # Parts of events

    def _place(self, response: _Response) -> dict[str, Any]:
        ids = {"response_id": response.id, "item_id": response.item_id}
        return {**ids, "output_index": 0, "content_index": 0}

    def _item(self, response: _Response, status: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if status != "in_progress":
            kind = self._dialect.content("output_audio")
            content.append({"type": kind, "transcript": response.transcript})
        return {
            "id": response.item_id,
            "object": "realtime.item",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _resource(
        self,
        response: _Response,
        status: str,
        output: list[dict[str, Any]],
        details: dict[str, Any] | None,
        counted: dict[str, Any] | None,
    ) -> dict[str, Any]:
        return {
            "id": response.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": output,
            "conversation_id": f"conv_{self._session}",
            "max_output_tokens": "inf",
            "metadata": response.metadata,
            "usage": counted,
            **self._describe(),
        }
