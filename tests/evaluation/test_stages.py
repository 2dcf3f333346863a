"""Both stages of retrieval against plain loops over every pair."""

import pytest
import torch

from fastmat.data.digits import digits_set
from fastmat.data.loader import evaluation_batches
from fastmat.evaluation.evaluate import clean_ranks, encode_gallery
from fastmat.evaluation.metrics import recall_at
from fastmat.evaluation.rerank import Rerank
from fastmat.evaluation.stages import Counts, counts_of, drops_of, stages_of
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_blip

K = 4


@torch.no_grad()
def test_survival_and_accuracy_by_loops() -> None:
    model = tiny_blip().eval()
    batches = evaluation_batches(digits_set("val").take(7), model.image_transform, batch_size=7)
    (batch,) = batches
    stages = stages_of(encode_gallery(model, batches, rerank=Rerank(k=K)))
    image, text = model.encode_image(batch.images), model.encode_text(model.tokenize(batch.texts))
    cosine = image.features @ text.features.T
    pairs = torch.cartesian_prod(torch.arange(len(batch)), torch.arange(len(batch.texts)))
    own = batch.group[:, None] == batch.text_group
    states = (type(image)(*(part[pairs[:, 0]] for part in image)), type(text)(*(part[pairs[:, 1]] for part in text)))
    logits = model.fuse(*states).itm_logits[:, 1].view_as(cosine)
    for way, cos, itm, match in (("tr", cosine, logits, own), ("ir", cosine.T, logits.T, own.T)):
        survived, first = [], {"itm": [], "itm+cosine": []}
        for q in range(len(cos)):
            shortlist = cos[q].argsort(descending=True)[:K]
            survived.append(bool(match[q, shortlist].any()))
            for scoring, score in (("itm", itm[q]), ("itm+cosine", itm[q] + cos[q])):
                first[scoring].append(bool(match[q, shortlist[score[shortlist].argmax()]]))
        for scoring, hits in first.items():
            counts = counts_of(stages, scoring)
            assert counts[f"survival_{way}"].hits.sum() == sum(survived)
            assert counts[f"survival_{way}"].queries.sum() == len(cos)
            assert counts[f"accuracy_{way}"].queries.sum() == sum(survived)
            assert counts[f"accuracy_{way}"].hits.sum() == sum(hits) == counts[f"{way}@1"].hits.sum()
    for scoring, cosine_too in (("itm", False), ("itm+cosine", True)):
        known = clean_ranks(model, batches, rerank=Rerank(k=K, plus_cosine=cosine_too))
        assert torch.equal(stages.ranks[scoring].tr, known.tr) and torch.equal(stages.ranks[scoring].ir, known.ir)


def test_without_a_matching_head() -> None:
    model = tiny_clip().eval()
    batches = evaluation_batches(digits_set("val").take(5), model.image_transform, batch_size=3)
    stages = stages_of(encode_gallery(model, batches))
    counts = counts_of(stages, "itc")
    assert set(stages.ranks) == {"itc"} and all("@" in metric for metric in counts)
    for way in ("tr", "ir"):
        hits, queries = counts[f"{way}@5"]
        ranks = getattr(stages.ranks["itc"], way)
        assert 100 * hits.sum() / queries.sum() == pytest.approx(recall_at(ranks, 5))


def test_a_drop_is_a_share_of_what_was_there() -> None:
    def counts(*hits: float) -> dict[str, Counts]:
        return {"tr@1": Counts(torch.tensor(hits).double(), torch.ones(4).double())}

    (drop,) = drops_of(counts(1, 1, 1, 1), counts(1, 0, 0, 0)).values()
    assert drop.hits.sum() / drop.queries.sum() == 0.75
    (gain,) = drops_of(counts(1, 0, 1, 0), counts(1, 1, 1, 0)).values()
    assert gain.hits.sum() / gain.queries.sum() == -0.5
