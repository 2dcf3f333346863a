"""Fine-tuning without an attack: the reference every defence is compared with."""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.defences.base import Features, Views
from fastmat.defences.terms import pair_terms
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import Batch


class FineTune:
    """Symmetric InfoNCE on clean pairs (CLIP, ICML 2021, figure 3), with groups as positives."""

    pairs = ("clean-clean",)

    def __init__(self, *, trains: tuple[str, ...] = ("image", "text")) -> None:
        self.trains = trains

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        return Views(images={"clean": batch.images}, texts={"clean": batch.texts})

    def loss(self, features: Features) -> dict[str, Tensor]:
        return pair_terms(features, "clean", "clean")
