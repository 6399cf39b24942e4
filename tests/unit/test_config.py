"""A checkpoint's config.json: read as it is meant, or refused before anything is built of it."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from golden import CONFIG, GOLDEN
from mutation import memory_within, mutants

from personaplex.config import ModelConfig
from personaplex.errors import ConfigError

TEXT = (GOLDEN / "config.json").read_bytes()


def changed(path: str, value: Any) -> dict[str, Any]:
    """The golden config with one value in place of another."""
    data: dict[str, Any] = json.loads(TEXT)
    *parents, key = path.split(".")
    section = data
    for parent in parents:
        section = section[parent]
    section[key] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("lm.dim", 2**31, "dim must be a whole number from 1 to 65536"),
        ("lm.dim", 0, "dim must be"),
        ("lm.dim", -64, "dim must be"),
        ("lm.dim", "64", "dim must be"),
        ("lm.dim", 64.0, "dim must be"),
        ("lm.dim", True, "dim must be"),
        ("lm.dim", None, "dim must be"),
        ("lm.dim", 34, "width 34 does not divide into 2 even heads"),
        ("lm.num_heads", 0, "num_heads must be"),
        ("lm.num_layers", 10**9, "num_layers must be a whole number from 1 to 256"),
        ("lm.depformer_num_layers", 10**9, "depformer_num_layers must be"),
        ("lm.context", 10**12, "context must be"),
        ("lm.text_card", 10**12, "text_card must be"),
        ("lm.hidden_scale", float("nan"), "hidden_scale must be"),
        ("lm.hidden_scale", float("inf"), "hidden_scale must be"),
        ("lm.hidden_scale", 10**400, "hidden_scale must be"),
        ("lm.hidden_scale", "4", "hidden_scale must be"),
        ("lm.max_period", -1, "max_period must be"),
        ("lm.delays", 7, "config.json"),
        ("lm.delays", [0], "delays must be"),
        ("lm", [], "config.json"),
        ("lm", None, "config.json"),
        ("mimi", "text", "config.json"),
        ("mimi.seanet", None, "config.json"),
        ("mimi.seanet.ratios", [8, 6, 5, 8], "ratios must be"),
        ("mimi.seanet.ratios", [2] * 64, "ratios must be"),
        ("mimi.seanet.ratios", 4, "config.json"),
        ("mimi.seanet.n_filters", 2**40, "n_filters must be"),
        ("mimi.seanet.dimension", 64, "must be equal"),
        ("mimi.quantizer.n_q", 10**6, "n_q must be a whole number from 1 to 256"),
    ],
)
def test_sizes_no_model_has(path: str, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ModelConfig.from_json(changed(path, value))


def test_an_absent_or_zero_depth_feed_forward_follows_the_scale() -> None:
    data = changed("lm.depformer_dim_feedforward", 0)
    assert ModelConfig.from_json(data) == CONFIG  # 66 is what 4.125 times 16 gives


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in data if isinstance(data, dict) else ():
        yield from leaves(data[key], (*path, key))


ODD = (None, True, -1, 0, 1, 2**63, 10**400, 1e308, float("nan"), "", "x", [], [[]], {}, {"dim": 1})


def test_any_other_value_anywhere_raises_nothing_else() -> None:
    whole = json.loads(TEXT)
    paths = [path for path in leaves(whole) if path]
    refused = 0
    for path in paths:
        for odd in ODD:
            data = copy.deepcopy(whole)
            section = data
            for key in path[:-1]:
                section = section[key]
            section[path[-1]] = odd
            try:
                ModelConfig.from_json(data)
            except ConfigError:
                refused += 1
    assert refused > 3 * len(paths)


def test_damaged_text_raises_nothing_else() -> None:
    read = 0
    with memory_within(32):
        for damaged in mutants(TEXT, 1_000, random.Random(11)):
            try:
                data = json.loads(damaged)
            except ValueError:  # the caller's affair
                continue
            read += 1
            with contextlib.suppress(ConfigError):
                ModelConfig.from_json(data)
    assert read > 20
