"""Zero-shot classification: which class prompt is nearest to a picture (CLIP, Radford et al., ICML 2021, section 3.1)?

Robust accuracy as TeCoA (Mao et al., ICLR 2023) and FARE (Schlarmann et al., ICML 2024) report it: pictures are
attacked, class prompts are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastmat.attacks.base import frozen, image_features
from fastmat.data.labelled import class_prompts
from fastmat.data.retrieval import RetrievalSet
from fastmat.defences.classes import ClassPrompts
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.tasks.base import Judged, share
from fastmat.tasks.uncontrasted import contrasts
from fastmat.types import AttackContext, Batch


class ZeroShot:
    """Top-1 accuracy over the classes of a labelled set.

    data: with the prompts of its class for the captions of a picture; its templates are set there. A class with several
        prompts is the mean of their unit features, on the sphere again. Each is encoded once for a model.
    Published: attack apgd_classes, eps 1/255, 2/255 and 4/255, the prompt "This is a photo of a {}", and for FARE 1,000
        pictures of a set (`limit`; the readers let classes take turns, FARE draws at random).
    Attacks see the classes in place of captions: with objective contrastive, {directions: i2t} is the cross-entropy
        of the classes; margin and dlr are their margins. With several attacks of one budget there is a row for the
        worst case, in which a picture counts when it is right before and after each of them.
    Raises UserError for data whose captions are no labels.
    """

    name = "zero_shot"

    def __init__(self, *, data: RetrievalSet) -> None:
        prompts = class_prompts(data)
        if prompts is None:
            raise UserError(
                f"the captions of {data.name}/{data.split} are no class labels, or no class has two pictures: take a "
                "labelled set (image_folder, torchvision, labelled_digits)"
            )
        self.data = data
        self.picture = torch.arange(data.n_images)
        self.prompts = ClassPrompts(prompts)
        self.groups = torch.tensor(sorted(set(data.group)))
        self.label = torch.searchsorted(self.groups, torch.tensor(data.group))
        self.spoken = tuple(own[0] for own in prompts)
        self.wanted = tuple(self.spoken[label] for label in self.label.tolist())
        self.wanted_boxes: tuple[tuple[float, ...], ...] = ()
        self._contexts: weakref.WeakKeyDictionary[nn.Module, AttackContext] = weakref.WeakKeyDictionary()

    def check(self, model: VisionLanguageModel) -> None:
        if not contrasts(model):
            raise UserError(
                f"{type(model).__name__} has no features that compare images with class prompts: take a model for "
                "retrieval (open_clip, hf_clip, albef, blip)"
            )

    def judge(self, model: VisionLanguageModel, batches: Iterable[Batch]) -> Judged:
        device = model.logit_scale.device
        known = {text for prompts in self.prompts.prompts for text in prompts}
        found: list[Tensor] = []
        for batch in batches:
            changed = next((text for text in batch.texts if text not in known), None)
            if changed is not None:
                raise UserError(
                    f"an attack made {changed!r} of a class prompt, but {self.name} attacks none: take an attack on "
                    "images alone, or set threat.max_words to 0"
                )
            with frozen(model):
                images = image_features(model, batch.images.to(device)).float()
                found.append((images @ self.prompts.features(model).T).argmax(1).cpu())
        predicted = torch.cat(found)
        judged = self.counted(predicted == self.label[: len(predicted)])
        return Judged(
            metrics=judged.metrics, right=judged.right, said=tuple(self.spoken[label] for label in predicted.tolist())
        )

    def counted(self, right: Tensor) -> Judged:
        """What [N] bool of right rows amount to."""
        return Judged(metrics={"accuracy": share(right)}, right=right, said=("",) * len(right))

    def context(self, model: VisionLanguageModel, batches: Iterable[Batch]) -> AttackContext:
        """What attacks contrast with: the C classes, and the clean pictures of the set."""
        assert isinstance(model, nn.Module)
        if model not in self._contexts:
            device = model.logit_scale.device
            parts = []
            with frozen(model):
                for batch in batches:
                    parts.append((image_features(model, batch.images.to(device)), batch.group.to(device)))
                classes = self.prompts.features(model)
            images, groups = zip(*parts, strict=True)
            self._contexts[model] = AttackContext(
                image_features=torch.cat(images),
                image_group=torch.cat(groups),
                text_features=classes,
                text_group=self.groups.to(device),
            )
        return self._contexts[model]
