"""What is trained is what the server runs: the export into the project's own codec and language model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from personaplex.config import CODEBOOKS, FRAME_SIZE, SILENCE_CODES, SINE_CODES, EngineConfig, Sampling
from personaplex.engine.engine import Engine
from personaplex.model import Model
from personaplex.model.hub import resolve
from personaplex.model.lm import LMInputs, step
from personaplex.model.mimi import decode, encode
from personaplex.model.sampling import SamplingState
from personaplex.model.weights import load_model
from personaplex.persona import VOICES
from personaplex.text import Tokenizer
from personaplex.training import bank, behaviour, export
from personaplex.training.articulation import CODES, SILENCE, Said
from personaplex.training.assemble import assemble
from personaplex.training.documents import NOTHING
from personaplex.training.ear import Ear
from personaplex.training.grammar import Facts
from personaplex.training.hearing import PHONES
from personaplex.training.lm import CONSTANT, START, Talker, streams
from personaplex.training.mouth import HALF, Mouth, basis
from personaplex.training.run import save
from personaplex.training.speaking import Fitted
from personaplex.training.unseen import Caller
from personaplex.voices import VoiceLibrary

pytestmark = pytest.mark.usefixtures("few_words")

FRAMES = 6


@pytest.fixture(scope="module")
def parts() -> tuple[Ear, Mouth, Talker]:
    """Every part with random weights, the codebooks on the scale of what they quantise."""
    torch.manual_seed(0)
    ear = Ear(export.EAR, 8).eval()
    mouth, talker = Mouth(export.CONFIG.mimi), Talker(export.CONFIG.lm)
    with torch.no_grad():
        ear.books.copy_(torch.randn_like(ear.books) * ear(speech()).rest.std())
    return ear.eval(), mouth.eval(), talker.eval()


def speech() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, FRAMES * FRAME_SIZE) * 0.1


def test_checkpoints_become_a_model_that_takes_calls(
    parts: tuple[Ear, Mouth, Talker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a training folder, assembled, loaded and spoken to; the same seed says the same."""
    ear, mouth, _ = parts
    Fitted(basis(torch.randn(600, FRAME_SIZE), 256), torch.full((256,), 0.1)).save(tmp_path / "basis.pt")
    heard, talker = Ear(export.EAR, PHONES), Talker(export.CONFIG.lm)
    heard.books.copy_(ear.books)
    for name, part, module in (("ear", "ear", heard), ("mouth", "mouth", mouth), ("talk", "talker", talker)):
        save(tmp_path / f"{name}.pt", {part: module.state_dict()})
    one = Said(np.ones((2, 4), np.int64), np.ones(2, np.int64), np.full(2, 190, np.float32))
    monkeypatch.setattr(bank.Words, "_say", lambda *_: one)
    assemble(tmp_path, tmp_path / "model")

    checkpoint = resolve(str(tmp_path / "model"))
    model = load_model(checkpoint, "cpu", torch.float32)
    library = VoiceLibrary(checkpoint.config.lm, checkpoint.voices)
    assert sorted(library.names()) == sorted(VOICES)
    tokenizer = Tokenizer(checkpoint.tokenizer, size=320)
    wave = speech()[0].numpy()
    callers = [Caller(wave, "hello", "hello", "slt", False)] * 3
    known = Facts("Ada", "Pearl Bakery", "bakery", "gift box", 9, "Monday", "Friday")
    sampling = Sampling(audio_seed=3, text_seed=3)
    agents = [behaviour.World(known, "NATF2", "Your name is Ada.")] * 3
    said = []
    for _ in range(2):
        engine = Engine(model, library, tokenizer, EngineConfig(slots=2))
        said.append(behaviour.talks(engine, callers, agents, sampling, after=4))
    for first, second in zip(*said, strict=True):
        assert first.end == FRAMES + 12
        assert first.pcm.shape == (FRAMES + 16, FRAME_SIZE)
        assert np.array_equal(first.pcm, second.pcm)
        assert first.text == second.text


def test_answers_are_told_by_their_words_and_names_by_their_sound() -> None:
    assert behaviour.intent_of(" My name is Ada Novak, I work for Pearl Bakery.") == "name"
    assert behaviour.intent_of("The gift box costs nine dollars.") == "price"
    assert behaviour.intent_of("My dog is Ada.") is None
    assert behaviour.sounds_like("Ceertta Owens", "My name is Cirta Owens.")
    assert not behaviour.sounds_like("Ceertta Owens", "My name is Philip Marlow.")


@pytest.fixture(scope="module")
def halves() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    vectors = basis(torch.randn(600, FRAME_SIZE), 256)
    return vectors, torch.rand(256) * 0.5


