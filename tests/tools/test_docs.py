"""The documentation: links resolve, snippets run, tables are short, and what it names exists."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from echo_service import EchoService

from deployments.gateway import query
from deployments.settings import Settings
from k8s import sizing as cards
from personaplex import errors, offline, sizing
from personaplex.config import PRESET_7B, Sampling
from personaplex.engine.interface import Output
from personaplex.session import core, moshi

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
README, CHAT, TROUBLE = (
    (ROOT / name).read_text() for name in ("README.md", "docs/protocols/chat.md", "docs/troubleshooting.md")
)
ROW_LIMIT = 30  # words
ELSEWHERE = ("http://", "https://", "mailto:")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """Fragments of a page's headings, as the hosting page makes them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(text: str) -> list[list[str]]:
    """Cells of every table row, heads and rules included."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def section(text: str, heading: str) -> str:
    return re.split(r"^##+ ", text.split(f"## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(ELSEWHERE):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{named(page)}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{named(page)}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    targets = re.findall(r"\]\(([^)#\s]+)", index.read_text())
    linked = {(index.parent / target).resolve() for target in targets}
    missing = {page for page in (ROOT / "docs").rglob("*.md") if page != index} - linked
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_rows_of_tables_are_short(page: Path) -> None:
    for cells in rows(page.read_text()):
        assert sum(len(cell.split()) for cell in cells) <= ROW_LIMIT, cells[0]


def test_settings_reference_is_current() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_fresh_machine_needs_two_commands() -> None:
    first = README.split("```")[0]
    assert re.findall(r"^    (make \w+)", first, re.MULTILINE) == ["make serve", "make test"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z][\w-]*)", page.read_text())) <= targets, named(page)


def test_the_readmes_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And its tokens are those of the offline command for the same recording, persona and seed."""
    (snippet,) = snippets(README)
    body = snippet.split("\n\n")[1]
    assert len(body.splitlines()) == 6
    monkeypatch.chdir(ROOT)
    heard: list[Output] = []
    exec(compile(f"{snippet}    heard.append(output)\n", "README.md", "exec"), {"heard": heard})
    recording = re.findall(r'blocks\("([^"]+)"', body)[0]
    text = re.findall(r'text_prompt="([^"]+)"', body)[0]
    options = ["--model", "tiny", "--seed", "0", "--voice-prompt", "NATF2", "--text-prompt", text]
    outputs = ["--output-wav", str(tmp_path / "a.wav"), "--output-tokens", str(tmp_path / "a.npz")]
    assert offline.main([*options, "--input-wav", recording, *outputs]) == 0
    with np.load(tmp_path / "a.npz") as saved:
        expected = saved["tokens"]
    tokens = np.array([output.tokens for output in heard])
    assert tokens.shape == expected.shape == (88, 17), "7 s"
    assert (tokens == expected).all()
    assert max(float(np.abs(output.pcm).max()) for output in heard) > 0.01


def test_the_clients_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = snippets(CHAT)
    names: dict[str, object] = {}
    with EchoService() as service:
        address = "ws://localhost:8998/api/chat"
        assert address in snippet
        exec(compile(snippet.replace(address, service.url), "chat.md", "exec"), names)
    heard = names["heard"]
    assert isinstance(heard, list)
    assert all(frame.shape == (1920,) for frame in heard)
    assert len(heard) >= 20
    assert capsys.readouterr().out, "the words beside the audio"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_know_their_options(page: Path) -> None:
    """Options of our own commands in indented or fenced shell lines."""
    for module, arguments in _commands(page.read_text()):
        known = _help(module)
        if arguments and arguments[0].isalpha():  # one of several commands, with options of its own
            known += _help(module, arguments[0])
        for argument in arguments:
            if argument.startswith("--"):
                assert argument.split("=")[0] in known, f"{named(page)}: {module} {argument}"


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    joined = text.replace("\\\n", " ")
    for module, rest in re.findall(r"python -m ((?:personaplex|loadtest)\.\w+)([^\n`|]*)", joined):
        yield module, shlex.split(rest, comments=True)


