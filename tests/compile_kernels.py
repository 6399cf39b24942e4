"""Compiles for an H100/H200 what is launched, instead of running it: no GPU needed, only Triton's own tools.

Run in a process of its own, without Triton's interpreter: `python tests/compile_kernels.py`. Prints one line
for each kernel and its argument types, ending in the bytes of shared memory it needs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Stands in for JITFunction.run."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(self.params, args, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = _type(value)
            divisible = value.data_ptr() % 16 == 0 if isinstance(value, torch.Tensor) else (
                isinstance(value, int) and value % 16 == 0 and parameter.name not in self.do_not_specialize
            )  # fmt: skip
            if divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(self, signature, constants, attributes)
    options = {k: v for k, v in options.items() if k in ("num_warps", "num_stages")}
    made = triton.compile(source, target=HOPPER, options=options)
    print(self.fn.__name__, *[s for s in signature.values() if s.startswith("*")], made.metadata.shared)


def main() -> None:
    JITFunction.run = compile_only
    from personaplex.config import PRESET_7B, TransformerConfig
    from personaplex.kernels import triton_attention as attention
    from personaplex.kernels import triton_int8 as int8
    from personaplex.kernels import triton_pointwise as pointwise
    from personaplex.model.ring import Ring
    from personaplex.model.self_attention import rope

    cpu, temporal, codec = torch.device("cpu"), PRESET_7B.lm.temporal, PRESET_7B.mimi.transformer
    one_layer = TransformerConfig(dim=4096, layers=1, heads=32, hidden=1, context=3000)
    for config, kind, dtype, steps in [
        (one_layer, torch.bfloat16, torch.bfloat16, 1),
        (one_layer, torch.int8, torch.bfloat16, 1),
        (codec, torch.float32, torch.float32, 2),
    ]:
        ring = Ring.allocate(config, 1, cpu, kind)
        qkv = torch.zeros(1, steps, 3, config.heads, config.head_dim, dtype=dtype)
        angles = rope(config, torch.zeros(1, steps, dtype=torch.int64))
        attention.attend(ring, 0, qkv, angles, torch.ones(1, dtype=torch.bool))
    assert temporal.head_dim == one_layer.head_dim
    depth = PRESET_7B.lm.depth
    cache = torch.zeros(2, 1, depth.heads, depth.context, depth.head_dim, dtype=torch.bfloat16)
    qkv = torch.zeros(1, 1, 3, depth.heads, depth.head_dim, dtype=torch.bfloat16)
    attention.attend_depth(qkv, cache[0], cache[1], 3)
    for width in (temporal.dim, depth.dim):
        pointwise.rms_norm(torch.zeros(1, width, dtype=torch.bfloat16), torch.zeros(width), 1e-8)
    pointwise.silu_multiply(torch.zeros(1, 2 * temporal.hidden, dtype=torch.bfloat16))
    lm, row = PRESET_7B.lm, torch.zeros(1, dtype=torch.int64)
    table = torch.zeros(16 * (lm.card + 2), temporal.dim, dtype=torch.bfloat16)
    pointwise.embed(torch.zeros(1, 17, dtype=torch.int64), table, table[: lm.card + 2])
    pointwise.add_embedding(
        torch.zeros(1, depth.dim, dtype=torch.bfloat16), table[:, : depth.dim].contiguous(), row
    )
    pointwise.noise_keys(row, row, row, 9)
    for vocabulary in (PRESET_7B.lm.card, PRESET_7B.lm.text_card):
        numbers, whole = torch.zeros(1, vocabulary, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
        pointwise.sample(numbers, torch.zeros(1), whole, whole)
    for rows in (1, 32, 128):
        x, y = torch.zeros(rows, temporal.hidden, dtype=torch.bfloat16), torch.zeros(temporal.dim)
        int8.matmul(x, torch.zeros(temporal.dim, temporal.hidden, dtype=torch.int8), y)
        residual = torch.zeros(rows, temporal.dim, dtype=torch.bfloat16)
        int8.matmul(x, torch.zeros(temporal.dim, temporal.hidden, dtype=torch.int8), y, residual)


if __name__ == "__main__":
    main()
