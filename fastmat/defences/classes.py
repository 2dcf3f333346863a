"""What adversarial images are contrasted with: the captions of the batch, or the prompts of all classes.

Class prompts are encoded once; a label is found by the text, for the caption of a labelled image is its class prompt.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmat.attacks.base import context_of, text_features
from fastmat.attacks.objectives import Bound, Contrastive, Objective
from fastmat.defences.base import Features
from fastmat.defences.teacher import Teacher
from fastmat.defences.terms import contrastive_between, of_everyone
from fastmat.errors import UserError, nearest
from fastmat.memory import Chunks
from fastmat.models.protocol import ImageState, VisionLanguageModel
from fastmat.ops import contrastive_statistics
from fastmat.types import AttackContext, Batch

Against = Literal["captions", "classes"]
Prompts = tuple[tuple[str, ...], ...]
AT_ONCE = 512  # prompts: 80 templates of 1,000 classes do not fit at once


class ClassPrompts:
    """The prompts of C classes; several of one class are averaged on the sphere (CLIP, ICML 2021, section 3.1.4).

    The text tower must not train: its features of the prompts are encoded once per model and kept.
    Raises UserError without prompts, or where a defence that contrasts with classes trains the text tower.
    """

    def __init__(self, prompts: Prompts | None, *, text_trains: bool = False) -> None:
        if prompts is None:
            raise UserError(
                "the captions of this set are no class labels: take a labelled set (image_folder, labelled_digits), or "
                "a defence on captions (against: captions, or tecoa_itr)"
            )
        if text_trains:
            raise UserError("class prompts are encoded once, so the text tower cannot train: set trains to ['image']")
        self.prompts = prompts
        self._label = {text: label for label, texts in enumerate(prompts) for text in texts}
        self._chunks = Chunks(item="prompt", advice="encode on a device with more of it, or a smaller model")
        self._encoded: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()

    def labels(self, batch: Batch) -> Tensor:
        """[B] int64. Raises UserError for a caption that is no prompt."""
        unknown = next((text for text in batch.texts if text not in self._label), None)
        if unknown is not None:
            raise UserError(f"caption {unknown!r} is no class prompt; do not augment the captions of a labelled set")
        of_texts = torch.tensor([self._label[text] for text in batch.texts])
        # Without asking the device how many captions an image has.
        place = batch.txt2img
        return torch.zeros_like(batch.group).scatter_(0, place, of_texts.to(place.device, non_blocking=True))

    def features(self, model: VisionLanguageModel) -> Tensor:
        """[C, E] unit features."""
        assert isinstance(model, nn.Module)
        if model not in self._encoded:
            every = [text for texts in self.prompts for text in texts]
            parts = self._chunks.run(len(every), lambda a, b: text_features(model, every[a:b]).float(), at_most=AT_ONCE)
            flat = torch.cat(parts)
            means = [rows.mean(0) for rows in flat.split([len(texts) for texts in self.prompts])]
            self._encoded[model] = F.normalize(torch.stack(means), dim=-1)
        return self._encoded[model]

    def task(self, model: VisionLanguageModel, batch: Batch) -> tuple[Batch, AttackContext]:
        """What `CrossEntropy` reads: the batch with labels for groups, and the classes in place of the captions."""
        features = self.features(model)
        labels = self.labels(batch)
        context = AttackContext(
            image_features=features[:0],
            image_group=labels[:0],
            text_features=features,
            text_group=torch.arange(len(features), device=features.device),
        )
        return replace(batch, group=labels), context


class CrossEntropy:
    """The cross-entropy of each image over the texts of the context, one of which has its group; an objective.

    logit_scale: None: the model's.
    """

    def __init__(self, *, logit_scale: float | None = None) -> None:
        self.logit_scale = logit_scale

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        scale = model.logit_scale.detach()
        if self.logit_scale is not None:
            scale = torch.full_like(scale, self.logit_scale)
        return lambda state: class_rows(state, context.text_features, batch.group, scale)


def class_rows(state: ImageState, classes: Tensor, labels: Tensor, logit_scale: Tensor) -> Tensor:
    """[B] cross-entropies over C classes: classes [C, E] unit features, labels [B] int64 below C."""
    everyone = torch.arange(len(classes), device=classes.device)
    found = contrastive_statistics(state.features, classes, logit_scale, labels, everyone, column_side=False)
    return found.row_lse - found.row_match


class Contrast:
    """One defence's choice between captions (its retrieval form) and classes, and what follows from it.

    The terms are symmetric InfoNCE over the captions of all processes, or cross-entropy over all classes.
    Raises UserError for another choice, and for classes as `ClassPrompts`.
    """

    def __init__(self, against: Against, prompts: Prompts | None, *, text_trains: bool = False) -> None:
        if against not in get_args(Against):
            raise UserError(
                f"against must be 'captions' or 'classes', got {against!r}{nearest(against, get_args(Against))}"
            )
        self.classes = ClassPrompts(prompts, text_trains=text_trains) if against == "classes" else None

    def objective(self, *, logit_scale: float | None = None) -> Objective:
        """What the inner attack ascends. logit_scale: that of class logits, None: the model's."""
        return CrossEntropy(logit_scale=logit_scale) if self.classes else Contrastive()

    def task(self, model: VisionLanguageModel, batch: Batch) -> tuple[Batch, AttackContext]:
        """What the objective is bound to, of this process; `everyone` makes it that of all."""
        return self.classes.task(model, batch) if self.classes else (batch, context_of(model, batch))

    def everyone(self, context: AttackContext) -> AttackContext:
        """Classes are the same in every process; captions are gathered."""
        return context if self.classes else of_everyone(context)

    def texts(self, batch: Batch) -> dict[str, tuple[str, ...]]:
        """The text views of the outer forward."""
        return {} if self.classes else {"clean": batch.texts}

    def targets(self, task: Batch, context: AttackContext) -> dict[str, Tensor]:
        """What `term` needs beside features."""
        return {"classes": context.text_features, "labels": task.group} if self.classes else {}

    def own_texts(self, task: Batch, context: AttackContext) -> Tensor:
        """[B, E] unit rows: the class of each image, or the mean of its own captions."""
        if self.classes:
            return context.text_features[task.group]
        total = torch.zeros_like(context.image_features).index_add_(0, task.txt2img, context.text_features)
        return F.normalize(total, dim=-1)

    def teacher_columns(self, teacher: Teacher, batch: Batch, context: AttackContext) -> Tensor:
        """`columns` as the teacher has them."""
        if self.classes:
            return self.classes.features(teacher.model)
        return of_everyone(replace(context, text_features=teacher.texts(batch).features)).text_features

    def columns(self, features: Features) -> Tensor:
        """[C, E] class features, or [T, E] features of the captions of all processes."""
        if self.classes:
            return features.targets["classes"]
        return features.texts["clean"].features if features.everyone is None else features.everyone().texts["clean"]

    def term(self, features: Features, images: str) -> dict[str, Tensor]:
        """The loss of one image view, by its name."""
        if not self.classes:
            return {"contrastive": contrastive_between(features, images, "clean")}
        targets = features.targets
        rows = class_rows(features.images[images], targets["classes"], targets["labels"], features.logit_scale)
        return {"classes": rows.mean()}
