"""Adapters: their gradients, their file, the weights they make, and what refuses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import plain_lm
import pytest
import torch
from golden import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from personaplex.config import AGENT, CODEBOOKS, PRESET_TINY, EngineConfig, Sampling
from personaplex.engine.engine import Engine
from personaplex.errors import CheckpointError, ConfigError
from personaplex.finetune.adapters import Adapters, matrix, merged
from personaplex.finetune.memory import adapter_parameters, training_step
from personaplex.finetune.merge import config_json, merge
from personaplex.finetune.network import Batch, Network
from personaplex.kernels.int8 import Int8Matrix
from personaplex.loading import ModelSpec, Parts, load_parts, resolve
from personaplex.model.hub import Checkpoint
from personaplex.model.identity import Base, base_of, digest_of, digest_of_file
from personaplex.model.lora import KINDS, Adapter, read_adapter, targets, write_adapter
from personaplex.model.weights import load_model, merged_tensors
from personaplex.persona import Persona

CPU = torch.device("cpu")


def tiny(**changed: object) -> Checkpoint:
    return resolve(ModelSpec("tiny", device="cpu", **changed)).checkpoint  # type: ignore[arg-type]


def shaken(adapters: Adapters, size: float = 0.3) -> Adapters:
    """Adapters that change something: b is zero at first."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * size / parameter.shape[1] ** 0.5
            )
    return adapters


def adapted(kinds: tuple[str, ...] = KINDS, rank: int = 4, size: float = 0.3) -> Adapters:
    return shaken(Adapters(targets(PRESET_TINY.lm, kinds), rank, 1.5), size)


@pytest.fixture(scope="module")
def base() -> Base:
    return base_of(tiny())


