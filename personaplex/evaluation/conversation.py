"""One recording while the engine answers it: frames out, frames in, and the files of the answer.

Knows the engine's interface only.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from personaplex.audio.wav import read_wav, resample, write_wav
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE
from personaplex.engine.interface import Output
from personaplex.errors import BadAudio
from personaplex.evaluation import transcript
from personaplex.evaluation.scoring import SAMPLE_FILE, write_json
from personaplex.evaluation.speech import Word


class AnswerRun:
    """`recording` is answered into `folder`, in files called `output`."""

    def __init__(self, recording: Path, folder: Path, output: str) -> None:
        self.folder, self._recording, self._output = folder, recording, output
        self._samples: NDArray[np.float32] = np.empty(0, np.float32)
        self._sent = 0
        self._pcm: list[NDArray[np.float32]] = []
        self._pieces: list[tuple[int, str]] = []

    def read(self) -> None:
        """The first channel at 24 kHz. Raises BadAudio or OSError."""
        pcm, rate = read_wav(self._recording)
        self._samples = resample(pcm[0], rate, SAMPLE_RATE)
        if not len(self._samples):
            raise BadAudio("the recording is shorter than one sample at 24 kHz")

    @property
    def finished(self) -> bool:
        return len(self._pcm) * FRAME_SIZE >= len(self._samples)

    def next_frame(self) -> NDArray[np.float32]:
        """float32 [1920]; the last one is filled with zeros."""
        frame = self._samples[self._sent * FRAME_SIZE : (self._sent + 1) * FRAME_SIZE]
        self._sent += 1
        return np.pad(frame, (0, FRAME_SIZE - len(frame)))

    def take(self, output: Output) -> None:
        if output.text:
            self._pieces.append((len(self._pcm), output.text))
        self._pcm.append(output.pcm.copy())

    def write(self) -> None:
        """The sound, as long as the recording, and the text stream with its words as written."""
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SAMPLE_FILE).unlink(missing_ok=True)  # of an earlier answer: this one is not scored yet
        write_wav(
            folder / f"{self._output}.wav", np.concatenate(self._pcm)[: len(self._samples)], SAMPLE_RATE
        )
        words = [Word(piece.strip(), frame * FRAME_SECONDS) for frame, piece in self._pieces if piece.strip()]
        data = {**transcript.chunks(words), "pieces": self._pieces}
        data["text"] = "".join(piece for _, piece in self._pieces).strip()
        write_json(folder / f"{self._output}.json", data)
