"""The difference of logits ratio (Croce & Hein, ICML 2020): a margin between classes whose scale cancels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.attacks.base import image_features
from fastmat.attacks.objectives import Bound
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, VisionLanguageModel
from fastmat.types import AttackContext, Batch

TINY = 1e-12  # as published, beside a difference of logits


class DLR:
    """(max over wrong z - z right) / (z1 - z3), with z1 >= z2 >= ... the cosines of an image with C classes, sorted.

    target: None, or the place of a wrong class among those that are nearest to the clean image, from 0: targeted,
        (z target - z right) / (z1 - (z3 + z4) / 2), as AutoAttack runs it for target after target.
    Positive: the image is lost. The model's logit scale cancels, so this is the same for cosines and for logits.

    The classes are the texts of the context, each of a group of its own, as `fastmat task` makes them for zero_shot.
    Raises UserError for a negative target, and `bind` for any other context, for fewer than three classes (targeted:
    four), or fewer than `target` + 1 wrong ones.
    """

    def __init__(self, *, target: int | None = None) -> None:
        if target is not None and target < 0:
            raise UserError(f"target is a place among the wrong classes, counted from 0, got {target}")
        self.target = target

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        classes = context.text_features.float()
        right = right_class(batch, context)
        check_classes(len(classes), self.target)

        def cosines(features: Tensor) -> Tensor:
            return features.float() @ classes.T

        if self.target is None:

            def untargeted(state: ImageState) -> Tensor:
                z = cosines(state.features)
                first, _, third = z.topk(3).values.unbind(1)
                wrong = z.scatter(1, right, float("-inf")).amax(1)
                return (wrong - z.gather(1, right).squeeze(1)) / (first - third + TINY)

            return untargeted
        wrong = cosines(image_features(model, batch.images)).scatter(1, right, float("-inf"))
        target = wrong.topk(self.target + 1).indices[:, -1:]

        def targeted(state: ImageState) -> Tensor:
            z = cosines(state.features)
            first, _, third, fourth = z.topk(4).values.unbind(1)
            ahead = z.gather(1, target) - z.gather(1, right)
            return ahead.squeeze(1) / (first - (third + fourth) / 2 + TINY)

        return targeted


def check_classes(n_classes: int, target: int | None) -> None:
    """Raise UserError for fewer classes than the ratio is made of, or than there are targets."""
    least, targeted = (3, "") if target is None else (4, "targeted ")
    if n_classes < least:
        raise UserError(
            f"the {targeted}difference of logits ratio needs {least} classes, here are {n_classes}: use objective "
            "margin (for apgd_classes: targets: 0)"
        )
    if target is not None and target >= n_classes - 1:
        raise UserError(f"target must be below {n_classes - 1}, the number of wrong classes, got {target}")


def right_class(batch: Batch, context: AttackContext) -> Tensor:
    """[B, 1] int64: where the class of each image stands in the context. Raises UserError unless it stands there once,
    and every other class too."""
    ordered, order = context.text_group.sort()
    place = torch.searchsorted(ordered, batch.group).clamp_max(len(order) - 1)
    once = (ordered[1:] > ordered[:-1]).all()
    if not bool(once & (ordered[place] == batch.group).all()):
        raise UserError(
            "this attack takes one text for each class: give it to `fastmat task` with task zero_shot; on captions use "
            "objective contrastive or margin"
        )
    return order[place][:, None]
