"""The last text pass of DRA and SA-AET: away from three images at once; slow and plain."""

import torch
from oracles.word_substitution import Oracle
from tiny_mlm import tiny_parts
from torch import Tensor

from fastmat.models.protocol import VisionLanguageModel
from fastmat.quirks import Quirks
from fastmat.text.words import STOP_WORDS
from fastmat.types import Batch


class ThreeGuides(Oracle):
    """The published choice: a guide of three features in one row; importance reads the feature once."""

    def encode(self, text: str) -> dict[str, Tensor]:
        encoded = super().encode(text)
        return {"once": encoded["features"], "features": encoded["features"].repeat(3)}


def plain_texts(
    model: VisionLanguageModel, batch: Batch, weighted: list[tuple[float, Tensor]], quirks: Quirks
) -> list[str]:
    """Each caption away from three weighted images' features; `weighted` holds weight and images."""
    bert, tokenizer = tiny_parts()
    words = ThreeGuides(
        bert=bert,
        tokenizer=tokenizer,
        model=model,
        stop_words=set(STOP_WORDS),
        quirks=quirks,
        max_words=1,
        choice="cosine",
        importance="once",
        compare="once",
        top_k=10,
        threshold=0.3,
    )
    with torch.no_grad():
        guides = [weight * model.encode_image(images).features for weight, images in weighted]
    owners = batch.txt2img.tolist()
    return [
        words.attack(text, torch.cat([guide[i] for guide in guides]))
        for text, i in zip(batch.texts, owners, strict=True)
    ]
