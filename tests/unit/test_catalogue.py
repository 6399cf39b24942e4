"""The lists behind /api/voices and /api/prompts."""

from __future__ import annotations

from deployments.gateway.info import prompt_list, voice_list
from personaplex.persona import PROMPTS, TALK_PROMPTS, VOICES, Persona


def test_every_published_voice_is_described() -> None:
    listed = voice_list(reversed(VOICES))
    assert [voice["name"] for voice in listed["voices"]] == list(VOICES)
    assert all(voice["family"] and voice["description"] for voice in listed["voices"])
    assert listed["default"] == Persona().voice


def test_own_voices_come_last() -> None:
    listed = voice_list(["alice", "VARM4", "NATF0"])
    assert [voice["name"] for voice in listed["voices"]] == ["NATF0", "VARM4", "alice"]
    assert listed["voices"][-1] == {"name": "alice", "family": "Of this service", "description": ""}


def test_the_embedded_model_is_offered_the_roles_that_it_knows() -> None:
    listed = prompt_list("talk")
    assert [prompt["id"] for prompt in listed["prompts"]] == [*TALK_PROMPTS, *PROMPTS]
    assert listed["default"] in TALK_PROMPTS
    assert prompt_list("7b") == prompt_list(None) == prompt_list()


def test_prompts() -> None:
    listed = prompt_list()
    assert [prompt["id"] for prompt in listed["prompts"]] == list(PROMPTS)
    assert PROMPTS[listed["default"]].text == Persona().text_prompt
    assert all(prompt.keys() == {"id", "label", "text", "voices"} for prompt in listed["prompts"])
