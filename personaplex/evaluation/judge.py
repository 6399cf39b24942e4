"""Ratings of what the agent said, by a language model behind any OpenAI-compatible address.

Off unless an address is given. Each answer is asked about once at temperature 0 and the rating kept in its
folder's rating.json; what cannot be understood after three tries stays unrated and is counted as such.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaplex.errors import ConfigError
from personaplex.evaluation.dataset import Sample
from personaplex.evaluation.results import BEHAVIOURS
from personaplex.evaluation.scoring import write_json
from personaplex.files import read_bounded

RATING_FILE = "rating.json"
TRIES = 3
TIMEOUT_S = 60.0
HIGHEST = 5
_REPLY_LIMIT = 2**20

_SCALE = "Give a whole number from 0 (not at all) to 5 (fully)."
_QUESTIONS: Mapping[str, tuple[str, str]] = {
    "interruption": (
        "A voice assistant was interrupted by its user. Rate how well what it said afterwards answers the "
        f'interruption. {_SCALE} Reply with JSON only: {{"relevance": number}}',
        "relevance",
    ),
    "service": (
        "A voice assistant plays a role in a phone call. Rate how natural its reply is as spoken language "
        f"(naturalness), and how well it keeps to its role and its facts (adherence). {_SCALE} "
        'Reply with JSON only: {"naturalness": number, "adherence": number}',
        "naturalness adherence",
    ),
    "overlap": (
        "While a voice assistant was speaking, other speech was heard. Say what it did afterwards: "
        '"respond" (it took up what was said), "resume" (it went on with what it had been saying), '
        '"uncertain" (it asked, hesitated or doubted that it was meant) or "unknown" (anything else, or '
        'nothing). Reply with JSON only: {"behaviour": "one of the four words"}',
        "behaviour",
    ),
}


@dataclass(frozen=True)
class Judge:
    """`url` up to and without /chat/completions; `key` is sent as a bearer token, if there is one."""

    url: str
    model: str
    key: str = ""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not self.model:
            raise ConfigError("a judge needs --judge-url http(s)://... and --judge-model")

    def rate(self, sample: Sample, record: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
        """The rating of one scored answer: kept, or asked for and kept. None where its kind has no question
        or nobody spoke; a rating with None inside is one that could not be had."""
        words = self._spoken(sample, record)
        if sample.kind not in _QUESTIONS or not words:
            return None
        instruction, names = _QUESTIONS[sample.kind]
        content = _content(sample, words)
        key = hashlib.sha256(
            "\0".join((self.model, instruction, content)).encode(errors="surrogatepass")
        ).hexdigest()
        kept = _kept(folder / RATING_FILE, key)
        if kept is not None:
            return kept
        rating = self._ask(instruction, content, names.split())
        if None not in rating.values():
            write_json(folder / RATING_FILE, {"key": key, "model": self.model, "rating": rating})
        return rating

    def _spoken(self, sample: Sample, record: Mapping[str, Any]) -> str:
        """What the agent said; after an interruption or overlap, what it said from its end on."""
        after = sample.marked.end if sample.marked is not None else 0.0
        return " ".join(text for text, start, _ in record.get("words", ()) if start >= after)

    def _ask(self, instruction: str, content: str, names: Sequence[str]) -> dict[str, Any]:
        for _ in range(TRIES):
            try:
                return understood(self._reply(instruction, content), names)
            except (OSError, ValueError, http.client.HTTPException, RecursionError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404):
                    raise ConfigError(f"the judge refuses: HTTP {error.code}") from error
        return dict.fromkeys(names)

    def _reply(self, instruction: str, content: str) -> str:
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": content}]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            data = json.loads(response.read(_REPLY_LIMIT))
        try:
            return str(data["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError("no chat completion") from error


def understood(reply: str, names: Sequence[str]) -> dict[str, Any]:
    """The JSON object in a reply, which may stand in other text. Raises ValueError for anything else."""
    start, end = reply.find("{"), reply.rfind("}")
    data = json.loads(reply[start : end + 1]) if 0 <= start < end else None
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    rating: dict[str, Any] = {}
    for name in names:
        value = data.get(name)
        if name == "behaviour":
            if value not in BEHAVIOURS:
                raise ValueError("an unknown behaviour")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= HIGHEST:
            raise ValueError("a rating outside 0 to 5")
        rating[name] = value
    return rating


def _content(sample: Sample, words: str) -> str:
    texts = "".join(f"{role}: {text}\n" for role, text in sample.texts.items() if text)
    return f"{texts}assistant: {words}"


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    try:
        data = json.loads(read_bounded(path, _REPLY_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get("key") != key or not isinstance(data.get("rating"), dict):
        return None
    return dict(data["rating"])
