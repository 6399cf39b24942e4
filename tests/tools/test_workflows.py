"""The workflows of GitHub Actions, which cannot run here: their schema, and that what they name is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from kube import chart

from k8s import __main__ as operator
from personaplex import client_io, sessions

FOLDER = chart.ROOT / ".github" / "workflows"
TEXTS = {path.name: path.read_text() for path in sorted(FOLDER.iterdir())}
FLOWS: dict[str, Any] = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
ALL = "\n".join(TEXTS.values())
PARSERS = {
    "k8s": operator._parser,
    "personaplex.client": client_io.parser,
    "personaplex.sessions": sessions._parser,
}
WRITERS = {("release.yaml", "images"), ("release.yaml", "chart")}


def _jobs() -> Iterator[tuple[str, str, Any]]:
    for flow, content in FLOWS.items():
        for name, job in content["jobs"].items():
            yield flow, name, job


def _steps() -> Iterator[Any]:
    for _, _, job in _jobs():
        yield from job.get("steps", ())


def _commands(flow: str = "") -> Iterator[list[str]]:
    """Every simple command of every script, split into words as a shell does."""
    for name, content in FLOWS.items():
        if flow not in ("", name):
            continue
        for job in content["jobs"].values():
            for step in job.get("steps", ()):
                lexer = shlex.shlex(_lines(step.get("run", "")), posix=True, punctuation_chars="|&;()\n")
                lexer.whitespace, lexer.whitespace_split = " \t", True
                words: list[str] = []
                for word in [*lexer, ";"]:
                    if set(word) <= set("|&;()\n"):
                        if words:
                            yield words
                        words = []
                    else:
                        words.append(word)


def _lines(script: str) -> str:
    """A script without comments and with continued lines joined."""
    return re.sub(r"(^|\s)#.*", r"\1", re.sub(r"\\\n\s*", "", script))


def _modules() -> Iterator[tuple[str, list[str]]]:
    """Module and arguments of each `python -m`."""
    for words in _commands():
        for place, word in enumerate(words[:-1]):
            if word == "-m" and words[place - 1].endswith("python"):
                yield words[place + 1], words[place + 2 :]


@pytest.mark.parametrize("name", TEXTS)
def test_the_schema_holds(name: str) -> None:
    lint = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*lint, str(FOLDER / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_make_target_exists() -> None:
    targets = {target for words in _commands() if words[0] == "make" for target in words[1:]}
    assert {"check", "test", "install"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", (chart.ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_python_command_takes_its_arguments() -> None:
    used = set()
    for module, arguments in _modules():
        if module in PARSERS:
            PARSERS[module]().parse_args(arguments)
            used.add((module, *arguments[: module == "k8s"]))
        else:
            assert arguments == []
            assert importlib.util.find_spec(module), module
    wanted = {"preflight", "rollout", "smoke", "sessions", "verify"}
    assert used == {("k8s", name) for name in wanted} | {("personaplex.client",), ("personaplex.sessions",)}


def test_every_name_that_is_imported_exists() -> None:
    found = re.findall(r"from ([\w.]+) import (\w+)", ALL)
    assert ("k8s.conversation", "tone") in found
    for module, name in found:
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"(?<![\w./-])(?:\./)?((?:\.github|docker|docs|helm|k8s|tests)/[\w./-]*\w)", ALL))
    assert {"helm/personaplex/values-dev.yaml", ".github/kind/values.yaml"} <= named
    missing = [name for name in named if not (chart.ROOT / name).exists()]
    assert missing == []
    paths = FLOWS["kind.yaml"][True]["pull_request"]["paths"]  # YAML reads `on` as true
    assert [path for path in paths if not (chart.ROOT / path.removesuffix("/**")).exists()] == []


def test_every_target_of_the_dockerfile_exists() -> None:
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", (chart.ROOT / "Dockerfile").read_text(), re.MULTILINE))
    targets = set(re.findall(r"(?:--target|target:) ([\w-]+)", ALL))
    assert targets == {"gateway", "cpu", "gpu"}
    assert targets <= stages


def test_the_chart_runs_the_images_that_kind_loads_before_and_after_the_upgrade() -> None:
    scripts = "\n".join(step.get("run", "") for step in FLOWS["kind.yaml"]["jobs"]["kind"]["steps"])
    built = set(re.findall(r"-t (\S+) \.", scripts)) | {
        new for _, new in re.findall(r"docker tag (\S+) (\S+)", scripts)
    }
    installed: set[str] = set()
    kinds = []
    for words in _commands("kind.yaml"):
        if (
            words[0] == "helm"
            and "helm/personaplex" in words
            and words[1] in ("install", "upgrade", "template")
        ):
            kinds.append(words[1])
            values = shlex.split(FLOWS["kind.yaml"]["env"]["VALUES"])
            expanded = [part for word in words[2:] for part in (values if word == "$VALUES" else [word])]
            done = chart.helm("template", *expanded, cwd=chart.ROOT)
            assert done.returncode == 0, done.stderr
            installed |= set(re.findall(r"image: \"?([^\s\"]+)", done.stdout))
            assert "admin_keys_file: /etc/personaplex-admin/keys" in done.stdout
    assert kinds == ["template", "install", "upgrade", "upgrade"]
    assert installed == built


def test_permissions_are_stated_and_least() -> None:
    for name, content in FLOWS.items():
        assert content["permissions"] in ({}, {"contents": "read"}), name
        assert "concurrency" in content, name
    for flow, name, job in _jobs():
        writes = {key for key, value in job.get("permissions", {}).items() if value == "write"}
        assert writes == ({"packages", "id-token"} if (flow, name) in WRITERS else set()), (flow, name)
        assert "uses" in job or job["timeout-minutes"] <= 90, (flow, name)


def test_actions_are_pinned_by_commit_with_their_version() -> None:
    for line in re.findall(r"uses: (.*)", ALL):
        assert line.startswith("./") or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), (
            line
        )


def test_no_secret_is_written_down_and_no_expression_becomes_shell() -> None:
    """What an expression gives is code where it stands in a script; in a variable it is a value."""
    for step in _steps():
        assert "${{" not in step.get("run", ""), step
        for name, value in step.get("env", {}).items():
            if re.search("PASSWORD|TOKEN|KEY|SECRET", name):
                assert re.fullmatch(r"\$\{\{ [^'\"]*secrets\.[^'\"]* \}\}", value), name
    assert not re.search(r"gh[pousr]_\w{20}|github_pat_|AKIA\w{16}|hf_\w{20}|-----BEGIN|xox[bp]-", ALL)
    checkouts = [step for step in _steps() if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_the_pythons_that_are_tested_are_the_oldest_and_the_newest() -> None:
    project = (chart.ROOT / "pyproject.toml").read_text()
    least, beyond = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project).groups()
    tested = FLOWS["tests.yaml"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested == [f"3.{least}", f"3.{int(beyond) - 1}"]
