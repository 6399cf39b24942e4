"""From prepared calls to batches: prompt and part of a call laid out as the engine would, with loss weights.

Which sequences make the batch of a step is a function of the seed and the step alone: a run that was broken
off goes on with the same ones. The prompt counts nothing, as it is given; neither do the codes that the last
frame of the prompt still owes to the first frame of the call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from personaplex.config import AGENT, CODEBOOKS, STREAMS, TEXT_EPAD, TEXT_PAD, ZERO_TOKEN, LMConfig
from personaplex.engine.script import compose
from personaplex.errors import ConfigError
from personaplex.finetune.dataset import Dataset, Entry
from personaplex.finetune.network import Batch
from personaplex.text import Tokenizer
from personaplex.voices import Voice, VoiceLibrary


@dataclass(frozen=True)
class Weights:
    """What a token counts beside a word's piece: text padding, the semantic codebook of the agent's audio and
    each acoustic one. Text and audio are averaged apart, then added. Of the frames in which the agent is
    silent only a share, drawn anew for each batch, counts in the audio: `quiet`."""

    padding: float = 0.3
    semantic: float = 50.0
    acoustic: float = 1.0
    quiet: float = 1.0


@dataclass(frozen=True)
class Part:
    """Frames start..stop-1 of a call."""

    entry: Entry
    start: int
    stop: int


class Source:
    """A dataset's calls as sequences, kept in memory as tokens."""

    def __init__(
        self,
        data: Dataset,
        entries: Sequence[Entry],
        config: LMConfig,
        tokenizer: Tokenizer,
        library: VoiceLibrary,
        weights: Weights,
        length: int,
    ) -> None:
        """Calls longer than `length` frames are cut into parts of equal length. Raises ConfigError,
        UnknownVoice or CheckpointError for what does not fit the model."""
        self._config, self._weights = config, weights
        self._arrays = {entry.name: data.arrays(entry, config) for entry in entries}
        self._roles = {entry.role: tokenizer.encode_prompt(entry.role) for entry in entries}
        self._voices = {entry.name: self._voice(entry, library) for entry in entries}
        self.parts = [part for entry in entries for part in _parts(entry, length)]
        for part in self.parts:
            positions = self._prompt(part.entry) + part.stop - part.start
            if positions >= config.temporal.context:
                raise ConfigError(
                    f"{part.entry.name}: prompt and part are {positions} frames, the model remembers "
                    f"{config.temporal.context - 1}: give a shorter --length"
                )

    def _voice(self, entry: Entry, library: VoiceLibrary) -> Voice:
        codes = self._arrays[entry.name].voice
        return library.get(entry.voice) if codes is None else Voice.from_codes(torch.from_numpy(codes))

    def _prompt(self, entry: Entry) -> int:
        return compose(self._voices[entry.name], self._roles[entry.role], self._config).frames

    def sequence(self, part: Part, draw: int = 0) -> Row:
        """One part behind its prompt; `draw` decides which silent frames count."""
        arrays, span = self._arrays[part.entry.name], slice(part.start, part.stop)
        frames = torch.from_numpy(arrays.tokens[:, span])
        voice, role = self._voices[part.entry.name], self._roles[part.entry.role]
        prompt = compose(voice, role, self._config).frames
        script = compose(voice, role, self._config, frames)
        inputs, targets = script.positions[:-1], script.positions[1:]
        first = prompt - 1  # the input that predicts the call's first frame
        text = torch.zeros(len(inputs))
        text[first:] = _text_weight(targets[first:, 0], self._weights.padding)
        audio = torch.zeros(len(inputs), CODEBOOKS)
        drawn = np.random.default_rng([draw, part.start]).random(part.stop - part.start)
        counts = torch.from_numpy(arrays.sounds[span] | (drawn < self._weights.quiet)).float()
        count = len(inputs) - first  # the last frame, whose acoustic codes come one later, is left out
        audio[first:, 0] = self._weights.semantic * counts[:count]
        audio[first + 1 :, 1:] = self._weights.acoustic * counts[: count - 1, None]
        return Row(inputs, targets, text, audio, script.embeddings)

    def batch(self, parts: Sequence[Part]) -> Batch:
        return stack([self.sequence(part) for part in parts])


@dataclass(frozen=True, eq=False)
class Row:
    """A batch's row: inputs and targets [T, 17], weights [T] and [T, 8], embeddings of the voice or None."""

    inputs: Tensor
    targets: Tensor
    text_weight: Tensor
    audio_weight: Tensor
    embeddings: Tensor | None


def _text_weight(text: Tensor, padding: float) -> Tensor:
    return torch.where((text == TEXT_PAD) | (text == TEXT_EPAD), padding, 1.0)


def _parts(entry: Entry, length: int) -> list[Part]:
    count = -(-entry.frames // length)
    edges = np.linspace(0, entry.frames, count + 1).round().astype(int).tolist()
    return [Part(entry, start, stop) for start, stop in itertools.pairwise(edges)]


def stack(rows: Sequence[Row]) -> Batch:
    """Rows as one batch, the shorter ones filled up behind their end with what counts nothing."""
    longest = max(len(row.inputs) for row in rows)

    def filled(tensors: list[Tensor], value: float) -> Tensor:
        out = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[1:]), value)
        for index, tensor in enumerate(tensors):
            out[index, : len(tensor)] = tensor
        return out

    batch = Batch(
        inputs=filled([row.inputs for row in rows], ZERO_TOKEN),
        targets=filled([row.targets for row in rows], 0),
        text_weight=filled([row.text_weight for row in rows], 0),
        audio_weight=filled([row.audio_weight for row in rows], 0),
        embeddings=[row.embeddings for row in rows],
    )
    assert batch.inputs.shape[-1] == STREAMS
    assert bool((batch.targets[..., AGENT][batch.audio_weight.sum(-1) > 0] >= 0).all())
    return batch


class Order:
    """Which parts the batch of a step holds: all of them once an epoch, in an order drawn from seed and
    epoch. A share of every batch may come from a second list."""

    def __init__(
        self, parts: Sequence[Part], size: int, seed: int, rehearsed: Sequence[Part] = (), share: float = 0.0
    ) -> None:
        again = round(share * size) if rehearsed else 0
        self._lists = [(parts, size - again, seed), (rehearsed, again, seed + 1)]
        self.rehearsed = again

    def batch(self, step: int) -> tuple[list[Part], list[Part]]:
        """(parts, rehearsed parts) of the step, counted from 0."""
        first, second = (
            [_drawn(parts, step * size + offset, seed) for offset in range(size)]
            for parts, size, seed in self._lists
        )
        return first, second

    def epoch(self, step: int) -> float:
        parts, size, _ = self._lists[0]
        return step * size / len(parts)


def _drawn(parts: Sequence[Part], index: int, seed: int) -> Part:
    epoch, place = divmod(index, len(parts))
    order = np.random.default_rng([seed, epoch]).permutation(len(parts))
    return parts[int(order[place])]
