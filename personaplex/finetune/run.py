"""What each command does, from its options to its exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from functools import partial

import torch

from personaplex import cli
from personaplex.config import EngineConfig, Sampling, frames_in
from personaplex.errors import ConfigError
from personaplex.finetune import merge as merging
from personaplex.finetune import settings as run_settings
from personaplex.finetune.adapters import Adapters
from personaplex.finetune.align import Spelling
from personaplex.finetune.batches import Source, Weights
from personaplex.finetune.dataset import Dataset, Entry, split
from personaplex.finetune.network import Network
from personaplex.finetune.prepare import Options, Preparation
from personaplex.finetune.processes import Processes, joined
from personaplex.finetune.samples import Sampler
from personaplex.finetune.settings import Settings
from personaplex.finetune.train import ADAPTER, Data, Intervals, Trainer
from personaplex.loading import ModelSpec, Parts, load_parts, resolve
from personaplex.model.identity import Base, base_of
from personaplex.model.lora import read_adapter, targets

logger = logging.getLogger(__name__)


def prepare(options: argparse.Namespace) -> int:
    """1 when some calls cannot be used, of which each was said."""
    spelling = Spelling(options.text_lead, not options.no_end_of_padding)
    wanted = Options(options.voice, options.role, spelling, options.shortest)
    made = Preparation(resolve(_spec(options)), options.output, wanted).run(options.sources)
    minutes = sum(entry.frames for entry in made.entries) / 750
    words = sum(entry.words for entry in made.entries)
    print(
        f"{len(made.entries)} calls, {minutes:.1f} minutes, {words} words; {len(made.faults)} cannot be used"
    )
    return cli.FAILED if made.faults else 0


def show(options: argparse.Namespace) -> int:
    adapter = read_adapter(options.adapter)
    described = {
        "base": vars(adapter.base),
        "rank": adapter.rank,
        "scale": adapter.scale,
        "matrices": len(adapter.pairs),
        "parameters": sum(a.numel() + b.numel() for a, b in adapter.pairs.values()),
        "training": adapter.training,
    }
    print(json.dumps(described, indent=1))
    return 0


def merge(options: argparse.Namespace) -> int:
    found = resolve(dataclasses.replace(_spec(options), lora=options.lora, device="cpu"))
    merging.merge(found.checkpoint, options.output)
    print(f"{options.output}: use it with --model")
    return 0


def train(options: argparse.Namespace) -> int:
    with joined(options.device) as processes:
        return _train(options, processes)


def _train(options: argparse.Namespace, processes: Processes) -> int:
    settings = _settings(options)
    if settings.batch % (settings.pieces * processes.count):
        raise ConfigError(
            f"a batch of {settings.batch} cannot be divided among {processes.count} processes with "
            f"{settings.pieces} pieces each"
        )
    if processes.count > 1 and torch.cuda.is_available() and options.device != "cpu":
        options.device = f"cuda:{processes.local}"
    found = resolve(_spec(options))
    base = base_of(found.checkpoint)
    dataset = Dataset.read(options.data)
    if processes.first:
        _claim(options, settings, base, dataset)
        for fault in dataset.faults:
            cli.complain(f"not trained on: {fault.file}: {fault.reason}", "")
    parts = load_parts(found, EngineConfig(slots=1))
    lm = parts.model.lm
    chosen = targets(lm.config, settings.kinds, settings.layers)
    adapters = Adapters(chosen, settings.rank, settings.scale, settings.seed)
    if options.begin is not None:
        adapters.adopt(options.begin.name, read_adapter(options.begin))
    network = Network(lm, adapters.to(lm.device), options.gradient_checkpointing)
    data, sampled = _data(options, settings, parts, base, dataset)
    sampler = _sampler(options, settings, parts, sampled)
    samples = partial(sampler.write, adapters) if sampler else None
    trainer = Trainer(network, data, settings, options.output, base, processes, samples)
    if processes.first:
        _introduce(adapters, data, trainer, settings)
    trainer.run(Intervals(options.save_every, options.evaluate_every))
    if processes.first:
        print(f"{options.output / ADAPTER}: use it with --lora")
    return 0


def _claim(options: argparse.Namespace, settings: Settings, base: Base, dataset: Dataset) -> None:
    calls = [(entry.name, entry.source, entry.transcript) for entry in dataset.entries]
    described = {
        **settings.described(),
        "base": vars(base),
        "calls": run_settings.digest(calls),
        "begin": options.begin and run_settings.digest(options.begin.read_bytes().hex()),
        "rehearse": options.rehearse and str(options.rehearse),
        "validation_data": options.validation_data and str(options.validation_data),
        "dtype": options.dtype,
        "quantized": options.weights,
    }
    run_settings.claim(options.output, described)


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        rank=options.rank,
        scale=options.scale,
        kinds=tuple(options.targets),
        layers=options.layers,
        weights=Weights(options.padding_weight, options.semantic_weight, quiet=options.quiet_share),
        length=frames_in(options.length),
        batch=options.batch_size,
        pieces=options.pieces,
        steps=options.steps,
        warmup=options.warmup,
        rate=options.rate,
        decay=options.weight_decay,
        clip=options.clip,
        validation=options.validation,
        rehearsal=options.rehearsal if options.rehearse else 0.0,
        seed=options.seed,
    )


def _data(
    options: argparse.Namespace, settings: Settings, parts: Parts, base: Base, dataset: Dataset
) -> tuple[Data, tuple[Dataset, list[Entry]]]:
    """What is trained on, and the calls that samples are generated from."""

    def source(data: Dataset, entries: list[Entry]) -> Source | None:
        data.check_base(base)
        config, weights = parts.model.lm.config, settings.weights
        tools = parts.tokenizer, parts.library
        return Source(data, entries, config, *tools, weights, settings.length) if entries else None

    apart = options.validation_data and Dataset.read(options.validation_data)
    trained, held = split(dataset.entries, 0.0 if apart else settings.validation, settings.seed)
    validated = (apart, list(apart.entries)) if apart else (dataset, held)
    rehearsed = options.rehearse and Dataset.read(options.rehearse)
    first = source(dataset, trained)
    assert first is not None
    data = Data(first, source(rehearsed, list(rehearsed.entries)) if rehearsed else None, source(*validated))
    return data, validated if validated[1] else (dataset, trained)


def _sampler(
    options: argparse.Namespace, settings: Settings, parts: Parts, sampled: tuple[Dataset, list[Entry]]
) -> Sampler | None:
    if not options.samples:
        return None
    sampling = Sampling(text_seed=settings.seed, audio_seed=settings.seed)
    if options.greedy_samples:
        sampling = sampling.greedy()
    data, entries = sampled
    return Sampler(parts, data, entries[: options.samples], options.sample_seconds, sampling)


def _introduce(adapters: Adapters, data: Data, trainer: Trainer, settings: Settings) -> None:
    count = sum(parameter.numel() for parameter in adapters.parameters())
    held = len(data.held.parts) if data.held else 0
    logger.info(
        "%d matrices, %.2f million parameters; %d sequences, %d held back; step %d of %d",
        *(len(adapters.targets), count / 1e6, len(data.trained.parts), held),
        *(trainer.state.step, settings.steps),
    )


def _spec(options: argparse.Namespace) -> ModelSpec:
    return ModelSpec(
        name=options.model,
        repo=options.repo,
        revision=options.revision,
        moshi_weight=options.moshi_weight,
        mimi_weight=options.mimi_weight,
        tokenizer=options.tokenizer,
        voice_prompt_dir=options.voice_prompt_dir,
        device=options.device,
        dtype=getattr(options, "dtype", "auto"),
        weights=getattr(options, "weights", "auto"),
    )
