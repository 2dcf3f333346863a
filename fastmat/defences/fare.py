"""FARE (Schlarmann et al., ICML 2024): unsupervised, keeps the embeddings of a frozen original.

Published: eps 4/255 or 2/255, 10 steps of 1/255, squared L2 between un-normalised embeddings summed over dimensions,
only the image tower trains. Its released code ascends with momentum 0.9 and an unclamped start; here it is plain PGD,
which the paper describes.

What is kept is the projected embedding, before it is normalised: CLIP's, and of a fusion model (ALBEF, BLIP) the one
that contrast and the shortlist of two-stage retrieval read. Image tokens that fusion reads, and the matching head, are
not held to anything; no text is seen, so `fastmat.defences.matching` refuses it.
"""

from __future__ import annotations

from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import squared_l2_from
from fastmat.attacks.search import ascend, check_steps, random_start
from fastmat.defences.base import Features, Views
from fastmat.defences.inner import attacking
from fastmat.defences.teacher import Teacher
from fastmat.defences.teacher_cache import TeacherCache
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import Batch, ThreatModel


class FARE:
    """teacher: the original model; a frozen copy is taken here, so hand it in before training changes it.

    steps, step_size: the inner PGD; step_size in pixel units, None: eps/4 (1/255 at the published eps of 4/255).
    teacher_cache: the original's embeddings of the training images, where those are the same at every epoch.
    Raises UserError without a step, with a negative step size, and in `perturb` for a teacher of another width.
    """

    trains: tuple[str, ...] = ("image",)

    def __init__(
        self,
        *,
        threat: ThreatModel,
        teacher: VisionLanguageModel,
        steps: int = 10,
        step_size: float | None = None,
        teacher_cache: TeacherCache | None = None,
    ) -> None:
        check_steps(steps, step_size)
        self.threat = threat
        self.teacher = Teacher(teacher, teacher_cache)
        self.steps = steps
        self.step_size = threat.eps / 4 if step_size is None else step_size

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        target = self.teacher.clean_embeds(batch)
        value = squared_l2_from(target)
        with attacking(model):
            self.teacher.check(model)
            images = ascend(
                lambda x, step: value(model.encode_image(x)),
                batch.images,
                random_start(batch, self.threat, draws),
                threat=self.threat,
                steps=self.steps,
                step_size=self.step_size,
            )
        return Views(images={"adv": images.detach()}, texts={}, targets={"teacher": target})

    def loss(self, features: Features) -> dict[str, Tensor]:
        return {"distance": squared_l2_from(features.targets["teacher"])(features.images["adv"]).mean()}
