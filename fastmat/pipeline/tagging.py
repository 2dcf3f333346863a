"""The expert that knows classes: zero-shot classification by prompts (CLIP, ICML 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmat.attacks.base import frozen, image_features
from fastmat.data.labelled import fill
from fastmat.defences.classes import ClassPrompts
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.pipeline.base import Argument
from fastmat.pipeline.retrieval import check_contrasts


class Tagging:
    """The names whose prompts have the largest cosines with the picture, the nearest first.

    names: the classes. templates: prompts of a class, "{}" is its name; several are averaged. top: how many names an
        answer has (this project's choice: one, so that an answer does not change by the order of what comes behind).
    Raises UserError without two names, for equal ones, and for a model that does not compare images with texts.
    """

    argument: Argument | None = None
    from_gallery = False

    def __init__(
        self,
        *,
        vlm: VisionLanguageModel,
        names: tuple[str, ...],
        templates: tuple[str, ...] = ("a photo of a {}",),
        top: int = 1,
    ) -> None:
        check_contrasts(vlm)
        if len(names) < 2 or not 1 <= top <= len(names):
            raise UserError(f"names must be two or more and top 1 to their number, got {len(names)} and {top}")
        self.vlm = vlm
        self.names = names
        self.top = top
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        self.description = f"Tells which of these names fits the image best: {shown}."
        with frozen(vlm):
            self.features = ClassPrompts(fill(templates, names)).features(vlm)

    def answer(self, images: Tensor, arguments: Sequence[str]) -> list[str]:
        with frozen(self.vlm):
            cosine = image_features(self.vlm, images).float() @ self.features.T
        return [", ".join(self.names[place] for place in places) for places in cosine.topk(self.top).indices.tolist()]
