"""From the log of a session to a live slot: what of it is run again.

A session after F answered frames is rebuilt as a prompt that ends with its first F - 1 frames, followed by
one frame that is stepped for real:

1. The temporal transformer's keys and values: the prompt and the logged frames as one prefill (`script`).
2. The codec's two states, in blocks: the agent's codes through the decoder without keeping the sound, and
   the sound of the user through the encoder without keeping the codes.
3. The frame in flight. The last step sampled a text token and a first codebook that no log holds yet, since
   an output is the frame before (`lm.step`). It is stepped again with the user's last answered frame; the
   codes that the log has of it are forced by the script's token ring, and draws depend on their frame alone.

All of it is exact but for rounding while the log holds the session's whole sound and the session is no
longer than the windows that are run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from personaplex.config import AGENT, USER, EngineConfig, LMConfig, frames_in
from personaplex.errors import CheckpointError, LogRefused
from personaplex.model import Model, mimi
from personaplex.model.mimi import MimiState
from personaplex.sessionlog import SessionLog
from personaplex.voices import Voice

DECODED = 4  # frames of codes that cost no more than one of sound: few columns of their sound are computed


@dataclass
class CodecRebuild:
    """The codec's part of one rebuild: the agent's codes [D, 8] int64 and the user's sound [E, 1920] float32,
    both up to the frame before the last, and how much of them has been run.
    """

    codes: Tensor
    sound: Tensor
    decoded: int = 0
    encoded: int = 0

    @classmethod
    def of(cls, log: SessionLog, context: int, config: EngineConfig) -> CodecRebuild:
        """`context`: the window of the codec's transformers, in steps."""
        run = config.rebuild_windows * context // mimi.STEPS
        kept = min(len(log.sound), frames_in(config.rebuild_audio_s))
        sound = log.sound[len(log.sound) - kept : -1]
        return cls(
            codes=torch.from_numpy(log.tokens[max(0, log.frames - 1 - run) : -1, AGENT].astype(np.int64)),
            sound=torch.from_numpy(np.array(sound, np.float32)),
        )

    @property
    def left(self) -> int:
        """Frames of both directions still to be run."""
        return len(self.codes) - self.decoded + len(self.sound) - self.encoded

    def run_chunk(self, model: Model, state: MimiState, slot: int, frames: int) -> None:
        """At most `frames` more of the sound, or DECODED times as many of the codes."""
        if self.decoded < len(self.codes):
            codes = self.codes[self.decoded : self.decoded + DECODED * frames].to(model.device)
            mimi.decode_block(model.mimi, state.decoder, slot, self.decoded, codes, pcm_wanted=False)
            self.decoded += len(codes)
        else:
            sound = self.sound[self.encoded : self.encoded + frames].to(model.device)
            mimi.encode_block(
                model.mimi, state.encoder, slot, self.encoded, sound.flatten(), codes_wanted=False
            )
            self.encoded += len(sound)


def check_log(log: SessionLog, lm: LMConfig) -> None:
    """Raises LogRefused for tokens outside the model's vocabulary and for sound that is not finite."""
    spoken = log.tokens[1:]
    limits = ((spoken[:, 0], lm.text_card), (spoken[:, AGENT], lm.card), (spoken[:, USER], lm.card))
    if any(((part < 0) | (part >= card)).any() for part, card in limits) or (
        log.frames and not _in_range(log.tokens[0, AGENT], lm.card)
    ):
        raise LogRefused("the session log holds tokens outside this model's vocabulary")
    if not np.isfinite(log.sound).all():
        raise LogRefused("the session log holds sound that is not finite")


def logged_voice(log: SessionLog, lm: LMConfig) -> Voice | None:
    """The voice that the session brought, if it did. Raises LogRefused when it does not fit this model."""
    if not log.voice:
        return None
    try:
        return Voice.unpack(log.voice, lm)
    except CheckpointError as error:
        raise LogRefused(f"the session log's voice cannot be used: {error}") from error


def spoken_frames(log: SessionLog) -> Tensor:
    """The logged frames behind the prompt, [17, F - 1] int64; none of a session not answered yet."""
    return torch.from_numpy(log.tokens[1:].T.astype(np.int64))


def _in_range(tokens: np.ndarray, card: int) -> bool:
    return bool(((tokens >= 0) & (tokens < card)).all())
