"""PGD of 10 steps on the contrastive loss, beside torchattacks' (attacks/pgd.py, 23620a6).

The victim is what a user of torchattacks writes: an image classifier over the captions, whose features are computed
once. One caption per image, image to text only, so that all ascend the same cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.job import Job, Outcome, Runner, features
from fastmat.benchmarks.attacks.setting import Setting, first_captions
from fastmat.build import Component
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import Batch, ThreatModel

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10  # the defaults of torchattacks


class Classifier(nn.Module):
    """Images to logits over a fixed set of captions."""

    def __init__(self, model: DualEncoder, texts: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.prototypes = model.logit_scale.detach() * features(model, texts)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images).features @ self.prototypes.T


def job(setting: Setting, *, images: int | None = None) -> Job:
    """images: how many of the batch are attacked at once."""
    everything = first_captions(setting.batch)
    batch = everything if images is None else everything.rows(0, images)
    labels = torch.arange(len(everything), device=setting.device)[: len(batch)]

    def published(threat: ThreatModel) -> Runner:
        return loop(Classifier(setting.unfrozen, batch.texts), batch, labels, threat)

    def tuned(threat: ThreatModel, model: DualEncoder) -> Runner:
        return loop(Classifier(model, batch.texts), batch, labels, threat)

    def objective(images: Tensor, texts: Sequence[str]) -> Tensor:
        return F.cross_entropy(Classifier(setting.model, batch.texts)(images), labels, reduction="none")

    return Job(
        name="pgd" if images is None else f"pgd B={images}",
        component=Component(
            name="pgd",
            arguments={"objective": {"name": "contrastive", "directions": "i2t"}, "steps": STEPS, "step_size": STEP},
        ),
        batch=batch,
        threat=ThreatModel(eps=EPS, max_words=0),
        published=published,
        tuned=tuned,
        objective=objective,
        halves=("both",),
    )


def loop(classifier: Classifier, batch: Batch, labels: Tensor, threat: ThreatModel) -> Runner:
    """As published. Tuned is the same with frozen weights: their activations are not kept."""

    def run(draws: Draws) -> Outcome:
        images = batch.images.clone().detach()
        x = images + threat.eps * draws.uniform("start", batch.index, images.shape[1:])
        x = x.clamp(0, 1).detach()
        for _ in range(STEPS):
            x.requires_grad = True
            cost = F.cross_entropy(classifier(x), labels)
            (gradient,) = torch.autograd.grad(cost, x)
            x = x.detach() + STEP * gradient.sign()
            x = (images + (x - images).clamp(-threat.eps, threat.eps)).clamp(0, 1).detach()
        return Outcome(x, batch.texts)

    return run
