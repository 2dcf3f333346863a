"""Two-stage retrieval against the published loop, written plainly, and against recordings of it."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from golden import golden
from golden_models import golden_albef, golden_blip
from torch import Tensor

from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.evaluation import rerank as module
from fastmat.evaluation.evaluate import (
    Attacked,
    Gallery,
    clean_ranks,
    encode_gallery,
    evaluate,
    gallery_context,
    gallery_ranks,
    run_attack,
)
from fastmat.evaluation.metrics import recall_at
from fastmat.evaluation.rerank import Rerank, Reranked, reranked_ranks, shortlist
from fastmat.evaluation.results import Setting
from fastmat.evaluation.subset import attacked_subset_ranks
from fastmat.models.albef import Albef
from fastmat.models.blip import Blip
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.protocol import ImageState, TextState, TextTokens
from fastmat.models.tiny_fusion import tiny_albef, tiny_blip
from fastmat.ops import ranks_of_scores
from fastmat.types import Batch, ThreatModel

Split = Callable[[int], list[Batch]]
TINY = {"albef": tiny_albef, "blip": tiny_blip}
SETTING = Setting(surrogate="a", victim="b", defence="none", attack="pgd", dataset="d", split="test", seed=3)
FILLER = -100.0


def sharpened(kind: str) -> Albef | Blip:
    """Weights five times as large, so that what a model says depends on image and text."""
    model = TINY[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.eval()


@torch.no_grad()
def published(
    model: Albef | Blip, batches: list[Batch], k: int, *, plus_cosine: bool, like: Gallery
) -> tuple[Tensor, Tensor]:
    """[N, T] and [T, N] scores: query by query, every candidate with an image of its own and padded text."""
    images = model.encode_image(torch.cat([batch.images for batch in batches])).tokens
    tokens = model.tokenize([text for batch in batches for text in batch.texts], pad=True)
    texts = model.encode_text(tokens)
    assert images is not None and texts.tokens is not None
    cosine = like.image_features @ like.text_features.T  # one shortlist, whatever rounding did
    both = []
    for scores, of_text in ((cosine, False), (cosine.T, True)):
        filled = torch.full_like(scores, FILLER)
        for query, row in enumerate(scores):
            best, found = row.topk(k)
            text, image = (torch.full_like(found, query), found) if of_text else (found, torch.full_like(found, query))
            pairs = ImageState(images[image], *2 * (images,)), TextState(*(part[text] for part in texts))
            filled[query, found] = model.fuse(*pairs).itm_logits[:, 1] + (best if plus_cosine else 0)
        both.append(filled)
    return both[0], both[1]


def matrix(scores: Tensor, candidates: Tensor, columns: int) -> Tensor:
    return torch.full((len(scores), columns), FILLER).scatter_(1, candidates, scores)


def scores_of(gallery: Gallery) -> Reranked:
    images, texts = gallery.image_features, gallery.text_features
    assert gallery.matching is not None
    rows = {"image_rows": torch.arange(len(images)), "text_rows": torch.arange(len(texts))}
    return gallery.matching.scores(images, texts, **rows)


@pytest.mark.parametrize(("tokens", "plus_cosine"), [(1, False), (40, None), (4096, True)])
@pytest.mark.parametrize("kind", TINY)
def test_scores_and_ranks_are_the_published_loops(
    kind: str, tokens: int, plus_cosine: bool | None, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TOKENS, "cpu", tokens)
    model, k = sharpened(kind), 5
    gallery = encode_gallery(model, split(4), rerank=Rerank(k=k, plus_cosine=plus_cosine))
    added = kind == "blip" if plus_cosine is None else plus_cosine
    want = published(model, split(11), k, plus_cosine=added, like=gallery)
    found = scores_of(gallery)
    assert found.image_scores.std() > 0.01  # or all would be equal whatever was computed
    got = matrix(found.image_scores, found.image_candidates, len(gallery.text_features))
    torch.testing.assert_close(got, want[0], atol=2e-5, rtol=2e-5)
    got = matrix(found.text_scores, found.text_candidates, len(gallery.image_features))
    torch.testing.assert_close(got, want[1], atol=2e-5, rtol=2e-5)
    ranks = gallery_ranks(gallery)
    groups = {"query_group": gallery.image_group, "gallery_group": gallery.text_group}
    assert torch.equal(ranks.tr, ranks_of_scores(want[0], **groups))
    groups = {"query_group": gallery.text_group, "gallery_group": gallery.image_group}
    assert torch.equal(ranks.ir, ranks_of_scores(want[1], **groups))
    assert not torch.equal(ranks.tr, gallery_ranks(dataclasses.replace(gallery, matching=None)).tr)


@pytest.mark.parametrize("kind", TINY)
def test_keys_once_per_image_and_every_pair_once(kind: str, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharpened(kind)
    gallery = encode_gallery(model, split(4), rerank=Rerank(k=6))
    looked, pairs = [], []
    keys, match = model.image_keys, model.match
    monkeypatch.setattr(model, "image_keys", lambda tokens: (looked.append(len(tokens)), keys(tokens))[1])
    monkeypatch.setattr(model, "match", lambda keys, texts: (pairs.append(len(texts.lengths)), match(keys, texts))[1])
    found = scores_of(gallery)
    assert looked == [1] * len(gallery.image_features)
    of_images = {(i, t) for i, row in enumerate(found.image_candidates.tolist()) for t in row}
    of_texts = {(i, t) for t, row in enumerate(found.text_candidates.tolist()) for i in row}
    assert of_images & of_texts
    assert sum(pairs) == len(of_images | of_texts)


@pytest.mark.parametrize("kind", TINY)
def test_a_single_layer(kind: str, split: Split) -> None:
    """The first layer, begun without the image, is then the last, of which one token is wanted."""
    model = sharpened(kind)
    del model.fusion.layers[1:]
    gallery = encode_gallery(model, split(4), rerank=Rerank(k=4))
    want = published(model, split(11), 4, plus_cosine=kind == "blip", like=gallery)
    found = scores_of(gallery)
    got = matrix(found.image_scores, found.image_candidates, len(gallery.text_features))
    torch.testing.assert_close(got, want[0], atol=2e-5, rtol=2e-5)


def test_attacked_data_and_a_subset(split: Split) -> None:
    model, rerank = sharpened("albef"), Rerank(k=5)
    batches = split(1)
    pgd = PGD(threat=ThreatModel(eps=8 / 255), steps=1)
    context = gallery_context(encode_gallery(model, batches))
    attacked = list(run_attack(model, pgd, batches, context))
    clean = encode_gallery(model, batches, rerank=rerank)
    row = evaluate(
        model, attacked, clean=clean_ranks(model, batches, rerank=rerank), setting=SETTING, resamples=10, rerank=rerank
    )
    after = encode_gallery(model, [part.pairs for part in attacked], rerank=rerank)
    groups = {"query_group": after.image_group, "gallery_group": after.text_group}
    want = published(model, [part.pairs for part in attacked], 5, plus_cosine=False, like=after)
    assert row.tr_1 == recall_at(ranks_of_scores(want[0], **groups), 1)

    rows = (0, 4, 7, 10)
    mixed = [part.pairs if place in rows else batches[place] for place, part in enumerate(attacked)]
    whole = gallery_ranks(encode_gallery(model, mixed, rerank=rerank))
    chosen: Iterator[Attacked] = (attacked[place] for place in rows)
    ranks, _ = attacked_subset_ranks(model, chosen, clean=clean, rows=rows)
    assert torch.equal(ranks.tr, whole.tr[list(rows)])
    assert torch.equal(ranks.ir, whole.ir[torch.isin(whole.txt2img, torch.tensor(rows))])


@pytest.mark.parametrize("case", ["rerank_k16", "rerank_k10"])
def test_recorded_shortlists_and_ranks(case: str) -> None:
    """The recorded matrices from a look-up table of logits, in place of a model."""
    tensors = golden("metrics")[1]
    images, texts, logits = (tensors[f"{case}.{name}"] for name in ("image_feats", "text_feats", "itm_logit_full"))
    k = int(case.removeprefix("rerank_k"))
    lengths = torch.arange(len(texts)) % 7
    rows = {"image_rows": torch.arange(len(images)), "text_rows": torch.arange(len(texts))}
    found = shortlist(images, texts, k=k, lengths=lengths, **rows)
    assert len(found.image) == len({*zip(found.image.tolist(), found.text.tolist(), strict=True)})
    assert torch.equal(found.image, found.image.sort().values)
    scores = logits[found.image, found.text]
    group = torch.arange(len(texts)) % len(images)
    for way, pair, cosine, candidates, mine, other in (
        ("i2t", found.image_pair, found.image_cosine, found.image_candidates, torch.arange(len(images)), group),
        ("t2i", found.text_pair, found.text_cosine, found.text_candidates, group, torch.arange(len(images))),
    ):
        for name, got in ((way, scores[pair]), (f"{way}_plus_cos", scores[pair] + cosine)):
            want = tensors[f"{case}.score_{name}"]
            torch.testing.assert_close(matrix(got, candidates, len(other)), want, atol=1e-6, rtol=0)
            groups = {"query_group": mine, "gallery_group": other}
            assert torch.equal(reranked_ranks(got, candidates, **groups), ranks_of_scores(want, **groups))


@pytest.mark.parametrize("kind", ["albef", "blip"])
def test_recorded_scores_of_the_official_models(kind: str, tmp_path) -> None:
    recorded = golden(kind)[1]
    model = golden_albef(tmp_path) if kind == "albef" else golden_blip(tmp_path)
    tokens = TextTokens(recorded["rerank.input_ids"].long(), recorded["rerank.attention_mask"].bool())
    keeper = module.Keeper.of(model, Rerank(k=8))
    with torch.no_grad():
        image, text = model.encode_image(recorded["images_u8"] / 255), model.encode_text(tokens)
        keeper.keep_images(image)
        keeper.keep_texts(text)
    rows = {"image_rows": torch.arange(len(image.features)), "text_rows": torch.arange(len(tokens.ids))}
    found = keeper.matching().scores(image.features, text.features, **rows)
    got = matrix(found.image_scores, found.image_candidates, len(tokens.ids))
    torch.testing.assert_close(got, recorded["rerank.score_i2t"], atol=1e-5, rtol=1e-5)
    got = matrix(found.text_scores, found.text_candidates, len(image.features))
    torch.testing.assert_close(got, recorded["rerank.score_t2i"], atol=1e-5, rtol=1e-5)


def test_tokens_wait_on_the_device_while_there_is_room(split: Split) -> None:
    model = sharpened("albef")
    keeper = module.Keeper.of(model, Rerank(k=2))
    state = model.encode_image(torch.rand(3, 3, 32, 32))
    assert state.tokens is not None
    keeper.room = state.tokens.nbytes + 1
    keeper.keep_images(state)
    keeper.keep_images(state)
    assert len(keeper.images) == 6
    assert keeper.images[0].data_ptr() == state.tokens.data_ptr()


def test_refusals(model: DualEncoder, split: Split) -> None:
    with pytest.raises(UserError, match="DualEncoder has no matching head"):
        encode_gallery(model, split(4), rerank=Rerank(k=2))
    with pytest.raises(UserError, match="rerank_k must be at most the 11 images of the gallery, got 12"):
        clean_ranks(sharpened("albef"), split(4), rerank=Rerank(k=12))
    none = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(UserError, match="query 0 has no positive: its group 9"):
        reranked_ranks(*none, query_group=torch.tensor([9]), gallery_group=torch.arange(3))
    with pytest.raises(UserError, match="rerank_k must be at least 1, got 0"):
        Rerank(k=0)
    broken = sharpened("blip")
    with torch.no_grad():
        broken.itm_head.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or infinite logits for image 0 with caption"):
        clean_ranks(broken, split(4), rerank=Rerank(k=2))
