"""Places, R-precision and mAP@R against plain re-writings; retrieval under several ground truths."""

import math

import pytest
import torch

from fastmat.data.truth import Positives, Truth, truth_of
from fastmat.evaluation import multi_positive
from fastmat.evaluation.evaluate import clean_row, encode_gallery, gallery_ranks
from fastmat.evaluation.metrics import Ranks, worst_case
from fastmat.evaluation.multi_positive import (
    Found,
    Retrieved,
    average_precision,
    cosine_tiles,
    found_at,
    of_images,
    positive_places,
    r_precision,
    reranked_tiles,
)
from fastmat.evaluation.rerank import Rerank, reranked_ranks
from fastmat.evaluation.results import Setting
from fastmat.evaluation.truth_figures import figures_under
from fastmat.models.dual_encoder import DualEncoder
from fastmat.models.tiny_fusion import tiny_albef
from fastmat.ops import ranks_of_scores
from fastmat.types import Batch

SETTING = Setting(surrogate="a", victim="a", white_box=True, defence="none", dataset="d", split="test", seed=3)


def positives_of(right: list[set[int]]) -> Positives:
    pairs = torch.tensor([(query, item) for query, items in enumerate(right) for item in items])
    return Positives.of(*pairs.unbind(1))


def some_right(queries: int, gallery: int, generator: torch.Generator) -> list[set[int]]:
    """1 to 6 right items for each query."""
    counts = torch.randint(1, 7, (queries,), generator=generator).tolist()
    return [set(torch.randperm(gallery, generator=generator)[:count].tolist()) for count in counts]


def published(ranked: list[int], right: set[int]) -> tuple[float, float, float]:
    """Recall at 1, R-precision and average precision of one ranked list, as the ECCV Caption benchmark counts them:
    the precision among the first r for r = 1 ... R, averaged where the r-th is right."""
    precisions = [len(set(ranked[:r]) & right) / r for r in range(1, len(right) + 1)]
    hits = [precision if ranked[r] in right else 0.0 for r, precision in enumerate(precisions)]
    return float(ranked[0] in right), precisions[-1], sum(hits) / len(hits)


def test_figures_are_those_of_the_benchmark() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 30, generator=generator)
    right = some_right(40, 30, generator)
    positives = positives_of(right)
    places = positive_places([(slice(0, 40), scores.clone())], positives.count, positives.items)
    found = found_at(places, positives, torch.arange(40))
    for query, items in enumerate(right):
        ranked = scores[query].argsort(descending=True).tolist()
        recall, precision, average = published(ranked, items)
        assert float(found.rank[query] == 0) == recall
        assert found.rank[query] == min(ranked.index(item) for item in items)
        assert found.r_precision[query] == pytest.approx(precision, abs=1e-12)
        assert found.average_precision[query] == pytest.approx(average, abs=1e-12)
    figures = figures_under(Retrieved(tr=found, ir=found), None, seed=0, resamples=10)
    lists = [published(scores[query].argsort(descending=True).tolist(), items) for query, items in enumerate(right)]
    for at, metric in enumerate(("tr@1", "ir_rp", "tr_map@r")):
        assert figures.metrics[metric] == pytest.approx(100 * sum(row[at] for row in lists) / 40)
    assert figures.right_captions == pytest.approx(sum(map(len, right)) / 40)


def test_all_right_is_one_and_all_wrong_is_nothing() -> None:
    count = torch.tensor([3, 2])
    places = torch.tensor([0, 1, 2, 2, 3])
    assert r_precision(places, count).tolist() == [1.0, 0.0]
    assert average_precision(places, count).tolist() == [1.0, 0.0]


