"""Mimi against the reference's vectors: every stage streamed, codes exactly, toy and full size."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from golden import CONFIG, CPU, GOLDEN, arrays, build_mimi, difference
from safetensors.torch import load_file

from personaplex.config import CODEBOOKS, FRAME_SIZE, PRESET_7B
from personaplex.kernels import codec_ops, ops
from personaplex.model import mimi as codec
from personaplex.model.mimi import Mimi
from personaplex.model.rvq import SplitQuantizer

TRANSFORMED = 3e-5  # limit after a transformer
CONVOLVED = 2e-5  # limit after convolutions alone
PCM = 1e-5


def stream(mimi: Mimi, wav: torch.Tensor, dec_codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs both directions frame by frame with a hook after each stage; stages concatenated over time."""
    stages: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> object:
        return lambda _module, _inputs, output: stages.setdefault(name, []).append(output.clone())

    hooks = [
        mimi.encoder.register_forward_hook(keep("enc_conv")),
        mimi.encoder_transformer.register_forward_hook(keep("enc_tr")),
        mimi.downsample.register_forward_hook(keep("latent")),
        mimi.upsample.register_forward_hook(keep("up")),
        mimi.decoder_transformer.register_forward_hook(keep("dec_tr")),
    ]
    slots, frames = wav.shape[0], wav.shape[1] // FRAME_SIZE
    state, active = mimi.allocate(slots, CPU), torch.ones(slots, dtype=torch.bool)
    codes, pcm, dequant = [], [], []
    with torch.inference_mode():
        for f in range(frames):
            codes.append(
                codec.encode(mimi, state.encoder, wav[:, f * FRAME_SIZE : (f + 1) * FRAME_SIZE], active)
            )
            dequant.append(mimi.quantizer.decode(dec_codes[..., f]))
            pcm.append(codec.decode(mimi, state.decoder, dec_codes[..., f], active))
    for hook in hooks:
        hook.remove()
    out = {name: torch.cat(parts, -1) for name, parts in stages.items()}
    return out | {
        "codes": torch.stack(codes, -1),
        "dequant": torch.stack(dequant, -1),
        "pcm": torch.cat(pcm, -1),
    }


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return arrays("mimi_stream")


@pytest.mark.usefixtures("compiled")
def test_streaming_stages(vectors: dict[str, np.ndarray]) -> None:
    """Past the ring's wrap (20 steps of 25 Hz), where streaming differs from offline."""
    wav = torch.from_numpy(vectors["wav_int16"][:, 0].astype(np.float32) / 32768)
    out = stream(build_mimi(), wav, torch.from_numpy(vectors["dec_codes"]))
    assert (out["codes"].numpy() == vectors["codes"]).all()
    assert difference(out["pcm"], vectors["pcm"][:, 0]) < PCM
    assert difference(out["dequant"], vectors["dequant"]) < CONVOLVED
    for name, limit in [("enc_conv", CONVOLVED), ("up", CONVOLVED), ("enc_tr", TRANSFORMED)]:
        assert difference(out[name], vectors[name]) < limit, name
    for name in ("latent", "dec_tr"):
        assert difference(out[name], vectors[name]) < TRANSFORMED, name


