from collections.abc import Callable

import pytest
import torch

from fastmat.attacks.pgd import PGD
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.types import Batch, ThreatModel

COLOURS = ("red", "green", "blue", "white", "black")
THINGS = ("dog", "cup", "tree")


@pytest.fixture
def model() -> DualEncoder:
    return tiny_clip(seed=0)


@pytest.fixture
def data() -> Batch:
    """Eleven images with 1 to 3 captions; images 0 and 7 show the same, so they share a group."""
    generator = torch.Generator().manual_seed(5)
    n = 11
    counts = torch.arange(n) % 3 + 1
    txt2img = torch.arange(n).repeat_interleave(counts)
    group = torch.arange(n)
    group[7] = 0
    texts = tuple(f"a {COLOURS[i % 5]} {THINGS[t % 3]} number {i}" for t, i in enumerate(txt2img.tolist()))
    return Batch(
        images=torch.rand(n, 3, 32, 32, generator=generator),
        texts=texts,
        txt2img=txt2img,
        index=torch.arange(n),
        group=group,
    )


@pytest.fixture
def split(data: Batch) -> Callable[[int], list[Batch]]:
    return lambda size: [data.rows(start, min(start + size, len(data))) for start in range(0, len(data), size)]


@pytest.fixture
def pgd() -> PGD:
    return PGD(threat=ThreatModel(eps=8 / 255), steps=3)
