"""TeCoA (Mao et al., ICLR 2023): adversarial images are contrasted with the prompts of all classes.

Published: cross-entropy of logit_scale * cosine over all prompts, ascended by PGD (eps 1/255, 2 steps of 1/255, uniform
start) and then minimised; the image tower alone trains. The released code encodes the prompts again in every step and
lets the attack's weight gradients into the update; here they are encoded once, and nothing is left of the attack.
RobustVLM's TeCoA2 and TeCoA4 take 10 steps of 1/255 at eps 2/255 and 4/255.
"""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.attacks.pgd import PGD
from fastmat.defences.base import Features, Views
from fastmat.defences.classes import Contrast, Prompts
from fastmat.defences.inner import attacking
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import Batch, ThreatModel


class TeCoA:
    """prompts: of every class, from a labelled set.

    steps, step_size (pixel units; None: eps, the published 1/255 at eps 1/255), random_start: the inner PGD.
    Raises UserError on a set without labels.
    """

    trains: tuple[str, ...] = ("image",)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        prompts: Prompts | None,
        steps: int = 2,
        step_size: float | None = None,
        random_start: bool = True,
    ) -> None:
        self.contrast = Contrast("classes", prompts)
        self.attack = PGD(
            threat=threat,
            objective=self.contrast.objective(),
            steps=steps,
            step_size=threat.eps if step_size is None else step_size,
            random_start=random_start,
        )

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        with attacking(model):
            task, context = self.contrast.task(model, batch)
            images, _ = self.attack.run(model, task, self.contrast.everyone(context), draws)
        return Views(images={"adv": images.detach()}, texts={}, targets=self.contrast.targets(task, context))

    def loss(self, features: Features) -> dict[str, Tensor]:
        return self.contrast.term(features, "adv")
