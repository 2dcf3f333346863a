"""A random ALBEF small enough for tests: same code path as the published sizes, no files."""

from __future__ import annotations

import torch

from fastmat.models.albef import Albef
from fastmat.models.fusion_checkpoint import FusionSizes
from fastmat.models.tokenizers import HashTokenizer


def tiny_albef(*, image_size: int = 32, seed: int = 0) -> Albef:
    """Widths of 16 and 24, two layers of each kind, hashed words; seeded without touching the global random state."""
    tokenizer = HashTokenizer(64)
    sizes = FusionSizes(
        image_size=image_size,
        patch=8,
        image_width=24,
        image_layers=2,
        image_heads=2,
        image_hidden=48,
        vocabulary=len(tokenizer),
        positions=32,
        text_width=16,
        text_layers=2,
        fusion_layers=2,
        text_heads=2,
        text_hidden=32,
        embed_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Albef(sizes=sizes, tokenizer=tokenizer, context_length=32)
