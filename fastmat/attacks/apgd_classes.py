"""AutoAttack's two attacks by APGD on a classifier (Croce & Hein, ICML 2020): cross-entropy, then targeted DLR."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastmat.attacks.apgd import ascend_adaptively, farthest_start
from fastmat.attacks.base import Attack
from fastmat.attacks.dlr import DLR, check_classes, right_class
from fastmat.attacks.draws import Draws
from fastmat.attacks.margin import Margin
from fastmat.attacks.objectives import Contrastive, Objective
from fastmat.attacks.search import check_steps
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import AttackContext, Batch, ThreatModel

ROUNDING = 1e-6  # of a cosine: who judges may sum in another order


class APGDClasses(Attack):
    """Image only, on classes. An image is lost as soon as any iterate of any run is misclassified, and left alone then,
    as one that is misclassified from the start is; so the accuracy that is left is the worst case over all runs.

    steps: of APGD, in every run, with its constants. restarts: runs on cross-entropy, each from another random start.
    targets: runs on the targeted difference of logits ratio, one for each of the wrong classes that are nearest to the
        clean image; where there are fewer wrong classes, as many as there are.
    Defaults: RobustVLM's evaluation of FARE and TeCoA, that is AutoAttack's `custom` version with apgd-ce and apgd-t;
    its `standard` version has restarts: 1. Of each image the iterate with the largest margin is kept.
    Costs steps + 1 forwards and steps backwards per run and image that is still right, and one forward per target.
    Raises UserError for steps below 1, or no run at all; in a call for a context that does not hold each class once
    (`fastmat task` with zero_shot makes it), and with targets for fewer than four classes.
    """

    def __init__(
        self, *, threat: ThreatModel, steps: int = 100, restarts: int = 5, targets: int = 9, seed: int = 0
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        check_steps(steps, None)
        if restarts < 0 or targets < 0 or not restarts + targets:
            raise UserError(f"restarts and targets must give at least one run, got {restarts} and {targets}")
        self.steps = steps
        self.restarts = restarts
        self.targets = targets

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        right_class(batch, context)
        targets = min(self.targets, len(context.text_features) - 1)
        if targets:
            check_classes(len(context.text_features), targets - 1)
        if self.threat.eps == 0:
            return batch.images, batch.texts
        images = batch.images.clone()
        with torch.no_grad():
            margin = Margin().bind(model, batch, context)(model.encode_image(images))
        runs: list[Objective] = [Contrastive(directions="i2t")] * self.restarts  # with one right text: cross-entropy
        for number, objective in enumerate([*runs, *(DLR(target=target) for target in range(targets))]):
            left = (margin <= ROUNDING).nonzero().flatten()  # waits for the device, once per run
            if not len(left):
                break
            images[left], margin[left] = self._once(
                model, part(batch, left), context, draws, number, objective, (images[left], margin[left])
            )
        return images, batch.texts

    def _once(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        context: AttackContext,
        draws: Draws,
        number: int,
        objective: Objective,
        found: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """One run; the images and margins `found` so far, or those of an iterate with a larger margin."""
        images, margin = found
        value, ahead = objective.bind(model, batch, context), Margin().bind(model, batch, context)

        def watched(x: Tensor) -> Tensor:
            state = model.encode_image(x)
            with torch.no_grad():  # in place: a captured step (`Engine.cuda_graph`) keeps its tensors
                now = ahead(state)
                images.copy_(torch.where((now > margin).view(-1, 1, 1, 1), x, images))
                margin.copy_(torch.maximum(now, margin))
            return value(state)

        start = farthest_start(batch, self.threat, draws, number)
        ascend_adaptively(watched, batch.images, start, threat=self.threat, steps=self.steps)
        return images, margin


def part(batch: Batch, rows: Tensor) -> Batch:
    """The images `rows` [R], without their texts: classes stand in the context."""
    none = batch.txt2img[:0]
    return replace(
        batch, images=batch.images[rows], texts=(), txt2img=none, index=batch.index[rows], group=batch.group[rows]
    )
