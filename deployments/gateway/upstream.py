"""A session's way to the replicas: frames out, replies in, whichever replica holds its slot.

`open` gets the first slot; `send_frame` takes the user's frames from then on. What a replica says becomes
events, given to `emit`, and frames, given to `on_frame`. The session's log is kept as the replies come, so
that another replica can go on with it (`handover.py`). Laws:

1. Every frame of the user is kept until it was answered. At most a burst waits for a slot, the newest one.
2. Only the current slot's replies count, each once, in the order of their numbers. A candidate's count from
   the first that nobody gave yet: it is the current slot from then on, and nothing of the old one reaches
   anybody.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

from deployments import metrics
from deployments.gateway.handover import Handover
from deployments.gateway.leases import Claim
from deployments.gateway.progress import Progress, seconds_since
from deployments.gateway.recorder import Recording
from deployments.gateway.resumes import Taken
from deployments.gateway.resumption import Resumption
from deployments.gateway.services import Services
from deployments.gateway.slot import Slot, UserFrame
from deployments.gateway.stats import SessionStats
from deployments.wire import messages
from deployments.wire.messages import LeaseRequest, MessageKind, SlotReady
from personaplex.config import Pcm, frames_in
from personaplex.errors import LogRefused, NoCapacity, ProtocolError, SessionTaken
from personaplex.persona import Persona
from personaplex.record.format import Row
from personaplex.session.events import AgentText, Event, Failed, LeaseGranted, Queued, Ready, SessionNotice
from personaplex.sessionlog import SessionRecorder
from personaplex.tokenlog import TokenLog

WINDOW = "window"  # told to clients that asked for status
UNANSWERED_LIMIT = 1_024  # frames: more than the queues between a gateway and an engine hold


class Upstream:
    """Made with its session. `stop` ends the media, `close` the links, `release` gives the slots back."""

    def __init__(
        self,
        session: str,
        services: Services,
        stats: SessionStats,
        emit: Callable[[Event], None],
        on_frame: Callable[[int, Pcm, bool], None],
        recording: Recording | None = None,
        *,
        resumable: bool = False,
        on_heard: Callable[[int, Pcm], None] | None = None,
    ) -> None:
        """`on_frame(number, pcm, stale)` takes the agent's frames; `stale` ones answer frames that waited for
        the slot. `resumable`: the client may come back after its connection was lost, if the service lets
        it. `on_heard(number, pcm)` gets each frame of the user once the agent's frame of that number has
        answered it; without, nobody transcribes the session."""
        self._session, self._services, self._stats, self._emit = session, services, stats, emit
        self._on_frame = on_frame
        self._metrics = services.metrics
        self._recording = recording
        self._on_heard = on_heard
        self._generations = itertools.count()
        self._details: dict[str, Any] = {}
        self._burst_frames = frames_in(services.limits.burst_s)
        self._stale = 0  # replies before this number answer frames that waited for the slot
        self._window = 0  # the first frame that knows the beginning no more, until the client is told
        self.progress = Progress()
        self._newest = 0  # generation of the slot that was asked for last
        self._resumption = Resumption(
            session, services.resumes if resumable else None, services.metrics, self
        )
        self.handover = Handover(
            session, services, stats, self.progress, emit, self._make_slot, self._resumption.ticket
        )

    @property
    def log(self) -> TokenLog:
        """The session's tokens so far."""
        return self.progress.log

    async def open(self, persona: Persona, claim: Claim) -> None:
        """Returns once the persona was sent to the replica; Ready follows. Raises NoCapacity, OSError."""
        self._metrics.observe(metrics.PROMPT_CHARACTERS, len(persona.text_prompt))
        self.progress.recorder = SessionRecorder(persona, self._services.failovers.audio_s)
        self._resumption.begin()
        slot = await self._get_slot(persona, claim)
        slot.open(persona)

    async def go_on(self, taken: Taken, heard: int, read: int, claim: Claim) -> None:
        """`open` for a session whose client has come back, after it had heard `heard` frames of the agent
        and read the text of `read`.
        Raises NoCapacity, OSError, LogRefused, and SessionTaken when the client has come back by another
        connection meanwhile; then `taken` was given back."""
        log, recorder = taken.log, SessionRecorder.of(taken.log, self._services.failovers.audio_s)
        try:
            told = self._resumption.go_on(taken, heard, read, self._lose_client)
            self.progress.recorder, self._details["resumed"] = recorder, told
            self._generations = itertools.count(taken.generation + 1)
            slot = await self._get_slot(recorder.persona, claim)
            if log.frames:
                packed = await asyncio.to_thread(log.pack)
                slot.rebuild(packed, log.frames)
            else:
                slot.open(recorder.persona)
        except BaseException:
            taken.give_back()
            raise

    async def _get_slot(self, persona: Persona, claim: Claim) -> Slot:
        self._details |= {
            "session": self._session,
            "voice": persona.voice,
            "text_seed": persona.sampling.text_seed,
            "audio_seed": persona.sampling.audio_seed,
        }
        if self._recording is not None:
            self._details["recorded"] = True
        if self._on_heard is not None:
            self._details["transcription"] = True
        try:
            slot = await self._join(claim)
        except OSError:  # the replica has just ended or is out of reach; another one may do better
            claim = await self._services.leases.claim(LeaseRequest.of(self._session, persona))
            slot = await self._join(claim)
        self._stats.note(replica=slot.replica, prompt_characters=len(persona.text_prompt))
        self._metrics.add(metrics.SESSIONS_ADMITTED)
        self._emit(LeaseGranted())
        return slot

    def record(self, recording: Recording) -> None:
        """What happens goes to `recording` too, from now on; before `open`."""
        self._recording = recording

    def send_frame(self, frame: Pcm) -> None:
        """Sends one frame of the user; while no slot is ready the newest burst is kept for one."""
        if self.handover.live:
            self._resumption.shown()
        waiting = self.progress.add(frame)
        ready = [slot for slot in self.handover.slots if slot.ready and not slot.ended]
        dropped = self.progress.trim(UNANSWERED_LIMIT if ready else self._burst_frames)
        if dropped and not ready:
            self._metrics.add(metrics.FRAMES_DROPPED, dropped, place="early")
        for slot in ready:
            dropped = slot.dropped
            slot.send_frame(waiting)
            if slot.dropped > dropped:
                self._metrics.add(metrics.FRAMES_DROPPED, slot.dropped - dropped, place="link_in")
        if ready:
            self.handover.asked()

    def stop(self) -> None:
        """Stops both directions; later messages are ignored."""
        self._services.moves.remove(self.handover)
        self.handover.stop()

    def detach(self) -> None:
        """As `close`, but the client may come back: the session's log is kept, here and by its replica.
        Without effect on a session whose client has nothing to come back with yet."""
        self.stop()
        recorder, current = self.progress.recorder, self.handover.current
        if recorder is None or current is None:
            return
        if self._resumption.keep(recorder, self._newest, current.address):
            current.detach()

    def hand_over(self, counter: int) -> None:
        """See `resumes.Own`."""
        if self._resumption.held.takes(counter, self._newest):
            self.detach()
            self._lose_client()

    def close(self) -> None:
        """Closes the links, if there are any. Idempotent."""
        self.stop()
        self._resumption.end()
        for slot in self.handover.slots:
            slot.close()

    async def release(self, timeout_s: float) -> None:
        """Gives the slot back, once the replica says that it is free or did not for `timeout_s`."""
        await self.handover.wait_stopped()
        if self.handover.current is not None:
            await self.handover.current.release(timeout_s)

    # The way to a slot

    async def _join(self, claim: Claim) -> Slot:
        """A lease and the link to its replica. Raises NoCapacity, OSError once the lease is given back."""
        self.handover.current = slot = self._make_slot()
        await slot.join(claim, self._queue)
        self._services.changed()
        self._stats.phase("queue" if self._stats.queued else "lease", time.monotonic() - claim.began)
        began = time.monotonic()
        await slot.connect()
        self._stats.phase("connect", time.monotonic() - began)
        return slot

    def _make_slot(self) -> Slot:
        self._newest = next(self._generations)
        return Slot(
            self._newest,
            self._services.connect,
            self._services.connect_timeout_s,
            self._burst_frames,
            self._on_message,
            self.handover.ended,
            self._resumption.held,
        )

    def _lose_client(self) -> None:
        self._emit(Failed(SessionTaken()))

    def _queue(self, place: int) -> None:
        self._stats.queued = True
        self._services.changed()
        self._emit(Queued(place, self._services.wait(self._session)))

    # What the replicas say

    def _on_message(self, slot: Slot, kind: MessageKind, payload: bytes) -> None:
        if self.handover.stopped or slot not in self.handover.slots:
            return
        if kind is MessageKind.REPLY:
            self._receive_reply(slot, messages.unpack_reply(payload))
        else:
            self._receive_ready(slot, messages.unpack_ready(payload))

    def _receive_ready(self, slot: Slot, ready: SlotReady) -> None:
        if slot.ready or ready.frame != slot.frame:
            raise ProtocolError("a slot that is ready for something else")
        recorder = self.progress.recorder
        assert recorder is not None
        try:
            heard = recorder.sound_since(ready.frame)
        except LogRefused as error:
            slot.close()
            self.handover.ended(slot, NoCapacity(str(error)))
            return
        recorder.voice_digest = ready.voice_digest
        if not self.handover.live and ready.frame <= ready.window:
            self._window = ready.window
        first = not self.handover.live
        self.handover.ready(slot)
        if first:
            self._stats.phase("prefill", ready.prefill_s)
            self._resumption.ready()
            self._emit(Ready({**self._details, **self._resumption.ticket(slot.generation)}))
            self._services.moves.add(self.handover)
        self._feed(slot, heard)

    def _feed(self, slot: Slot, heard: list[Pcm]) -> None:
        """Sends a slot that has just become ready what the user said since, answered elsewhere or not."""
        now = time.monotonic()
        waiting = [*(UserFrame(0, now, pcm) for pcm in heard), *self.progress.unanswered]
        self._stale = self.progress.frames + self.progress.late()
        slot.begin(waiting)
        self.handover.fed(slot, owes=bool(waiting))

    def _receive_reply(self, slot: Slot, reply: messages.Reply) -> None:
        slot.replied()
        number = self.progress.frames
        if reply.frame < number:  # another slot was first
            self.handover.late(slot, reply.frame)
            return
        if slot is not self.handover.current:
            self.handover.take_over(slot)
        if reply.frame != number or not slot.ready:
            raise ProtocolError("a reply out of order")
        assert self.progress.recorder is not None
        frame = self.progress.take_answered(reply.timestamp)
        self.progress.recorder.answered(None if frame is None else frame.pcm, reply.tokens)
        self.handover.heard()
        latency_s = seconds_since(reply.timestamp)
        if self._recording is not None:
            row = Row(reply.frame, time.monotonic(), latency_s, reply.tokens, forced=reply.frame == 0)
            self._recording.frame(row, reply.text)
        if reply.text:
            self._resumption.said(reply.frame, reply.text)
            self._emit(AgentText(reply.text))
        self._on_frame(reply.frame, reply.pcm, reply.frame < self._stale)
        if self._on_heard is not None and frame is not None:
            self._on_heard(reply.frame, frame.pcm)
        if reply.frame % metrics.SAMPLED == 0:
            self._metrics.observe(metrics.FRAME_SECONDS, latency_s)
        if 0 < self._window <= reply.frame:
            self._window = 0
            self._emit(SessionNotice(WINDOW, {"frame": reply.frame}))
        self.handover.progressed(reply.frame, frame)
