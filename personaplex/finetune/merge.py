"""A checkpoint directory from a base and an adapter; `--model DIR` then loads it like any other.

The language model keeps the types of its base's tensors. Codec, tokenizer and voices are the base's. A voice
file holds embeddings, made by the base's tables: they stay as they are where an adapter changes those tables,
here as with `--lora`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from personaplex.config import PRESET_7B, ModelConfig
from personaplex.errors import ConfigError
from personaplex.files import replacing
from personaplex.model import packed, tiny
from personaplex.model.hub import LM_FILE, Checkpoint
from personaplex.model.mimi import Mimi
from personaplex.model.weights import merged_tensors


def merge(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes `folder`. Raises ConfigError when it holds something, CheckpointError for an adapter of another
    base, OSError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and not an empty folder")
    tensors = merged_tensors(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / LM_FILE, tensors)
    if checkpoint.mimi is None:
        with torch.device("meta"):
            shapes = {n: tuple(t.shape) for n, t in Mimi(checkpoint.config.mimi).state_dict().items()}
        _save(folder / "mimi.safetensors", tiny.mimi_weights(shapes))
    else:
        suffix = packed.SUFFIX if checkpoint.mimi.suffix == packed.SUFFIX else ".safetensors"
        _copy(checkpoint.mimi, folder / f"mimi{suffix}")
    _copy(checkpoint.tokenizer, folder / "tokenizer.model")
    if checkpoint.voices is not None and checkpoint.voices.is_dir():
        shutil.copytree(checkpoint.voices, folder / "voices")
    elif checkpoint.voices is not None:
        _copy(checkpoint.voices, folder / "voices.tgz")
    if checkpoint.config != PRESET_7B:
        content = json.dumps(config_json(checkpoint.config), indent=1) + "\n"
        (folder / "config.json").write_text(content, encoding="utf-8")


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors that share their memory, as those of a checkpoint with eight depth steps do, are parted."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        own[name] = whole.clone() if whole.data_ptr() in seen else whole
        seen.add(whole.data_ptr())
    with replacing(path) as part:
        save_file(own, part, {"format": "pt"})


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as part:
        shutil.copyfile(source, part)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What `ModelConfig.from_json` reads back as `config`."""
    lm, mimi = config.lm, config.mimi
    return {
        "lm": {
            "dim": lm.temporal.dim,
            "num_layers": lm.temporal.layers,
            "num_heads": lm.temporal.heads,
            "hidden_scale": _nominal(lm.temporal.dim, lm.temporal.hidden) / lm.temporal.dim,
            "context": lm.temporal.context,
            "max_period": lm.temporal.max_period,
            "depformer_dim": lm.depth.dim,
            "depformer_num_layers": lm.depth.layers,
            "depformer_num_heads": lm.depth.heads,
            "depformer_dim_feedforward": int(_nominal(lm.depth.dim, lm.depth.hidden)),
            "card": lm.card,
            "text_card": lm.text_card,
        },
        "mimi": {
            "seanet": {
                "n_filters": mimi.filters,
                "dimension": mimi.dim,
                "ratios": list(mimi.ratios),
                "kernel_size": mimi.kernel,
                "residual_kernel_size": mimi.residual_kernel,
                "last_kernel_size": mimi.last_kernel,
                "compress": mimi.compress,
            },
            "transformer": {
                "d_model": mimi.transformer.dim,
                "num_layers": mimi.transformer.layers,
                "num_heads": mimi.transformer.heads,
                "dim_feedforward": mimi.transformer.hidden,
                "context": mimi.transformer.context,
                "max_period": mimi.transformer.max_period,
            },
            "quantizer": {"dimension": mimi.codebook_dim, "bins": mimi.bins, "n_q": mimi.codebooks},
        },
    }


def _nominal(dim: int, hidden: int) -> float:
    """A nominal feed-forward width of which `gated_hidden` makes `hidden`; a half more, against rounding."""
    if hidden == 21 * dim // 8:
        return 4.0 * dim
    width = -(-3 * hidden // 2)
    return width + 0.5 if width != 4 * dim else width + 1.5
