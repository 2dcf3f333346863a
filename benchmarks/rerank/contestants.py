"""Who scores the shortlists: the published loop, a tuned one, and fastmat. All give [N, T] and [T, N] scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.benchmarks.rerank.setting import Setting
from fastmat.evaluation.rerank import Keeper, Rerank, reranked_ranks
from fastmat.models.protocol import ImageState, TextState

FILLER = -100.0
Scores = tuple[Tensor, Tensor]


@torch.no_grad()
def published(setting: Setting) -> Scores:
    """ALBEF's and BLIP's evaluation: query by query; tokens of images wait on the host and are copied for every
    candidate, whose keys and values are computed again; texts are padded to the context."""
    text, k, tokens = setting.text, setting.k, setting.image.tokens
    assert tokens is not None
    cosine = setting.image.features @ text.features.T
    i2t, t2i = torch.full_like(cosine, FILLER), torch.full_like(cosine.T, FILLER)
    device = cosine.device
    for query, row in enumerate(cosine):
        best, found = row.topk(k)
        seen = tokens[query].repeat(k, 1, 1).to(device)
        i2t[query, found] = logits(setting, seen, rows(text, found)) + (best if setting.plus_cosine else 0)
    for query, row in enumerate(cosine.T):
        best, found = row.topk(k)
        seen = tokens[found.cpu()].to(device)
        own = rows(text, torch.full_like(found, query))
        t2i[query, found] = logits(setting, seen, own) + (best if setting.plus_cosine else 0)
    return i2t, t2i


@torch.no_grad()
def tuned(setting: Setting, device_tokens: Tensor) -> Scores:
    """The same loop with what is easily had: tokens stay on the device, an image's keys are shared by its own
    candidates, and padding is cut to the longest of them."""
    model, text, k = setting.model, setting.text, setting.k
    cosine = setting.image.features @ text.features.T
    i2t, t2i = torch.full_like(cosine, FILLER), torch.full_like(cosine.T, FILLER)
    lengths = text.mask.sum(1).cpu()
    best, found = cosine.topk(k)
    for query, (value, places) in enumerate(zip(best, found, strict=True)):
        some = rows(text, places, int(lengths[places.cpu()].max()))
        state = ImageState(device_tokens[query, None], *2 * (device_tokens,))
        scores = model.fuse(state, some, torch.zeros_like(places)).itm_logits[:, 1]
        i2t[query, places] = scores + (value if setting.plus_cosine else 0)
    best, found = cosine.T.topk(k)
    for query, (value, places) in enumerate(zip(best, found, strict=True)):
        own = rows(text, torch.full_like(places, query), int(lengths[query]))
        t2i[query, places] = logits(setting, device_tokens[places], own) + (value if setting.plus_cosine else 0)
    return i2t, t2i


@torch.no_grad()
def ours(setting: Setting) -> Scores:
    """fastmat's second stage, from the same states; packing the texts is part of it."""
    features, text = setting.image.features, setting.text
    keeper = Keeper.of(setting.model, Rerank(k=setting.k))
    keeper.room = 0  # from the host, as the published loop
    keeper.keep_images(setting.image)
    keeper.keep_texts(text)
    everything = {
        "image_rows": torch.arange(len(features), device=features.device),
        "text_rows": torch.arange(len(text.features), device=features.device),
    }
    found = keeper.matching().scores(features, text.features, **everything)
    i2t = features.new_full((len(features), len(text.features)), FILLER)
    t2i = features.new_full((len(text.features), len(features)), FILLER)
    i2t.scatter_(1, found.image_candidates, found.image_scores)
    return i2t, t2i.scatter_(1, found.text_candidates, found.text_scores)


def logits(setting: Setting, tokens: Tensor, text: TextState) -> Tensor:
    """Row by row, [P]."""
    return setting.model.fuse(ImageState(tokens, *2 * (tokens,)), text).itm_logits[:, 1]


def rows(text: TextState, places: Tensor, length: int | None = None) -> TextState:
    ids, mask, tokens, embeds, features = (part[places] for part in text if part is not None)
    return TextState(ids[:, :length], mask[:, :length], tokens[:, :length], embeds, features)


def misplaced(setting: Setting, got: Scores, exact: Scores, *, tolerance: float) -> Tensor:
    """[] how many queries have a rank that the exact scores, moved by `tolerance` of the largest, would not give."""
    wrong = torch.zeros((), device=got[0].device)
    images = torch.arange(len(setting.image.features), device=got[0].device)
    for scores, true, query, gallery in zip(
        got, exact, (images, setting.txt2img), (setting.txt2img, images), strict=True
    ):
        room = tolerance * true[true > FILLER].abs().max()
        groups = {"query_group": query, "gallery_group": gallery}
        own = gallery == query[:, None]
        rank = reranked_ranks(*scores.topk(setting.k), **groups)
        first = reranked_ranks(*(true + room * own).topk(setting.k), **groups)
        last = reranked_ranks(*(true - room * own).topk(setting.k), **groups)
        wrong += ((rank < first) | (rank > last)).sum()
    return wrong
