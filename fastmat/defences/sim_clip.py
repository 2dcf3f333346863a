"""Sim-CLIP (Hossain and Imteaj, arXiv 2407.14971): Siamese agreement of clean and adversarial images.

Minimised: minus the cosine of both embeddings, averaged over two stop-gradients, one on either side (SimSiam's loss
without its predictor). Published: ViT-L/14, image tower alone, eps 4/255, 10 PGD steps of 1/255 that ascend the squared
distance to the clean embedding, uniform start, no text and no label anywhere. In the released code the clean embedding
is the frozen original's, which makes one of the two terms a constant (`Quirks.frozen_siamese`).
"""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import squared_l2_from
from fastmat.attacks.search import ascend, check_steps, random_start
from fastmat.defences.base import Features, Views
from fastmat.defences.inner import attacking
from fastmat.defences.teacher import Teacher
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.types import Batch, ThreatModel


class SimCLIP:
    """steps, step_size: the inner PGD; step_size in pixel units, None: eps/4 (1/255 at the published eps of 4/255).

    teacher: the original model, of which the quirk `frozen_siamese` keeps a frozen copy.
    Raises UserError without a step, with a negative step size, for that quirk without a teacher, and in `perturb` for a
    teacher of another width.
    """

    trains: tuple[str, ...] = ("image",)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        teacher: VisionLanguageModel | None = None,
        steps: int = 10,
        step_size: float | None = None,
        quirks: Quirks | None = None,
    ) -> None:
        check_steps(steps, step_size)
        quirks = quirks or Quirks()
        self.threat = threat
        self.steps = steps
        self.step_size = threat.eps / 4 if step_size is None else step_size
        if quirks.frozen_siamese and teacher is None:
            raise UserError("the quirk frozen_siamese needs a teacher, the original model")
        self.teacher = Teacher(teacher) if quirks.frozen_siamese and teacher is not None else None

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        with attacking(model):
            if self.teacher is None:
                clean = model.encode_image(batch.images)
            else:
                self.teacher.check(model)
                clean = self.teacher.images(batch.images)
            value = squared_l2_from(clean.embeds.detach())
            images = ascend(
                lambda x, step: value(model.encode_image(x)),
                batch.images,
                random_start(batch, self.threat, draws),
                threat=self.threat,
                steps=self.steps,
                step_size=self.step_size,
            ).detach()
        if self.teacher is None:
            return Views(images={"clean": batch.images, "adv": images}, texts={})
        return Views(images={"adv": images}, texts={}, targets={"teacher": clean.features})

    def loss(self, features: Features) -> dict[str, Tensor]:
        adv = features.images["adv"].features
        clean = features.targets["teacher"] if self.teacher else features.images["clean"].features
        return {"siamese": (cosine_apart(adv, clean) + cosine_apart(clean, adv)) / 2}


def cosine_apart(moved: Tensor, kept: Tensor) -> Tensor:
    """Minus the mean cosine of unit rows [B, E]; no gradient to `kept`."""
    return -(moved * kept.detach()).sum(-1).mean()
