"""Prompts to tokens, tokens to text, and the prompt library."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from mutation import memory_within, mutants

from personaplex.config import PRESET_TINY, TEXT_EPAD, TEXT_PAD
from personaplex.errors import BadParameter, CheckpointError, UnknownVoice
from personaplex.persona import DEFAULT_VOICE, PROMPTS, VOICES, Persona, voice_name
from personaplex.text import PieceDecoder, Tokenizer

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TINY = Path(__file__).parents[2] / "personaplex" / "data" / "tiny-tokenizer.model"


@pytest.fixture(scope="module")
def golden() -> Tokenizer:
    return Tokenizer(GOLDEN / "tokenizer.model", size=256)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(TINY, size=PRESET_TINY.lm.text_card)


def test_prompt_tokens_are_the_references(golden: Tokenizer) -> None:
    text = json.loads((GOLDEN / "config.json").read_text())["text_prompt"]
    expected = np.load(GOLDEN / "prompt_inputs.npz")["text_tokens"].tolist()
    assert golden.encode_prompt(text) == expected
    assert golden.encode_prompt(f"  {text}\n") == expected
    assert golden.encode_prompt(f"<system> {text} <system>") == expected


def test_one_tag_alone_is_part_of_the_text(golden: Tokenizer) -> None:
    assert golden.encode_prompt("<system> hello") == golden.encode_prompt("<system> <system> hello <system>")


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_empty_prompt_has_no_tokens(golden: Tokenizer, text: str) -> None:
    assert golden.encode_prompt(text) == []


def test_pieces_are_the_references(golden: Tokenizer) -> None:
    run = np.load(GOLDEN / "e2e.npz")
    text = run["outputs"][:, 0].tolist()
    decoder = PieceDecoder(golden)
    assert [decoder.push(token) for token in text] == run["pieces"].tolist()
    assert [golden.label(t) for t in text[:2]] == ["PAD", golden.piece(text[1])]
    assert golden.label(TEXT_EPAD) == "EPAD"


def test_tiny_vocabulary_spells_any_text(tiny: Tokenizer) -> None:
    text = "You are a guide. Grüße, 你好 🙂"
    decoder = PieceDecoder(tiny)
    spoken = "".join(decoder.push(token) for token in tiny.encode_prompt(text)) + decoder.flush()
    assert spoken == f" <system> {text} <system>"


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    ids = {tokenizer.byte(token): token for token in range(tokenizer.size)}
    return [ids[value] for value in data]


def test_a_character_comes_out_whole_even_across_padding(tiny: Tokenizer) -> None:
    first, second = byte_tokens(tiny, "é".encode())
    decoder = PieceDecoder(tiny)
    assert [decoder.push(t) for t in (first, TEXT_PAD, TEXT_EPAD, second)] == ["", "", "", "é"]


def test_a_broken_character_becomes_the_replacement_character(tiny: Tokenizer) -> None:
    decoder = PieceDecoder(tiny)
    lead = byte_tokens(tiny, "é".encode())[0]
    word = next(t for t in range(tiny.size) if tiny.piece(t) == " you")
    assert decoder.push(lead) == ""
    assert decoder.push(word) == "\N{REPLACEMENT CHARACTER} you"
    assert decoder.push(lead) == ""
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.flush() == ""


@pytest.mark.parametrize(
    "source", [b"", b"not a model", Path("no-such-file.model"), "/dev", "/dev/zero", "\0"]
)
def test_unreadable_tokenizer(source: bytes | str | Path) -> None:
    with pytest.raises(CheckpointError, match="sentencepiece"):
        Tokenizer(source)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(CheckpointError, match="sentencepiece"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("piece", "other"), [("<0x41>", b"<0xZZ>"), ("<0x41>", b"\xff0x41>"), ("<pad>", b"<\xffad>")]
)
def test_a_piece_that_cannot_be_said_is_found_at_once(piece: str, other: bytes) -> None:
    """And not by the session in which the model first says it."""
    whole = TINY.read_bytes()
    assert len(piece) == len(other)
    damaged = whole.replace(piece.encode(), other, 1)
    assert damaged != whole
    with pytest.raises(CheckpointError, match="sentencepiece"):
        Tokenizer(damaged)


def test_damaged_tokenizers_raise_nothing_else() -> None:
    """What is still taken can say every piece and read any text."""
    taken, whole = 0, TINY.read_bytes()
    with memory_within(64):
        for damaged in mutants(whole, 300, random.Random(11)):
            try:
                tokenizer = Tokenizer(damaged)
            except CheckpointError:
                continue
            taken += 1
            decoder = PieceDecoder(tokenizer)
            for token in range(tokenizer.size):
                tokenizer.label(token)
                decoder.push(token)
            tokenizer.encode_prompt("Grüße, 你好 🙂")
    assert 0 < taken < 200


def test_a_role_text_with_lone_surrogates(tiny: Tokenizer) -> None:
    """As arguments and JSON may hold them."""
    with pytest.raises(BadParameter, match="Unicode"):
        tiny.encode_prompt("caf\udce9")


def test_tokenizer_of_another_size() -> None:
    with pytest.raises(CheckpointError, match="256 pieces, the model needs 32000"):
        Tokenizer(GOLDEN / "tokenizer.model", size=32_000)


def test_library_names_real_voices() -> None:
    assert len(VOICES) == len(set(VOICES)) == 18
    assert DEFAULT_VOICE in VOICES
    for key, prompt in PROMPTS.items():
        assert prompt.id == key
        assert prompt.text.strip() == prompt.text != ""
        assert prompt.voices
        assert set(prompt.voices) <= set(VOICES)
    assert Persona().text_prompt == PROMPTS["assistant"].text


@pytest.mark.parametrize("name", ["NATF2", "NATF2.pt", "my_voice-3", "a" * 64])
def test_voice_names(name: str) -> None:
    assert voice_name(name) == name.removesuffix(".pt")


@pytest.mark.parametrize(
    "name",
    ["", ".pt", "../NATF2", "/etc/passwd", "a/b.pt", "NATF2.wav", "NATF2.pt.pt", "a" * 65, "NATF2\n", "é"],
)
def test_a_voice_name_is_never_a_path(name: str) -> None:
    with pytest.raises(UnknownVoice):
        voice_name(name)
