"""Which of an image's captions enter a step: human ones, generated ones, or some of both, drawn anew every step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError
from fastmat.types import Batch


@dataclass(frozen=True, kw_only=True)
class CaptionPool:
    """All captions of every image of a set, by its position there: `human[i]` and `generated[i]`, not both empty."""

    human: tuple[tuple[str, ...], ...]
    generated: tuple[tuple[str, ...], ...]

    @cached_property
    def most(self) -> int:
        """Captions of one image."""
        return max(len(human) + len(made) for human, made in zip(self.human, self.generated, strict=True))

    @classmethod
    def of(cls, dataset: RetrievalSet) -> CaptionPool:
        """Those of a set; without provenance all are human. The captions of a generated image are human."""
        by = dataset.provenance or [[None] * len(own) for own in dataset.captions]
        flags = [[maker is not None and maker.made == "caption" for maker in makers] for makers in by]
        pairs = list(zip(dataset.captions, flags, strict=True))
        return cls(
            human=tuple(tuple(c for c, made in zip(own, flag, strict=True) if not made) for own, flag in pairs),
            generated=tuple(tuple(c for c, made in zip(own, flag, strict=True) if made) for own, flag in pairs),
        )


@dataclass(frozen=True, kw_only=True)
class CaptionDraw:
    """`augment(batch, draws) -> Batch` with `number` captions per image, in place of those that the batch brought.

    generated: the expected share of generated ones, 0 to 1. `number * generated` is rounded up or down at random,
    image by image, so that one caption per image with 0.5 is a generated one in every second case. Captions are drawn
    without replacement. Where one kind has too few, the other fills up, and then captions repeat, so that every image
    has equally many on every process (this project's choice, as is the rule).
    Raises UserError for values out of range, and for a share of what the pool does not have.
    """

    pool: CaptionPool
    number: int
    generated: float = 0.0

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"captions must be at least 1, got {self.number}")
        if not 0 <= self.generated <= 1:
            raise UserError(f"generated must be a share between 0 and 1, got {self.generated}")
        if self.generated and not any(self.pool.generated):
            raise UserError(
                f"generated is {self.generated}, but the data has human captions only; write an augmented set with "
                "`fastmat augment` and name it as data"
            )

    def __call__(self, batch: Batch, draws: Draws) -> Batch:
        # The one wait for the device, before anything of a step is queued.
        index = batch.index.cpu()
        pools = [(self.pool.human[i], self.pool.generated[i]) for i in index.tolist()]
        drawn = draws.uniform("augment/captions", index, (self.pool.most + 1,))
        texts = [self.choose(*pool, row) for pool, row in zip(pools, drawn, strict=True)]
        txt2img = torch.arange(len(texts)).repeat_interleave(self.number)
        return Batch(
            images=batch.images,
            texts=tuple(itertools.chain.from_iterable(texts)),
            txt2img=txt2img.to(batch.images.device, non_blocking=True),
            index=batch.index,
            group=batch.group,
        )

    def choose(self, human: Sequence[str], generated: Sequence[str], drawn: Tensor) -> list[str]:
        """`number` captions of one image. drawn [more than captions]: the first rounds, others order."""
        wanted = math.floor(self.number * self.generated + (float(drawn[0]) + 1) / 2)
        texts = (*human, *generated)
        order = drawn[1 : 1 + len(texts)].argsort().tolist()
        made = [texts[i] for i in order if i >= len(human)]
        others = [texts[i] for i in order if i < len(human)]
        of_others = self.number - min(wanted, len(made))
        first = [*others[:of_others], *made[:wanted]]
        return list(itertools.islice(itertools.cycle([*first, *made[wanted:], *others[of_others:]]), self.number))
