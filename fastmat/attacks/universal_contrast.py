"""C-PGC's objective (Fang et al., ICCV 2025, arXiv 2406.05491), the same for images and for captions.

A sample is pushed from what belongs to it towards what is farthest from it, and away from where it was:

    log(1 + sum_other exp(cos / temperature) / sum_own exp(cos / temperature)) + alpha ||f - f_clean||^2

own: an image's captions, or a caption's image; other: those of the least similar of a few images drawn. f: unit rows.

Where the release differs: it averages the two sums over its batch of 4 before the logarithm, here every sample has its
own, so that the batch size does not matter; its squared distance is summed over the batch where the rest is a mean; for
captions it looks for the farthest image from the perturbed caption, here from the clean one, as for images; the drawn
images may be the sample's own, here they are not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.base import text_features
from fastmat.attacks.draws import Draws
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.types import Batch


class Keys(NamedTuple):
    """What each of B samples is compared with: features [B, K, E], mask [B, K] bool (True where a key stands)."""

    features: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Clean features of what is fitted on: N images, T captions, in the order of the batches.

    images [N, E]; texts [T, E]; group [N]; index [N] on the CPU, as in `Batch`; captions: the T strings; txt2img [T];
    own [N, K], mask [N, K]: rows of each image's captions, padded; own_mean [N, E]: the mean of their features.
    """

    images: Tensor
    texts: Tensor
    group: Tensor
    index: Tensor
    captions: tuple[str, ...]
    txt2img: Tensor
    own: Tensor
    mask: Tensor
    own_mean: Tensor

    def captions_of(self, rows: Tensor) -> Keys:
        """The captions of the images `rows` [B]."""
        return Keys(self.texts[self.own[rows]], self.mask[rows])

    def image_of(self, rows: Tensor) -> Keys:
        """The images `rows` [B] as single keys."""
        features = self.images[rows, None]
        return Keys(features, features.new_ones(features.shape[:2], dtype=torch.bool))

    def drawn(self, draws: Draws, name: str, index: Tensor, count: int) -> Tensor:
        """[B, count] rows of images, drawn for each of the samples `index` [B]."""
        share = draws.uniform(name, index, (count,)).add(1).div(2)
        return (share * len(self.images)).long().clamp_max(len(self.images) - 1)  # rounding may reach the end


@torch.no_grad()
def read_corpus(model: VisionLanguageModel, batches: Iterable[Batch]) -> Corpus:
    """Encode every image and caption once. Raises UserError without two groups, or for an image without captions."""
    device = model.logit_scale.device
    images, texts, group, index, txt2img = [], [], [], [], []
    captions: list[str] = []
    seen = 0
    for batch in batches:
        images.append(model.encode_image(batch.images.to(device)).features)
        texts.append(text_features(model, batch.texts))
        group.append(batch.group.to(device))
        index.append(batch.index.cpu())
        txt2img.append(batch.txt2img.to(device) + seen)
        captions += batch.texts
        seen += len(batch)
    if not seen or len(torch.cat(group).unique()) < 2:
        raise UserError("batches to fit on must hold images of at least two groups, which are contrasted")
    all_texts, rows = torch.cat(texts), torch.cat(txt2img)
    count = torch.bincount(rows, minlength=seen)
    if not bool(count.all()):
        raise UserError(f"batches to fit on: image {int((count == 0).nonzero()[0])} has no caption; leave it out")
    # The captions of one image stand together, so each image's are a run, padded here to the longest.
    place = torch.arange(int(count.max()), device=device)
    own = ((count.cumsum(0) - count)[:, None] + place).clamp_max(len(all_texts) - 1)
    mask = place < count[:, None]
    return Corpus(
        images=torch.cat(images),
        texts=all_texts,
        group=torch.cat(group),
        index=torch.cat(index),
        captions=tuple(captions),
        txt2img=rows,
        own=own,
        mask=mask,
        own_mean=torch.zeros_like(torch.cat(images)).index_add_(0, rows, all_texts) / count[:, None],
    )


@torch.no_grad()
def farthest(clean: Tensor, keys: Tensor, group: Tensor, keys_group: Tensor) -> Tensor:
    """[B]: which of each sample's keys is least similar to it, among those of other groups.

    clean [B, E], keys [B, K, E], group [B], keys_group [B, K]. Where every key is of the sample's own group it is the
    first: such a sample then pulls nowhere.
    """
    similarity = (clean[:, None] * keys).sum(2)
    return similarity.masked_fill(keys_group == group[:, None], float("inf")).argmin(1)


def contrast(query: Tensor, clean: Tensor, own: Keys, other: Keys, *, temperature: float, alpha: float) -> Tensor:
    """[B] values of the objective, at least 0, always maximised. query, clean [B, E] unit rows."""

    def mass(keys: Keys) -> Tensor:
        cosines = (query[:, None] * keys.features).sum(2) / temperature
        return cosines.masked_fill(~keys.mask, float("-inf")).logsumexp(1)

    return F.softplus(mass(other) - mass(own)) + alpha * (query - clean).square().sum(1)
