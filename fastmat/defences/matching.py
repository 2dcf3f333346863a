"""Fine-tuning and hardening of fusion models (ALBEF, NeurIPS 2021; BLIP, ICML 2022): contrast against a momentum model
and its queue, and matching with hard negatives, between the views that any defence makes.

Published: both terms with weight 1; soft targets 0.4, ramped over the first epoch; keys of momentum 0.995; negatives
drawn by similarity to the momentum keys (ALBEF) or to the live features (BLIP); a queue of 65,536 (ALBEF) or 57,600
(BLIP). Under an attack clean keys are this project's choice: targets that the attack cannot move.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.defences.base import Defence, Features, Pairs, Views
from fastmat.defences.inner import Captions, unit_captions, unit_images
from fastmat.defences.momentum import FeatureQueue, Momentum
from fastmat.defences.negatives import check_negatives, draw_columns, negative_weights, uniform_of_texts
from fastmat.defences.terms import contrastive_between, mean_over_texts, of_everyone
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel, fuses
from fastmat.ops import contrastive_rows
from fastmat.types import AttackContext, Batch

Keys = Literal["clean", "adv"]
Negatives = Literal["momentum", "online"]


@dataclass(frozen=True, kw_only=True)
class MatchingSettings:
    """itc, itm: weights. A zero itc stays in the graph, because a wrapper waits for every trained parameter.

    ema_decay: what momentum encoders keep of themselves in a step; null: there are none, and contrast is within the
        batch. queue: momentum features kept of each modality, a multiple of the global batch; 0: none.
    soft_weight, ramp_steps: share of the momentum model's softmax in the targets, reached after so many steps.
    keys: which views the momentum model sees, and the queues keep, clean or adv.
    negatives: which keys make a negative likely, momentum or online.
    negatives_across: seek them in the batch of all processes, as BLIP did on COCO, so that the number of processes
        changes nothing; false: in each process's own share, as ALBEF did.
    Raises UserError for weights that are negative or both zero, for what lies outside its range, for an unknown choice.
    """

    itc: float = 1.0
    itm: float = 1.0
    ema_decay: float | None = 0.995
    queue: int = 65536
    soft_weight: float = 0.4
    ramp_steps: int = 0
    keys: Keys = "clean"
    negatives: Negatives = "momentum"
    negatives_across: bool = False

    def __post_init__(self) -> None:
        if not (self.itc >= 0 and self.itm >= 0 and 0 < self.itc + self.itm < math.inf):
            raise UserError(
                f"itc and itm must be finite and not negative, and one must be positive; got {self.itc} and {self.itm}"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise UserError(f"ema_decay must be in [0, 1], or null for no momentum encoders; got {self.ema_decay}")
        if not 0 <= self.soft_weight <= 1:
            raise UserError(f"soft_weight must be in [0, 1], got {self.soft_weight}")
        for name, least in (("queue", self.queue), ("ramp_steps", self.ramp_steps)):
            if least < 0:
                raise UserError(f"{name} must not be negative, got {least}; 0 is none")
        for name, value, known in (("keys", self.keys, Keys), ("negatives", self.negatives, Negatives)):
            if value not in get_args(known):
                raise UserError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")


class Matching:
    """The views of `defence`, each of its pairs drawn together by itc * ITC + itm * ITM.

    defence: one that says which pairs it contrasts (finetune, tecoa_itr, mat); its own terms and weights stay.
    model: that will be trained; momentum encoders are copied from it here. seed: of what stands in the queues at first.
    Raises UserError for a defence without pairs and for a model that does not fuse where itm is positive; in `perturb`
    for a queue that holds no whole number of batches; in `Views.match` for a batch in which a pair has no negative.
    """

    def __init__(
        self, *, defence: Defence, model: VisionLanguageModel, settings: MatchingSettings | None = None, seed: int = 0
    ) -> None:
        settings = settings or MatchingSettings()
        pairs = getattr(defence, "pairs", ())
        if not pairs:
            raise UserError(
                f"{type(defence).__name__} contrasts no images with texts, so there is nothing to match; "
                "take finetune, tecoa_itr or mat"
            )
        if settings.itm and not fuses(model):
            raise UserError(
                f"{type(model).__name__} does not fuse images with texts; take albef or blip, or set itm: 0"
            )
        self.defence = defence
        self.settings = settings
        self.memory: Momentum | None = None
        if settings.ema_decay is not None:
            self.memory = Momentum(model, queue=settings.queue, ema_decay=settings.ema_decay, seed=seed)
        self.pairs = tuple(pairs)
        self.trains = (*defence.trains, "fusion") if settings.itm else defence.trains
        self._own: AttackContext | None = None
        self._every: AttackContext | None = None

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        views = self.defence.perturb(model, batch, draws)
        if self.memory is not None:
            self.memory.follow(model)
            self._own = self._keys_of(self.memory, views, batch)
            self._every = of_everyone(self._own)
            self.memory.check(len(self._every.image_group), len(self._every.text_group))
        if not self.settings.itm:
            return views
        if views.shifts and fuses(model) and model.rereads_text:
            raise UserError(
                "embedding_space moves the embeddings of tokens, and this model embeds a text anew to match it: take "
                "word_substitution, or set itm: 0"
            )
        uniform = [uniform_of_texts(draws, f"negative_{side}", batch) for side in ("image", "text")]
        match = partial(self._pairs_to_fuse, batch.txt2img, uniform)
        return replace(views, match=match, borrows=self.settings.negatives_across)

    def loss(self, features: Features) -> dict[str, Tensor]:
        return self.defence.loss(replace(features, between=self._terms))

    def remember(self) -> None:
        if self.memory is not None and self._every is not None:
            self.memory.add(self._every)

    def _keys_of(self, memory: Momentum, views: Views, batch: Batch) -> AttackContext:
        """Momentum features of the clean pairs, or of the adversarial view of whatever has one."""
        images, captions = batch.images, Captions(batch.texts)
        if self.settings.keys == "adv":
            images = views.images.get("adv", images)
            if "adv" in views.texts:
                captions = Captions(views.texts["adv"], views.shifts.get("adv"))
        seen = memory.model
        return AttackContext(
            image_features=unit_images(seen, images),
            image_group=batch.group,
            text_features=unit_captions(seen, captions),
            text_group=batch.text_group,
        )

    def _pairs_to_fuse(self, txt2img: Tensor, uniform: list[Tensor], features: Features) -> dict[str, Pairs]:
        """Of every contrasted pair: T positives, T with another image, T with another text."""
        found = {}
        texts = torch.arange(len(txt2img), device=txt2img.device)
        borrows = self.settings.negatives_across and features.everyone is not None
        for pair in self.pairs:
            image_view, text_view = pair.split("-")
            to_image, to_text = self.negative_weights(features, image_view, text_view)
            other_images = draw_columns(to_image, uniform[0])
            other_texts = draw_columns(to_text[txt2img], uniform[1])
            negatives = len(features.group) + texts, len(texts) + texts
            own_images, own_texts = negatives if borrows else (other_images, other_texts)
            found[pair] = Pairs(
                image_view,
                text_view,
                torch.cat([txt2img, own_images, txt2img]),
                torch.cat([texts, texts, own_texts]),
                other_images if borrows else None,
                other_texts if borrows else None,
            )
        return found

    def negative_weights(self, features: Features, images: str, texts: str) -> tuple[Tensor, Tensor]:
        """[T, N] and [B, M]: how likely each of N images is a text's negative, and each of M texts an image's."""
        among = self._sought_among(features, images, texts)
        check_negatives(features.text_group, among.image_group)
        check_negatives(features.group, among.text_group)
        image, text, scale = features.images[images].features, features.texts[texts].features, features.logit_scale
        return (
            negative_weights(scale * text @ among.image_features.T, features.text_group, among.image_group),
            negative_weights(scale * image @ among.text_features.T, features.group, among.text_group),
        )

    def _sought_among(self, features: Features, images: str, texts: str) -> AttackContext:
        across = self.settings.negatives_across
        if self._own is not None and self._every is not None and self.settings.negatives == "momentum":
            return self._every if across else self._own
        if across and features.everyone is not None:
            every = features.everyone()
            return AttackContext(
                image_features=every.images[images],
                image_group=every.group,
                text_features=every.texts[texts],
                text_group=every.text_group,
            )
        return AttackContext(
            image_features=features.images[images].features,
            image_group=features.group,
            text_features=features.texts[texts].features,
            text_group=features.text_group,
        )

    def _terms(self, features: Features, images: str, texts: str) -> dict[str, Tensor]:
        contrast: Callable[[Features, str, str], Tensor]
        contrast = contrastive_between if self.memory is None else partial(self._contrast, self.memory)
        terms = {"contrastive": self.settings.itc * contrast(features, images, texts)}
        if self.settings.itm:
            logits = features.fused[f"{images}-{texts}"].itm_logits.view(3, -1, 2)
            terms["matching"] = self.settings.itm * mean_over_texts(features, matching_loss(logits))
        return terms

    def _contrast(self, memory: Momentum, features: Features, images: str, texts: str) -> Tensor:
        """ITC against the momentum keys of everyone and the queue."""
        own, every = self._own, self._every
        assert own is not None and every is not None
        ramp = min(1.0, memory.steps / self.settings.ramp_steps) if self.settings.ramp_steps else 1.0

        def rows(
            live: Tensor, soft: Tensor, group: Tensor, keys: Tensor, key_group: Tensor, queue: FeatureQueue
        ) -> Tensor:
            queued = len(queue.group) > 0
            return contrastive_rows(
                live,
                keys,
                features.logit_scale,
                row_group=group,
                column_group=key_group,
                soft_rows=soft,
                soft_weight=self.settings.soft_weight * ramp,
                queue=queue.features if queued else None,
                queue_group=queue.group if queued else None,
            )

        image, text = features.images[images].features, features.texts[texts].features
        of_images = rows(image, own.image_features, features.group, every.text_features, every.text_group, memory.texts)
        of_texts = rows(
            text, own.text_features, features.text_group, every.image_features, every.image_group, memory.images
        )
        return (of_images.mean() + mean_over_texts(features, of_texts)) / 2


def matching_loss(logits: Tensor) -> Tensor:
    """[T]: the mean cross-entropy of logits [3, T, 2] of a caption with its image, with another image, and of its image
    with another caption."""
    label = torch.tensor([1, 0, 0], device=logits.device)[:, None].expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none").view_as(label).mean(0)
