"""The query of an upgrade."""

from __future__ import annotations

import pytest

from deployments.gateway.query import SEED_LIMIT, persona_from, read_query, wants_status
from personaplex.config import Sampling
from personaplex.errors import BadParameter, UnknownVoice
from personaplex.persona import Persona


def test_an_empty_query_is_the_default_persona_with_a_seed_of_its_own() -> None:
    first, second = persona_from({}), persona_from({})
    assert (first.voice, first.text_prompt) == (Persona().voice, Persona().text_prompt)
    assert first.sampling.text_seed == first.sampling.audio_seed
    assert first.sampling.text_seed != second.sampling.text_seed


def test_the_stock_web_clients_query_is_read() -> None:
    query = (
        b"worker_auth_id=k&email=a%40b&text_temperature=0.7&text_topk=25&audio_temperature=0.8&audio_topk=250"
        b"&pad_mult=0&text_seed=12&audio_seed=34&repetition_penalty_context=64&repetition_penalty=1"
        b"&text_prompt=You%20enjoy+it.%20%E4%BD%A0&voice_prompt=VARM4.pt"
    )
    persona = persona_from(read_query(query, 16_384))
    assert persona == Persona("VARM4", "You enjoy it. 你", Sampling(0.7, 25, 0.8, 250, 12, 34))


def test_one_seed_does_for_both_and_minus_one_is_none() -> None:
    sampling = persona_from({"seed": "5", "audio_seed": "6"}).sampling
    assert (sampling.text_seed, sampling.audio_seed) == (5, 6)
    assert persona_from({"text_seed": "-1", "seed": "9"}).sampling.text_seed == 9
    assert persona_from({"seed": str(SEED_LIMIT)}).sampling.text_seed == 2**63 - 1


def test_an_empty_prompt_is_a_prompt_and_the_first_of_two_names_counts() -> None:
    assert persona_from({"text_prompt": ""}).text_prompt == ""
    assert read_query(b"a=1&a=2", 100) == {"a": "1"}


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        (b"status=1", True),
        (b"text_prompt=a&status=%31", True),
        (b"status=0&status=1", False),
        (b"status=xyz", False),
        (b"status=", False),
        (b"text_prompt=%26status=1", False),
        (b"", False),
    ],
)
def test_status_is_read_like_every_other_name(query: bytes, wanted: bool) -> None:
    assert wants_status(read_query(query, 100)) is wanted


@pytest.mark.parametrize(
    ("text", "value"), [("0.7", 0.7), (".7", 0.7), ("1.", 1.0), ("7e-1", 0.7), (".5e0", 0.5)]
)
def test_numbers_as_programs_write_them(text: str, value: float) -> None:
    assert persona_from({"text_temperature": text}).sampling.text_temperature == value


@pytest.mark.parametrize(
    "text",
    [".", "-.", ".e1", "nan", "inf", "-inf", "1e400", "10.1", "-0.0001", "1,5", "0x1", " 1", "1\n", "٣"],
)
def test_numbers_are_read_strictly(text: str) -> None:
    with pytest.raises(BadParameter, match="text_temperature"):
        persona_from({"text_temperature": text})


@pytest.mark.parametrize("text", ["2.0", "1e3", "-1", "32001", "1_0", "", "x"])
def test_whole_numbers_too(text: str) -> None:
    if not text:
        assert persona_from({"text_topk": text}).sampling.text_topk == Sampling().text_topk
        return
    with pytest.raises(BadParameter, match="text_topk"):
        persona_from({"text_topk": text})


@pytest.mark.parametrize("name", ["../NATF2", "/etc/passwd", "a" * 65, "NATF2\0", "voices/NATF2.pt", "é"])
def test_a_voice_is_a_name_and_never_a_path(name: str) -> None:
    with pytest.raises(UnknownVoice) as caught:
        persona_from({"voice_prompt": name})
    assert name not in str(caught.value)


@pytest.mark.parametrize("query", [b"\xff", b"a=%FF", b"a=%ED%A0%80", b"x" * 101, b"&".join([b"a=1"] * 65)])
def test_a_query_that_cannot_be_read_is_refused(query: bytes) -> None:
    with pytest.raises(BadParameter):
        read_query(query, 200 if query.startswith(b"a=1&") else 100)
