"""Retrieval of a victim, clean and after an attack on a surrogate.

    gallery = encode_gallery(surrogate, batches)
    attacked = run_attack(surrogate, attack, batches, gallery_context(gallery))
    row = evaluate(victim, attacked, clean=gallery_ranks(encode_gallery(victim, batches)), setting=setting)

The whole gallery is attacked: adversarial queries rank adversarial galleries. An attack on images alone leaves the
captions as they are, and the other way round. Attacks know the original pairs alone; other ground truths
(`fastmat.data.truth`) judge what they leave.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastmat.attacks.base import Attack, frozen
from fastmat.attacks.engine import Engine
from fastmat.data.truth import Positives, Truth
from fastmat.errors import UserError
from fastmat.evaluation.metrics import Ranks, bootstrap_intervals, recalls, success_rates
from fastmat.evaluation.multi_positive import (
    Retrieved,
    cosine_tiles,
    found_at,
    positive_places,
    reranked_tiles,
)
from fastmat.evaluation.rerank import Keeper, Matching, Rerank, Reranked, reranked_ranks
from fastmat.evaluation.results import Row, Setting
from fastmat.evaluation.truth_figures import figures_under
from fastmat.memory import Chunks
from fastmat.models.protocol import VisionLanguageModel
from fastmat.ops import retrieval_ranks
from fastmat.types import AttackContext, Batch


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Unit features of N images and T captions, fp32 on the model's device.

    image_features [N, E], text_features [T, E]; image_group [N], text_group [T]; txt2img [T] int64, caption to image.
    matching: what the second stage needs; None: it is ranked by cosine alone.
    """

    image_features: Tensor
    image_group: Tensor
    text_features: Tensor
    text_group: Tensor
    txt2img: Tensor
    matching: Matching | None = None


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """A batch after an attack, on the CPU.

    pairs: adversarial images and captions. sources: the T captions before. distance [B], words_changed [T]: as in
    `AttackResult`. seconds: what the attack took, loading and encoding for evaluation not counted.
    """

    pairs: Batch
    sources: tuple[str, ...]
    distance: Tensor
    words_changed: Tensor
    seconds: float


