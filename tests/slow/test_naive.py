"""The benchmark's baseline is the model too: slow, but with the reference's tokens."""

from __future__ import annotations

import numpy as np
import pytest
from golden import CONFIG, GOLDEN, arrays
from safetensors.torch import load_file

from benchmarks.naive import NaiveLM
from personaplex.config import SILENCE_CODES, SILENCE_FRAMES, SINE_CODES, TEXT_PAD, Sampling


@pytest.fixture
def naive() -> NaiveLM:
    weights = {name: tensor.float() for name, tensor in load_file(GOLDEN / "model.safetensors").items()}
    return NaiveLM(weights, CONFIG.lm, Sampling().greedy())


def step_through_prompt(naive: NaiveLM) -> None:
    prompt = arrays("prompt_inputs")
    for codes in prompt["voice_codes"][0].T.tolist():
        naive.step(user=SINE_CODES, agent=codes, text=TEXT_PAD)
    silence = [TEXT_PAD] * SILENCE_FRAMES
    for token in (*silence, *prompt["text_tokens"].tolist(), *silence):
        naive.step(user=SINE_CODES, agent=SILENCE_CODES, text=token)


def test_the_baseline_says_what_the_reference_says(naive: NaiveLM) -> None:
    run = arrays("lm_run_voicewav")
    step_through_prompt(naive)
    assert naive.offset == run["offset_after_prompt"]
    said = [naive.step(user=codes) for codes in run["user_codes"][0].T.tolist()]
    np.testing.assert_array_equal(said, run["outputs"][:, 0])


def test_the_baseline_predicts_the_user_when_nobody_speaks(naive: NaiveLM) -> None:
    """Depth steps 8 to 15 matter here, the last of which no longer sees the first."""
    run = arrays("lm_run_selfplay")
    step_through_prompt(naive)
    said = [naive.step() for _ in range(len(run["outputs"]))]
    np.testing.assert_array_equal(said, run["outputs"][:, 0])