@pytest.fixture(scope="module")
def file(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    write_adapter(path, adapted().exported(base, {"steps": 3}))
    return path


def batch(rows: int = 2, length: int = 7) -> Batch:
    """Random tokens; the second row's last positions count nothing."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 512, (rows, length + 1, 17), generator=generator)
    tokens[0, 0, 3] = -1
    text, audio = (
        torch.rand(rows, length, generator=generator),
        torch.rand(rows, length, 8, generator=generator),
    )
    text[1, -2:], audio[1, -2:] = 0, 0
    return Batch(tokens[:, :-1], tokens[:, 1:], text, audio, [None] * rows)


def plain_loss(weights: dict[str, Tensor], given: Batch) -> Tensor:
    config = PRESET_TINY.lm
    hidden = plain_lm.temporal(weights, config, given.inputs).flatten(0, 1)
    text, codes = given.targets[..., 0].flatten(), given.targets[..., AGENT].flatten(0, 1)
    said = torch.nn.functional.cross_entropy(
        hidden @ weights["text_linear.weight"].t(), text, reduction="none"
    )
    logits = plain_lm.depth(weights, config, hidden, text, codes).flatten(0, 1)
    heard = torch.nn.functional.cross_entropy(logits, codes.flatten(), reduction="none")
    return (said * given.text_weight.flatten()).sum() + (heard * given.audio_weight.flatten()).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_model(checkpointing: bool) -> None:
    """Autograd through W + scale * b a of every matrix, in a model that shares no code with this one."""
    adapters, given = adapted(rank=2), batch()
    network = Network(load_model(tiny(), CPU, torch.float32).lm, adapters, checkpointing)
    sums = network(given)
    (sums[0] + sums[1]).backward()
    found = [parameter.grad for parameter in adapters.parameters()]

    weights = merged_tensors(tiny())
    pairs = {}
    for target in adapters.targets:
        a, b = (part.detach().clone().requires_grad_() for part in adapters.pair(target.key) or ())
        pairs[target.key] = (a, b)
        change = 1.5 * (b @ a)
        first = (target.step or 0) * target.rows
        rows = torch.arange(first, first + target.rows)
        weights[target.tensor] = weights[target.tensor].index_add(0, rows, change)
    loss = plain_loss(weights, given)
    loss.backward()
    torch.testing.assert_close(sums[0] + sums[1], loss, rtol=1e-5, atol=0)
    wanted = [pair[0].grad for pair in pairs.values()] + [pair[1].grad for pair in pairs.values()]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine is not None
        assert theirs is not None
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9
    assert sum(bool(g.abs().max() > 0) for g in wanted if g is not None) > 0.9 * len(wanted)


def test_an_int8_base_has_the_gradients_of_what_it_stands_for() -> None:
    model = load_model(tiny(), CPU, torch.float32, weights="int8")
    adapters, given = adapted(rank=2), batch()
    whole = load_model(tiny(), CPU, torch.float32)
    with torch.no_grad():
        for target in adapters.targets:
            weight = matrix(model.lm, target)
            if isinstance(weight, Int8Matrix):
                place = matrix(whole.lm, target)
                assert isinstance(place, Tensor)
                place.copy_(weight.dequantize(torch.float32))
    grads = []
    for lm in (model.lm, whole.lm):
        adapters.zero_grad()
        Network(lm, adapters, checkpointing=lm is model.lm)(given)[:2].sum().backward()
        grads.append([parameter.grad for parameter in adapters.parameters()])
    for one, other in zip(*grads, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def kept_bytes(network: Network, given: Batch) -> int:
    """What autograd holds on to between the passes, less the weights."""
    lm = network.lm
    layers = [*lm.transformer.layers, *lm.depformer.layers]
    own: list[Tensor] = [*lm.parameters(), *lm.buffers(), *network.parameters()]
    own += [tensor for layer in layers for tensor in (layer.norm1.gain, layer.norm2.gain)]
    own += [part for layer in layers for part in (*layer.self_attn.inputs, *layer.self_attn.outputs)]  # type: ignore
    weights = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(given)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def test_checkpointing_keeps_less_than_half_between_the_passes() -> None:
    """Without it, what the arithmetic says; `benchmarks.finetune_memory` measures a whole process."""
    adapters = Adapters(targets(PRESET_TINY.lm), 4, 1.0)
    network, given = Network(load_model(tiny(), CPU, torch.float32).lm, adapters), batch(2, 200)
    plain = kept_bytes(network, given)
    assert plain == pytest.approx(training_step(PRESET_TINY, 400, 0, dtype="float32").activations, rel=0.05)
    network.checkpointing = True
    assert kept_bytes(network, given) <= plain / 2


def test_the_arithmetic_counts_the_adapters() -> None:
    chosen = targets(PRESET_TINY.lm)
    counted = adapter_parameters([(target.rows, target.columns) for target in chosen], 4)
    assert counted == sum(parameter.numel() for parameter in Adapters(chosen, 4, 1.0).parameters())


def spoken(parts: Parts, frames: int = 12) -> list[list[int]]:
    """Tokens of a greedy session."""
    engine = Engine(parts.model, parts.library, parts.tokenizer, EngineConfig())
    slot = engine.open(Persona(text_prompt="Hello.", sampling=Sampling().greedy()))
    generator = torch.Generator().manual_seed(2)
    said = []
    for _ in range(frames):
        engine.feed(slot, (0.1 * torch.randn(1920, generator=generator)).numpy())
        said += [output.tokens.tolist() for output in engine.step()]
    return said


def loaded(spec: ModelSpec) -> Parts:
    return load_parts(resolve(spec), EngineConfig())


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_the_merged_checkpoint_says_what_the_adapter_says(file: Path, tmp_path: Path, weights: str) -> None:
    merge(tiny(lora=file), tmp_path / "merged")
    with_adapter = spoken(loaded(ModelSpec("tiny", device="cpu", lora=file, weights=weights)))  # type: ignore
    of_merged = spoken(loaded(ModelSpec(str(tmp_path / "merged"), device="cpu", weights=weights)))  # type: ignore
    plain = spoken(loaded(ModelSpec("tiny", device="cpu", weights=weights)))  # type: ignore[arg-type]
    assert with_adapter == of_merged
    assert with_adapter != plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_another_type_merges_to_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """A checkpoint in bfloat16 run in float32: both ways round at the checkpoint's type."""
    plain = tmp_path / "base"
    merge(tiny(), plain)
    stored = {name: tensor.to(dtype) for name, tensor in load_file(plain / "model.safetensors").items()}
    save_file(stored, plain / "model.safetensors")
    checkpoint = resolve(ModelSpec(str(plain), device="cpu")).checkpoint
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, adapted().exported(base_of(checkpoint), {}))
    there = dataclasses.replace(checkpoint, lora=path)
    merge(there, tmp_path / "merged")
    one = load_model(there, CPU, torch.float32).lm
    other = load_model(resolve(ModelSpec(str(tmp_path / "merged"))).checkpoint, CPU, torch.float32).lm
    assert load_file(tmp_path / "merged" / "model.safetensors")["text_linear.weight"].dtype == dtype
    for target in targets(PRESET_TINY.lm, KINDS):
        assert torch.equal(matrix(one, target), matrix(other, target)), target.key  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_model_lent_out_with_its_adapters_is_itself_again(file: Path, weights: str) -> None:
    parts = loaded(ModelSpec("tiny", device="cpu", weights=weights))  # type: ignore[arg-type]
    before = spoken(parts)
    with merged(parts.model.lm, adapted()):
        within = spoken(parts)
    assert spoken(parts) == before
    if weights == "auto":  # int8 rounds the adapted matrix from what is rounded already
        assert within == spoken(loaded(ModelSpec("tiny", device="cpu", lora=file)))
    assert within != before