def test_every_layer_of_the_first_frames(vectors: dict[str, np.ndarray]) -> None:
    expected, mimi, seen = arrays("mimi_layers"), build_mimi(), dict[str, list[torch.Tensor]]()

    def keep(name: str) -> object:
        return lambda _module, _inputs, output: seen.setdefault(name, []).append(output)

    for side in ("encoder", "decoder"):
        for index, layer in getattr(mimi, side).model.items():
            layer.register_forward_hook(keep(f"{side}.model.{index}"))
    for index, layer in enumerate(mimi.encoder_transformer.transformer.layers):
        layer.register_forward_hook(keep(f"encoder_transformer.layers.{index}"))
    wav = torch.from_numpy(vectors["wav_int16"][:1, 0].astype(np.float32) / 32768)
    state, active = mimi.allocate(1, CPU), torch.ones(1, dtype=torch.bool)
    with torch.inference_mode():
        for f in range(2):
            codec.encode(mimi, state.encoder, wav[:, f * FRAME_SIZE : (f + 1) * FRAME_SIZE], active)
            codec.decode(mimi, state.decoder, torch.from_numpy(vectors["dec_codes"][:1, :, f]), active)
    assert len(seen) == 22  # all but the ELUs
    for name, outputs in seen.items():
        for frame, output in enumerate(outputs):
            theirs = expected[f"f{frame}.{name}"]
            ours = output[0] if output[0].shape == theirs.shape else output[0][:, ::8]
            assert difference(ours, theirs) < TRANSFORMED, name


def test_quantizer(vectors: dict[str, np.ndarray]) -> None:
    z, mimi = arrays("mimi_rvq"), build_mimi()
    first, rest = mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest
    assert difference(first.vectors[0], z["codebook_first_0"]) < 1e-6 * np.abs(z["codebook_first_0"]).max()
    assert difference(rest.vectors[6], z["codebook_rest_6"]) < 1e-6 * np.abs(z["codebook_rest_6"]).max()
    codes = torch.from_numpy(vectors["dec_codes"])
    with torch.inference_mode():
        for f in range(codes.shape[-1]):
            one = codes[..., f]
            assert difference(first.decode(one[:, :1]), z["dequant_first"][..., f]) < CONVOLVED
            assert difference(rest.decode(one[:, 1:]), z["dequant_rest"][..., f]) < CONVOLVED
            latent = torch.from_numpy(z["latent"][..., f])
            assert (mimi.quantizer.encode(latent).numpy() == z["codes"][..., f]).all()


def test_quantizer_with_more_codebooks() -> None:
    z = arrays("mimi_rvq")
    quantizer = SplitQuantizer(CONFIG.mimi, used=15)
    weights = load_file(GOLDEN / "mimi.safetensors")
    prefix = "quantizer."
    quantizer.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})
    quantizer.prepare()
    for f in range(z["latent"].shape[-1]):
        codes = quantizer.encode(torch.from_numpy(z["latent"][..., f]))
        assert (codes.numpy() == z["codes_nq32"][:, :15, f]).all()


@pytest.mark.usefixtures("compiled")
def test_a_paused_slot_keeps_its_place(vectors: dict[str, np.ndarray]) -> None:
    """Inactive slots change nothing."""
    mimi = build_mimi()
    wav = torch.from_numpy(vectors["wav_int16"][:, 0, : 12 * FRAME_SIZE].astype(np.float32) / 32768)
    state, taken, codes = mimi.allocate(2, CPU), [0, 0], {0: [], 1: []}
    rng = np.random.default_rng(5)
    with torch.inference_mode():
        while min(taken) < 12:
            active = torch.from_numpy(rng.random(2) < 0.6) & (torch.tensor(taken) < 12)
            at = [min(t, 11) * FRAME_SIZE for t in taken]
            pcm = torch.stack([wav[s, at[s] : at[s] + FRAME_SIZE] for s in range(2)])
            out = codec.encode(mimi, state.encoder, pcm, active)
            for s in active.nonzero()[:, 0].tolist():
                codes[s].append(out[s])
                taken[s] += 1
    for s in range(2):
        assert (torch.stack(codes[s], -1).numpy() == vectors["codes"][s, :, :12]).all()


