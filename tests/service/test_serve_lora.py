"""A live service with `lora` says, token for token, what the checkpoint merged from it says offline."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import torch
from serving import Client, Service, connect, running, speech, token_log

from personaplex.config import PRESET_TINY, EngineConfig, Sampling
from personaplex.finetune.adapters import Adapters
from personaplex.finetune.merge import merge
from personaplex.loading import ModelSpec, load_parts, resolve
from personaplex.model.identity import base_of
from personaplex.model.lora import KINDS, targets, write_adapter
from personaplex.persona import Persona

SEED = 7


def _adapter(path: Path) -> None:
    """An adapter of tiny that changes every kind of matrix."""
    adapters = Adapters(targets(PRESET_TINY.lm, KINDS), 2, 1.0)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    write_adapter(path, adapters.exported(base_of(resolve(ModelSpec("tiny", device="cpu")).checkpoint), {}))


async def _talk(service: Service) -> Client:
    query = {"voice_prompt": "NATM1.pt", "text_prompt": "Be brief.", "text_seed": SEED, "audio_seed": SEED}
    async with connect(service, **query) as client:
        await client.talk(speech(2.0))
    return client


def test_the_service_with_an_adapter_says_what_the_merged_checkpoint_says(
    cluster: str, tmp_path: Path
) -> None:
    path, logs = tmp_path / "adapter.safetensors", tmp_path / "logs"
    _adapter(path)
    with running(cluster, model="tiny", lora=path, slots=1, token_log_dir=logs, burst_s=20.0) as service:
        client = asyncio.run(_talk(service))
    kept = token_log(logs, client.heard.session)

    spec = ModelSpec("tiny", device="cpu", lora=path)
    merge(resolve(spec).checkpoint, tmp_path / "merged")
    parts = load_parts(resolve(ModelSpec(str(tmp_path / "merged"), device="cpu")), EngineConfig())
    engine = parts.engine(EngineConfig())
    slot = engine.open(Persona("NATM1", "Be brief.", Sampling(text_seed=SEED, audio_seed=SEED)))
    said = []
    for frame in client.decoded():
        engine.feed(slot, frame)
        said.append(engine.step()[0].tokens)
    tokens = np.stack(said)
    np.testing.assert_array_equal(kept["text"], tokens[:, 0])
    np.testing.assert_array_equal(kept["agent_codes"], tokens[:, 1:9].T)
