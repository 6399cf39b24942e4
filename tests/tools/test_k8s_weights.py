"""What runs inside the images as jobs: filling the weights' cache, and one conversation's own parts."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from echo_service import EchoService
from kube import chart

from k8s import conversation
from personaplex.model.hub import LM_FILE, MIMI_FILE, TOKENIZER_FILE, VOICES_FILE

REPO, COMMIT = "models--nvidia--personaplex-7b-v1", "0123456789abcdef0123456789abcdef01234567"


def _fetch(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m k8s.fetch_weights` with no network, so that only the cache can answer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "k8s.fetch_weights", *arguments]
    return subprocess.run(command, cwd=chart.ROOT, env=environment, capture_output=True, text=True)


def _cache(home: Path) -> Path:
    """A cache as the hub's client lays it out, with the real repository's files; returns the snapshot."""
    repository = home / "hub" / REPO
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in (LM_FILE, MIMI_FILE, TOKENIZER_FILE):
        (snapshot / name).write_bytes(b"weights")
    voice = home / "NATF0.pt"
    voice.write_bytes(b"voice")
    with tarfile.open(snapshot / VOICES_FILE, "w:gz") as archive:
        archive.add(voice, "voices/NATF0.pt")
    return snapshot


def test_a_filled_cache_has_its_voices_unpacked_and_then_its_marker(tmp_path: Path) -> None:
    """Replicas mount the cache read-only: nothing may be left for them to write."""
    snapshot = _cache(tmp_path)
    marker = tmp_path / "ready"
    done = _fetch(tmp_path, "--marker", str(marker))
    assert done.returncode == 0, done.stderr
    assert (snapshot / "voices" / "NATF0.pt").read_bytes() == b"voice"
    assert marker.exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != marker}
    assert _fetch(tmp_path, "--marker", str(marker)).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != marker} == before


def test_a_missing_file_leaves_no_marker_and_says_what_to_do(tmp_path: Path) -> None:
    snapshot = _cache(tmp_path)
    (snapshot / MIMI_FILE).unlink()
    marker = tmp_path / "ready"
    done = _fetch(tmp_path, "--marker", str(marker))
    assert done.returncode == 1
    assert done.stderr.startswith(f"weights not fetched: {MIMI_FILE}")
    assert not marker.exists()


def test_the_tone_is_heard_and_its_length_known(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    conversation.tone(path, 1.5)
    assert conversation.length(path) == pytest.approx(1.5)


def test_the_first_key_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# for tests\n\n  one \ntwo\n")
    assert conversation.first_key(path) == "one"
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        conversation.first_key(path)


def test_no_service_is_an_error_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["conversation", "--url", "ws://127.0.0.1:1/api/chat"])
    assert conversation.main() == 1
    assert capsys.readouterr().err.startswith("no conversation: ")


def test_the_key_opens_the_conversation_and_is_on_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line can be read by everyone on the machine."""
    run, commands = subprocess.run, []

    def seen(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(" ".join(command))
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", seen)
    with EchoService() as service:
        conversation.converse(service.url, "a-secret", seconds=0.4)
    assert service.headers[0]["authorization"] == "Bearer a-secret"
    (command,) = commands
    assert "personaplex.client" in command
    assert "a-secret" not in command
