"""Prints what silero-vad's own package finds in a few recordings, and keeps those beside; JSON, in samples."""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
warnings.simplefilter("ignore")

import torch  # noqa: E402
from evaluation_scenes import TEXTS, Said, sound  # noqa: E402
from silero_vad import get_speech_timestamps, load_silero_vad  # noqa: E402

model = load_silero_vad(onnx=True, opset_version=15)
folder = Path(tempfile.mkdtemp())
random = np.random.default_rng(1)
names = list(TEXTS)
found = []
for number in range(20):
    said = [Said(names[i], 0.2 + 2.2 * n) for n, i in enumerate(random.integers(len(names), size=number % 4))]
    pcm = sound([one._replace(until=one.start + 2.0) for one in said], 8.0 - number / 7).astype(np.float32)
    pcm = pcm / 32_768 * random.uniform(0.05, 1.0) + random.normal(0, 0.004, len(pcm))
    path = folder / f"{number}.npy"
    np.save(path, pcm.astype(np.float32))
    spans = get_speech_timestamps(torch.from_numpy(np.load(path)), model, sampling_rate=16_000)
    found.append({"path": str(path), "segments": [[one["start"], one["end"]] for one in spans]})
print(json.dumps(found))
