"""What must not leave a cluster is taken out of text and of Kubernetes objects.

Three nets, since none is enough alone: values that are known to be secret, in every encoding in which they
are likely to be written; names behind which secrets stand (headers, settings, variables, options); and
shapes that secrets have (tokens of known issuers, queries of URLs, private keys, long random text). When in
doubt text goes: a bundle that lacks a line can be asked for again, one that held a key cannot be taken back.

    text(x)       a log, a message: a line loses everything behind a secret's name
    document(x)   an object of the API: literal values of variables go, but for names known to be plain
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

import yaml

GONE = "[removed]"
SHORTEST = 4  # characters of a known value that can be searched for: a shorter one is found everywhere

_NAME = (
    r"(?:pass(?:word|wd|phrase)|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|worker_auth_id"
    r"|authorization|\bauth\b|credential|cookie|signature)"
)
# A setting or a field whose name says that its value is the name of something, a number or a mode.
_HARMLESS = re.compile(r"(?:name|ref|file|path|_m?s|seconds|mode|options|enabled|limit)$", re.IGNORECASE)
_SECRET = re.compile(_NAME, re.IGNORECASE)
_PLAIN_VARIABLES = frozenset(
    {"HF_HOME", "HF_HUB_OFFLINE", "MARKER", "OMP_NUM_THREADS", "WEBSOCKETS_MAX_LINE_LENGTH"}
)
_PLAIN_ANNOTATIONS = (
    "cluster-autoscaler.kubernetes.io/",
    "helm.sh/",
    "karpenter.sh/",
    "meta.helm.sh/",
    "personaplex.io/",
    "ray.io/",
)
_PAIR = re.compile(
    rf"""(?P<name>{_NAME}[\w.-]{{0,64}})(?P<sep>["']?\s*[:=,]\s*b?)(?P<value>"[^"\n]*"|'[^'\n]*'|[^\n]+)""",
    re.IGNORECASE,
)
# What the group `gone` matched goes, or all where there is none.
_SHAPES = tuple(
    re.compile(pattern, flags)
    for pattern, flags in (
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
        (r"(?i)\b(?:[\w-]*authorization|cookie|set-cookie|sec-websocket-protocol|x-[\w-]*(?:key|token|secret))"
         r"""["']?\s*[:=,](?P<gone>[^\n]*)""", 0),
        (r"""(?i)\bquery(?:[_ -]?string)?["']?\s*[:=](?P<gone>[^\n]*)""", 0),
        (r"(?i)\b(?:bearer|basic)\s+(?P<gone>[^\s\"',;]+)", 0),
        (r"""\?(?P<gone>[^\s"'<>]+)""", 0),
        (r"://(?P<gone>[^/\s@\"']*)@", 0),
        (r"\b(?:hf_|sk-|ek_|gh[a-z]_|xox[a-z]-|AKIA|glpat-|nvapi-)[\w-]{6,}", 0),
        (r"\beyJ[\w-]+\.[\w.-]+", 0),
        # A key of 32 bytes, but no image's digest; then Base64 and random text.
        (r"(?<!sha256:)(?<![0-9a-fA-F])[0-9a-fA-F]{64,}", 0),
        (r"^[ \t]*[A-Za-z0-9+/]{48,}={0,2}[ \t]*$", re.MULTILINE),
        (r"(?<![\w+-])(?=[\w+-]*[a-z])(?=[\w+-]*[A-Z])(?=[\w+-]*\d)[\w+-]{32,}={0,2}", 0),
    )
)  # fmt: skip


class Redactor:
    """Takes out `secrets` wherever they stand, and whatever looks like one."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        given = [part for secret in secrets for part in parts(secret)]
        self.too_short = sum(len(part) < SHORTEST for part in given)
        forms = {form for part in given if len(part) >= SHORTEST for form in _forms(part)}
        longest_first = sorted(forms, key=len, reverse=True)
        self._known = re.compile("|".join(re.escape(form) for form in longest_first)) if forms else None

    def text(self, text: str) -> str:
        """The same with every secret replaced; only a private key takes line ends with it."""
        kept, end = [], 0
        for first, last in sorted(self._spans(text)):
            if first >= end:
                kept += [text[end:first], GONE]
            end = max(end, last)
        return "".join([*kept, text[end:]])

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Places of secrets, all found in the text as it was: one taken out first could hide another."""
        if self._known is not None:
            yield from (found.span() for found in self._known.finditer(text))
        for pattern in _SHAPES:
            group = "gone" if pattern.groups else 0
            yield from (found.span(group) for found in pattern.finditer(text))
        for found in _PAIR.finditer(text):
            if is_secret(found["name"]):
                yield found.span("value")

    def document(self, value: Any) -> Any:
        """An object as the API server sends it, safe to be shown."""
        if isinstance(value, dict):
            return self._mapping(value)
        if isinstance(value, list):
            return self._list(value)
        return self.text(value) if isinstance(value, str) else value

    def _mapping(self, value: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, inner in value.items():
            if name in ("managedFields", "data", "stringData", "binaryData"):
                continue
            shown = self.text(name)
            if name == "annotations" and isinstance(inner, dict):
                found[name] = {key: self._annotation(key, text) for key, text in inner.items()}
            elif name == "serveConfigV2":
                found[name] = self._serve_config(inner)
            elif is_secret(name) and not isinstance(inner, (dict, bool, int, float, type(None))):
                found[shown] = _names_only(inner)
            elif is_secret(name) and isinstance(inner, dict) and "value" in inner:
                found[shown] = self.document({**inner, "value": GONE})
            else:
                found[shown] = self.document(inner)
        if isinstance(value.get("name"), str) and "value" in value and not _plain(value["name"]):
            found["value"] = GONE
        return found

    def _list(self, value: list[Any]) -> list[Any]:
        """A list; what follows an option such as `--password` in a command goes."""
        found, hidden = [], False
        for item in value:
            found.append(GONE if hidden and isinstance(item, str) else self.document(item))
            hidden = isinstance(item, str) and item.startswith("-") and "=" not in item and is_secret(item)
        return found

    def _annotation(self, name: str, text: Any) -> Any:
        plain = name.startswith(_PLAIN_ANNOTATIONS) and not is_secret(name)
        return self.document(text) if plain else GONE

    def _serve_config(self, text: Any) -> str:
        try:
            config = yaml.safe_load(text)
        except (yaml.YAMLError, AttributeError):
            return GONE
        return yaml.safe_dump(self.document(config), sort_keys=False) if isinstance(config, dict) else GONE


def is_secret(name: str) -> bool:
    """Whether a secret is likely to stand behind this name of a field, a setting, a variable or an option."""
    return bool(_SECRET.search(name)) and not _HARMLESS.search(name)


def parts(secret: str) -> list[str]:
    """What of a Secret's value is secret by itself: the whole, each line, the key at a line's beginning (its
    options follow), every text in a JSON document but names of users."""
    found = {secret.strip()}
    for line in secret.splitlines():
        words = line.split()
        if words and not words[0].startswith(("#", "-----")):
            found |= {line.strip(), words[0]}
    with contextlib.suppress(ValueError):
        found |= set(_leaves(json.loads(secret)))
    return sorted(found - {""})


def _leaves(value: Any) -> Iterable[str]:
    if isinstance(value, dict):
        value = [inner for name, inner in value.items() if name not in ("username", "email")]
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _forms(secret: str) -> set[str]:
    """A secret as it may be written: in a URL, in JSON, in Base64."""
    raw = secret.encode()
    encoded = {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
    written = {json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
    bare = {text.rstrip("=") for text in encoded}
    return {secret, quote(secret, safe=""), quote_plus(secret), raw.hex(), *written, *encoded, *bare}


def _names_only(value: Any) -> Any:
    """Of a list under a secret's name the entries that are objects stay: `imagePullSecrets` names Secrets."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [{"name": item["name"]} if isinstance(item.get("name"), str) else GONE for item in value]
    return GONE


def _plain(name: str) -> bool:
    """Whether a variable's value is one of the chart's or Ray's own and no secret."""
    return name in _PLAIN_VARIABLES or (name.startswith("RAY_") and not is_secret(name))
