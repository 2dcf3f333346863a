"""MAT: multimodal adversarial training (arXiv 2405.18770, WACV 2026).

min over weights of max over (image, text) perturbations of the contrastive loss: the text is attacked first, guided by
the clean image, then the image by PGD-2 against the adversarial text, in one pass. Order, two-step PGD and "cross-modal
loss for both" are the paper's; eps/2 per step, one word and the (adversarial, adversarial) pair are this project's
choice where the paper's settings are not public.

Cross-modal or uni-modal, per modality: the image attack's `objective` is contrastive or cosine against the text, or
squared_l2 or kl, distances from the clean image; the text attack's `choice` is cosine against the image, or kl from the
clean text. Loss: a weighted sum of contrastive pairs and of distances, so that every weight can be studied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.attacks.fusion import KLFusedFromClean
from fastmat.attacks.matching import ITM, ITCAndITM
from fastmat.attacks.objectives import CosineToOwn, Objective
from fastmat.attacks.pgd import PGD
from fastmat.attacks.rivals import Rivals
from fastmat.defences.base import Features, Views
from fastmat.defences.embedding_space import EmbeddingSpace
from fastmat.defences.inner import Captions, TextAttack, TextSearch, attacking, unit_captions, unit_images
from fastmat.defences.teacher import Teacher
from fastmat.defences.teacher_cache import TeacherCache
from fastmat.defences.terms import mean_over_texts, of_everyone, pair_terms
from fastmat.errors import UserError, nearest
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import AttackContext, Batch, ThreatModel

Order = Literal["text_image", "image_text", "independent"]
PAIRS = ("clean-clean", "adv-clean", "clean-adv", "adv-adv")
DISTANCES = tuple(
    f"{modality}-{apart}" for modality in ("image", "text") for apart in ("adv-teacher", "clean-teacher", "adv-clean")
)


class MAT:
    """text_search: the text attack: word_substitution, whose `max_words` is the text budget, or embedding_space.

    order: "text_image" (published), "image_text", or "independent" (each against the other's clean form).
    steps, step_size (pixel units; null: eps/2), objective, random_start: the image attack, as in `PGD`.
    pairs: weight of each image-text pair in the outer loss; zero or absent: not encoded.
    distances: weight of each squared distance between embeddings, un-normalised and summed over dimensions as FARE's:
        image-adv-teacher is FARE's term, image-adv-clean TRADES' idea; the teacher is the model before training.
    trains: which towers, ("image", "text") or one of them. teacher_cache: as in `FARE`.
    Raises UserError for an unknown order, pair or distance, a weight that is negative or not finite, no positive
    weight, and an image objective that reads words where the text attack makes none.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        text_search: TextSearch,
        teacher: VisionLanguageModel | None = None,
        order: Order = "text_image",
        steps: int = 2,
        step_size: float | None = None,
        objective: Objective | None = None,
        random_start: bool = True,
        pairs: Mapping[str, float] | None = None,
        distances: Mapping[str, float] | None = None,
        trains: tuple[str, ...] = ("image", "text"),
        teacher_cache: TeacherCache | None = None,
    ) -> None:
        if order not in get_args(Order):
            raise UserError(f"MAT has no order {order!r}{nearest(order, get_args(Order))}")
        wordless = order == "text_image" and isinstance(text_search, EmbeddingSpace)
        if wordless and isinstance(objective, CosineToOwn | Rivals | KLFusedFromClean | ITM | ITCAndITM):
            raise UserError(
                "this image objective reads the words of a caption, and embedding_space changes none: take "
                "'contrastive', or the order 'image_text' or 'independent'"
            )
        self.text_search = text_search
        self.order = order
        self.attack = PGD(
            threat=threat,
            steps=steps,
            step_size=threat.eps / 2 if step_size is None else step_size,
            objective=objective,
            random_start=random_start,
        )
        self.pairs = positive({"adv-adv": 1.0} if pairs is None else pairs, PAIRS, "pair", " (image first, then text)")
        self.distances = positive(distances or {}, DISTANCES, "distance", "")
        if not self.pairs and not self.distances:
            raise UserError(f"MAT needs a pair of positive weight, one of {', '.join(PAIRS)}, or a distance")
        self.trains = trains
        self._to_teacher = {name.split("-")[0] for name in self.distances if name.endswith("-teacher")}
        if self._to_teacher and teacher is None:
            raise UserError("a distance to the teacher needs a teacher, the original model")
        if teacher_cache is not None and "image" not in self._to_teacher:
            raise UserError("teacher_cache is for distances of images to the teacher, and this MAT has none")
        self.teacher = Teacher(teacher, teacher_cache) if self._to_teacher and teacher is not None else None

    def perturb(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> Views:
        targets: dict[str, Tensor] = {}
        with attacking(model):
            if self.teacher is not None:
                self.teacher.check(model)
                if "image" in self._to_teacher:
                    targets["image"] = self.teacher.clean_embeds(batch)
                if "text" in self._to_teacher:
                    targets["text"] = self.teacher.texts(batch).embeds
            images, captions = self._attack(model, batch, draws)
        image_views = {"adv": images.detach(), "clean": batch.images}
        text_views = {"adv": captions.texts, "clean": batch.texts}
        texts = self._needed("text")
        return Views(
            images={name: image_views[name] for name in self._needed("image")},
            texts={name: text_views[name] for name in texts},
            targets=targets,
            shifts={"adv": captions.shift} if captions.shift is not None and "adv" in texts else {},
        )

    def loss(self, features: Features) -> dict[str, Tensor]:
        of_pairs = {
            f"{name}/{pair}": weight * term
            for pair, weight in self.pairs.items()
            for name, term in pair_terms(features, *pair.split("-")).items()
        }
        return of_pairs | {
            f"distance/{name}": weight * distance(features, *name.split("-")) for name, weight in self.distances.items()
        }

    def _needed(self, modality: Literal["image", "text"]) -> list[str]:
        """The views of a modality that some term reads."""
        place = ("image", "text").index(modality)
        paired = {pair.split("-")[place] for pair in self.pairs}
        apart = {view for name in self.distances if name.startswith(modality) for view in name.split("-")[1:]}
        return sorted((paired | apart) - {"teacher"})

    def _attack(self, model: VisionLanguageModel, batch: Batch, draws: Draws) -> tuple[Tensor, Captions]:
        clean = unit_images(model, batch.images)
        attack_texts = TextAttack(self.text_search, model, batch)

        def attack_images(captions: Captions) -> Tensor:
            context = AttackContext(
                image_features=clean,
                image_group=batch.group,
                text_features=unit_captions(model, captions),
                text_group=batch.text_group,
            )
            return self.attack.run(model, batch.replace(texts=captions.texts), of_everyone(context), draws)[0]

        if self.order == "text_image":
            captions = attack_texts(clean)
            return attack_images(captions), captions
        images = attack_images(Captions(batch.texts))
        return images, attack_texts(unit_images(model, images) if self.order == "image_text" else clean)


def distance(features: Features, modality: str, view: str, to: str) -> Tensor:
    """Scalar: the mean over images or texts of the squared distance of a view's embedding to another's."""
    views = features.images if modality == "image" else features.texts
    target = features.targets[modality] if to == "teacher" else views[to].embeds
    rows = (views[view].embeds - target).square().sum(-1)
    return rows.mean() if modality == "image" else mean_over_texts(features, rows)


def positive(weights: Mapping[str, float], known: tuple[str, ...], what: str, hint: str) -> dict[str, float]:
    """The weights above zero. Raises UserError for a name that is not `known` and for a weight that is none."""
    for name, weight in weights.items():
        if name not in known:
            raise UserError(f"MAT has no {what} {name!r}{nearest(name, known)}{hint}")
        if not 0 <= weight < math.inf:
            raise UserError(
                f"the weight of MAT's {what} {name!r} must be finite and must not be negative, got {weight}"
            )
    return {name: weight for name, weight in weights.items() if weight > 0}
