"""TeCoA-ITR: TeCoA (Mao et al., ICLR 2023) with captions in place of class prompts.

Image-only adversarial training: PGD on the contrastive objective against the clean captions, then InfoNCE between the
adversarial images and the clean captions. This is the retrieval baseline that MAT (arXiv 2405.18770) compares with,
with 10 steps; TeCoA itself takes `steps=2, step_size=eps` at eps 1/255 and trains the image tower alone.
"""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.base import context_of
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Objective
from fastmat.attacks.pgd import PGD
from fastmat.defences.base import Features, Views
from fastmat.defences.inner import attacking
from fastmat.defences.terms import of_everyone, pair_terms
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import Batch, ThreatModel


class TeCoAITR:
    """steps, step_size (pixel units; None: eps/4), objective, random_start: the inner PGD, as in `PGD`.

    trains: ("image", "text"), or ("image",) as TeCoA was published.
    """

    pairs = ("adv-clean",)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        steps: int = 10,
        step_size: float | None = None,
        objective: Objective | None = None,
        random_start: bool = True,
        trains: tuple[str, ...] = ("image", "text"),
    ) -> None:
        self.attack = PGD(
            threat=threat, steps=steps, step_size=step_size, objective=objective, random_start=random_start
        )
        self.trains = trains

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        with attacking(model):
            images, _ = self.attack.run(model, batch, of_everyone(context_of(model, batch)), draws)
        return Views(images={"adv": images.detach()}, texts={"clean": batch.texts})

    def loss(self, features: Features) -> dict[str, Tensor]:
        return pair_terms(features, "adv", "clean")
