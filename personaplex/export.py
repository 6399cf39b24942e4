"""Records as a dataset: for each a stereo wav (agent left, user right) and its words, and one manifest.

data.jsonl     {"path": wav, "duration": seconds} a line, paths relative to it
NAME.wav       24 kHz, 16 bit
NAME.json      alignments: [word, [start, end], "SPEAKER_MAIN"] of the agent; text_prompt; voice
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from personaplex import cli
from personaplex.audio.wav import write_wav
from personaplex.config import SAMPLE_RATE
from personaplex.errors import ConfigError, PersonaplexError
from personaplex.files import replacing
from personaplex.loading import ModelSpec, resolve
from personaplex.model.mimi import Mimi
from personaplex.outputs import make_folder_of, refuse_overwriting, try_output
from personaplex.playback import load_codec, spec, stereo
from personaplex.record.format import Record
from personaplex.record.transcript import alignments

MANIFEST = "data.jsonl"


class Exporter:
    """Writes into one folder; `finish` writes the manifest of all that was added."""

    def __init__(self, options: argparse.Namespace, folder: Path, records: Sequence[Path]) -> None:
        """Refuses, with ConfigError or OSError, what cannot be written before any work is done."""
        self.count, self.seconds = 0, 0.0
        self.manifest = folder / MANIFEST
        self._options, self._folder = options, folder
        self._codecs: dict[ModelSpec, Mimi] = {}
        self._lines: list[str] = []
        stems = [path.stem for path in records]
        twice = sorted({stem for stem in stems if stems.count(stem) > 1})
        if twice:
            raise ConfigError(f"two records would write the same files: {', '.join(twice)}")
        outputs = [folder / f"{stem}{suffix}" for stem in stems for suffix in (".wav", ".json")]
        refuse_overwriting(
            [("--output", path) for path in (*outputs, self.manifest)], [("PATH", path) for path in records]
        )
        make_folder_of(self.manifest)
        try_output(self.manifest)

    def add(self, path: Path, record: Record, fail: Callable[[Path, str], None]) -> None:
        """Writes one record's files; of a damaged one those of its good part. What goes wrong is told."""
        if record.damage is not None:
            cli.complain(f"{path}: {record.damage}", "")
        if not len(record):
            fail(path, "it holds no frame of the conversation")
            return
        wav = self._folder / f"{path.stem}.wav"
        try:
            write_wav(wav, stereo(record, self._codec(record)), SAMPLE_RATE)
            with replacing(wav.with_suffix(".json")) as part:
                part.write_text(json.dumps(alignments(record), ensure_ascii=False), encoding="utf-8")
        except (PersonaplexError, OSError) as error:
            fail(path, cli.reason(error))
            return
        self._lines.append(json.dumps({"path": wav.name, "duration": round(record.seconds, 2)}))
        self.count += 1
        self.seconds += record.seconds

    def finish(self) -> None:
        """Writes the manifest. Raises OSError."""
        with replacing(self.manifest) as part:
            part.write_text("".join(f"{line}\n" for line in self._lines), encoding="utf-8")

    def _codec(self, record: Record) -> Mimi:
        wanted = spec(self._options, record.head)
        if wanted not in self._codecs:
            self._codecs[wanted] = load_codec(resolve(wanted))
        return self._codecs[wanted]
