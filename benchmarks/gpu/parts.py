"""The measurements of `benchmarks.gpu`, one function each; every one returns what goes into the JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.setup import (
    Spread,
    fill,
    frames,
    log_of,
    make_engine,
    persona,
    set_context,
    synchronise,
    timed,
)
from personaplex.config import FRAME_SECONDS, TransformerConfig
from personaplex.engine.engine import Engine
from personaplex.engine.interface import Slot
from personaplex.kernels import ops
from personaplex.kernels.int8 import Int8Matrix
from personaplex.model import Model
from personaplex.model.ring import Ring
from personaplex.model.self_attention import rope
from personaplex.sizing import footprint


def ceilings(device: torch.device, small: bool) -> dict[str, float]:
    """What the machine does at best: copying, reading and multiplying, in GB/s and TFLOP/s."""
    size, side = (1 << 20, 256) if small else (1 << 31, 8_192)
    source = torch.ones(size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source), device, 5)
    rows = source.view(-1, 4_096)
    vector = torch.ones(4_096, dtype=torch.bfloat16, device=device)
    read = min(timed(work, device, 5) for work in (lambda: torch.mv(rows, vector), lambda: rows.amax(1)))
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    multiplied = timed(lambda: a @ a, device, 5)
    return {
        "copy_gb_s": round(2 * source.nbytes / copied / 1e9, 1),
        "read_gb_s": round(source.nbytes / read / 1e9, 1),
        "matmul_tflop_s": round(2 * side**3 / multiplied / 1e12, 2),
    }


def matmuls(
    config: TransformerConfig, device: torch.device, rows: list[int], copies: int = 8, rounds: int = 5
) -> list[dict[str, Any]]:
    """A layer's matrices times a few rows: cuBLAS in bfloat16, the int8 kernel with int8 and with bfloat16
    numbers, torch's own int8 if any.

    Microseconds and the share of the weights' bytes in them, GB/s. So many copies are cycled through that no
    cache holds them.
    """
    from personaplex.kernels import triton_int8 as int8

    found = []
    shapes = {"qkv": (3 * config.dim, config.dim), "out": (config.dim, config.dim),
              "gate": (2 * config.hidden, config.dim), "down": (config.dim, config.hidden)}  # fmt: skip
    for name, (outputs, inputs) in shapes.items():
        weights = [torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) for _ in range(copies)]
        codes = [Int8Matrix.of(weight) for weight in weights]
        ones = torch.ones(outputs, device=device)
        for n in rows:
            x = torch.randn(n, inputs, device=device, dtype=torch.bfloat16)
            ways: dict[str, Any] = {
                "bf16": (lambda x=x, w=weights: [F.linear(x, m) for m in w], weights[0].nbytes),
                "bf16_kernel": (
                    lambda x=x, w=weights, s=ones: [int8.matmul(x, m, s) for m in w],
                    weights[0].nbytes,
                ),
                "int8": (lambda x=x, w=codes: [ops.linear(x, m) for m in w], codes[0].nbytes),
            }
            row: dict[str, Any] = {"matrix": name, "rows": n}
            for way, (work, size) in ways.items():
                seconds = timed(work, device, rounds) / copies
                row[way] = {"us": round(1e6 * seconds, 2), "gb_s": round(size / seconds / 1e9, 1)}
            try:
                scale = codes[0].scale.bfloat16()
                own = timed(
                    lambda x=x, c=codes[0].codes, s=scale: torch._weight_int8pack_mm(x, c, s), device, rounds
                )
                row["torch_int8pack"] = {"us": round(1e6 * own, 2)}
            except (NotImplementedError, RuntimeError) as error:
                row["torch_int8pack"] = f"not on this device: {str(error).splitlines()[0][:80]}"
            found.append(row)
    return found


def attention_sizes(config: TransformerConfig, device: torch.device, slots: int) -> list[dict[str, Any]]:
    """The ring attention kernel at several cuts, full windows; beside it torch's over the masked ring.

    One layer. GB/s count the keys and values read once.
    """
    from personaplex.kernels import triton_attention as attention

    found = []
    one = TransformerConfig(config.dim, 1, config.heads, 1, config.context)
    for name, kind in (("bf16", torch.bfloat16), ("int8", torch.int8)):
        ring = Ring.allocate(one, slots, device, kind)
        ring.offset.fill_(config.context + 5)
        size = sum(part.nbytes for part in ring.contents)
        qkv = torch.randn(slots, 1, 3, one.heads, one.head_dim, device=device, dtype=torch.bfloat16)
        angles = rope(one, ring.offset[:, None])
        everyone = torch.ones(slots, dtype=torch.bool, device=device)
        for chunk, block, warps, stages in [(256, 32, 4, 3), (256, 32, 4, 1), (256, 32, 4, 2),
                                            (256, 32, 4, 4), (256, 64, 8, 3), (256, 16, 4, 4),
                                            (512, 32, 4, 3), (128, 32, 4, 3)]:  # fmt: skip
            sizes = {"chunk": chunk, "block": block, "warps": warps, "stages": stages}
            seconds = timed(
                lambda r=ring, s=sizes, q=qkv, t=angles, a=everyone: attention.attend(r, 0, q, t, a, **s),
                device,
                5,
            )
            found.append({"kv": name, **sizes,
                          "us": round(1e6 * seconds, 1), "gb_s": round(size / seconds / 1e9, 1)})  # fmt: skip
        if kind == torch.bfloat16:
            seen = torch.ones(slots, 1, 1, config.context, dtype=torch.bool, device=device)
            q = qkv[:, :, 0].transpose(1, 2)
            seconds = timed(
                lambda r=ring, q=q, m=seen: F.scaled_dot_product_attention(
                    q, r.k[:, 0], r.v[:, 0], attn_mask=m
                ),
                device,
                5,
            )
            found.append({"kv": name, "way": "torch, masked", "us": round(1e6 * seconds, 1),
                          "gb_s": round(size / seconds / 1e9, 1)})  # fmt: skip
    return found


def ticks(
    engine: Engine, counts: list[int], contexts: list[int], rounds: int, read_gb_s: float, kv: str
) -> list[dict[str, Any]]:
    """Sampled ticks over the first N slots with so many positions each, one after the other."""
    found = []
    runner, planned = engine._runner, footprint(engine._model.config, kv=kv)
    fill(engine, contexts[0])
    runner.pcm[: engine.slots] = torch.from_numpy(frames(engine.slots))
    for context in contexts:
        for count in (c for c in counts if c <= engine.slots):
            set_context(engine, context)
            taken = []
            for index in range(rounds + 3):
                start = time.perf_counter()
                runner.run(list(range(count)))
                if index >= 3:
                    taken.append(time.perf_counter() - start)
            spread = Spread.of(taken)
            size = planned.tick_bytes(count, context)
            bound = 1e3 * size / (read_gb_s * 1e9)
            found.append({"kv": kv, "sessions": count, "context": context, **asdict(spread),
                          "bytes_gb": round(size / 1e9, 3), "bound_ms": round(bound, 3),
                          "share_of_bound": round(bound / spread.p50, 3)})  # fmt: skip
    return found


def starts(engine: Engine, device: torch.device, rounds: int) -> dict[str, Any]:
    """From `admit` to live, the device's work included, nobody else speaking."""
    taken: dict[str, list[float]] = {"new_voice": [], "cached_voice": []}
    for index in range(rounds):
        for way in taken:
            start = time.perf_counter()
            slot = engine.open(persona(index, voice=f"voice{index}"))
            synchronise(device)
            taken[way].append(time.perf_counter() - start)
            engine.close(slot)
    return {way: asdict(Spread.of(seconds)) for way, seconds in taken.items()}


