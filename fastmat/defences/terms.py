"""Loss terms that several defences share: over the batch of all processes, whoever holds which part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from fastmat.defences.base import Features
from fastmat.errors import UserError
from fastmat.ops import contrastive_loss, contrastive_rows
from fastmat.types import AttackContext

Gathering = Callable[[AttackContext], AttackContext]
_gathering: ContextVar[Gathering | None] = ContextVar("gathering", default=None)


def of_everyone(context: AttackContext) -> AttackContext:
    """The context of an inner attack, made of this process's share, over the batch of all processes.

    An image is then attacked against the texts it would be attacked against in one process with the whole batch, so the
    number of processes changes nothing. Every process calls it, equally often in a step.
    """
    gather = _gathering.get()
    return context if gather is None else gather(context)


@contextmanager
def gathering(gather: Gathering | None) -> Iterator[None]:
    """Inside, `of_everyone` gathers by this; the training loop's part."""
    token = _gathering.set(gather)
    try:
        yield
    finally:
        _gathering.reset(token)


def pair_terms(features: Features, images: str, texts: str) -> dict[str, Tensor]:
    """The terms that draw a view of the images and one of the texts together, by name.

    "contrastive", unless whoever trains has others in mind (`fastmat.defences.matching`).
    """
    if features.between is not None:
        return features.between(features, images, texts)
    return {"contrastive": contrastive_between(features, images, texts)}


def contrastive_between(features: Features, images: str, texts: str) -> Tensor:
    """Symmetric multi-positive InfoNCE between one view of the images and one of the texts (scalar).

    With several processes: this process's rows against the columns of all, such that the mean over the processes, and
    of its gradients, is that of one process with the whole batch.
    """
    if features.everyone is None:
        return contrastive_loss(
            features.images[images].features,
            features.texts[texts].features,
            features.logit_scale,
            image_group=features.group,
            text_group=features.text_group,
        )
    every = features.everyone()
    of_images = contrastive_rows(
        features.images[images].features,
        every.texts[texts],
        features.logit_scale,
        row_group=features.group,
        column_group=every.text_group,
    )
    of_texts = contrastive_rows(
        features.texts[texts].features,
        every.images[images],
        features.logit_scale,
        row_group=features.text_group,
        column_group=every.group,
    )
    return (of_images.mean() + mean_over_texts(features, of_texts)) / 2


def mean_over_texts(features: Features, values: Tensor) -> Tensor:
    """The mean of values [T], one per text, weighted such that the mean over the processes is that over all texts.

    Processes hold equally many images but not always equally many texts, so a plain mean would be another one.
    """
    if features.everyone is None:
        return values.mean()
    every = features.everyone()
    processes = len(every.group) // len(features.group)
    return values.sum() * (processes / len(every.text_group))


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise UserError for a weight, by the argument's name, that is negative or no number."""
    for name, weight in weights.items():
        if not weight >= 0:
            raise UserError(f"{name} must not be negative, got {weight}")
