"""In-memory batches and runs for the training tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny import tiny_clip
from fastmat.training.settings import TrainSettings
from fastmat.types import Batch, ThreatModel

WORDS = ("red", "dog", "runs", "over", "green", "grass", "near", "water")
THREAT = ThreatModel(eps=8 / 255)


def make_batch(*, size: int = 4, seed: int = 0, image_size: int = 32) -> Batch:
    """`size` random images, one to three captions each; the first two images share a group."""
    generator = torch.Generator().manual_seed(seed)
    counts = [1 + (i + seed) % 3 for i in range(size)]
    texts = tuple(
        " ".join(WORDS[w] for w in torch.randint(len(WORDS), (4,), generator=generator)) for _ in range(sum(counts))
    )
    return Batch(
        images=torch.rand(size, 3, image_size, image_size, generator=generator),
        texts=texts,
        txt2img=torch.arange(size).repeat_interleave(torch.tensor(counts)),
        index=torch.arange(size) + size * seed,
        group=torch.tensor([0, 0, *range(1, size - 1)]),
    )


@dataclass
class Synthetic:
    """Batches that are a function of the step."""

    size: int = 4
    image_size: int = 32

    def iterate(self, start: int, stop: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        share = self.size // world
        whole = (make_batch(size=self.size, seed=step, image_size=self.image_size) for step in range(start, stop))
        return whole if world == 1 else (batch.rows(rank * share, (rank + 1) * share) for batch in whole)


class SwapWord:
    """A text search without a language model: the last word becomes "stone"; remembers its guides."""

    def __init__(self) -> None:
        self.guides: list[torch.Tensor | None] = []

    def plan(self, model: object, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(texts)

    def search(self, model: object, plan: tuple[str, ...], guide: torch.Tensor | None) -> tuple[str, ...]:
        self.guides.append(guide)
        return tuple(" ".join([*text.split(" ")[:-1], "stone"]) for text in plan)


def model_with_state(seed: int = 0) -> DualEncoder:
    """A tiny model with batch-norm and dropout in the image projection."""
    model = tiny_clip(seed=seed)
    model.image_projection = torch.nn.Sequential(
        model.image_projection, torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.2)
    )
    return model.train()


def settings(**changes: object) -> TrainSettings:
    return TrainSettings(**{"steps": 6, "lr": 1e-2, "warmup_steps": 1, "save_every": 3, "log_every": 1, **changes})


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
