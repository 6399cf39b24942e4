"""Keeps the chart's generated parts in step with their sources.

    python helm/generate.py            # rewrites what is stale
    python helm/generate.py --check    # exit code 1 when something is stale

values.schema.json gets the definition of `settings` from deployments/fields.py, less what the chart derives
itself; the chart's README.md gets its table from the `## @section` and `## @param` comments of values.yaml;
the raw manifests under k8s/ are renders of the chart (manifests.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import manifests
import yaml

from deployments.settings import Settings

CHART = Path(__file__).resolve().parent / "personaplex"
DERIVED = (  # the chart's own, or a secret that does not belong in values
    "replicas_min",
    "replicas_max",
    "gateways_min",
    "gateways_max",
    "replica_resources",
    "gateway_resources",
    "transcribers_min",
    "transcribers_max",
    "transcriber_resources",
    "api_keys",
    "api_keys_file",
    "admin_keys_file",
    "twilio_token_file",
)
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"


def settings_schema() -> dict[str, Any]:
    """JSON schema of the settings in values; derived ones stay, to be refused with their own message."""
    schema = Settings.model_json_schema()
    for name in DERIVED:
        schema["properties"][name] = {"description": "derived by the chart"}
    for field in schema["properties"].values():
        field.pop("title", None)
        field.pop("default", None)
    return {"type": "object", "additionalProperties": False, "properties": schema["properties"]}


def chart_schema() -> str:
    """values.schema.json with the settings of this moment."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    schema["$defs"]["settings"] = settings_schema()
    return json.dumps(schema, indent=2) + "\n"


def values_table(text: str) -> str:
    """Markdown from the comments of values.yaml. Raises KeyError for a @param that is no value."""
    values, lines = yaml.safe_load(text), []
    for kind, rest in re.findall(r"^## @(section|param) (.*)$", text, re.MULTILINE):
        if kind == "section":
            lines += ["", f"### {rest}", "", "| value | what it does | default |", "| --- | --- | --- |"]
        else:
            name, _, description = rest.partition(" ")
            lines.append(f"| `{name}` | {description} | {_shown(_at(values, name))} |")
    return "\n".join(lines).lstrip("\n") + "\n"


def parameters(text: str) -> list[str]:
    """Dotted names of the documented values."""
    return re.findall(r"^## @param (\S+)", text, re.MULTILINE)


def _at(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f"`{text}`" if len(text) <= 60 else "see values.yaml"


def readme() -> str:
    """README.md of the chart with the table of this moment."""
    text = (CHART / "README.md").read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + "\n" + values_table((CHART / "values.yaml").read_text()) + "\n" + END + tail


def main() -> int:
    parser = argparse.ArgumentParser(description="Rewrite the chart's generated parts.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 when something is stale"
    )
    check = parser.parse_args().check
    stale = _bring(CHART / "values.schema.json", chart_schema(), check)
    stale |= _bring(CHART / "README.md", readme(), check)
    for path, text in manifests.files().items():  # after the schema, which rendering reads
        stale |= _bring(path, text, check)
    return int(check and stale)


def _bring(path: Path, text: str, check: bool) -> bool:
    """Writes `text` unless it is there already, or only looks; whether it was stale."""
    if path.exists() and path.read_text() == text:
        return False
    if not check:
        path.write_text(text)
    print(f"{'stale' if check else 'rewritten'}: {path.relative_to(CHART.parents[1])}")
    return True


if __name__ == "__main__":
    sys.exit(main())