@pytest.fixture(scope="module")
def model(
    parts: tuple[Ear, Mouth, Talker],
    halves: tuple[torch.Tensor, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Model:
    ear, mouth, talker = parts
    folder: Path = tmp_path_factory.mktemp("talk")
    mimi = export.mimi_tensors(dict(ear.state_dict()), dict(mouth.state_dict()), *halves)
    lm = export.lm_tensors(dict(talker.lm.state_dict()), CONSTANT)
    export.write(folder, lm, mimi, b"not read here")
    assert resolve(str(folder)).config == export.CONFIG
    return load_model(resolve(str(folder)), "cpu", torch.float32)


def test_a_block_of_codes_holds_no_constant_code() -> None:
    for level in range(CODEBOOKS):
        block = range(export.first_id(level), export.first_id(level) + CODES)
        assert SILENCE_CODES[level] not in block
        assert SINE_CODES[level] not in block
        assert block.stop <= export.CONFIG.mimi.bins


def test_the_codec_hears_what_the_ear_hears(parts: tuple[Ear, Mouth, Talker], model: Model) -> None:
    """Frame by frame through Mimi's own layers; int8 on disk moves a few codes of the last levels."""
    ear = parts[0]
    with torch.no_grad():
        expected = export.to_ids(ear.codes(ear(speech())))[0]
    state = model.mimi.allocate(1, torch.device("cpu"))
    active = torch.ones(1, dtype=torch.bool)
    pcm = speech().view(FRAMES, 1, FRAME_SIZE)
    heard = torch.cat([encode(model.mimi, state.encoder, frame, active) for frame in pcm])
    assert (heard[:, 0] == expected[:, 0]).all()
    assert (heard == expected).float().mean() > 0.7


def test_the_codec_says_what_the_mouth_says(
    parts: tuple[Ear, Mouth, Talker], halves: tuple[torch.Tensor, torch.Tensor], model: Model
) -> None:
    mouth = parts[1]
    shapes, size = halves
    codes = torch.randint(CODES, (FRAMES, CODEBOOKS), generator=torch.Generator().manual_seed(3))
    codes[4] = SILENCE
    with torch.no_grad():
        expected = (mouth(codes[None])[0] * size @ shapes).view(FRAMES, 2 * HALF)
    state = model.mimi.allocate(1, torch.device("cpu"))
    active = torch.ones(1, dtype=torch.bool)
    said = torch.cat([decode(model.mimi, state.decoder, row[None], active) for row in export.to_ids(codes)])
    error = (said - expected).square().mean() / expected.square().mean()
    assert error < 2e-3


def test_the_model_predicts_what_the_talker_predicts(parts: tuple[Ear, Mouth, Talker], model: Model) -> None:
    """Teacher-forced frames through the engine's step give the training's logits, and rule out other ids."""
    talker = parts[2]
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(4, 320, (1, FRAMES + 1), generator=generator)
    agent = torch.randint(CODES, (1, FRAMES + 1, CODEBOOKS), generator=generator)
    user = torch.randint(CODES, (1, FRAMES + 1, CODEBOOKS), generator=generator)
    agent[:, 3], text[:, 0], agent[:, 0], user[:, 0] = SILENCE, 320, START, START
    audio = streams(agent, user)
    audio[..., CODEBOOKS + 1 :] = NOTHING
    with torch.no_grad():
        hidden = talker.temporal(text, audio)
        expected = talker.text_logits(hidden)[0]
        depth = talker.depth(hidden[0, :-1], text[0, 1:], audio[0, 1:, :CODEBOOKS])

    state = model.lm.allocate(1)
    sampling = SamplingState.allocate(1, torch.device("cpu"))
    active = torch.ones(1, dtype=torch.bool)
    ids = torch.cat([text[..., None], export.to_ids(agent), export.to_ids(user)], dim=-1)
    for frame in range(FRAMES + 1):
        inputs = LMInputs(ids[:, frame], torch.ones_like(ids[:, frame], dtype=torch.bool))
        output = step(model.lm, state, inputs, sampling, active, CODEBOOKS)
        if frame == 0:
            continue
        assert torch.allclose(output.text_logits[0], expected[frame - 1], atol=8e-2)
        for level, logits in enumerate(output.audio_logits):
            block = slice(export.first_id(level), export.first_id(level) + CODES)
            assert torch.allclose(
                logits[0, block], export.SHARPNESS * depth[level, frame - 1, :CODES], atol=2e-1
            )
            assert torch.allclose(
                logits[0, SILENCE_CODES[level]],
                export.SHARPNESS * depth[level, frame - 1, SILENCE],
                atol=2e-1,
            )
            assert (logits[0] < -30).sum() == 2048 - CODES - 1
