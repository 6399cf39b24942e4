"""Where a model's files are: the Hugging Face hub, a local directory, or this package (`tiny`, `talk`).

`resolve` turns a model's name into a `Checkpoint`, a list of files that exist, without reading a tensor.
The hub's cache, its offline switch and HF_TOKEN are huggingface_hub's own and respected as they are.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from personaplex.config import PRESET_7B, PRESET_TINY, ModelConfig
from personaplex.errors import CheckpointError
from personaplex.files import LFS_ADVICE, is_lfs_pointer, read_bounded

log = logging.getLogger(__name__)

DEFAULT_REPO = "nvidia/personaplex-7b-v1"
LM_FILE = "model.safetensors"
MIMI_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER_FILE = "tokenizer_spm_32k_3.model"
VOICES_FILE = "voices.tgz"

_CONFIG_LIMIT = 2**20  # bytes
_DATA = Path(__file__).parent.parent / "data"
_TINY_TOKENIZER = _DATA / "tiny-tokenizer.model"
_TALK = _DATA / "talk"
SCORES_FILE = "scores.json"  # of `talk`, by `make score-talk`
# Shares below which a talking model makes people think that it is broken.
FLOOR = {"name_written": 0.8, "name_heard": 0.6, "intent": 0.7, "intent_noisy": 0.5, "silent": 0.95}
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[
    0
]  # of whichever HTTP library the hub client uses


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model. `lm` and `mimi` are None for the built-in `tiny`: its weights are computed."""

    name: str
    config: ModelConfig
    tokenizer: Path
    lm: Path | None
    mimi: Path | None
    voices: Path | None  # a folder of .pt files or a voices.tgz; None: tiny's own, or no voices
    lora: Path | None = None  # an adapter, merged into the language model as it is loaded
    repo: str = ""  # of one from the hub, and the commit its files are of
    revision: str = ""

    @property
    def built_in(self) -> bool:
        return self.lm is None


def resolve(
    spec: str,
    *,
    hf_repo: str = DEFAULT_REPO,
    revision: str | None = None,
    moshi_weight: Path | None = None,
    mimi_weight: Path | None = None,
    tokenizer: Path | None = None,
    voice_prompt_dir: Path | None = None,
    lora: Path | None = None,
) -> Checkpoint:
    """The checkpoint behind `spec`: `tiny`, `talk`, `7b` (the hub's `hf_repo` at `revision`) or a directory.

    A file given by its own option is used in place of the checkpoint's, and the hub is not asked for it.
    Raises CheckpointError when a file is missing or cannot be fetched, saying what to do, and ConfigError for
    a config.json of another architecture.
    """
    given = {"lm": moshi_weight, "mimi": mimi_weight, "tokenizer": tokenizer, "voices": voice_prompt_dir}
    try:
        if lora is not None and not lora.is_file():
            raise CheckpointError(f"no such file for the adapter (LoRA): {lora.name}")
        return dataclasses.replace(_resolve(spec, hf_repo, revision, given), lora=lora)
    except OSError as error:  # a name too long, a folder that may not be searched
        raise CheckpointError(f"the model's files cannot be looked up: {error.strerror}") from error


def talk_is_here() -> bool:
    """Whether this package was built with the `talk` model."""
    return (_TALK / "model.packed").is_file()


def talk_is_good() -> bool:
    """Whether the `talk` model is here and its scores reach FLOOR."""
    if not talk_is_here():
        return False
    scores = json.loads((_TALK / SCORES_FILE).read_text(encoding="utf-8"))
    return all(scores[name] >= least for name, least in FLOOR.items())


def _resolve(spec: str, hf_repo: str, revision: str | None, given: dict[str, Path | None]) -> Checkpoint:
    for part, path in given.items():
        if path is not None and not path.exists():
            raise CheckpointError(f"no such file for the {_PARTS[part]}: {path.name}")
    if spec == "tiny":
        if given["lm"] or given["mimi"]:
            raise CheckpointError("`tiny` computes its weights: name a directory to load weights from files")
        tokenizer = given["tokenizer"] or _TINY_TOKENIZER
        return Checkpoint("tiny", PRESET_TINY, tokenizer, lm=None, mimi=None, voices=given["voices"])
    if spec == "7b":
        return _from_hub(hf_repo, revision, given)
    if spec == "talk":
        if not talk_is_here():
            raise CheckpointError("this package brings no `talk` model: give tiny, 7b or a directory")
        return _from_directory(_TALK, given)
    return _from_directory(Path(spec), given)


_PARTS = {"lm": "language model", "mimi": "codec (Mimi)", "tokenizer": "tokenizer", "voices": "voices"}
_LOCAL_NAMES = {
    "lm": (LM_FILE, "model.packed"),
    "mimi": ("mimi.safetensors", "mimi.packed", MIMI_FILE),
    "tokenizer": ("tokenizer.model", TOKENIZER_FILE),
    "voices": ("voices", VOICES_FILE),
}


