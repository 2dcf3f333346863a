"""Signs that an attack by gradients proves nothing about a model: it is random, its gradient is zero or is masked.

After the checks of AutoAttack (Croce and Hein, ICML 2020) and of Athalye et al. (ICML 2018), for retrieval. A check
that finds nothing is no proof of robustness; thresholds are this project's choice.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastmat.attacks.apgd import ascend_adaptively, farthest_start
from fastmat.attacks.base import image_features, text_features
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Objective
from fastmat.attacks.rivals import Rivals
from fastmat.attacks.search import value_and_gradient
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import AttackContext, Batch, ThreatModel

SHARE = 0.25  # of a batch's images; a few of them may stand at a flat spot of any model
SAME = 1e-5  # between unit features of one input; kernels that add in no fixed order differ by less


class UnreliableGradient(UserWarning):
    """What an attack by gradients says of this model is not to be relied on."""


def gradient_warnings(
    model: VisionLanguageModel,
    batch: Batch,
    context: AttackContext,
    *,
    threat: ThreatModel,
    draws: Draws,
    objective: Objective | None = None,
    steps: int = 10,
) -> dict[str, str]:
    """Kind ("random", "zero", "masked") to one sentence; empty where nothing is wrong.

    random: two encodings of the same images or captions differ. zero: at a random point of the sphere the gradient of
    `objective` (default: `Rivals`, contrastive) is zero, not finite or not there for some image. masked: for a quarter
    of the images, a short APGD at `threat.eps` gains nothing over its start, or does less than at a quarter of the
    radius. A random model is not looked at further.

    model: frozen, in eval mode. Costs 4 + 2 steps image forwards and 1 + 2 steps backwards per image.
    """
    if unequal(model, batch):
        return {
            "random": "the model is random: two encodings of the same input differ, so a gradient is one of many "
            "and ranks change from run to run; make it deterministic, or attack the mean of many encodings"
        }
    if threat.eps == 0:
        return {}
    bound = (objective or Rivals(form="contrastive")).bind(model, batch, context)

    def value(x: Tensor) -> Tensor:
        return bound(model.encode_image(x)) + 0 * x.sum((1, 2, 3))

    start = farthest_start(batch, threat, draws, 0)
    values, gradient = value_and_gradient(value, start)
    gradient = gradient.flatten(1)
    broken = int((~gradient.isfinite().all(1) | ~gradient.any(1)).sum())
    said = {}
    if broken:
        said["zero"] = (
            f"the gradient is zero or not finite for {broken} of {len(batch)} images: attacks by gradients say nothing "
            "about them; rely on Square, or attack a differentiable stand-in of the model"
        )
    _, far = ascend_adaptively(value, batch.images, start, threat=threat, steps=steps)
    less = dataclasses.replace(threat, eps=threat.eps / 4)
    near_start = farthest_start(batch, less, draws, 0)
    _, near = ascend_adaptively(value, batch.images, near_start, threat=less, steps=steps)
    useless = int((~(far > values) | ~(far >= near)).sum())
    if useless > SHARE * len(batch) and broken <= SHARE * len(batch):
        said["masked"] = (
            f"the gradient may be masked: for {useless} of {len(batch)} images, APGD gains nothing over a random start "
            "or does less than at a quarter of the radius; rely on Square and on transfer from other models as well"
        )
    return said


@torch.no_grad()
def black_box_warning(white: Tensor, black: Tensor) -> dict[str, str]:
    """Kind "masked" to a sentence, where Square raises an objective further than APGD for over a quarter of the images.

    white, black: [B] values of the same objective at the images of APGD and of Square, under the same threat.
    """
    ahead = int((black > white).sum())
    if ahead <= SHARE * len(white):
        return {}
    return {
        "masked": f"the gradient may be masked: Square, which uses none, does better than APGD for {ahead} of "
        f"{len(white)} images; give Square more queries and do not rely on attacks by gradients"
    }


def unequal(model: VisionLanguageModel, batch: Batch) -> bool:
    """Whether encoding the same images or captions twice gives other features."""
    pairs = (
        (image_features(model, batch.images), image_features(model, batch.images)),
        (text_features(model, batch.texts), text_features(model, batch.texts)),
    )
    return any(not bool(((first - second).abs() <= SAME).all()) for first, second in pairs)