@cache
def _help(module: str, *command: str) -> str:
    said = io.StringIO()
    package = hasattr(importlib.import_module(module), "__path__")
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(f"{module}.__main__" if package else module).main([*command, "--help"])
    assert "usage:" in said.getvalue()
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_that_are_named_exist(page: Path) -> None:
    roots = "personaplex|deployments|loadtest|benchmarks|helm|k8s|tests|docs|docker"
    for path in re.findall(rf"`((?:{roots})/[\w./-]+\w)`", page.read_text()):
        file = ROOT / path
        assert file.exists() or file.with_suffix(".py").exists(), f"{named(page)}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_settings_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named_here = re.findall(r"--set (?!name=)(\w+)=", text) + re.findall(r"`([a-z]\w+_[a-z]\w*)=[^`]*`", text)
    assert set(named_here) <= set(Settings.model_fields), named(page)


def test_lines_of_troubleshooting_are_in_the_sources() -> None:
    packages = [ROOT / "personaplex", ROOT / "deployments"]
    sources = [ROOT / "Makefile", *(path for folder in packages for path in folder.rglob("*.py"))]
    said = "\n".join(_strings(path) for path in sources)
    lines = [cells[0] for cells in rows(TROUBLE) if cells[0].startswith("`")]
    assert len(lines) > 30
    for line in lines:
        for part in filter(None, map(str.strip, line.strip("`").split("..."))):
            assert part in said, line


def _strings(path: Path) -> str:
    text = path.read_text()
    if path.suffix != ".py":
        return text
    constants = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return "\n".join(node.value for node in constants if isinstance(node.value, str))


def test_hardware_is_what_is_computed() -> None:
    table = rows(section(README, "Hardware"))
    sessions = {machine: number for _, machine, number in table}
    for card, machine in (("l40s", "L40S, 48 GB"), ("h200", "H200, 141 GB")):
        assert sessions[machine] == str(cards.slots(cards.CARDS[card]))
    for card in ("a100", "h100"):
        assert sessions["A100 or H100, 80 GB"] == str(cards.slots(cards.CARDS[card]))
    small = cards.Card(24 * 2**30, 1_008e9)
    assert sessions["RTX 4090, 24 GB"] == str(cards.slots(small, "int8", "int8"))


def test_bytes_are_what_is_computed() -> None:
    full, small = sizing.footprint(PRESET_7B), sizing.footprint(PRESET_7B, weights="int8", kv="int8")
    weights, session = f"{full.weights / 1e9:.1f} GB", f"{full.session / 1e9:.2f} GB"
    text = " ".join((ROOT / "docs" / "weights.md").read_text().split())
    assert f"The model takes {weights} in bfloat16, or {small.weights / 1e9:.1f} GB" in text
    assert f"Each session takes {session}, or {small.session / 1e9:.2f} GB" in text
    assert f"takes {weights} in bfloat16 and each session {session}," in " ".join(README.split())
    saved = f"{(full.weights - small.weights) / 1e9:.1f} GB"
    cluster = " ".join((ROOT / "docs" / "kubernetes.md").read_text().split())
    assert f"`settings.weights: int8` takes {saved} off" in cluster
    assert f"weights, {saved} less for 7b" in str(Settings.model_fields["weights"].description)


def test_figures_are_those_of_the_results() -> None:
    engine, serving, bursts, codec = map(_results, ("engine-cpu", "serving", "bursts", "codec"))
    table = {what: figure for what, figure, _ in rows(section(README, "Figures"))}
    found = {
        "prefill of 197 frames": [engine["prompt"]["times_naive"]],
        "eight sessions in one tick": [engine["batch"]["times_frames_per_second"]],
        "one step of one session": [
            engine[step]["times_naive"] for step in ("step_after_prompt", "step_at_full_context")
        ],
        "16 sessions": _times_baseline(serving["sessions"]["16"]),
        "the same, 64 sessions": _times_baseline(serving["sessions"]["64"]),
        "64 sessions with pages": [
            bursts["runs"][1]["kb_per_session"] / bursts["runs"][0]["kb_per_session"],
            bursts["runs"][1]["kb_per_session"] / 1_000,
        ],
        "Opus and Ogg": [codec["times_sphn"]],
    }
    full = serving["sessions"]["64"]["service"]
    words = f"{full['on_time_share']:.1%} of the answers arrived within one frame's time".replace("%", " %")
    assert words in " ".join(README.split())
    stolen = f"the least CPU steal, {full['stolen_share']:.1%}".replace("%", " %")
    assert stolen in " ".join(README.split())
    assert engine["prompt"]["frames"] == 197
    assert round(1 / engine["tiny"]["real_time_factor"]) == 15, "a fifteenth of a core"
    assert README.count("a fifteenth of a core") == 2
    for start, values in found.items():
        (figure,) = (figure for what, figure in table.items() if what.startswith(start))
        shown = re.findall(r"\d+(?:\.\d+)?", figure)
        assert len(shown) == len(values), figure
        for text, value in zip(shown, values, strict=True):
            digits = len(text.partition(".")[2])
            holds = float(text) < value if "more than" in figure else float(text) == round(value, digits)
            assert holds, f"{start}: {figure}, measured {value}"