def test_the_network_gives_the_engines_logits() -> None:
    """Greedy tokens of a session, laid out again, are the likeliest ones of the network."""
    from personaplex.engine.script import compose

    parts = loaded(ModelSpec("tiny", device="cpu"))
    said = torch.tensor(spoken(parts, 20)).t()
    voice, role = parts.library.get("NATF2"), parts.tokenizer.encode_prompt("Hello.")
    prompt = compose(voice, role, PRESET_TINY.lm).frames
    script = compose(voice, role, PRESET_TINY.lm, said[:, 1:])  # row 0 is the prompt's last frame
    network = Network(parts.model.lm, Adapters([], 1, 1.0))
    with torch.no_grad():
        hidden = network.hidden(script.positions[None, :-1], [None])[0, prompt - 1 :]
        text = network.text_logits(hidden).argmax(-1)
        goal = script.positions[prompt:]
        codes = network.depth_logits(hidden, goal[:, 0], goal[:, AGENT]).argmax(-1).t()
    assert torch.equal(text, goal[:, 0])
    assert torch.equal(codes[1:], goal[1:, AGENT])
    assert torch.equal(codes[0, 0], goal[0, 1])


def test_equal_adapters_have_equal_files(base: Base, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_adapter(tmp_path / name, adapted().exported(base, {"settings": {"rank": 4}}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = read_adapter(tmp_path / "a")
    assert back.base == base
    written = adapted().exported(base, {}).pairs
    assert set(back.pairs) == set(written)
    for key, (one, other) in written.items():
        assert torch.equal(back.pairs[key][0], one)
        assert torch.equal(back.pairs[key][1], other)


def other_lm(base: Base) -> Base:
    return dataclasses.replace(base, lm="0" * 64)


def other_tokenizer(base: Base) -> Base:
    return dataclasses.replace(base, tokenizer="0" * 64, repo="firm/voice", revision="abc")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_lm, "trained on tiny .* this is tiny .*: the language model differs"),
        (other_tokenizer, "trained on firm/voice at abc .*: the tokenizer differs"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    base: Base, change: Callable[[Base], Base], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, adapted().exported(change(base), {}))
    with pytest.raises(CheckpointError, match=reason):
        load_model(tiny(lora=path), CPU, torch.float32)


def test_an_adapter_of_a_model_of_other_sizes_is_refused(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    write_adapter(path, adapted().exported(base, {}))
    checkpoint = resolve(ModelSpec(str(GOLDEN), device="cpu", lora=path)).checkpoint
    with pytest.raises(CheckpointError, match="does not fit this model: "):
        load_model(checkpoint, CPU, torch.float32)


def test_one_changed_number_makes_another_base(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(4)}
    save_file(tensors, tmp_path / "one")
    assert digest_of_file(tmp_path / "one") == digest_of(tensors)
    save_file(dict(reversed(tensors.items())), tmp_path / "two", {"format": "pt"})
    assert digest_of_file(tmp_path / "two") == digest_of(tensors)
    tensors["b"][1, 2] += 1e-6
    save_file(tensors, tmp_path / "three")
    assert digest_of_file(tmp_path / "three") != digest_of_file(tmp_path / "one")
    (tmp_path / "four").write_bytes((tmp_path / "one").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="four is damaged"):
        digest_of_file(tmp_path / "four")


def _without_metadata(adapter: Adapter, path: Path) -> None:
    save_file({"x.a": torch.ones(2, 3)}, path)


def _half_a_pair(adapter: Adapter, path: Path) -> None:
    write_adapter(path, adapter)
    _rewritten(path, lambda tensors: tensors.pop("text_linear.weight.b"))


def _not_a_number(adapter: Adapter, path: Path) -> None:
    write_adapter(path, adapter)
    _rewritten(path, lambda tensors: tensors["text_linear.weight.b"].fill_(float("nan")))


def _other_rank(adapter: Adapter, path: Path) -> None:
    write_adapter(path, dataclasses.replace(adapter, rank=5))


def _cut_off(adapter: Adapter, path: Path) -> None:
    write_adapter(path, adapter)
    path.write_bytes(path.read_bytes()[:-100])


def _later_format(adapter: Adapter, path: Path) -> None:
    write_adapter(path, adapter)
    path.write_bytes(path.read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 9'))


def _pointer(adapter: Adapter, path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def _rewritten(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (_without_metadata, "is no adapter of this project"),
        (_half_a_pair, "text_linear.weight is no pair of rank 4"),
        (_not_a_number, "text_linear.weight is not of finite float32 numbers"),
        (_other_rank, "is no pair of rank 5"),
        (_cut_off, "it is damaged or incomplete"),
        (_later_format, "has format 9, this version reads 1"),
        (_pointer, "git lfs pull"),
    ],
)
def test_a_damaged_adapter_is_refused_with_its_reason(
    base: Base, write: Callable[[Adapter, Path], None], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    write(adapted(("heads",)).exported(base, {}), path)
    with pytest.raises(CheckpointError, match=reason):
        load_model(tiny(lora=path), CPU, torch.float32)


def test_targets_are_chosen_by_kind_and_layer() -> None:
    config = PRESET_TINY.lm
    assert len(targets(config)) == 2 * 4 + 2 * CODEBOOKS * 4
    some = targets(config, ("temporal-attention",), (1,))
    assert [target.tensor.split(".")[2] for target in some] == ["1", "1"]
    with pytest.raises(ConfigError, match="'mouth' cannot be adapted: one of temporal-attention"):
        targets(config, ("mouth",))
    with pytest.raises(ConfigError, match="layers must be between 0 and 1, got 2"):
        targets(config, layers=(2,))


def test_a_merged_checkpoint_has_the_sizes_of_its_base() -> None:
    from personaplex.config import PRESET_7B, ModelConfig

    for config in (PRESET_7B, PRESET_TINY):
        assert ModelConfig.from_json(config_json(config)) == config


def test_a_folder_that_holds_something_is_not_merged_into(file: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    with pytest.raises(ConfigError, match="not an empty folder"):
        merge(tiny(lora=file), tmp_path)
