"""From a persona to the frames a slot consumes before it goes live.

A prompt is voice frames, silence, the role text at one token per frame, silence; the agent's stream carries
the voice's codes and then silence, the user's stream a sine. `Script` holds what the network reads of it:
positions 0..P-2 to prefill, and the token ring just before frame P is generated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from personaplex.config import (
    AGENT,
    DELAYS,
    FRAME_SIZE,
    RING_COLUMNS,
    SILENCE_CODES,
    SILENCE_FRAMES,
    SINE_CODES,
    STREAMS,
    TEXT_PAD,
    UNGENERATED,
    USER,
    LMConfig,
)
from personaplex.model import Model
from personaplex.model.lm import LM
from personaplex.model.mimi import encode
from personaplex.voices import Voice

_DELAYED = torch.tensor(DELAYS, dtype=torch.bool)


@dataclass(frozen=True)
class Script:
    """A prompt of P frames, ready to prefill; all tensors on the CPU.

    `positions` [P - 1, 17] are the network's inputs; of these the first `prefix` belong to the voice, and
    `embeddings` [prefix, dim] replaces them when the voice came as embeddings. `ring` [17, 4] and
    `provided` [17, 4] are the token ring after the prompt.
    """

    frames: int
    positions: Tensor
    prefix: int
    embeddings: Tensor | None
    ring: Tensor
    provided: Tensor

    def inputs(self, lm: LM, start: int, stop: int) -> Tensor:
        """Input embeddings [1, T, dim] at positions start..stop-1, voice or rest, not both."""
        if self.embeddings is not None and start < self.prefix:
            assert stop <= self.prefix
            return self.embeddings[start:stop].to(lm.device, lm.dtype, copy=True)[
                None
            ]  # a prefill writes to it
        return lm.embed(self.positions[start:stop].to(lm.device))[None]


def compose(voice: Voice | None, text: list[int], config: LMConfig, spoken: Tensor | None = None) -> Script:
    """The script of a voice and the tokens of a role text (either may be empty).

    `spoken` [17, S] int64 are frames of a conversation behind the prompt, given like it.
    """
    prompt = [TEXT_PAD] * SILENCE_FRAMES + text + [TEXT_PAD] * SILENCE_FRAMES
    silence = torch.tensor(SILENCE_CODES)[:, None].expand(-1, len(prompt))
    tail = _frames(torch.tensor(prompt), silence)
    if spoken is not None:
        tail = torch.cat([tail, spoken], dim=1)
    head = tail[:, :0] if voice is None else _voice_frames(voice)
    frames = torch.cat([head, tail], dim=1)
    count, prefix = frames.shape[1], max(head.shape[1] - 1, 0)
    positions = lay_out(frames, config)
    if voice is not None and voice.cache is not None:
        positions[prefix] = voice.cache[:, prefix % RING_COLUMNS]
    provided = torch.zeros(STREAMS, RING_COLUMNS, dtype=torch.bool)
    provided[:, (count - 1) % RING_COLUMNS] = True
    provided[_DELAYED, count % RING_COLUMNS] = True
    return Script(
        frames=count,
        positions=positions[:-1],
        prefix=prefix,
        embeddings=None if voice is None else voice.embeddings,
        ring=token_ring(frames, positions),
        provided=provided,
    )


def lay_out(frames: Tensor, config: LMConfig) -> Tensor:
    """frames [17, P] -> the network's inputs [P, 17]: delayed streams one position later, frame 0 lost."""
    start = torch.full((STREAMS, 1), config.audio_start)
    start[0] = config.text_start
    frames = torch.cat([start, frames[:, 1:]], dim=1)
    later = torch.cat([start, frames[:, :-1]], dim=1)
    return torch.where(_DELAYED[:, None], later, frames).t().contiguous()


def token_ring(frames: Tensor, positions: Tensor) -> Tensor:
    """The token ring [17, 4] after P frames [17, P], laid out as positions [P, 17].

    Column P holds the last frame's delayed codes; its other cells are those of four frames before, as
    stepping would have left them.
    """
    count = positions.shape[0]
    ring = torch.full((STREAMS, RING_COLUMNS), UNGENERATED)
    for position in range(max(0, count - RING_COLUMNS), count):
        ring[:, position % RING_COLUMNS] = positions[position]
    ring[_DELAYED, count % RING_COLUMNS] = frames[_DELAYED, -1]
    return ring


class VoiceEncoder:
    """A recording on its way to a voice's codes, frame by frame with a codec state of its own."""

    def __init__(self, model: Model, waveform: Tensor) -> None:
        """waveform [samples] float32, 24 kHz, normalised; the last frame is zero-padded."""
        padded = torch.nn.functional.pad(waveform, (0, -waveform.shape[0] % FRAME_SIZE)).to(model.device)
        self._model, self._frames = model, padded.split(FRAME_SIZE)
        self._state = model.mimi.allocate(1, model.device).encoder
        self._active = torch.ones(1, dtype=torch.bool, device=model.device)
        self._codes: list[Tensor] = []

    def run(self, frames: int) -> bool:
        """Encodes at most `frames` more; True when that was the last."""
        start = len(self._codes)
        with torch.inference_mode():
            for frame in self._frames[start : start + frames]:
                self._codes.append(encode(self._model.mimi, self._state, frame[None], self._active))
        return len(self._codes) == len(self._frames)

    @property
    def codes(self) -> Tensor:
        """Those of the frames so far, [8, F] int64, on the CPU."""
        return torch.cat(self._codes).t().cpu()


def encode_voice(model: Model, waveform: Tensor) -> Tensor:
    """waveform [samples] float32, 24 kHz, normalised -> codes [8, F] int64; the last frame is zero-padded."""
    encoder = VoiceEncoder(model, waveform)
    encoder.run(waveform.shape[0])
    return encoder.codes


def embed_voice(lm: LM, codes: Tensor) -> tuple[Tensor, Tensor]:
    """codes [8, F] of a voice -> what a voice file keeps: embeddings [F - 1, dim], token ring [17, 4]."""
    frames = _frames(torch.full((codes.shape[1],), TEXT_PAD), codes)
    positions = lay_out(frames, lm.config)
    with torch.inference_mode():
        embeddings = lm.embed(positions[:-1].to(lm.device)).cpu()
    return embeddings, token_ring(frames, positions)


def _frames(text: Tensor, agent: Tensor) -> Tensor:
    """text [P], agent codes [8, P] -> prompt frames [17, P] with the sine on the user's stream."""
    frames = torch.empty(STREAMS, text.shape[0], dtype=torch.int64)
    frames[0] = text
    frames[AGENT] = agent
    frames[USER] = torch.tensor(SINE_CODES)[:, None]
    return frames


def _voice_frames(voice: Voice) -> Tensor:
    """The frames of a voice [17, F]; of one saved as embeddings only what its token ring still holds."""
    if voice.codes is not None:
        return _frames(torch.full((voice.codes.shape[1],), TEXT_PAD), voice.codes)
    assert voice.embeddings is not None
    assert voice.cache is not None
    count = voice.embeddings.shape[0] + 1
    frames = torch.zeros(STREAMS, count, dtype=torch.int64)
    last, pending = voice.cache[:, (count - 1) % RING_COLUMNS], voice.cache[:, count % RING_COLUMNS]
    frames[:, -1] = torch.where(_DELAYED, pending, last)
    return frames