def test_figures_of_transcription_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "transcription.md").read_text()
    for column, name in ((1, "words"), (2, "words-pipeline")):
        table = {cells[0]: cells[column] for cells in rows(section(page, "Figures"))}
        _check_transcription(table, _results(name))
    unhurt = _results("unhurt")
    assert not unhurt["broken"]
    worst = max(unhurt["conditions"][kind]["gap_most_ms"]["most"] for kind in ("slow", "killed", "absent"))
    assert f"longest gap of any call was {worst / 1_000:.2f} s" in " ".join(page.split())


def _check_transcription(table: dict[str, str], found: dict[str, Any]) -> None:
    speech, silence = found["speech"], found["no_speech"]
    rates = (speech["word_error_rate"], speech["word_error_rate_of_clean_files"])
    assert (
        table["word error rate, against the same model on the clean files"]
        == f"{rates[0]:.3f} and {rates[1]:.3f}"
    )
    assert rates[0] <= rates[1] + 0.05
    for name, key in (("starts", "start_off_by_s"), ("ends", "end_off_by_s")):
        assert table[f"{name} of words, off by"] == f"{speech[key]['p95']:.2f} s at p95"
        assert speech[key]["p95"] <= 0.2
    delay = speech["text_after_end_of_speech_s"]["p95"]
    assert table["text after the end of speech"] == f"{delay:.2f} s at p95"
    assert delay <= 2.0
    assert (silence["minutes"], silence["words"]) == (10.0, 0)
    share = found.get("cpu_seconds_of_the_gateways_ear_per_second")
    shown = "" if share is None else f"{share:.1%} of a core per session".replace("%", " %")
    assert table["what listening adds in a gateway"] == shown


def _results(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return data


def _times_baseline(run: dict[str, Any]) -> list[float]:
    return [value for key, value in run.items() if "_times_" in key]


def test_the_query_is_what_is_read() -> None:
    table = {cells[0].strip("`"): cells[1:] for cells in rows(section(CHAT, "Query"))}
    sampling = Sampling()
    for name, limit in (
        ("text_temperature", query.TEMPERATURE_LIMIT),
        ("text_topk", query.TEXT_TOPK_LIMIT),
        ("audio_temperature", query.TEMPERATURE_LIMIT),
        ("audio_topk", query.AUDIO_TOPK_LIMIT),
    ):
        values, default = table[name]
        assert values.startswith(f"0 to {limit:g};")
        assert float(default) == getattr(sampling, name)
        with pytest.raises(query.BadParameter):
            query.persona_from({name: str(limit + 1)})
    assert query.SEED_LIMIT == 2**63 - 1
    assert query.wants_status({"status": "1"})


def test_kinds_and_rates_are_those_of_the_service() -> None:
    table = {cells[0]: cells[1] for cells in rows(section(CHAT, "Messages"))}
    assert {int(kind): name for kind, name in table.items() if kind.isdigit()} == {
        kind.value: kind.name.lower() for kind in moshi.Kind
    }
    text = " ".join(CHAT.split())
    assert f"{core.MESSAGES_PER_S:g} messages and {core.BYTES_PER_S:,.0f} bytes a second" in text
    assert f"burst of {core.MESSAGE_BURST:,.0f} messages and {core.BYTE_BURST / 2**20:g} MiB" in text
    assert f"at most {moshi.MESSAGE_LIMIT:,} bytes" in text
    assert f"nothing else was sent for {core.KEEP_ALIVE_S:g} s" in text
    assert f"cut to {moshi.REASON_LIMIT} bytes" in text
    assert f"earliest {core.HANDSHAKE_DELAY_S:g} s after the upgrade" in text


def test_close_codes_and_statuses_are_those_of_the_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    ended = {kind.close_code for kind in kinds if issubclass(kind, errors.PersonaplexError)}
    told = {int(cells[0]) for cells in rows(section(CHAT, "Close codes")) if cells[0].isdigit()}
    assert told == ended | {1009}, "1009 is the WebSocket layer's"
    refused = {kind.http_status for kind in kinds if issubclass(kind, errors.PersonaplexError)}
    statuses = {int(cells[0][:3]) for cells in rows(section(CHAT, "Refusals before the upgrade"))[2:]}
    uploads = {422}  # of recordings: /api/voices has no upgrade
    assert statuses == refused - {500} - uploads | {404, 426}
