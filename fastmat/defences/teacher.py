"""The original model that some defences keep to: a frozen copy, taken before training changes it."""

from __future__ import annotations

import copy
import weakref

import torch
from torch import Tensor, nn

from fastmat.defences.teacher_cache import TeacherCache
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, TextState, VisionLanguageModel
from fastmat.types import Batch


class Teacher:
    """`original` is copied here, so hand it in before training changes it. Encodes without gradients.

    cache: knows what it makes of the clean images; without one they are encoded at every step.
    """

    def __init__(self, original: VisionLanguageModel, cache: TeacherCache | None = None) -> None:
        assert isinstance(original, nn.Module)
        self.model = copy.deepcopy(original).eval().requires_grad_(False)
        self._cache = cache
        self._known: Tensor | None = None
        self._fits: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @torch.no_grad()
    def clean_embeds(self, batch: Batch) -> Tensor:
        """[B, E] un-normalised embeddings of the images of `batch`, whom no attack has touched."""
        if self._cache is None:
            return self.images(batch.images).embeds
        if self._known is None:
            self._known = self._cache.embeds(self.model.to(batch.images.device))
        return self._known[batch.index]

    @torch.no_grad()
    def images(self, images: Tensor) -> ImageState:
        """[B, 3, H, W], on whose device the teacher will be."""
        return self.model.to(images.device).encode_image(images)

    @torch.no_grad()
    def texts(self, batch: Batch) -> TextState:
        """The T captions of `batch`, on the device of its images."""
        device = batch.images.device
        return self.model.to(device).encode_text(self.model.tokenize(batch.texts).to(device))

    @torch.no_grad()
    def check(self, model: VisionLanguageModel) -> None:
        """Raise UserError unless both embed with the same width; looked at once per model."""
        assert isinstance(model, nn.Module)
        if model in self._fits:
            return
        device = model.logit_scale.device
        own, wanted = (
            m.encode_text(m.tokenize(["a"]).to(device)).embeds.shape[1] for m in (model, self.model.to(device))
        )
        if own != wanted:
            raise UserError(
                f"the teacher embeds in {wanted} dimensions and the model in {own}, so their embeddings cannot be "
                "compared: take a teacher of the model's own width"
            )
        self._fits.add(model)
