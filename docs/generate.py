"""Keeps docs/settings.md in step with deployments/fields.py.

    python docs/generate.py            # rewrites it when it is stale
    python docs/generate.py --check    # changes nothing; exit code 1 when it is stale

Sections begin at the field named in SECTIONS; within them the fields have the order of the settings.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments.settings import ENV_PREFIX, Settings

PAGE = Path(__file__).resolve().parent / "settings.md"

SECTIONS = {
    "model": "Model",
    "slots": "Sessions",
    "replicas_min": "Replicas",
    "spare_slots": "Autoscaling",
    "media_host": "Media link",
    "gateways_min": "Gateways",
    "api_keys": "Access",
    "log_level": "Observability",
}

HEAD = f"""\
# Settings

Generated from `deployments/fields.py` by `python docs/generate.py`. Do not edit.

A setting `slots` is an argument of `deployments:build` (`slots=8`), an option of the server
(`--set slots=8`), a variable (`{ENV_PREFIX}SLOTS=8`) or a key under `settings` in the chart's values, except
those that the chart derives. Arguments take precedence over variables, variables over defaults. Unknown names
are refused at start. Lists and maps are JSON; lists of keys, origins and networks may also be separated by
commas. API keys are refused on a command line, which the process list shows, and masked in logs.
"""

_TYPES = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "object": "map",
    "array": "list",
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


def page() -> str:
    """The reference, in Markdown. Raises KeyError when a section begins at a field that is gone."""
    fields = Settings.model_json_schema()["properties"]
    missing = SECTIONS.keys() - fields.keys()
    if missing:
        raise KeyError(f"no such settings: {', '.join(sorted(missing))}")
    return HEAD + "".join(_entries(fields))


def _entries(fields: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, schema in fields.items():
        if name in SECTIONS:
            yield f"\n## {SECTIONS[name]}\n"
        default = Settings.model_fields[name].get_default(call_default_factory=True)
        yield f"\n### {name}\n\n{_kind(schema)}; {_default(default)}.\n\n{schema['description']}\n"


def _kind(schema: dict[str, Any]) -> str:
    """`integer, at least 1, at most 512`, or the values there are."""
    variants = [variant for variant in schema.get("anyOf", [schema]) if variant.get("type") != "null"]
    (variant,) = variants
    if "enum" in variant:
        return " or ".join(f"`{value}`" for value in variant["enum"])
    kind = "path" if variant.get("format") == "path" else _TYPES[variant["type"]]
    bounds = [words.format(f"{variant[key]:,}") for key, words in _BOUNDS.items() if key in variant]
    return ", ".join([kind, *bounds])


def _default(value: Any) -> str:
    if value is None or (value in ("", (), {}) and not isinstance(value, bool)):
        return "unset by default"
    if isinstance(value, str):
        return f"default `{value}`"
    return f"default `{json.dumps(value)}`"


def main() -> int:
    parser = argparse.ArgumentParser(description="Rewrite docs/settings.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when it is stale")
    check = parser.parse_args().check
    text = page()
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    if not check:
        PAGE.write_text(text)
        return 0
    sys.stderr.write("docs/settings.md is stale: run python docs/generate.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
