"""Visual entailment: does a picture entail a sentence (SNLI-VE; Xie et al., 2019)? By the head of ALBEF's `VE.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastmat.attacks.base import frozen
from fastmat.attacks.entailment import entailment_model
from fastmat.data.captions import CaptionRule
from fastmat.data.entailment import LABELS, read_entailment_set
from fastmat.models.protocol import VisionLanguageModel
from fastmat.tasks.base import Judged, share
from fastmat.types import Batch


class Entailment:
    """Accuracy over entailment, neutral and contradiction.

    annotations: `snli_ve_test.jsonl` as published, or ALBEF's `ve_test.json`. images: Flickr30k's pictures, `ID.jpg`.
    title, split: as the tables shall name them. captions: pre-processing of sentences; ALBEF's, as published.
    """

    name = "entailment"

    def __init__(
        self,
        *,
        annotations: Path,
        images: Path,
        title: str = "snli-ve",
        split: str = "test",
        captions: CaptionRule = "albef",
    ) -> None:
        read = read_entailment_set(annotations, images, name=title, split=split, captions=captions)
        self.data = read.pairs
        self.label = read.label
        self.picture = torch.tensor(self.data.group)
        self.wanted = tuple(LABELS[label] for label in read.label.tolist())
        self.wanted_boxes: tuple[tuple[float, ...], ...] = ()

    def check(self, model: VisionLanguageModel) -> None:
        entailment_model(model)

    def judge(self, model: VisionLanguageModel, batches: Iterable[Batch]) -> Judged:
        predicted = torch.cat([classes(model, batch).cpu() for batch in batches])
        right = predicted == self.label[: len(predicted)]
        return Judged(
            metrics={"accuracy": share(right)},
            right=right,
            said=tuple(LABELS[label] for label in predicted.tolist()),
        )


@torch.no_grad()
def classes(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """[T] int64, the class of every text of `batch` beside its image."""
    entailing = entailment_model(model)
    device = model.logit_scale.device
    with frozen(model):
        image = entailing.encode_image(batch.images.to(device))
        text = entailing.encode_text(entailing.tokenize(batch.texts).to(device))
        fused = entailing.fuse(image, text, batch.txt2img.to(device))
        logits: Tensor = entailing.entailment_head(fused.tokens[:, 0])
    return logits.argmax(1)
