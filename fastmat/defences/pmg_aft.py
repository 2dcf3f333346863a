"""PMG-AFT (Wang et al., CVPR 2024): the original model guides adversarial fine-tuning.

Loss: cross-entropy of adversarial images, plus KL(P_adv || P_teacher) with P_teacher the original model's prediction
for the same adversarial images, plus KL(P_adv || P_clean) with P_clean the trained model's own for the clean ones; both
weights 1. Published: ViT-B/32, image tower alone, eps 1/255, 2 PGD steps of 1/255 on the cross-entropy. The released
code sums the KL terms over the batch and loses the logit scale (`Quirks.summed_kl`, `Quirks.cosine_logits`).

On captions predictions run over the captions of the batch, and InfoNCE takes the place of the cross-entropy: this
project's reading, the paper has classes alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.attacks.pgd import PGD
from fastmat.defences.base import Features, Views
from fastmat.defences.classes import Against, Contrast, Prompts
from fastmat.defences.inner import attacking
from fastmat.defences.teacher import Teacher
from fastmat.defences.terms import check_weights
from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.types import Batch, ThreatModel


class PMGAFT:
    """against: "captions" of the batch, or all "classes" of a labelled set. teacher: the original model, copied here.

    steps, step_size (pixel units; None: eps), random_start: the inner PGD.
    teacher_weight, clean_weight: of the two KL terms.
    trains: ("image",) as published; on captions also both.
    Raises UserError for another `against`, classes on a set without labels, a negative weight, and in `perturb` for a
    teacher of another width.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        teacher: VisionLanguageModel,
        against: Against = "captions",
        prompts: Prompts | None = None,
        steps: int = 2,
        step_size: float | None = None,
        random_start: bool = True,
        teacher_weight: float = 1.0,
        clean_weight: float = 1.0,
        trains: tuple[str, ...] = ("image",),
        quirks: Quirks | None = None,
    ) -> None:
        check_weights({"teacher_weight": teacher_weight, "clean_weight": clean_weight})
        self.quirks = quirks or Quirks()
        self.contrast = Contrast(against, prompts, text_trains="text" in trains)
        self.teacher = Teacher(teacher)
        self.attack = PGD(
            threat=threat,
            objective=self.contrast.objective(logit_scale=1.0 if self.quirks.cosine_logits else None),
            steps=steps,
            step_size=threat.eps if step_size is None else step_size,
            random_start=random_start,
        )
        self.teacher_weight = teacher_weight
        self.clean_weight = clean_weight
        self.trains = trains

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        with attacking(model):
            self.teacher.check(model)
            task, context = self.contrast.task(model, batch)
            images = self.attack.run(model, task, self.contrast.everyone(context), draws)[0].detach()
        original = self.teacher.model
        guide = log_predictions(
            self.teacher.images(images).features,
            self.contrast.teacher_columns(self.teacher, batch, context),
            self._scale(original.logit_scale),
        )
        return Views(
            images={"clean": batch.images, "adv": images},
            texts=self.contrast.texts(batch),
            targets={"teacher": guide, **self.contrast.targets(task, context)},
        )

    def loss(self, features: Features) -> dict[str, Tensor]:
        features = replace(features, logit_scale=self._scale(features.logit_scale))
        columns = self.contrast.columns(features)
        adv, clean = (
            log_predictions(features.images[name].features, columns, features.logit_scale) for name in ("adv", "clean")
        )
        times = len(adv) if self.quirks.summed_kl else 1
        if self.quirks.summed_kl and features.everyone is not None:
            times = len(features.everyone().group)
        return {
            **self.contrast.term(features, "adv"),
            "kl/teacher": self.teacher_weight * times * kl(adv, features.targets["teacher"]),
            "kl/clean": self.clean_weight * times * kl(adv, clean),
        }

    def _scale(self, logit_scale: Tensor) -> Tensor:
        return torch.ones_like(logit_scale) if self.quirks.cosine_logits else logit_scale


def log_predictions(images: Tensor, columns: Tensor, logit_scale: Tensor) -> Tensor:
    """[B, C] log-probabilities that images [B, E] belong to columns [C, E], unit features both."""
    return (logit_scale * images @ columns.T).log_softmax(1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Scalar: the mean of KL(p || q) over rows of log-probabilities [B, C]."""
    return (p.exp() * (p - q)).sum(1).mean()
