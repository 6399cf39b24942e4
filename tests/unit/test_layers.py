"""Norms, rotary positions, feed-forward sizes and row independence, against the parity vectors."""

from __future__ import annotations

import pytest
import torch
from golden import CONFIG, arrays, difference
from torch import nn

from personaplex.config import gated_hidden
from personaplex.kernels.constants import LAYER_NORM_EPS
from personaplex.kernels.ops import add_embedding, linear, rms_norm
from personaplex.kernels.torch_reference import apply_rope
from personaplex.model.layers import Embedding
from personaplex.model.self_attention import rope


def test_rms_norm_at_all_scales() -> None:
    z = arrays("norms")
    x, alpha = torch.from_numpy(z["x"]), torch.from_numpy(z["alpha"])
    assert difference(rms_norm(x, alpha), z["rms_f32"]) < 1e-6
    assert difference(rms_norm(x.bfloat16(), alpha).float(), z["rms_bf16_in_out"]) < 1e-6


def test_layer_norm() -> None:
    z = arrays("norms")
    norm = nn.LayerNorm(z["x"].shape[-1], eps=LAYER_NORM_EPS)
    norm.load_state_dict({"weight": torch.from_numpy(z["alpha"]), "bias": torch.from_numpy(z["ln_bias"])})
    with torch.inference_mode():
        assert difference(norm(torch.from_numpy(z["x"])), z["layer_norm"]) < 1e-6


@pytest.mark.parametrize(("dim", "feed_forward"), [(32, 128), (32, 132), (24, 99)])
def test_gated_width(dim: int, feed_forward: int) -> None:
    shapes = arrays("norms")[f"gating_shapes_dim{dim}_ff{feed_forward}"].tolist()
    hidden = gated_hidden(dim, feed_forward)
    assert shapes == [2 * hidden, dim, dim, hidden]


@pytest.mark.parametrize("offset", [0, 37, 2999])
def test_rope(offset: int) -> None:
    z = arrays("lm_stage")
    q, k = (torch.from_numpy(z[f"rope_{name}_in"]).transpose(1, 2) for name in "qk")
    angles = rope(CONFIG.lm.temporal, torch.arange(offset, offset + q.shape[1])[None])
    turned_q, turned_k = apply_rope(torch.stack([q, k], dim=2), angles).unbind(2)
    assert difference(turned_q.transpose(1, 2), z[f"rope_q_{offset}"]) < 2e-6
    assert difference(turned_k.transpose(1, 2), z[f"rope_k_{offset}"]) < 2e-6


@pytest.mark.parametrize(("inputs", "outputs"), [(32, 96), (64, 512), (128, 2048), (512, 1536)])
def test_rows_do_not_depend_on_the_batch(inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(8, inputs, generator=generator)
    whole = linear(x, weight)
    for rows in range(1, 8):
        assert torch.equal(linear(x[:rows], weight), whole[:rows])


def test_token_minus_one_embeds_as_zeros() -> None:
    table = Embedding(5, 3)
    table.weight.data.normal_()
    table.prepare()
    found = add_embedding(torch.zeros(3, 3), table.weight, torch.tensor([-1, -2, 0]))
    assert torch.equal(found[0], torch.zeros(3))
    assert torch.equal(found[1], found[2])