def occupy(engine: Engine, count: int, context: int) -> list[Slot]:
    """`count` live sessions, moved to `context` positions."""
    slots = [engine.open(persona(index)) for index in range(count)]
    set_context(engine, context)
    return slots


def joins(engine: Engine, context: int, joining: int, rounds: int, ticks: int) -> dict[str, Any]:
    """Ticks of the others, back to back as the loop runs them, alone and while `joining` come at once.

    `rounds` times they come, and `ticks` ticks are timed from then on. As in `engine/loop.py` at most one
    prefill chunk runs between two ticks; its time counts into the tick that has to wait for it. With new
    voices, then with cached ones.
    """
    for index in range(4):
        engine.close(engine.open(persona(index, voice=f"shared-{index}")))
    others = occupy(engine, engine.slots - joining, context)
    report: dict[str, Any] = {"others": len(others), "context": context, "joining": joining}
    sound = frames(1)[0]
    for way in ("alone", "new_voices", "cached_voices"):
        taken = []
        for turn in range(rounds):
            come = []
            if way != "alone":
                voice = "shared" if way == "cached_voices" else f"{turn}"
                come = [engine.admit(persona(i, voice=f"{voice}-{i % 4}")) for i in range(joining)]
            for _ in range(ticks):
                for slot in others:
                    engine.feed(slot, sound)
                start = time.perf_counter()
                engine.step()
                taken.append(time.perf_counter() - start)
                if way != "alone":
                    engine.prefill()
            while engine.prefilling:
                engine.prefill()
            for slot in come:
                engine.close(slot)
        report[way] = asdict(Spread.of(taken))
    for slot in others:
        engine.close(slot)
    return report


