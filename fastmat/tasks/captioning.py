"""Image captioning: what does the model say of a picture, clean and attacked? By CIDEr and BLEU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fastmat.attacks.base import frozen
from fastmat.attacks.caption_loss import captioning_model
from fastmat.data.captions import CaptionRule
from fastmat.data.coco_captions import read_coco_captions
from fastmat.models.protocol import VisionLanguageModel
from fastmat.tasks.base import Judged
from fastmat.tasks.caption_scores import caption_metrics, check_scorers
from fastmat.types import Batch


class Captioning:
    """CIDEr and BLEU-1 to BLEU-4 against the human captions, times 100, as papers have them.

    The references are those of the data, also where an attack has changed captions: a captioner reads none.

    annotations: captions in COCO's format (`captions_val2014.json`), or a JSON list in the ALBEF/Karpathy format
        (`coco_karpathy_test.json`). images: the folder that file names start from.
    title, split: as the tables shall name them. captions: pre-processing of the references; scores have their own
        (`fastmat.tasks.caption_scores`).
    """

    name = "captioning"

    def __init__(
        self,
        *,
        annotations: Path,
        images: Path,
        title: str = "coco",
        split: str = "test",
        captions: CaptionRule = "none",
    ) -> None:
        check_scorers()
        self.data = read_coco_captions(annotations, images, name=title, split=split, captions=captions)
        self.picture = torch.arange(self.data.n_images)
        self.wanted = tuple(texts[0] for texts in self.data.captions)
        self.wanted_boxes: tuple[tuple[float, ...], ...] = ()

    def check(self, model: VisionLanguageModel) -> None:
        captioning_model(model)

    def judge(self, model: VisionLanguageModel, batches: Iterable[Batch]) -> Judged:
        captioner = captioning_model(model)
        said: list[str] = []
        for batch in batches:
            with frozen(model):
                said += captioner.generate(batch.images.to(model.logit_scale.device))
        references = self.data.captions[: len(said)]
        return Judged(metrics=caption_metrics(said, references), right=None, said=tuple(said))
