"""What is said in a recording: the live service's detector and Whisper, without the service."""

from __future__ import annotations

import numpy as np

from personaplex.config import FRAME_SIZE, Pcm
from personaplex.errors import ConfigError
from personaplex.transcription.listener import Listener
from personaplex.transcription.silero import FASTER_WHISPER, Silero, find
from personaplex.transcription.whisper import EXTRA, Options, Whisper
from personaplex.words import Segment


class Transcriber:
    """Loaded once, for any number of recordings."""

    def __init__(self, options: Options) -> None:
        """Raises ConfigError when the extra is not installed or the model cannot be loaded."""
        path = find(FASTER_WHISPER)
        if path is None:
            raise ConfigError(EXTRA)
        self._silero, self._whisper = Silero(path, EXTRA), Whisper(options)

    def read(self, pcm: Pcm) -> list[Segment]:
        """The segments in float32 [samples] at 24 kHz, with times in seconds from its start."""
        frames = np.pad(pcm, (0, -len(pcm) % FRAME_SIZE)).reshape(-1, FRAME_SIZE)
        listener = Listener(self._silero)
        found = [speech for number, frame in enumerate(frames) for speech in listener.hear(number, frame)]
        return [segment for speech in [*found, *listener.end()] if (segment := self._whisper.read(speech))]
