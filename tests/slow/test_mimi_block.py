"""Mimi over blocks of many frames equals Mimi frame by frame: codes, sound and the state either leaves."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from golden import CONFIG, CPU, arrays, build_mimi, difference
from torch import Tensor

from benchmarks.gpu.setup import random_model
from personaplex.config import CODEBOOKS, FRAME_SIZE, PRESET_7B, PRESET_TINY, MimiConfig
from personaplex.model import mimi as codec
from personaplex.model.mimi import CodecState, Mimi

STATE = 1e-4  # largest difference of any number kept between frames
PCM = 2e-5


def random_mimi(config: MimiConfig, context: int) -> Mimi:
    """Random weights at the sizes of `config`, with a ring of `context` steps of 25 Hz."""
    shorter = dataclasses.replace(config.transformer, context=context)
    mimi = dataclasses.replace(config, transformer=shorter)
    return random_model(dataclasses.replace(PRESET_TINY, mimi=mimi), CPU, torch.float32).mimi


def stepped(mimi: Mimi, pcm: Tensor, codes: Tensor) -> tuple[codec.MimiState, Tensor, Tensor]:
    """pcm [F, 1920] and codes [F, 8], frame by frame: the state, the codes and the sound."""
    state, active, heard, spoken = mimi.allocate(1, CPU), torch.ones(1, dtype=torch.bool), [], []
    with torch.inference_mode():
        for frame, code in zip(pcm, codes, strict=True):
            heard.append(codec.encode(mimi, state.encoder, frame[None], active)[0])
            spoken.append(codec.decode(mimi, state.decoder, code[None], active)[0])
    return state, torch.stack(heard), torch.cat(spoken)


def in_blocks(
    mimi: Mimi, pcm: Tensor, codes: Tensor, sizes: list[int], wanted: bool = True, slot: int = 1
) -> tuple[codec.MimiState, Tensor, Tensor]:
    """The same in slot `slot` of two, in blocks of these sizes; a block of 0 is a step."""
    state, heard, spoken, start = mimi.allocate(2, CPU), [], [], 0
    active = torch.arange(2) == slot
    with torch.inference_mode():
        for size in sizes:
            stop = start + max(size, 1)
            if size:
                sound, some = pcm[start:stop].flatten(), codes[start:stop]
                heard.append(codec.encode_block(mimi, state.encoder, slot, start, sound, wanted))
                spoken.append(codec.decode_block(mimi, state.decoder, slot, start, some, wanted))
            else:
                two = pcm[start].expand(2, -1), codes[start].expand(2, -1)
                heard.append(codec.encode(mimi, state.encoder, two[0], active)[slot][None])
                spoken.append(codec.decode(mimi, state.decoder, two[1], active)[slot])
            start = stop
    assert start == len(pcm)
    return state.rows(slot, slot + 1), torch.cat(heard), torch.cat(spoken)


def assert_same_state(ours: codec.MimiState, theirs: codec.MimiState) -> None:
    for one, other in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
        for a, b in zip(parts(one), parts(other), strict=True):
            assert (a - b).abs().max() < STATE
        assert one.ring.offset.tolist() == other.ring.offset.tolist()


def parts(state: CodecState) -> list[Tensor]:
    return [*state.conv_state, state.resample, *state.ring.contents]


def splits(frames: int, seed: int) -> list[int]:
    """A random split into blocks; zeros are single steps between them."""
    rng, sizes = np.random.default_rng(seed), list[int]()
    while (left := frames - sum(max(size, 1) for size in sizes)) > 0:
        sizes.append(int(rng.integers(0, min(left, 17) + 1)))
    return sizes


def test_golden_vectors_in_one_block() -> None:
    z, mimi = arrays("mimi_stream"), build_mimi()
    for slot, wav in enumerate(z["wav_int16"][:, 0].astype(np.float32) / 32768):
        pcm, codes = torch.from_numpy(wav).view(-1, FRAME_SIZE), torch.from_numpy(z["dec_codes"][slot]).t()
        _, heard, spoken = in_blocks(mimi, pcm, codes, [len(pcm)])
        assert (heard.t().numpy() == z["codes"][slot]).all()
        assert difference(spoken, z["pcm"][slot, 0]) < PCM


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wanted", [True, False])
def test_any_split_leaves_the_state_of_steps(seed: int, wanted: bool) -> None:
    """Golden weights and tiny's sizes; the rings of 20 and 30 steps wrap several times."""
    for mimi in (build_mimi(), random_mimi(PRESET_TINY.mimi, context=30)):
        random = torch.Generator().manual_seed(seed)
        pcm = 0.1 * torch.randn(41, FRAME_SIZE, generator=random)
        codes = torch.randint(0, CONFIG.mimi.bins, (41, CODEBOOKS), generator=random)
        state, heard, spoken = stepped(mimi, pcm, codes)
        sizes = splits(41, seed)
        ours, our_codes, our_pcm = in_blocks(mimi, pcm, codes, sizes, wanted)
        assert_same_state(ours, state)
        if wanted:
            assert torch.equal(our_codes, heard)
            assert (our_pcm - spoken).abs().max() < PCM
        else:  # steps in between still give theirs
            kept = [
                frame
                for frame, size in zip(itertools.accumulate(max(s, 1) for s in sizes), sizes, strict=True)
                if not size
            ]
            assert torch.equal(our_codes, heard[[frame - 1 for frame in kept]])


def test_the_real_depth_keeps_state_without_the_sound() -> None:
    """Eight layers and the real kernels: the few columns run without the sound do for every convolution."""
    layers = dataclasses.replace(PRESET_7B.mimi.transformer, dim=32, heads=2, hidden=64)
    small = dataclasses.replace(PRESET_7B.mimi, filters=4, dim=32, codebook_dim=8, transformer=layers)
    mimi = random_mimi(small, context=12)
    assert mimi.decoder.reach() == 8
    random = torch.Generator().manual_seed(1)
    pcm = 0.1 * torch.randn(9, FRAME_SIZE, generator=random)
    codes = torch.randint(0, PRESET_7B.mimi.bins, (9, CODEBOOKS), generator=random)
    state, _, _ = stepped(mimi, pcm, codes)
    ours, heard, spoken = in_blocks(mimi, pcm, codes, [2, 7], wanted=False)
    assert_same_state(ours, state)
    assert (heard.shape, spoken.shape) == ((0, CODEBOOKS), (0,))
