"""MAT: multimodal adversarial training (arXiv 2405.18770, WACV 2026).

min over weights of max over (image, text) perturbations of the contrastive loss: the text is attacked first, guided by
the clean image, then the image by PGD-2 against the adversarial text, in one pass. Order, two-step PGD and "cross-modal
loss for both" are the paper's; eps/2 per step, one word and the (adversarial, adversarial) pair are this project's
choice where the paper's settings are not public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from fastmat.attacks.base import frozen, text_features
from fastmat.attacks.draws import Draws
from fastmat.attacks.objectives import Objective
from fastmat.attacks.pgd import PGD
from fastmat.defences.base import Features, Views
from fastmat.defences.terms import contrastive_between
from fastmat.errors import UserError, nearest
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import AttackContext, Batch, ThreatModel

Order = Literal["text_image", "image_text", "independent"]
PAIRS = ("clean-clean", "adv-clean", "clean-adv", "adv-adv")


class TextSearch(Protocol):
    """What `WordSubstitution` offers; the plan is opaque here."""

    def plan(self, model: VisionLanguageModel, texts: Sequence[str]) -> Any: ...

    def search(self, model: VisionLanguageModel, plan: Any, guide: Tensor | None) -> tuple[str, ...]: ...


class MAT:
    """text_search: the word substitution; its `max_words` is the text budget.

    order: "text_image" (published), "image_text", or "independent" (each against the other's clean form).
    steps, step_size (pixel units; None: eps/2), objective, random_start: the image attack, as in `PGD`.
    pairs: weight of each image-text pair in the outer loss; zero or absent: not encoded.
    trains: which towers, ("image", "text") or one of them.
    Raises UserError for an unknown order or pair, a negative weight, or no positive weight.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        text_search: TextSearch,
        order: Order = "text_image",
        steps: int = 2,
        step_size: float | None = None,
        objective: Objective | None = None,
        random_start: bool = True,
        pairs: Mapping[str, float] | None = None,
        trains: tuple[str, ...] = ("image", "text"),
    ) -> None:
        if order not in get_args(Order):
            raise UserError(f"MAT has no order {order!r}{nearest(order, get_args(Order))}")
        pairs = {"adv-adv": 1.0} if pairs is None else pairs
        for pair, weight in pairs.items():
            if pair not in PAIRS:
                raise UserError(f"MAT has no pair {pair!r}{nearest(pair, PAIRS)} (image first, then text)")
            if not weight >= 0:
                raise UserError(f"the weight of MAT's pair {pair!r} must not be negative, got {weight}")
        self.text_search = text_search
        self.order = order
        self.attack = PGD(
            threat=threat,
            steps=steps,
            step_size=threat.eps / 2 if step_size is None else step_size,
            objective=objective,
            random_start=random_start,
        )
        self.pairs = {pair: weight for pair, weight in pairs.items() if weight > 0}
        if not self.pairs:
            raise UserError(f"MAT needs a pair of positive weight, one of {', '.join(PAIRS)}")
        self.trains = trains

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        with frozen(model):
            images, texts = self._attack(model, batch, draws)
        image_views = {"clean": batch.images, "adv": images.detach()}
        text_views = {"clean": batch.texts, "adv": texts}
        return Views(
            images={name: image_views[name] for name in sorted({pair.split("-")[0] for pair in self.pairs})},
            texts={name: text_views[name] for name in sorted({pair.split("-")[1] for pair in self.pairs})},
        )

    def loss(self, features: Features) -> dict[str, Tensor]:
        return {
            f"contrastive/{pair}": weight * contrastive_between(features, *pair.split("-"))
            for pair, weight in self.pairs.items()
        }

    def _attack(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> tuple[Tensor, tuple[str, ...]]:
        clean = unit_images(model, batch.images)
        plan = self.text_search.plan(model, batch.texts)

        def substitute(image_features: Tensor) -> tuple[str, ...]:
            return tuple(self.text_search.search(model, plan, image_features[batch.txt2img]))

        def ascend(texts: tuple[str, ...]) -> Tensor:
            context = AttackContext(
                image_features=clean,
                image_group=batch.group,
                text_features=text_features(model, texts),
                text_group=batch.text_group,
            )
            return self.attack.run(model, batch.replace(texts=texts), context, draws)[0]

        if self.order == "text_image":
            texts = substitute(clean)
            return ascend(texts), texts
        images = ascend(batch.texts)
        return images, substitute(unit_images(model, images) if self.order == "image_text" else clean)


@torch.no_grad()
def unit_images(model: VisionLanguageModel, images: Tensor) -> Tensor:
    """[B, E] unit features without a graph."""
    return model.encode_image(images).features