def test_ties_count_half_for_every_right_answer() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 4, (50, 17), generator=generator).float()
    right = some_right(50, 17, generator)
    positives = positives_of(right)
    places = positive_places([(slice(0, 50), scores.clone())], positives.count, positives.items)
    expected = []
    for row, items in zip(scores.tolist(), right, strict=True):
        wrong = [score for item, score in enumerate(row) if item not in items]
        for j, own in enumerate(sorted((row[item] for item in items), reverse=True)):
            expected.append(j + sum(score > own for score in wrong) + sum(score == own for score in wrong) // 2)
    assert places.tolist() == expected


def test_the_best_place_is_the_rank_of_the_operator() -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 6, (20, 23), generator=generator).float()
    scores[3, 5], scores[4] = torch.nan, torch.nan
    own, other = torch.arange(20) % 7, torch.arange(23) % 7
    right = [set((other == group).nonzero().flatten().tolist()) for group in own]
    positives = positives_of(right)
    places = positive_places([(slice(0, 20), scores.clone())], positives.count, positives.items)
    found = found_at(places, positives, torch.arange(20))
    assert torch.equal(found.rank, ranks_of_scores(scores, query_group=own, gallery_group=other))


def test_a_model_that_says_the_same_of_everything_stands_in_the_middle() -> None:
    places = positive_places([(slice(0, 1), torch.zeros(1, 101))], torch.tensor([1]), torch.tensor([7]))
    assert places.tolist() == [50]


def test_nan_never_improves_a_place() -> None:
    scores = torch.tensor([[0.9, torch.nan, 0.1, 0.5], [torch.nan, 0.3, 0.2, 0.1]])
    count, items = torch.tensor([2, 2]), torch.tensor([0, 3, 0, 2])
    assert positive_places([(slice(0, 2), scores)], count, items).tolist() == [1, 2, 1, 3]


def test_tiles_do_not_matter_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    queries, gallery = torch.rand(19, 8, generator=generator), torch.rand(31, 8, generator=generator)
    positives = positives_of(some_right(19, 31, generator))
    whole = positive_places([(slice(0, 19), queries @ gallery.T)], positives.count, positives.items)
    monkeypatch.setattr(multi_positive, "SCORES_AT_ONCE", {"cpu": 100})
    tiles = [(rows, tile.clone()) for rows, tile in cosine_tiles(queries, gallery)]
    assert all(tile.numel() <= 100 for _, tile in tiles) and len(tiles) == 7
    assert torch.equal(positive_places(cosine_tiles(queries, gallery), positives.count, positives.items), whole)


def test_a_second_stage_ranks_as_before() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randint(0, 5, (30, 6), generator=generator).float()
    candidates = torch.stack([torch.randperm(20, generator=generator)[:6] for _ in range(30)])
    own, other = torch.arange(30) % 5, torch.arange(20) % 5
    positives = positives_of([set((other == group).nonzero().flatten().tolist()) for group in own])
    places = positive_places(reranked_tiles(scores, candidates, total=20), positives.count, positives.items)
    ranks = reranked_ranks(scores, candidates, query_group=own, gallery_group=other)
    assert torch.equal(found_at(places, positives, torch.arange(30)).rank, ranks)


def own_pairs(data: Batch) -> Truth:
    group = data.group.tolist()
    owner = data.txt2img.tolist()
    return truth_of((i, t) for i in range(len(data)) for t in range(len(owner)) if group[i] == group[owner[t]])


def test_under_the_original_pairs_ranks_are_the_ranks(model: DualEncoder, data: Batch) -> None:
    for scored in (model, tiny_albef(seed=0).eval()):
        rerank = None if scored is model else Rerank(k=4)
        gallery = encode_gallery(scored, [data], rerank=rerank)
        for rows in (None, [0, 3, 7]):
            ranks = gallery_ranks(gallery, rows, truths={"pairs": own_pairs(data)})
            under = ranks.under["pairs"]
            assert torch.equal(under.tr.rank, ranks.tr) and torch.equal(under.ir.rank, ranks.ir)
            chosen = torch.arange(11) if rows is None else torch.tensor(rows)
            assert torch.equal(under.tr.image, chosen) and torch.equal(under.ir.image, chosen[ranks.txt2img])
        row = clean_row(gallery_ranks(gallery, truths={"pairs": own_pairs(data)}), setting=SETTING, resamples=50)
        metrics = row.truths["pairs"].metrics
        assert all(metrics[name] == pytest.approx(row.value(name)) for name in ("tr@1", "tr@5", "ir@1", "ir@10"))
        assert metrics["asr_tr@1"] is None and row.truths["pairs"].n_captions == len(data.texts)