def rebuilds(
    engine: Engine, device: torch.device, lengths: list[int], counts: list[int]
) -> list[dict[str, Any]]:
    """From logs in memory to live slots, nobody else speaking: sessions that come back all at once.

    `first_s` and `last_s`: when the first and the last of them is live. `chunk_ms`: what a tick may have to
    wait for.
    """
    found = []
    for length in lengths:
        for count in (c for c in counts if c <= engine.slots):
            logs = [log_of(index, length, engine._model.config.lm) for index in range(count)]
            engine.close(engine.rebuild(logs[0]))
            chunks: list[float] = []
            live: list[float] = []
            start = time.perf_counter()
            slots = [engine.admit_rebuild(log) for log in logs]
            while len(live) < count:
                began = time.perf_counter()
                slot = engine.rebuild_chunk()
                synchronise(device)
                chunks.append(time.perf_counter() - began)
                if slot is not None:
                    live.append(time.perf_counter() - start)
            for slot in slots:
                engine.close(slot)
            found.append({"frames": length, "sessions": count, "first_s": round(live[0], 4),
                          "last_s": round(live[-1], 4), "chunk_ms": asdict(Spread.of(chunks))})  # fmt: skip
    return found


def paced(engine: Engine, count: int, context: int, seconds: float) -> dict[str, Any]:
    """`count` sessions fed one frame every 80 ms of real time: from the frames' arrival to the replies."""
    slots = occupy(engine, count, context)
    sound = frames(count)
    taken, late = [], 0
    begin = time.perf_counter()
    for index in range(int(seconds / FRAME_SECONDS)):
        due = begin + index * FRAME_SECONDS
        time.sleep(max(0.0, due - time.perf_counter()))
        for slot, frame in zip(slots, sound, strict=True):
            engine.feed(slot, frame)
        engine.step()
        done = time.perf_counter()
        taken.append(done - due)
        late += done - due > FRAME_SECONDS
    for slot in slots:
        engine.close(slot)
    spread = Spread.of(taken)
    return {"sessions": count, "context": context, "seconds": seconds, **asdict(spread), "late": late,
            "in_time": spread.p99 < 1e3 * FRAME_SECONDS}  # fmt: skip


def kernel_times(engine: Engine, counts: list[int], context: int) -> dict[str, Any]:
    """Where a tick's time goes: the kernels that take most of it, microseconds a tick."""
    from torch.profiler import ProfilerActivity, profile

    report: dict[str, Any] = {}
    for count in counts:
        set_context(engine, context)
        with profile(activities=[ProfilerActivity.CUDA]) as watch:
            for _ in range(3):
                engine._runner.run(list(range(count)))
        rows = sorted(watch.key_averages(), key=lambda e: -e.self_device_time_total)
        report[str(count)] = {
            "kernels": sum(e.count for e in rows) // 3,
            "top": [{"name": e.key[:80], "calls": e.count // 3, "us": round(e.self_device_time_total / 3, 1)}
                    for e in rows[:25]],
        }  # fmt: skip
    return report


def step_table(
    rows: list[dict[str, Any]], chunks: dict[int, float], machine: dict[str, Any]
) -> dict[str, Any]:
    """The ticks as a table for planners and the simulated engine (`personaplex/engine/steptimes.py`)."""
    contexts = sorted({row["context"] for row in rows})
    batches = sorted({row["sessions"] for row in rows})
    p50 = {(row["context"], row["sessions"]): row["p50"] for row in rows}
    return {
        "table": "steps",
        "source": "measured",
        "note": "benchmarks/gpu: medians, random 7B weights",
        "machine": machine,
        "contexts": contexts,
        "batches": batches,
        "tick_ms": [[p50[context, batch] for batch in batches] for context in contexts],
        "prefill_positions": sorted(chunks),
        "prefill_ms": [round(1e3 * chunks[n], 3) for n in sorted(chunks)],
    }


def prefill_chunks(model: Model, engine: Engine, device: torch.device, sizes: list[int]) -> dict[int, float]:
    """Seconds of one prompt chunk, by positions."""
    found = {}
    lm, ring = model.lm, engine._state.lm.ring
    for size in sizes:
        x = torch.randn(1, size, lm.config.temporal.dim, device=device, dtype=lm.dtype)
        with torch.inference_mode():
            found[size] = timed(lambda x=x: lm.transformer.prefill(x.clone(), ring, 0, 0), device, 5)
    return found


def longest(
    engine: Engine, context: int, counts: list[int], seconds: float, left_s: Callable[[], float]
) -> list[dict[str, Any]]:
    """Paced runs from the largest count down, until one is in time, or time is up."""
    found: list[dict[str, Any]] = []
    for count in sorted((c for c in counts if c <= engine.slots), reverse=True):
        if found and left_s() < seconds + 5:
            break
        found.append(paced(engine, count, context, seconds))
        if found[-1]["in_time"]:
            break
    return found


def session_memory(model: Model, kv: str, device: torch.device) -> dict[str, Any]:
    """Bytes a session as planned, and as the device's allocator counts them."""
    planned = footprint(model.config, kv=kv).session
    report: dict[str, Any] = {"kv": kv, "planned_mb": round(planned / 1e6, 2)}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        engine = make_engine(model, 4, kv=kv, graphs=False)
        report["allocated_mb"] = round((torch.cuda.memory_allocated(device) - before) / 4e6, 2)
        del engine
    return report
