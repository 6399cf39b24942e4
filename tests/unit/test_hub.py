"""Finding a checkpoint's files. The hub is an HTTP server on this machine, asked by the real hub client."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from personaplex.config import PRESET_7B, PRESET_TINY, ModelConfig
from personaplex.errors import CheckpointError, ConfigError
from personaplex.model import hub
from personaplex.model.hub import DEFAULT_REPO, LM_FILE, MIMI_FILE, TOKENIZER_FILE, VOICES_FILE, resolve

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOKEN = "hf_" + "x" * 34
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Answers like the Hugging Face hub; `refusal` = (status, error code) makes it refuse everything."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {name: name.encode() * 100 for name in (LM_FILE, MIMI_FILE, TOKENIZER_FILE, VOICES_FILE)}
        self.refusal: tuple[int, str] | None = None
        self.cut = False  # the connection breaks off in the middle of a file
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        if self.server.refusal is not None:
            status, code = self.server.refusal
            self.send_response(status)
            self.send_header("X-Error-Code", code)
        elif name not in self.server.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            content = self.server.files[name]
            self.send_response(200)
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if self.server.cut else content)
            return
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    download = functools.partial(
        huggingface_hub.hf_hub_download, endpoint=endpoint, cache_dir=tmp_path / "cache", etag_timeout=2
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's pauses between its attempts
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_all_files_come_from_the_hub_and_then_from_its_cache(remote: Hub) -> None:
    checkpoint = resolve("7b")
    assert checkpoint.config == PRESET_7B
    assert not checkpoint.built_in
    for path, name in [
        (checkpoint.lm, LM_FILE),
        (checkpoint.mimi, MIMI_FILE),
        (checkpoint.tokenizer, TOKENIZER_FILE),
        (checkpoint.voices, VOICES_FILE),
    ]:
        assert path is not None
        assert path.read_bytes() == remote.files[name]
    remote.refusal = (503, "")
    assert resolve("7b") == checkpoint


def test_a_revision_is_asked_for_by_name(remote: Hub) -> None:
    resolve("7b", revision="v1.2")
    asked = [path for path in remote.asked if path.endswith(LM_FILE)]
    assert asked
    assert all("/resolve/v1.2/" in path for path in asked)


@pytest.mark.parametrize(
    ("refusal", "token", "advice"),
    [
        ((401, "GatedRepo"), None, "set it as HF_TOKEN"),
        ((403, "GatedRepo"), TOKEN, "no access to nvidia/personaplex-7b-v1: open the model page"),
        ((403, ""), TOKEN, "read gated repositories"),
        ((401, "GatedRepo"), TOKEN, "wrong or has expired"),
        ((401, ""), TOKEN, "wrong or has expired"),
        ((404, "RepoNotFound"), None, "set it as HF_TOKEN"),
        ((404, "RevisionNotFound"), None, "no revision 'v9'"),
        ((404, "EntryNotFound"), None, f"no file {LM_FILE}"),
        ((503, ""), None, "cannot be reached"),
    ],
)
def test_every_refusal_says_what_to_do(
    remote: Hub,
    monkeypatch: pytest.MonkeyPatch,
    refusal: tuple[int, str],
    token: str | None,
    advice: str,
) -> None:
    remote.refusal = refusal
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(CheckpointError, match=advice) as caught:
        resolve("7b", revision="v9")
    assert TOKEN not in str(caught.value)


def test_a_broken_off_download_is_no_file(remote: Hub) -> None:
    remote.cut = True
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors .* broke off .* run the same command again"
    ):
        resolve("7b")
    remote.cut = False
    checkpoint = resolve("7b")
    assert checkpoint.lm is not None
    assert checkpoint.lm.read_bytes() == remote.files[LM_FILE]


def test_no_network(remote: Hub) -> None:
    remote.shutdown()
    remote.server_close()
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve("7b")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(28, "No space left on device"), "HF_HOME to a larger disk"),
        (PermissionError(13, "Permission denied"), "HF_HOME to a folder of your own"),
        (RuntimeError("transfer failed"), "run the same command again"),
    ],
)
def test_trouble_of_this_machine(monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=advice):
        resolve("7b")


def test_a_malformed_repository_name() -> None:
    with pytest.raises(CheckpointError, match="OWNER/NAME"):
        resolve("7b", hf_repo="a/b/c")


def test_other_repositories_may_have_no_voices(remote: Hub) -> None:
    del remote.files[VOICES_FILE]
    assert resolve("7b", hf_repo="someone/moshi").voices is None
    with pytest.raises(CheckpointError, match=VOICES_FILE):
        resolve("7b", hf_repo=DEFAULT_REPO)


def test_given_files_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    checkpoint = resolve(
        "7b",
        moshi_weight=GOLDEN / "model.safetensors",
        mimi_weight=GOLDEN / "mimi.safetensors",
        tokenizer=GOLDEN / "tokenizer.model",
        voice_prompt_dir=tmp_path,
    )
    assert checkpoint.lm == GOLDEN / "model.safetensors"
    assert checkpoint.voices == tmp_path


def test_a_given_file_must_exist() -> None:
    with pytest.raises(CheckpointError, match=r"no such file for the codec \(Mimi\): nothing.safetensors"):
        resolve("tiny", mimi_weight=Path("/somewhere/nothing.safetensors"))


def test_directory_with_its_own_sizes() -> None:
    checkpoint = resolve(str(GOLDEN))
    assert checkpoint.config == ModelConfig.from_json(json.loads((GOLDEN / "config.json").read_text()))
    assert checkpoint.lm == GOLDEN / "model.safetensors"
    assert checkpoint.mimi == GOLDEN / "mimi.safetensors"
    assert checkpoint.voices is None


def fill(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).write_bytes(b"content")


def test_directory_with_the_hub_file_names(tmp_path: Path) -> None:
    fill(tmp_path, LM_FILE, MIMI_FILE, TOKENIZER_FILE, VOICES_FILE)
    checkpoint = resolve(str(tmp_path))
    assert checkpoint.config == PRESET_7B
    assert checkpoint.mimi == tmp_path / MIMI_FILE
    assert checkpoint.voices == tmp_path / VOICES_FILE
    (tmp_path / "voices").mkdir()
    assert resolve(str(tmp_path)).voices == tmp_path / "voices"


def test_every_missing_file_of_a_directory_is_named(tmp_path: Path) -> None:
    fill(tmp_path, LM_FILE)
    with pytest.raises(CheckpointError) as caught:
        resolve(str(tmp_path))
    for name in ("mimi.safetensors", MIMI_FILE, "tokenizer.model", TOKENIZER_FILE):
        assert name in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("content", ['{"model_type": "moshi"}', "[]", "not json", "[" * 200_000, " " * 2**21])
def test_an_unrelated_config_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    fill(tmp_path, LM_FILE, MIMI_FILE, TOKENIZER_FILE)
    (tmp_path / "config.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert resolve(str(tmp_path)).config == PRESET_7B
    assert "config.json" in caplog.text


def test_a_config_of_another_architecture_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, LM_FILE, MIMI_FILE, TOKENIZER_FILE)
    data = json.loads((GOLDEN / "config.json").read_text())
    data["lm"]["gating"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="gating"):
        resolve(str(tmp_path))


def test_a_git_lfs_pointer_is_not_the_file(tmp_path: Path) -> None:
    fill(tmp_path, MIMI_FILE, TOKENIZER_FILE)
    (tmp_path / LM_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", [LM_FILE, MIMI_FILE, TOKENIZER_FILE])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    fill(tmp_path, *{LM_FILE, MIMI_FILE, TOKENIZER_FILE} - {name})
    match kind:
        case "pipe":
            os.mkfifo(tmp_path / name)
        case "folder":
            (tmp_path / name).mkdir()
        case "device":
            (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: it is not a file"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["x" * 5_000, "\0", "a/" * 3_000])
def test_names_no_folder_can_have(name: str) -> None:
    with pytest.raises(CheckpointError):
        resolve(name)
    with pytest.raises(CheckpointError):
        resolve("tiny", voice_prompt_dir=Path(name))


def test_no_such_model() -> None:
    with pytest.raises(CheckpointError, match="no model 'huge': give tiny, 7b or a directory"):
        resolve("huge")


def test_tiny_is_built_in() -> None:
    checkpoint = resolve("tiny")
    assert checkpoint.built_in
    assert checkpoint.config == PRESET_TINY
    assert checkpoint.tokenizer.is_file()
    with pytest.raises(CheckpointError, match="tiny"):
        resolve("tiny", moshi_weight=GOLDEN / "model.safetensors")


def test_talk_is_a_name_where_the_package_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_TALK", tmp_path / "talk")
    assert not hub.talk_is_here()
    with pytest.raises(CheckpointError, match="brings no `talk` model"):
        resolve("talk")
    shutil.copytree(GOLDEN, tmp_path / "talk")
    (tmp_path / "talk" / "model.safetensors").rename(tmp_path / "talk" / "model.packed")
    assert hub.talk_is_here()
    checkpoint = resolve("talk")
    assert checkpoint.name == "talk"
    assert checkpoint.lm == tmp_path / "talk" / "model.packed"


@pytest.mark.parametrize("short", [None, *hub.FLOOR])
def test_talk_is_taken_by_itself_where_its_scores_reach_the_floor(
    short: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_TALK", tmp_path)
    assert not hub.talk_is_good(), "it is not here"
    (tmp_path / "model.packed").touch()
    scores = {name: least - 0.01 * (name == short) for name, least in hub.FLOOR.items()}
    (tmp_path / hub.SCORES_FILE).write_text(json.dumps({**scores, "price_heard": 0.1}))
    assert hub.talk_is_good() is (short is None)


def test_scores_are_those_of_the_model_that_is_shipped() -> None:
    """Its figures stand in docs/talk.md; auto goes by them."""
    folder = Path(hub.__file__).parent.parent / "data" / "talk"
    assert set(json.loads((folder / hub.SCORES_FILE).read_text())) >= set(hub.FLOOR)
