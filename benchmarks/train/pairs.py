"""What the steps are fed with: images with one caption each, or with the prompt of a class, out of a cache on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from fastmat.benchmarks.attacks.setting import Choice
from fastmat.data.digits import digits_set
from fastmat.data.loader import TrainingBatches
from fastmat.data.retrieval import read_retrieval_set
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import Batch

# The list of ImageNet's names has two of them twice; these are WordNet's other words for the second class.
OTHER_WORDS = ("projectile", "dark glasses")


class Pairs:
    """`choice.images` images of the chosen data at a time, two batches in turn, read as `fastmat train` reads them.

    folder: of the decoded images, so that every contestant loads alike and none decodes.
    """

    def __init__(self, choice: Choice, model: DualEncoder, folder: Path, device: torch.device) -> None:
        file = None if choice.data is None else Path(choice.data)
        dataset = (
            digits_set("test")
            if file is None
            else read_retrieval_set(file, file.parent, name=file.parent.name, split=file.stem)
        )
        images = min(choice.images, dataset.n_images)
        self.source = TrainingBatches(
            dataset.take(min(2 * images, dataset.n_images)),
            model.image_transform,
            batch_size=images,
            seed=0,
            image_cache=folder,
        )
        self.short = choice.short
        self.device = device

    def __call__(self, number: int) -> Batch:
        return self.source.batch(number).to(self.device)


class Labelled:
    """The same images as photographs of classes. prompts: one of each class; 1,000, or 20 in a short run."""

    def __init__(self, pairs: Pairs) -> None:
        from open_clip import IMAGENET_CLASSNAMES

        names = tuple(dict.fromkeys((*IMAGENET_CLASSNAMES, *OTHER_WORDS)))
        assert len(names) == 1000
        self.pairs = pairs
        self.prompts = tuple(f"This is a photo of a {name}" for name in names[: 20 if pairs.short else None])

    def __call__(self, number: int) -> Batch:
        batch = self.pairs(number)
        return batch.replace(texts=tuple(self.prompts[label] for label in self.labels(batch).tolist()))

    def labels(self, batch: Batch) -> torch.Tensor:
        """[B] int64, far apart in the list."""
        return batch.index * 37 % len(self.prompts)
