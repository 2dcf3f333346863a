"""A few images and captions before and after an attack, with all that a reader needs to see them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastmat.evaluation.evaluate import Attacked, Gallery, encode_gallery, gallery_ranks
from fastmat.evaluation.metrics import Ranks
from fastmat.evaluation.rerank import Rerank
from fastmat.evaluation.results import Example, RetrievedImage, RetrievedText, Setting
from fastmat.models.protocol import VisionLanguageModel
from fastmat.ops import topk_shortlist
from fastmat.types import Batch

TOP = 5
THUMBNAIL = 96


def pick_images(clean: Ranks, *, count: int, seed: int) -> list[int]:
    """Up to `count` images, drawn among those that retrieve a caption of theirs first when clean, then among others."""
    order = torch.randperm(len(clean.tr), generator=torch.Generator().manual_seed(seed))
    right_first = clean.tr[order].gt(0).int().argsort(stable=True)
    return order[right_first][:count].tolist()


def make_examples(
    victim: VisionLanguageModel,
    clean: Iterable[Batch],
    attacked: Iterable[Attacked],
    *,
    images: Sequence[int],
    ids: Sequence[str],
    setting: Setting,
    rerank: Rerank | None = None,
) -> list[Example]:
    """One example per position in `images`: the picture, and its first caption whose words changed (or its first).

    clean: the data at the resolution that was attacked. attacked: the whole of it, as for `evaluate`. Both are read
    once. ids: names of all images. rerank: the second stage, None: by cosine alone. Before: clean queries rank the
    clean gallery; after: attacked queries rank the attacked gallery.
    """
    before, after = Seen(keep=frozenset(images)), Seen(keep=frozenset(images))
    distance: list[float] = []

    def attacked_pairs() -> Iterator[Batch]:
        for part in attacked:
            distance.extend(part.distance.tolist())
            yield part.pairs

    galleries = (
        encode_gallery(victim, before.watch(clean), rerank=rerank),
        encode_gallery(victim, after.watch(attacked_pairs()), rerank=rerank),
    )
    ranks = tuple(gallery_ranks(gallery) for gallery in galleries)
    examples = []
    for image in images:
        captions = (galleries[0].txt2img == image).nonzero().flatten().tolist()
        caption = next((t for t in captions if before.texts[t] != after.texts[t]), captions[0])
        difference, magnification = magnified(before.pictures[image], after.pictures[image])
        found = [best(gallery, image, caption) for gallery in galleries]
        views = list(zip(galleries, (before, after), found, strict=True))
        texts = [top_texts(gallery, seen, image, places) for gallery, seen, (places, _) in views]
        pictures = [top_images(gallery, seen, caption, places) for gallery, seen, (_, places) in views]
        examples.append(
            Example(
                image=ids[image],
                setting=setting,
                clean=png(before.pictures[image]),
                adversarial=png(after.pictures[image]),
                difference=png(difference),
                magnification=magnification,
                distance=distance[image],
                caption_before=before.texts[caption],
                caption_after=after.texts[caption],
                texts_before=texts[0],
                texts_after=texts[1],
                images_before=pictures[0],
                images_after=pictures[1],
                image_rank_before=int(ranks[0].tr[image]) + 1,
                image_rank_after=int(ranks[1].tr[image]) + 1,
                caption_rank_before=int(ranks[0].ir[caption]) + 1,
                caption_rank_after=int(ranks[1].ir[caption]) + 1,
            )
        )
    return examples


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What passes by while a gallery is encoded: all captions, a thumbnail of every image, the pictures to `keep`."""

    keep: frozenset[int]
    texts: list[str] = field(default_factory=list)
    thumbnails: list[Tensor] = field(default_factory=list)
    pictures: dict[int, Tensor] = field(default_factory=dict)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            first = len(self.thumbnails)
            self.texts.extend(batch.texts)
            self.thumbnails.extend(thumbnails(batch.images))
            self.pictures.update({i: batch.images[i - first] for i in self.keep if first <= i < first + len(batch)})
            yield batch


def magnified(clean: Tensor, adversarial: Tensor) -> tuple[Tensor, int]:
    """0.5 + factor * (adversarial - clean), and the largest whole factor that keeps it in [0, 1]. [3, H, W] each.

    >>> picture, factor = magnified(torch.zeros(3, 1, 1), torch.full((3, 1, 1), 0.03125))
    >>> factor, picture[0].item()
    (16, 1.0)
    """
    delta = adversarial - clean
    largest = float(delta.abs().max())
    factor = max(1, int(0.5 / largest)) if largest else 1
    return (0.5 + factor * delta).clamp(0, 1), factor


def top_texts(gallery: Gallery, seen: Seen, image: int, places: Sequence[int]) -> list[RetrievedText]:
    """The captions `places` that an image retrieves, best first."""
    group = gallery.image_group[image]
    return [RetrievedText(text=seen.texts[t], correct=bool(gallery.text_group[t] == group)) for t in places]


def top_images(gallery: Gallery, seen: Seen, caption: int, places: Sequence[int]) -> list[RetrievedImage]:
    """The images `places` that a caption retrieves, best first."""
    group = gallery.text_group[caption]
    return [RetrievedImage(png=png(seen.thumbnails[i]), correct=bool(gallery.image_group[i] == group)) for i in places]


def best(gallery: Gallery, image: int, caption: int) -> tuple[list[int], list[int]]:
    """The captions that an image retrieves and the images that a caption retrieves, best first."""
    images, texts = gallery.image_features, gallery.text_features
    rows = torch.tensor([[image], [caption]], device=images.device)
    if gallery.matching is None:
        return nearest(images[image], texts), nearest(texts[caption], images)
    found = gallery.matching.scores(images, texts, image_rows=rows[0], text_rows=rows[1])
    return (
        found.image_candidates[0, found.image_scores[0].argsort(descending=True)][:TOP].tolist(),
        found.text_candidates[0, found.text_scores[0].argsort(descending=True)][:TOP].tolist(),
    )


def nearest(query: Tensor, gallery: Tensor) -> list[int]:
    """The rows of gallery [G, E] nearest to a query [E]."""
    return topk_shortlist(query[None], gallery, min(TOP, len(gallery)))[1][0].tolist()


def thumbnails(images: Tensor) -> Tensor:
    """[B, 3, H, W] fp32 in [0, 1] to uint8, at most `THUMBNAIL` pixels high and wide."""
    height, width = images.shape[-2:]
    scale = min(1.0, THUMBNAIL / max(height, width))
    if scale < 1:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True).clamp(0, 1)
    return to_uint8(images)


def png(image: Tensor) -> str:
    """[3, H, W], uint8 or fp32 in [0, 1], as base64 PNG."""
    pixels = to_uint8(image).permute(1, 2, 0).contiguous().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def to_uint8(image: Tensor) -> Tensor:
    return image if image.dtype == torch.uint8 else image.mul(255).round().to(torch.uint8)
