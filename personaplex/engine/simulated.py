"""An engine without a model but with a model's timing: each tick takes as long as a table says.

For capacity tests without an accelerator: queues, routing, scaling and pacing see the timing of real
hardware, while the slots return what they hear (`EchoEngine`). The thread sleeps through each tick, as it
does while a device computes. Slots, refusals, prompt chunks and cached voices are the engine's. Needs numpy
only. The table's `source` says whether its times were measured.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from personaplex.config import PRESET_7B, SILENCE_FRAMES, EngineConfig, Pcm
from personaplex.engine.echo import CHARACTERS_PER_TOKEN, EchoEngine, EchoVoice
from personaplex.engine.interface import Output, Slot, Usage
from personaplex.engine.steptimes import StepTimes
from personaplex.errors import ConfigError
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog

VOICE_POSITIONS = 125  # of a released voice: 10 s of speech
WINDOW = PRESET_7B.lm.temporal.context


def prompt_positions(text: str) -> int:
    """Positions of a prompt behind its voice: the role text between two silences."""
    return 2 * SILENCE_FRAMES + -(-len(text) // CHARACTERS_PER_TOKEN)


@dataclass
class _SlotState:
    """Positions in the window of one open slot."""

    voice: str
    text: int  # positions behind the voice
    filled: int = 0

    @property
    def prompt(self) -> int:
        return VOICE_POSITIONS + self.text

    @property
    def left(self) -> int:
        return self.prompt - self.filled


class SimulatedEngine:
    """See the module; the interface is that of `interface.Stepper`."""

    def __init__(
        self,
        times: StepTimes,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Raises ConfigError when `times` does not reach to `config.slots` sessions a step."""
        if config.slots > times.largest_batch:
            raise ConfigError(
                f"slots is {config.slots}, the step-time table ends at {times.largest_batch} sessions a step"
            )
        self._echo = EchoEngine(config.slots, config.prompt_tokens)
        self._times, self._config = times, config
        self._clock, self._sleep = clock, sleep
        self._open: dict[Slot, _SlotState] = {}
        self._waiting: deque[Slot] = deque()
        self._rebuilding: list[Slot] = []
        self._fed: list[Slot] = []
        self._voices: OrderedDict[str, None] = OrderedDict()  # cached, the last used last
        self._hits = self._misses = 0

    @property
    def slots(self) -> int:
        return self._echo.slots

    @property
    def free(self) -> int:
        return self._echo.free

    @property
    def usage(self) -> Usage:
        """Positions as a model would hold them; no device memory."""
        positions = sum(state.filled for state in self._open.values())
        return Usage(positions, 0, self._hits, self._misses, tuple(self._voices))

    def admit(self, persona: Persona) -> Slot:
        """Takes the lowest free slot. Raises UnknownVoice, PromptTooLong, NoCapacity."""
        slot = self._echo.admit(persona)
        self._open[slot] = _SlotState(persona.voice, prompt_positions(persona.text_prompt))
        self._waiting.append(slot)
        return slot

    def encode_voice(self, pcm: Pcm) -> EchoVoice:
        """As the echo engine does: the table knows nothing of the codec."""
        return self._echo.encode_voice(pcm)

    def count_tokens(self, text: str) -> int:
        return self._echo.count_tokens(text)

    def prefill(self) -> Slot | None:
        """Sleeps for one chunk of the oldest waiting prompt; its slot after the last chunk."""
        while self._waiting:
            slot = self._waiting[0]
            state = self._open.get(slot)
            if state is None:  # closed while it waited
                self._waiting.popleft()
                continue
            began = self._clock()
            chunk = self._next_chunk(state)
            if chunk:
                self._hold(began, self._times.prefill(chunk))
                state.filled += chunk
            if state.filled < state.prompt:
                return None
            self._waiting.popleft()
            return self._echo_ready(slot)
        return None

    def admit_rebuild(self, log: SessionLog) -> Slot:
        """Takes the lowest free slot for a session that goes on. Raises what `admit` raises."""
        slot = self._echo.admit_rebuild(log)
        live = self._echo.rebuild_chunk()
        assert live == slot, "the order is ours: there a slot is live at once"
        text = prompt_positions(log.persona.text_prompt) + log.frames
        self._open[slot] = _SlotState(log.persona.voice, text)
        self._rebuilding.append(slot)
        return slot

    def rebuild_chunk(self) -> Slot | None:
        """Sleeps for one chunk of the rebuild with the least left; its slot after the last chunk.

        Positions alone take time: the table knows nothing of the codec.
        """
        self._rebuilding = [slot for slot in self._rebuilding if slot in self._open]
        if not self._rebuilding:
            return None
        slot = min(self._rebuilding, key=lambda one: self._open[one].left)
        state, began = self._open[slot], self._clock()
        chunk = min(state.left, self._config.prefill_chunk)
        self._hold(began, self._times.prefill(chunk))
        state.filled += chunk
        if state.left:
            return None
        state.filled = min(state.filled, WINDOW)
        self._rebuilding.remove(slot)
        return slot

    def window(self, slot: Slot) -> int:
        return 0

    def voice_digest(self, slot: Slot) -> str:
        """Voices have no content here."""
        return ""

    def feed(self, slot: Slot, frame: Pcm) -> None:
        self._echo.feed(slot, frame)
        self._fed.append(slot)

    def step(self) -> list[Output]:
        """One tick over the fed slots, for as long as the table says at their number and context."""
        fed = [self._open[slot] for slot in self._fed if slot in self._open]
        self._fed.clear()
        if not fed:
            return []
        began = self._clock()
        spoken = self._echo.step()
        for state in fed:
            state.filled = min(state.filled + 1, WINDOW)
        context = sum(state.filled for state in fed) / len(fed)
        self._hold(began, self._times.tick(len(fed), context))
        return spoken

    def close(self, slot: Slot) -> None:
        """Frees the slot. Idempotent; a slot with a newer generation is left alone."""
        self._open.pop(slot, None)
        self._echo.close(slot)

    def _next_chunk(self, state: _SlotState) -> int:
        """Positions to run next. The voice's part ends a chunk and is run once, then copied."""
        if state.filled < VOICE_POSITIONS:
            if state.filled == 0 and state.voice in self._voices:
                self._voices.move_to_end(state.voice)
                self._hits += 1
                state.filled = VOICE_POSITIONS
            else:
                rest = VOICE_POSITIONS - state.filled
                if rest <= self._config.prefill_chunk:
                    self._keep_voice(state.voice)
                return min(rest, self._config.prefill_chunk)
        return min(state.prompt - state.filled, self._config.prefill_chunk)

    def _keep_voice(self, voice: str) -> None:
        self._misses += 1
        self._voices[voice] = None
        self._voices.move_to_end(voice)
        if len(self._voices) > self._config.voice_cache:
            self._voices.popitem(last=False)

    def _echo_ready(self, slot: Slot) -> Slot:
        ready = self._echo.prefill()
        assert ready == slot, "both engines take prompts in the same order"
        return slot

    def _hold(self, began: float, seconds: float) -> None:
        """Sleeps until `seconds` after `began`; our own work counts as part of them."""
        rest = began + seconds - self._clock()
        if rest > 0:
            self._sleep(rest)
