"""Two-stage retrieval taken apart: what the shortlist keeps, and where each scoring puts it.

A query whose positives are all off the shortlist is lost, whatever the matching head says: recall at `rerank_k` by
cosine bounds recall at 1 after re-ranking. So an attack on the contrast strikes the first stage, one on the matching
head the second, and the two figures tell which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastmat.evaluation.evaluate import Gallery, gallery_ranks
from fastmat.evaluation.metrics import KS, Ranks
from fastmat.evaluation.rerank import reranked_ranks
from fastmat.ops import topk_shortlist


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The same queries under every scoring. ranks: "itc" and, of a model that re-ranks, "itm" and "itm+cosine".

    tr_survives [N], ir_survives [T] bool, on the CPU: a positive of the query is on its shortlist; None: there is none.
    """

    ranks: dict[str, Ranks]
    tr_survives: Tensor | None = None
    ir_survives: Tensor | None = None


class Counts(NamedTuple):
    """A rate as a ratio of two sums over images: hits [N] of queries [N], float64."""

    hits: Tensor
    queries: Tensor


def stages_of(gallery: Gallery) -> Stages:
    """Every pair is matched once; scoring by the logit and by logit plus cosine share it."""
    itc = gallery_ranks(replace(gallery, matching=None))
    if gallery.matching is None:
        return Stages(ranks={"itc": itc})
    images, texts = gallery.image_features, gallery.text_features
    matching = replace(gallery.matching, rerank=replace(gallery.matching.rerank, plus_cosine=False))
    found = matching.scores(
        images,
        texts,
        image_rows=torch.arange(len(images), device=images.device),
        text_rows=torch.arange(len(texts), device=images.device),
    )
    k = matching.rerank.k
    ways = (
        (found.image_scores, found.image_candidates, topk_shortlist(images, texts, k)[0]),
        (found.text_scores, found.text_candidates, topk_shortlist(texts, images, k)[0]),
    )
    groups = ((gallery.image_group, gallery.text_group), (gallery.text_group, gallery.image_group))

    def ranked(plus_cosine: bool) -> Ranks:
        tr, ir = (
            reranked_ranks(logits + cosine if plus_cosine else logits, candidates, query_group=own, gallery_group=other)
            for (logits, candidates, cosine), (own, other) in zip(ways, groups, strict=True)
        )
        return Ranks(tr=tr.cpu(), ir=ir.cpu(), txt2img=itc.txt2img)

    tr, ir = (
        (other[candidates] == own[:, None]).any(1).cpu()
        for (_, candidates, _), (own, other) in zip(ways, groups, strict=True)
    )
    ranks = {"itc": itc, "itm": ranked(False), "itm+cosine": ranked(True)}
    return Stages(ranks=ranks, tr_survives=tr, ir_survives=ir)


def counts_of(stages: Stages, scoring: str) -> dict[str, Counts]:
    """Metric to counts: "tr@1" ... "ir@10"; of a model that re-ranks also "survival_tr", "survival_ir", and
    "accuracy_tr", "accuracy_ir": of the queries that survive, those whose positive `scoring` puts first."""
    return dict(_counted(stages, stages.ranks[scoring]))


def _counted(stages: Stages, ranks: Ranks) -> Iterator[tuple[str, Counts]]:
    n = len(ranks.tr)

    def per_image(way: str, flags: Tensor) -> Tensor:
        if way == "tr":
            return flags.double()
        return torch.zeros(n, dtype=torch.float64).index_add_(0, ranks.txt2img, flags.double())

    for way, own, survives in (("tr", ranks.tr, stages.tr_survives), ("ir", ranks.ir, stages.ir_survives)):
        every = per_image(way, torch.ones_like(own))
        for k in KS:
            yield f"{way}@{k}", Counts(per_image(way, own < k), every)
        if survives is not None:
            alive = per_image(way, survives)
            yield f"survival_{way}", Counts(alive, every)
            yield f"accuracy_{way}", Counts(per_image(way, survives & (own == 0)), alive)


def drops_of(clean: dict[str, Counts], counts: dict[str, Counts]) -> dict[str, Counts]:
    """ "drop_tr@1" ...: the share of a clean recall that is gone, (clean - now) / clean, of recalls at 1, 5 and 10.

    The multimodal impact score of Qiu et al. (arXiv 2212.08044) is this of a perturbation's mean over its severities.
    """
    recalls = [metric for metric in counts if "@" in metric]
    return {
        f"drop_{metric}": Counts(clean[metric].hits - counts[metric].hits, clean[metric].hits) for metric in recalls
    }
