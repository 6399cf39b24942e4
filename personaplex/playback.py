"""The sound of a record: both speakers' codes through Mimi. Needs the codec's weights, no language model.

The agent's sound is what the client was sent, sample for sample, as long as no frame is missing. The user's
is Mimi's rendering of what the model heard. Frames that are missing, and the user's last one, are silence.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from personaplex.config import FRAME_SIZE, MimiConfig
from personaplex.errors import BadRecord, ConfigError
from personaplex.loading import DTYPES, ModelSpec, Resolved
from personaplex.model.mimi import Mimi, decode
from personaplex.model.weights import load_mimi
from personaplex.record.format import Head, Record

AGENT_CHANNEL, USER_CHANNEL = 0, 1
_RECORDED = ("repo", "revision", "dtype", "weights", "kv")  # of a ModelSpec, found in a head's `engine`
_SMALL_FILTERS = 16  # a codec narrower than this runs faster on one CPU thread than on several


def load_codec(found: Resolved) -> Mimi:
    """The codec of a model, float32. Raises CheckpointError."""
    config = found.checkpoint.config.mimi
    if found.device.type == "cpu" and config.filters < _SMALL_FILTERS:
        torch.set_num_threads(1)
    return load_mimi(found.checkpoint.mimi, config, found.device)


def stereo(record: Record, mimi: Mimi) -> NDArray[np.float32]:
    """float32 [2, samples] at 24 kHz: the agent on the left, the user on the right, frame by frame as the
    conversation went. Raises BadRecord when the codes are not this codec's."""
    sound = np.zeros((2, record.span, FRAME_SIZE), np.float32)
    sound[AGENT_CHANNEL, record.frames] = play(mimi, record.agent_codes)
    heard = record.frames > 0  # row 0 holds the prompt's
    sound[USER_CHANNEL, record.frames[heard] - 1] = play(mimi, record.user_codes[heard])
    return sound.reshape(2, -1)


def play(mimi: Mimi, codes: NDArray[np.integer]) -> NDArray[np.float32]:
    """codes [frames, 8] from the start of a stream -> float32 [frames, 1920]. Raises BadRecord."""
    check_codes(codes, mimi.config)
    device = next(mimi.parameters()).device
    state = mimi.allocate(1, device).decoder
    active = torch.ones(1, dtype=torch.bool, device=device)
    frames = torch.from_numpy(np.array(codes, np.int64)).to(device)
    pcm = np.empty((len(codes), FRAME_SIZE), np.float32)
    with torch.inference_mode():
        for number, frame in enumerate(frames):
            pcm[number] = decode(mimi, state, frame[None], active)[0].cpu().numpy()
    return pcm


def check_codes(codes: NDArray[np.integer], config: MimiConfig) -> None:
    """Raises BadRecord for codes outside the codec's tables."""
    if codes.size and not 0 <= codes.min() <= codes.max() < config.bins:
        raise BadRecord("this record holds codes that the model's codec does not have: name its own --model")


def spec(options: argparse.Namespace, head: Head) -> ModelSpec:
    """The model that was recorded, with what the options change. Raises ConfigError where neither names
    one."""
    name = options.model or head.model
    if not name:
        raise ConfigError("this record does not say which model it is of: give --model")
    recorded = {key: head.engine[key] for key in _RECORDED if head.engine.get(key)}
    given = {key: getattr(options, key) for key in _RECORDED if getattr(options, key) is not None}
    if options.model and options.model != head.model:
        recorded.pop("repo", None)
        recorded.pop("revision", None)
    chosen = {**recorded, **given}
    _check(chosen)
    adapter = head.engine.get("lora")
    if adapter and options.lora is None and not options.model:
        raise ConfigError(f"this record was made with the adapter {adapter}: give it with --lora")
    return dataclasses.replace(
        ModelSpec(name=name, device=options.device, **chosen),
        moshi_weight=options.moshi_weight,
        mimi_weight=options.mimi_weight,
        tokenizer=options.tokenizer,
        voice_prompt_dir=options.voice_prompt_dir,
        lora=options.lora,
    )


def _check(chosen: dict[str, str]) -> None:
    for key, known in (("weights", ("auto", "int8")), ("kv", ("auto", "int8")), ("dtype", ("auto", *DTYPES))):
        if chosen.get(key, "auto") not in known:
            raise ConfigError(
                f"this record was made with {key}={chosen[key]}, which is unknown: give --{key}"
            )
