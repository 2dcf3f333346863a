"""Loss terms that several defences share."""

from __future__ import annotations

from torch import Tensor

from fastmat.defences.base import Features
from fastmat.ops import contrastive_loss


def contrastive_between(features: Features, images: str, texts: str) -> Tensor:
    """Symmetric multi-positive InfoNCE between one view of the images and one of the texts (scalar)."""
    return contrastive_loss(
        features.images[images].features,
        features.texts[texts].features,
        features.logit_scale,
        image_group=features.group,
        text_group=features.text_group,
    )
