"""Thirteen minutes in one slot: 10,000 steps, exact to the ring rule and flat in time.

One layer, whose keys and values depend on the inputs alone: so all of them can be made at once, kept by
position, and each query given exactly what the rule shows it.
"""

from __future__ import annotations

import time

import pytest
import torch

from personaplex.config import TransformerConfig
from personaplex.kernels.int8 import quantize_vectors
from personaplex.kernels.ops import finish_layer
from personaplex.kernels.torch_reference import apply_rope
from personaplex.model.ring import Ring
from personaplex.model.self_attention import rope
from personaplex.model.temporal import Temporal

CONFIG = TransformerConfig(dim=32, layers=1, heads=2, hidden=48, context=60)


def transformer() -> Temporal:
    net = Temporal(CONFIG)
    random = torch.Generator().manual_seed(6)
    for name, weight in net.named_parameters():
        if name.endswith("alpha"):
            weight.data.fill_(1.0)
        else:
            weight.data.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5, generator=random)
    net.prepare()
    return net


def by_position(net: Temporal, x: torch.Tensor, kv: str) -> torch.Tensor:
    """x [1, T, dim] -> [1, T, dim], every key and value kept: those at k are seen at q if k <= q and, once
    the ring is full, k > q + 1 - C.
    """
    layer, steps = net.layers[0], x.shape[1]
    qkv = layer.self_attn.project(layer.norm1(x))
    angles = rope(CONFIG, torch.arange(steps)[None])
    q, k = apply_rope(qkv[:, :, :2], angles)[0].transpose(0, 2).unbind(1)
    v = qkv[0, :, 2].transpose(0, 1)
    if kv == "int8":
        k, v = (codes * scale.float()[..., None] for codes, scale in map(quantize_vectors, (k, v)))
    query = torch.arange(steps)[:, None]
    key = query - torch.arange(CONFIG.context)
    seen = (key >= 0) & ((query + 1 < CONFIG.context) | (key > query + 1 - CONFIG.context))
    keys, values = (t[:, key.clamp(min=0)] for t in (k, v))  # [heads, T, C, head_dim]
    scores = (q[:, :, None] * keys).sum(-1) * CONFIG.head_dim**-0.5
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    return finish_layer(x, (weights[..., None] * values).sum(2)[None], layer.step_weights)


def empty_ring(kv: str) -> Ring:
    return Ring.allocate(CONFIG, 1, torch.device("cpu"), torch.int8 if kv == "int8" else torch.float32)


def run(net: Temporal, x: torch.Tensor, ring: Ring) -> list[torch.Tensor]:
    """One step for each position of x [1, T, dim]."""
    active = torch.ones(1, dtype=torch.bool)
    return [net.step(x[:, position].clone(), ring, active) for position in range(x.shape[1])]


def seconds(net: Temporal, x: torch.Tensor, ring: Ring) -> float:
    began = time.process_time()
    run(net, x, ring)
    return time.process_time() - began


@pytest.mark.parametrize(("kv", "steps"), [("auto", 10_000), ("int8", 1_500)])
def test_ten_thousand_frames(kv: str, steps: int) -> None:
    net, ring, young = transformer(), empty_ring(kv), empty_ring(kv)
    x = torch.randn(1, steps, CONFIG.dim, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        ours = run(net, x, ring)
        run(net, x[:, : CONFIG.context + 1], young)  # full for the first time
        difference = (torch.stack(ours, 1) - by_position(net, x, kv)).abs().amax(-1)
        # in turns, so that a busy machine is busy with both
        times = [[seconds(net, x[:, :5], one) for one in (young, ring)] for _ in range(200)]
    assert ring.offset.tolist() == [steps + 5 * len(times)]
    if kv == "auto":
        assert difference.max() < 2e-5
    else:  # a key that is the same to the last bit but one may round to the next code
        assert difference.median() < 2e-5
        assert difference.max() < 0.2
    first, last = torch.tensor(times).median(0).values
    assert last < 1.3 * first
