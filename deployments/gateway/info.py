"""What there is to choose from, as the page and other clients read it: voices and roles. Needs no Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from personaplex.persona import DEFAULT_VOICE, PROMPTS, TALK_PROMPTS, VOICES, Persona, Prompt

_FAMILIES = {
    "NATF": "Natural, female",
    "NATM": "Natural, male",
    "VARF": "Varied, female",
    "VARM": "Varied, male",
}
_OWN_FAMILY = "Of this service"
_MANNERS = ("reading the news", "friendly service", "teaching", "everyday chat")


def voice_list(names: Iterable[str]) -> dict[str, Any]:
    """`{"voices": [{"name", "family", "description"}], "default"}`; published voices first, then own ones."""
    known = {name: place for place, name in enumerate(VOICES)}
    ordered = sorted(names, key=lambda name: (known.get(name, len(known)), name))
    return {"voices": [_describe(name) for name in ordered], "default": DEFAULT_VOICE}


def prompt_list(model: str | None = None) -> dict[str, Any]:
    """`{"prompts": [{"id", "label", "text", "voices"}], "default"}`, which `model` knows best first.

    The default is for an empty query, but for `talk` one of the few roles that it can play.
    """
    prompts: dict[str, Prompt] = dict(PROMPTS)
    default = next(prompt.id for prompt in PROMPTS.values() if prompt.text == Persona().text_prompt)
    if model == "talk":
        prompts = {**TALK_PROMPTS, **PROMPTS}
        default = next(iter(TALK_PROMPTS))
    return {"prompts": [dataclasses.asdict(prompt) for prompt in prompts.values()], "default": default}


def _describe(name: str) -> dict[str, str]:
    if name not in VOICES:
        return {"name": name, "family": _OWN_FAMILY, "description": ""}
    natural = name.startswith("NAT")
    description = f"Suited to {_MANNERS[int(name[-1])]}" if natural else "A character of its own"
    return {"name": name, "family": _FAMILIES[name[:4]], "description": description}
