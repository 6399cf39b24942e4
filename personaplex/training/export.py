"""The trained parts as a checkpoint of this project: sizes, names and shapes of its own Mimi and LM."""

from __future__ import annotations

from personaplex.config import LMConfig, MimiConfig, ModelConfig, TransformerConfig

CONFIG = ModelConfig(
    lm=LMConfig(
        temporal=TransformerConfig(dim=192, layers=4, heads=4, hidden=528, context=3_000),
        depth=TransformerConfig(dim=96, layers=2, heads=4, hidden=264, context=16),
        text_card=320,
    ),
    mimi=MimiConfig(
        filters=16,
        dim=256,
        transformer=TransformerConfig(dim=256, layers=3, heads=4, hidden=768, context=250),
        codebook_dim=160,
        codebooks=8,
    ),
)
