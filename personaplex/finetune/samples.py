"""What the model says while it is trained: held-back calls through the engine, as the offline command would.

The user's channel is played to the adapted model and what it answers is written beside it: NAME.wav,
NAME.json (a piece of text a frame).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from personaplex.audio.wav import read_wav, write_wav
from personaplex.config import EngineConfig, Sampling
from personaplex.finetune.adapters import Adapters, merged
from personaplex.finetune.dataset import Dataset, Entry
from personaplex.loading import Parts
from personaplex.offline import converse
from personaplex.offline_io import Job, RunReport
from personaplex.persona import Persona
from personaplex.voices import Voice

_ANY_LENGTH = 2**31  # tokens of a role text


class Sampler:
    """Generates from a few calls of a dataset, each for `seconds` at most, always with the same seed."""

    def __init__(
        self, parts: Parts, data: Dataset, entries: Sequence[Entry], seconds: float, sampling: Sampling
    ) -> None:
        self._parts, self._data, self._entries = parts, data, entries
        self._seconds, self._sampling = seconds, sampling

    def write(self, adapters: Adapters, folder: Path) -> Mapping[str, str]:
        """Generates with `adapters` into `folder`; what was said, by call. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        said = {}
        with merged(self._parts.model.lm, adapters):
            for entry in self._entries:
                said[entry.name] = self._say(entry, folder)
        return said

    def _say(self, entry: Entry, folder: Path) -> str:
        heard = folder / f"{entry.name}.user.wav"
        pcm, rate = read_wav(self._data.user_wav(entry))
        write_wav(heard, pcm[0, : int(self._seconds * rate)], rate)
        job = Job(heard, folder / f"{entry.name}.wav", folder / f"{entry.name}.json", None)
        engine = self._parts.engine(EngineConfig(slots=1, prompt_tokens=_ANY_LENGTH, graphs=False))
        report = RunReport()
        persona = Persona(text_prompt=entry.role, sampling=self._sampling)
        converse(engine, self._parts.tokenizer, persona, self._voice(entry), [job], report)
        if report.failures:
            raise OSError(None, f"{entry.name}: its sample failed")
        assert job.text is not None
        pieces = json.loads(job.text.read_text(encoding="utf-8"))
        return "".join(piece for piece in pieces if piece not in ("PAD", "EPAD")).strip()

    def _voice(self, entry: Entry) -> Voice:
        codes = self._data.arrays(entry, self._parts.model.config.lm).voice
        if codes is not None:
            return Voice.from_codes(torch.from_numpy(codes))
        return self._parts.library.get(entry.voice)
