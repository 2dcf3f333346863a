"""A random model small enough for tests: same code path as every other, no files."""

from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.small import small_clip


def tiny_clip(*, image_size: int = 32, seed: int = 0) -> DualEncoder:
    """Widths of 8 and 16, one text layer, hashed words; milliseconds per batch."""
    return small_clip(
        vocabulary=None,
        image_size=image_size,
        widths=(8, 16),
        text_width=16,
        layers=1,
        heads=2,
        embed_dim=16,
        context_length=32,
        seed=seed,
    )
