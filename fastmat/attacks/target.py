"""Targeted attacks: what carries an image towards a caption that is given, and how near that caption it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastmat.attacks.base import text_features
from fastmat.attacks.objectives import Bound
from fastmat.errors import UserError
from fastmat.models.protocol import ImageState, VisionLanguageModel
from fastmat.ops import contrastive_statistics
from fastmat.types import AttackContext, Batch


class Target:
    """How near each image is to its target caption; ascending it is a targeted attack, with any image attack.

    caption: one target for all images. captions: one for each; a list by the image's position in its set
        (`Batch.index`), a mapping from position to caption, or a JSON file that holds either. A set may be attacked in
        part, so positions beyond it are no error.
    form: "cosine", in [-1, 1], as AttackVLM does with a text for target (Zhao et al., NeurIPS 2023, the MF-it form);
        "contrastive", the logarithm of the target's share against every text of the context, s cos(x, target) -
        logsumexp(s cos(x, texts)), s the model's scale: it also leaves the image's own captions, which is what a rank
        counts. Both are this image's alone, whatever the batch.

    Raises UserError unless exactly one of caption and captions is given, every position is a whole number from 0 and
    every caption a text that is not empty; `bind` raises it for an image of the batch without a caption.
    """

    def __init__(
        self,
        *,
        caption: str | None = None,
        captions: Path | Mapping[int, str] | Sequence[str] | None = None,
        form: Literal["cosine", "contrastive"] = "cosine",
    ) -> None:
        if (caption is None) == (captions is None):
            raise UserError(f"set exactly one of caption and captions, got {caption!r} and {captions!r}")
        if form not in ("cosine", "contrastive"):
            raise UserError(f"form must be 'cosine' or 'contrastive', got {form!r}")
        self.caption = None if caption is None else checked_caption("caption", caption)
        self.captions = {} if captions is None else read_captions(captions)
        self.form = form

    def bind(self, model: VisionLanguageModel, batch: Batch, context: AttackContext) -> Bound:
        target = self.features(model, batch)
        if self.form == "cosine":
            return lambda state: (state.features * target).sum(1)
        scale = model.logit_scale.detach()

        def value(state: ImageState) -> Tensor:
            rows = contrastive_statistics(
                state.features, context.text_features, scale, batch.group, context.text_group, column_side=False
            )
            return scale * (state.features * target).sum(1) - rows.row_lse

        return value

    def features(self, model: VisionLanguageModel, batch: Batch) -> Tensor:
        """[B, E] unit features of each image's target caption; each distinct caption is encoded once."""
        wanted = self.of(batch)
        distinct = list(dict.fromkeys(wanted))
        row = {text: n for n, text in enumerate(distinct)}
        return text_features(model, distinct)[[row[text] for text in wanted]]

    def of(self, batch: Batch) -> list[str]:
        """The B target captions. Raises UserError when an image has none."""
        if self.caption is not None:
            return [self.caption] * len(batch)
        index = batch.index.tolist()
        missing = [i for i in index if i not in self.captions]
        if missing:
            raise UserError(
                f"captions must name a target for every image, but {len(missing)} of {len(index)} have none, the first "
                f"at position {missing[0]} of the set (counted from 0); add it, or set caption for all"
            )
        return [self.captions[i] for i in index]


def read_captions(source: Path | Mapping[int, str] | Sequence[str]) -> dict[int, str]:
    """Position to caption, from a list, a mapping or a JSON file with either. Raises UserError naming the entry."""
    content: Any = source
    if isinstance(source, (str, Path)):
        try:
            content = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"captions file {source} cannot be read as JSON ({error}); give a list of captions or "
                '{"position": "caption"}'
            ) from error
    if isinstance(content, Mapping):
        entries = list(content.items())
    elif isinstance(content, Sequence) and not isinstance(content, str):
        entries = list(enumerate(content))
    else:
        raise UserError(f"captions must be a list or a mapping from position to caption, got {content!r}")
    captions: dict[int, str] = {}
    for position, caption in entries:
        if not str(position).isdecimal():
            raise UserError(f"captions: {position!r} is no position of an image; write whole numbers from 0")
        captions[int(position)] = checked_caption(f"captions[{position}]", caption)
    return captions


def checked_caption(name: str, caption: object) -> str:
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"{name} must be a text that is not empty, got {caption!r}")
    return caption


@torch.no_grad()
def target_ranks(features: Tensor, target_features: Tensor, gallery_features: Tensor) -> Tensor:
    """[B] int64: how many captions of the gallery stand before the target caption; 0: the image retrieves its target.

    features [B, E] of the attacked images, target_features [B, E] of their target captions, gallery_features [M, E],
    all unit rows of the judging model. The gallery may hold the target itself: a caption within 1e-6 of the target's
    cosine does not stand before it, and fp32 products of equal rows differ by less. A NaN never improves a rank.

    >>> gallery = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    >>> target_ranks(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), gallery[[1, 2]], gallery).tolist()
    [1, 0]
    """
    own = (features * target_features).sum(1, keepdim=True) + 1e-6
    blocks = zip(features.split(256), own.split(256), strict=True)  # never all of [B, M]
    return torch.cat([(~(block @ gallery_features.T <= bar)).sum(1) for block, bar in blocks])
