"""A model directory from what has been trained: `python -m personaplex.training.assemble FOLDER OUT`.

OUT then loads like any checkpoint (`--model OUT`), with the 18 voices as voice files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from personaplex.engine.script import embed_voice
from personaplex.model.hub import resolve
from personaplex.model.weights import load_model
from personaplex.training import export
from personaplex.training.articulation import NAMES
from personaplex.training.bank import Words
from personaplex.training.hearing import load_ear
from personaplex.training.lm import CONSTANT, Talker
from personaplex.training.mouth import Mouth
from personaplex.training.run import load
from personaplex.training.speaking import COMPRESS, Fitted
from personaplex.training.vocabulary import Pieces, cached
from personaplex.voices import save_voice


def assemble(folder: Path, out: Path) -> None:
    """Writes `out` from the checkpoints in `folder`. Raises FileNotFoundError for a part not trained yet."""
    mouth, talker = Mouth(export.CONFIG.mimi), Talker(export.CONFIG.lm)
    mouth.load_state_dict(_state(folder / "mouth.pt")["mouth"])
    talker.load_state_dict(_state(folder / "talk.pt")["talker"])
    fitted = Fitted.load(folder / "basis.pt")
    mimi = export.mimi_tensors(
        dict(load_ear(folder).state_dict()),
        dict(mouth.state_dict()),
        fitted.basis,
        fitted.size**COMPRESS,
    )
    lm = export.lm_tensors(dict(talker.lm.state_dict()), CONSTANT)
    export.write(out, lm, mimi, cached(folder))
    model = load_model(resolve(str(out)), "cpu", torch.float32)
    (out / "voices").mkdir(exist_ok=True)
    words = Words(folder, Pieces(cached(folder)))
    for name in NAMES:
        codes = export.to_ids(torch.from_numpy(words.samples(name)[0])).t()
        lost = torch.zeros(len(codes), 1, dtype=torch.int64)  # a voice's first frame is never read
        save_voice(out / "voices" / f"{name}.pt", *embed_voice(model.lm, torch.cat([lost, codes], dim=1)))


def _state(path: Path) -> dict[str, dict[str, Tensor]]:
    state = load(path)
    if state is None:
        raise FileNotFoundError(f"{path.name} is not trained yet")
    return state


if __name__ == "__main__":
    assemble(Path(sys.argv[1]), Path(sys.argv[2]))
