"""The attack on the classes of visual entailment."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.attacks.fusion import FusedCaptions, kl_from
from fastmat.attacks.objectives import Bound
from fastmat.errors import UserError
from fastmat.models.protocol import EntailmentModel, ImageState, VisionLanguageModel, entails
from fastmat.types import AttackContext, Batch


def entailment_model(model: VisionLanguageModel) -> EntailmentModel:
    """The same model. Raises UserError when it has no head for entailment."""
    if not entails(model):
        raise UserError(
            f"{type(model).__name__} has no head that tells entailment from contradiction: take a model that was "
            "fine-tuned for it (albef_ve)"
        )
    return model


class KLEntailment:
    """KL(softmax(clean logits) || softmax(logits)) of the three classes, the mean over the sentences of an image: away
    from what the model said, whether it was right or not. Co-Attack's paper (Zhang et al., ACM MM 2022) attacks these
    logits; its released script attacks the fused token instead (`kl_fused`; `co_attack`, representation: fusion).

    Raises UserError for a model without such a head.
    """

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        entailing = entailment_model(model)
        sentences = FusedCaptions(entailing, entailing.tokenize(batch.texts), batch.txt2img, len(batch))

        def logits(image: ImageState) -> Tensor:
            found: Tensor = entailing.entailment_head(sentences(image)).float()
            return found

        with torch.no_grad():
            clean = logits(entailing.encode_image(batch.images)).softmax(-1)
        return lambda image: sentences.mean(kl_from(clean, logits(image)))
