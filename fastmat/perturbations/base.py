"""What perturbations share: they imitate the world, look at no model, and keep no budget.

The 17 of images, at five severities, and 16 of texts are those of Qiu et al. (arXiv 2212.08044), who applied them to
files before a model's preprocessing. Here they act on what the model sees, at its resolution.
"""

from __future__ import annotations

import abc
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from fastmat.attacks.base import Attack
from fastmat.attacks.draws import Draws
from fastmat.errors import UserError, nearest
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import AttackContext, Batch, ThreatModel


class Perturbation(Attack, abc.ABC):
    """An attack by name only: `perturb` sees images and captions. Its threat model has no budget, so that results say
    how far it went (`distance`, `words_changed`) and not how far it might go.

    Raises UserError for a severity outside 1 to `severities`.
    """

    budgeted: ClassVar[bool] = False

    def __init__(self, *, threat: ThreatModel, severity: int, severities: int, seed: int = 0) -> None:
        if not 1 <= severity <= severities:
            raise UserError(f"severity must be a whole number from 1 to {severities}, got {severity}")
        super().__init__(threat=ThreatModel(eps=0.0, norm=threat.norm, max_words=0, bounds=threat.bounds), seed=seed)
        self.severity = severity

    @abc.abstractmethod
    def perturb(self, batch: Batch) -> tuple[Tensor, tuple[str, ...]]:
        """Images [B, 3, H, W] and T texts; draws are a function of (seed, index of the image) alone."""

    @final
    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        return self.perturb(batch)

    def generator(self, *key: int) -> np.random.Generator:
        """The draws of an image, or of one of its captions."""
        return np.random.default_rng([self.seed, *key])


def chosen(kind: str, known: tuple[str, ...]) -> str:
    """The kind. Raises UserError when it is none of `known`."""
    if kind not in known:
        raise UserError(f"there is no kind {kind!r}{nearest(kind, known)}")
    return kind


def eight_bit(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] in [0, 1] to [3, H, W] fp32, on the levels of a file."""
    levels = (pixels.clip(0, 1) * 255).round().astype(np.float32) / np.float32(255)
    return torch.from_numpy(np.ascontiguousarray(levels.transpose(2, 0, 1)))