def test_a_truth_may_judge_some_queries_only(model: DualEncoder, data: Batch) -> None:
    truth = truth_of([(2, 0), (2, 5), (4, 1)])
    gallery = encode_gallery(model, [data])
    found = gallery_ranks(gallery, truths={"few": truth}).under["few"]
    scores = gallery.image_features @ gallery.text_features.T
    assert found.tr.image.tolist() == [2, 4] and found.tr.count.tolist() == [2, 1]
    assert found.ir.image.tolist() == data.txt2img[[0, 1, 5]].tolist()
    wrong = [score for t, score in enumerate(scores[2].tolist()) if t not in (0, 5)]
    assert found.tr.rank[0] == sum(score > max(scores[2, 0], scores[2, 5]) for score in wrong)
    nothing = gallery_ranks(gallery, [0, 1], truths={"few": truth}).under["few"]
    assert len(nothing.tr.image) == 0 and len(nothing.ir.image) == 2
    figures = figures_under(nothing, nothing, seed=0, resamples=10)
    assert figures.metrics["tr@1"] is figures.metrics["tr_rp"] is figures.right_captions is None
    assert "tr@1" not in figures.ci and figures.metrics["ir@10"] is not None


def found(image: list[int], rank: list[int], precision: list[float]) -> Found:
    values = torch.tensor(precision, dtype=torch.float64)
    return Found(
        image=torch.tensor(image),
        count=torch.full((len(image),), 2),
        rank=torch.tensor(rank),
        r_precision=values,
        average_precision=values / 2,
    )


def test_success_of_attacks_and_the_worst_of_several() -> None:
    clean = Retrieved(tr=found([1, 4, 8], [0, 0, 5], [1, 0.5, 0]), ir=found([1, 1], [0, 2], [1, 0]))
    one = Retrieved(tr=found([1, 4, 8], [0, 2, 0], [0.5, 0, 0.5]), ir=found([1, 1], [3, 0], [0, 0.5]))
    two = Retrieved(tr=found([1, 4, 8], [1, 0, 0], [0, 1, 0.5]), ir=found([1, 1], [0, 0], [0.5, 0.5]))
    metrics = figures_under(one, clean, seed=0, resamples=20).metrics
    assert metrics["asr_tr@1"] == 50.0 and metrics["asr_ir@1"] == 100.0 and metrics["asr_ir@5"] == 0.0
    assert metrics["tr_rp"] == pytest.approx(100 / 3) and metrics["tr_map@r"] == pytest.approx(100 / 6)
    nobody = torch.zeros(0, dtype=torch.int64)
    runs = [Ranks(tr=nobody, ir=nobody, txt2img=nobody, under={"t": run}) for run in (one, two)]
    worst = worst_case(runs).under["t"]
    assert worst.tr.rank.tolist() == [1, 2, 0] and worst.tr.r_precision.tolist() == [0, 0, 0.5]
    assert worst.ir.average_precision.tolist() == [0, 0.25]
    part = of_images(one.tr, torch.tensor([8, 1]))
    assert part.image.tolist() == [1, 8] and part.rank.tolist() == [0, 0]


def test_intervals_resample_images_with_all_their_queries() -> None:
    after = Retrieved(
        tr=found([1, 4, 8, 9], [0, 2, 0, 7], [0.5, 0, 0.75, 1]), ir=found([1, 1, 4, 6], [3, 0, 0, 1], [0, 0.5, 1, 0.25])
    )
    ci = figures_under(after, None, seed=11, resamples=40).ci
    images = [1, 4, 6, 8, 9]
    drawn = torch.randint(5, (40, 5), generator=torch.Generator().manual_seed(11)).tolist()
    for way, metric, values in (("tr", "tr_rp", after.tr.r_precision), ("ir", "ir@1", (after.ir.rank < 1).double())):
        image = getattr(after, way).image.tolist()
        means = []
        for draw in drawn:
            taken = [float(v) for at in draw for i, v in zip(image, values, strict=True) if i == images[at]]
            means.append(100 * sum(taken) / len(taken) if taken else math.nan)
        kept = torch.tensor(means, dtype=torch.float64)
        low, high = kept.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        assert ci[metric] == pytest.approx((low, high))
