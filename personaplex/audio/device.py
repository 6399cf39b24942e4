"""Microphone and loudspeaker of this machine, through the optional package `sounddevice`.

The sound card calls from threads of its own; both directions pass through bounded queues whose oldest frame
is dropped, since late speech is worth less than prompt speech.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from personaplex.config import FRAME_SIZE, SAMPLE_RATE, Pcm
from personaplex.errors import ConfigError

QUEUE_FRAMES = 4  # 320 ms, each way


class Device:
    """The default sound devices at 24 kHz mono, open while the `with` block runs."""

    def __init__(self, notify: Callable[[], None]) -> None:
        """`notify` is called, from another thread, whenever a frame can be read.

        Raises ConfigError when sounddevice or its PortAudio library is missing.
        """
        try:
            sounddevice = importlib.import_module("sounddevice")
        except (ImportError, OSError) as error:
            raise ConfigError(
                "no microphone: install the Python package sounddevice and PortAudio (libportaudio2), "
                "or give a recording with --input-wav"
            ) from error
        self._sounddevice: Any = sounddevice
        self._streams: list[Any] = []
        self._notify = notify
        self._heard: deque[Pcm] = deque(maxlen=QUEUE_FRAMES)
        self._to_play: deque[Pcm] = deque(maxlen=QUEUE_FRAMES)
        self._playing = False

    def __enter__(self) -> Device:
        """Raises ConfigError when there is no usable device."""
        settings = {"samplerate": SAMPLE_RATE, "channels": 1, "dtype": "float32", "blocksize": FRAME_SIZE}
        try:
            for kind, callback in (
                (self._sounddevice.InputStream, self._on_input),
                (self._sounddevice.OutputStream, self._on_output),
            ):
                self._streams.append(kind(callback=callback, **settings))
                self._streams[-1].start()
        except self._sounddevice.PortAudioError as error:
            self.__exit__(None, None, None)
            raise ConfigError(f"the sound device cannot be used: {error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            stream.close()
        self._streams.clear()

    def read(self) -> Pcm | None:
        """The oldest frame of the microphone, float32 [1920], or None."""
        return self._heard.popleft() if self._heard else None

    def play(self, frame: Pcm) -> None:
        """Queues one frame, float32 [1920]."""
        self._to_play.append(frame)

    def _on_input(self, data: Pcm, frames: int, time: object, status: object) -> None:
        self._heard.append(data[:, 0].copy())
        self._notify()

    def _on_output(self, data: Pcm, frames: int, time: object, status: object) -> None:
        # After an underrun one frame is gathered before playing on, or each small delay would be heard twice.
        if len(self._to_play) >= (1 if self._playing else 2):
            data[:, 0] = self._to_play.popleft()
            self._playing = True
        else:
            data.fill(0)
            self._playing = False