def _from_directory(directory: Path, given: dict[str, Path | None]) -> Checkpoint:
    if not directory.is_dir():
        raise CheckpointError(
            f"no model {directory.name!r}: give tiny, 7b or a directory that holds the files"
        )

    def find(part: str) -> Path | None:
        names = _LOCAL_NAMES[part]
        return next((directory / name for name in names if (directory / name).exists()), None)

    config_file = directory / "config.json"
    config = _read_config(config_file) if config_file.is_file() else None
    return _complete(directory.name, config or PRESET_7B, given, find)


def _from_hub(repo: str, revision: str | None, given: dict[str, Path | None]) -> Checkpoint:
    files = {"lm": LM_FILE, "mimi": MIMI_FILE, "tokenizer": TOKENIZER_FILE, "voices": VOICES_FILE}

    def find(part: str) -> Path | None:
        return _download(repo, revision, files[part], optional=part == "voices" and repo != DEFAULT_REPO)

    found = _complete("7b", PRESET_7B, given, find)
    return dataclasses.replace(found, repo=repo, revision=_commit(found.lm) or revision or "")


def _commit(path: Path | None) -> str:
    """The commit that a file in the hub's cache belongs to."""
    if path is not None and path.parent.parent.name == "snapshots":
        return path.parent.name
    return ""


def _complete(
    name: str, config: ModelConfig, given: dict[str, Path | None], find: Callable[[str], Path | None]
) -> Checkpoint:
    """Fills the parts that were not given; all but the voices must be there."""
    parts = {part: path or find(part) for part, path in given.items()}
    missing = [part for part, path in parts.items() if path is None and part != "voices"]
    if missing:
        wanted = "; ".join(f"{_PARTS[part]}: {' or '.join(_LOCAL_NAMES[part])}" for part in missing)
        raise CheckpointError(f"the model directory lacks files ({wanted})")
    for part in ("lm", "mimi", "tokenizer"):
        path = parts[part]
        assert path is not None
        _check_readable(path)
    assert parts["tokenizer"] is not None
    return Checkpoint(name, config, parts["tokenizer"], parts["lm"], parts["mimi"], parts["voices"])


def _check_readable(path: Path) -> None:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path.name} cannot be read: it is not a file")
        pointer = is_lfs_pointer(path)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    if pointer:
        raise CheckpointError(f"{path.name} {LFS_ADVICE}")


def _read_config(path: Path) -> ModelConfig | None:
    """The sizes in a config.json, or None (with a warning) when it is about something else."""
    _check_readable(path)
    try:
        data = json.loads(read_bounded(path, _CONFIG_LIMIT))
    except (OSError, ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and ("lm" in data or "mimi" in data):
        return ModelConfig.from_json(data)
    log.warning("config.json has no `lm` and `mimi` keys and is ignored: the sizes of the 7B model apply")
    return None


def _download(repo: str, revision: str | None, filename: str, *, optional: bool) -> Path | None:
    """One file from the hub, or from its cache; None when an optional file is not in the repository."""
    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=revision))
    except LocalEntryNotFoundError as error:
        refused = error.__cause__  # a token without the right to read gated models looks like no network
        if isinstance(refused, HfHubHTTPError) and refused.response.status_code == 403:
            raise CheckpointError(_access_advice(repo, refused)) from error
        raise CheckpointError(
            f"{filename} of {repo} is not in the local cache and the Hugging Face hub cannot be reached: "
            "check the network (and HF_HUB_OFFLINE), or give a directory that holds the files"
        ) from error
    except EntryNotFoundError as error:
        if optional:
            return None
        raise CheckpointError(
            f"{repo} has no file {filename}: is it a PersonaPlex or Moshi model?"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise CheckpointError(_access_advice(repo, error)) from error
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is no repository name (it should be OWNER/NAME)") from error
    except (OSError, RuntimeError, _HTTP_ERROR) as error:  # RuntimeError: the hub's own transfer library
        raise CheckpointError(_transfer_advice(repo, filename, error)) from error


def _access_advice(repo: str, error: HfHubHTTPError) -> str:
    licence = f"open the model page of {repo} on Hugging Face and accept its licence"
    if huggingface_hub.get_token() is None:
        return (
            f"{repo} needs a Hugging Face account: {licence}, make an access token with the right to read, "
            "and set it as HF_TOKEN"
        )
    if error.response is not None and error.response.status_code == 401:
        return (
            f"{repo} does not exist, or the access token in HF_TOKEN is wrong or has expired: make a new one"
        )
    return (
        f"the account of this HF_TOKEN has no access to {repo}: {licence} with it, see that the token may "
        "read gated repositories, then try again"
    )


def _transfer_advice(repo: str, filename: str, error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        if status == 401:
            return f"the access token in HF_TOKEN is wrong or has expired: {repo} refused it (401)"
        return f"the Hugging Face hub answered {status} for {filename} of {repo}: try again later"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for {filename} of {repo}: free some, or point HF_HOME to a larger disk"
    if isinstance(error, PermissionError):
        return f"the cache for {filename} of {repo} cannot be written: point HF_HOME to a folder of your own"
    return (
        f"fetching {filename} of {repo} broke off ({type(error).__name__}): run the same command again, "
        "what has arrived is kept"
    )