def encode_gallery(model: VisionLanguageModel, batches: Iterable[Batch], *, rerank: Rerank | None = None) -> Gallery:
    """Encode every image and caption once, in order; where memory runs out, batches go on in halves.

    rerank: also keep what the second stage needs. Raises UserError without any image or caption, when the model gives
    features that are not finite, which say nothing about a rank, or when it cannot re-rank.
    """
    keeper = None if rerank is None else Keeper.of(model, rerank)
    device = model.logit_scale.device
    images, texts, groups, text_groups, txt2img = [], [], [], [], []
    images_at_once = Chunks(item="image", advice="evaluate on a device with more of it, or a smaller model")
    texts_at_once = Chunks(item="caption", advice="evaluate on a device with more of it, or a smaller model")
    seen = 0
    for batch in batches:
        # Inside the loop: pulling the next batch may run an attack, which needs gradients.
        batch = batch.to(device)
        with frozen(model):
            images += images_at_once.run(len(batch), partial(encode_images, model, batch.images, keeper))
            texts += texts_at_once.run(len(batch.texts), partial(encode_texts, model, batch.texts, keeper))
        groups.append(batch.group)
        text_groups.append(batch.text_group)
        txt2img.append(batch.txt2img + seen)
        seen += len(batch)
    if not seen or not sum(map(len, texts)):
        raise UserError("there is nothing to evaluate: the data has no images or no captions")
    gallery = Gallery(
        image_features=torch.cat(images),
        image_group=torch.cat(groups),
        text_features=torch.cat(texts),
        text_group=torch.cat(text_groups),
        txt2img=torch.cat(txt2img),
        matching=keeper.matching() if keeper else None,
    )
    for what, features in (("image", gallery.image_features), ("caption", gallery.text_features)):
        broken = (~features.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise UserError(f"the model gives NaN or infinite features for {what} {broken[0]} of the data")
    return gallery


@torch.no_grad()
def encode_images(model: VisionLanguageModel, images: Tensor, keeper: Keeper | None, start: int, stop: int) -> Tensor:
    state = model.encode_image(images[start:stop])
    features = state.features.float()
    if keeper is not None:
        keeper.keep_images(state)
    return features


@torch.no_grad()
def encode_texts(
    model: VisionLanguageModel, texts: Sequence[str], keeper: Keeper | None, start: int, stop: int
) -> Tensor:
    state = model.encode_text(model.tokenize(texts[start:stop]).to(model.logit_scale.device))
    features = state.features.float()
    if keeper is not None:
        keeper.keep_texts(state)
    return features


def gallery_context(gallery: Gallery) -> AttackContext:
    """What an attack contrasts its samples with: the surrogate's clean gallery."""
    return AttackContext(
        image_features=gallery.image_features,
        image_group=gallery.image_group,
        text_features=gallery.text_features,
        text_group=gallery.text_group,
    )


def gallery_ranks(
    gallery: Gallery, rows: Sequence[int] | None = None, *, truths: Mapping[str, Truth] | None = None
) -> Ranks:
    """Ranks in both directions, on the CPU, by cosine or by the gallery's second stage.

    rows: the images, ascending, that query with their captions, among the whole gallery; None: all.
    truths: ground truths to judge the same queries under, where they judge them.
    """
    images, texts, txt2img = gallery.image_features, gallery.text_features, gallery.txt2img.to(gallery.text_group)
    device = images.device
    chosen = torch.arange(len(images), device=device) if rows is None else torch.tensor(rows, device=device)
    captions = captions_of(gallery, chosen)
    of_images, of_texts = gallery.image_group[chosen], gallery.text_group[captions]
    found = None
    if gallery.matching is None:
        tr = retrieval_ranks(images[chosen], texts, query_group=of_images, gallery_group=gallery.text_group)
        ir = retrieval_ranks(texts[captions], images, query_group=of_texts, gallery_group=gallery.image_group)
    else:
        found = gallery.matching.scores(images, texts, image_rows=chosen, text_rows=captions)
        tr = reranked_ranks(
            found.image_scores, found.image_candidates, query_group=of_images, gallery_group=gallery.text_group
        )
        ir = reranked_ranks(
            found.text_scores, found.text_candidates, query_group=of_texts, gallery_group=gallery.image_group
        )
    return Ranks(
        tr=tr.cpu(),
        ir=ir.cpu(),
        txt2img=torch.searchsorted(chosen, txt2img[captions]).cpu(),
        under={
            label: retrieved(gallery, truth, images=chosen, captions=captions, found=found)
            for label, truth in (truths or {}).items()
        },
    )


def retrieved(
    gallery: Gallery, truth: Truth, *, images: Tensor, captions: Tensor, found: Reranked | None = None
) -> Retrieved:
    """Under `truth`, those of the queries `images` [N'] and `captions` [T'], ascending, that it judges.

    found: the scores of the second stage for these very queries; None: by cosine.
    """
    features, own = (gallery.image_features, gallery.text_features), gallery.txt2img.cpu()
    of_images, of_captions = truth.captions.take(images.cpu()), truth.images.take(captions.cpu())

    def places(positives: Positives, asked: Tensor, queries: Tensor, items: Tensor, second: Sequence[Tensor]) -> Tensor:
        rows = positives.queries.to(queries.device)
        if second:
            at = torch.searchsorted(asked, rows)
            tiles = reranked_tiles(second[0][at], second[1][at], total=len(items))
        else:
            tiles = cosine_tiles(queries[rows], items)
        return positive_places(tiles, positives.count, positives.items)

    tr = places(of_images, images, *features, found[:2] if found else ())
    ir = places(of_captions, captions, *features[::-1], found[2:] if found else ())
    return Retrieved(
        tr=found_at(tr, of_images, of_images.queries), ir=found_at(ir, of_captions, own[of_captions.queries])
    )


def captions_of(gallery: Gallery, images: Tensor) -> Tensor:
    """[Q] places of the captions of `images`, in order."""
    return torch.isin(gallery.txt2img.to(images.device), images).nonzero().flatten()


def clean_ranks(model: VisionLanguageModel, batches: Iterable[Batch], *, rerank: Rerank | None = None) -> Ranks:
    """A model's ranks on data as it is."""
    return gallery_ranks(encode_gallery(model, batches, rerank=rerank))


def run_attack(
    surrogate: VisionLanguageModel,
    attack: Attack,
    batches: Iterable[Batch],
    context: AttackContext,
    engine: Engine | None = None,
) -> Iterator[Attacked]:
    """Attack the data batch by batch against one context, so that the batch size does not matter.

    engine: how the attack is executed.
    """
    device = surrogate.logit_scale.device
    for batch in batches:
        on_device = batch.to(device)
        start = time.perf_counter()
        result = attack(surrogate, on_device, context, engine=engine)
        images = result.images.cpu()  # waits for the device, so the clock is honest
        seconds = time.perf_counter() - start
        yield Attacked(
            pairs=batch.replace(images=images, texts=result.texts).to("cpu"),
            sources=batch.texts,
            distance=result.distance.cpu(),
            words_changed=result.words_changed.cpu(),
            seconds=seconds,
        )


@dataclass(kw_only=True)
class Measured:
    """What passes by while attacked data is encoded: largest distance, most words in one caption, seconds."""

    distance: float = 0.0
    words: int = 0
    seconds: float = 0.0

    def watch(self, attacked: Iterable[Attacked]) -> Iterator[Batch]:
        for part in attacked:
            self.seconds += part.seconds
            self.distance = max(self.distance, float(part.distance.max()))
            self.words = max([self.words, *part.words_changed.tolist()])
            yield part.pairs


def evaluate(
    victim: VisionLanguageModel,
    attacked: Iterable[Attacked],
    *,
    clean: Ranks,
    setting: Setting,
    resamples: int = 1000,
    rerank: Rerank | None = None,
    truths: Mapping[str, Truth] | None = None,
) -> Row:
    """Judge `victim` on attacked data, be it made just now (`run_attack`) or stored (`AdversarialSet`).

    clean: the victim's own ranks on the clean data. rerank: the second stage, None: by cosine alone; as for `clean`.
    truths: those that `clean` was judged under. A victim of another resolution than the surrogate's resizes inside.
    """
    ranks, measured = attacked_ranks(victim, attacked, clean=clean, rerank=rerank, truths=truths)
    return row_of(ranks, clean, setting=setting, resamples=resamples, measured=measured)


def attacked_ranks(
    victim: VisionLanguageModel,
    attacked: Iterable[Attacked],
    *,
    clean: Ranks,
    rerank: Rerank | None = None,
    truths: Mapping[str, Truth] | None = None,
) -> tuple[Ranks, Measured]:
    """The ranks behind a row, and what passed by. Raises UserError unless the queries are those of `clean`."""
    measured = Measured()
    ranks = gallery_ranks(encode_gallery(victim, measured.watch(attacked), rerank=rerank), truths=truths)
    if not torch.equal(ranks.txt2img, clean.txt2img):
        raise UserError(
            f"the attacked data ({len(ranks.tr)} images, {len(ranks.ir)} captions) is not the clean data "
            f"({len(clean.tr)} images, {len(clean.ir)} captions)"
        )
    return ranks, measured


def clean_row(clean: Ranks, *, setting: Setting, resamples: int = 1000, gallery_images: int | None = None) -> Row:
    """The row of a victim on clean data; `setting.attack` is "none"."""
    return row_of(clean, None, setting=setting, resamples=resamples, gallery_images=gallery_images)


def row_of(
    ranks: Ranks,
    clean: Ranks | None,
    *,
    setting: Setting,
    resamples: int,
    measured: Measured | None = None,
    gallery_images: int | None = None,
) -> Row:
    """Ranks as a row. clean: of the same queries; measured: of the attack; both None on clean data."""
    rates = success_rates(clean, ranks) if clean else dict.fromkeys(success_rates(ranks, ranks))
    return Row(
        **setting.model_dump(),
        **recalls(ranks),  # type: ignore[arg-type]
        **rates,
        n_images=len(ranks.tr),
        n_captions=len(ranks.ir),
        gallery_images=gallery_images,
        ci=bootstrap_intervals(ranks, clean, seed=setting.seed, resamples=resamples),
        truths={
            label: figures_under(found, clean.under[label] if clean else None, seed=setting.seed, resamples=resamples)
            for label, found in ranks.under.items()
        },
        max_distance=measured.distance if measured else 0.0,
        max_words_changed=measured.words if measured else 0,
        seconds=measured.seconds if measured else None,
        pairs_per_s=len(ranks.ir) / measured.seconds if measured and measured.seconds else None,
    )
