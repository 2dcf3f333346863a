"""Random fusion models small enough for tests: same code path as the published sizes, no files."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastmat.models.albef import Albef
from fastmat.models.albef_ve import albef_ve
from fastmat.models.blip import Blip
from fastmat.models.fusion_checkpoint import FusionSizes
from fastmat.models.tokenizers import HashTokenizer

TOKENIZER = HashTokenizer(64)
SIZES = FusionSizes(
    patch=8,
    image_width=24,
    image_layers=2,
    image_heads=2,
    image_hidden=48,
    vocabulary=len(TOKENIZER),
    positions=32,
    text_width=16,
    text_layers=2,
    fusion_layers=2,
    text_heads=2,
    text_hidden=32,
    embed_dim=16,
)


def tiny_albef(*, image_size: int = 32, seed: int = 0) -> Albef:
    """Widths of 16 and 24, two layers of each kind, hashed words; seeded without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Albef(sizes=replace(SIZES, image_size=image_size), tokenizer=TOKENIZER, context_length=32)


def tiny_blip(*, image_size: int = 32, seed: int = 0) -> Blip:
    """As `tiny_albef`, with two layers in all, which both look at the image."""
    sizes = replace(SIZES, image_size=image_size, text_layers=0, vocabulary=len(TOKENIZER) + 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Blip(sizes=sizes, tokenizer=TOKENIZER, context_length=32)


def tiny_albef_ve(*, image_size: int = 32, seed: int = 0) -> Albef:
    """As `tiny_albef`, with a head for visual entailment in place of the others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return albef_ve(sizes=replace(SIZES, image_size=image_size), tokenizer=TOKENIZER, context_length=32)