@pytest.mark.usefixtures("compiled")
def test_no_slot_depends_on_another() -> None:
    """To the last bit, whichever others are there, and though they have gone wrong; past the ring's wrap."""
    mimi, slots, frames = build_mimi(), 5, 24
    rng = np.random.default_rng(6)
    wav = torch.from_numpy(rng.normal(0, 0.2, (slots, frames, FRAME_SIZE)).astype(np.float32))
    codes = torch.from_numpy(rng.integers(0, CONFIG.mimi.bins, (slots, frames, CODEBOOKS)))
    heard: dict[tuple[str, int, int], list[torch.Tensor]] = {}
    with torch.inference_mode():
        for run in ("alone", "together"):
            state, taken = mimi.allocate(slots, CPU), [0] * slots
            if run == "together":
                for kept in (*state.encoder.conv_state, *state.decoder.conv_state):
                    kept[0].fill_(torch.nan)
            while min(taken[1:]) < frames:
                if run == "alone":
                    takes_part = torch.arange(slots) == next(s for s in range(1, slots) if taken[s] < frames)
                else:
                    takes_part = torch.from_numpy(rng.random(slots) < 0.7)
                at = torch.tensor(taken).clamp(max=frames - 1)
                every = torch.arange(slots)
                takes_part &= torch.tensor(taken) < frames
                user = codec.encode(mimi, state.encoder, wav[every, at], takes_part)
                sound = codec.decode(mimi, state.decoder, codes[every, at], takes_part)
                assert not sound[~takes_part].any()
                for s in takes_part.nonzero()[:, 0].tolist():
                    for kind, out in (("codes", user), ("sound", sound)):
                        heard.setdefault((kind, s, taken[s]), []).append(out[s].clone())
                    taken[s] += 1
    for (kind, slot, frame), outs in heard.items():
        if slot:
            alone, together = outs
            assert torch.equal(alone, together), (kind, slot, frame)


def test_full_size() -> None:
    """The real dimensions, with weights any implementation can rebuild from the list of names."""
    folder = GOLDEN / "mimi_full"
    spec = importlib.util.spec_from_file_location("make_mimi_full", folder / "make_mimi_full.py")
    assert spec is not None
    maker = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(maker)
    lines = (line.split("\t") for line in (folder / "tensors-mimi.txt").read_text().splitlines())
    weights = {
        name: torch.from_numpy(maker.value(name, tuple(json.loads(shape)))) for name, shape, _ in lines
    }
    mimi = Mimi(PRESET_7B.mimi)
    mimi.load_state_dict(weights, strict=True, assign=True)
    mimi.prepare()
    with np.load(folder / "stream.npz") as z:
        wav = torch.from_numpy(z["wav_int16"][:, 0].astype(np.float32) / 32768)
        codes = torch.from_numpy(z["codes"].astype(np.int64))
        assert codes.shape[1] == CODEBOOKS
        out = stream(mimi, wav, codes)
        assert torch.equal(out["codes"], codes)
        assert difference(out["pcm"][:, ::4], z["pcm"][:, 0]) < PCM
        for name, every, limit in [
            ("enc_conv", 8, CONVOLVED),
            ("enc_tr", 8, TRANSFORMED),
            ("latent", 4, TRANSFORMED),
            ("dequant", 4, CONVOLVED),
            ("up", 8, CONVOLVED),
            ("dec_tr", 8, TRANSFORMED),
        ]:
            assert difference(out[name][:, ::every], z[name]) < limit, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "columns"), [(16, 8, 2), (3, 1, 2), (4, 2, 1), (1, 1, 16), (3, 1, 17)]
)
def test_convolutions_as_a_device_does_them(
    monkeypatch: pytest.MonkeyPatch, kernel: int, stride: int, columns: int, bias: bool
) -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(3, 5, (columns - 1) * stride + kernel, generator=random)
    weight = torch.randn(7, 5, kernel, generator=random)
    offset = torch.randn(7, generator=random) if bias else None
    expected = torch.nn.functional.conv1d(x, weight, offset, stride)
    monkeypatch.setattr(ops, "uses_triton", lambda _: True)
    ours = codec_ops.conv1d(x, weight, offset, stride)
    assert ours.shape == expected.shape == (3, 7, columns)
    assert (ours - expected).abs().max() < 1e-5
