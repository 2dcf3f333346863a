"""Recall, ASR and intervals against loops over single queries, and against the recorded published evaluation."""

import math

import pytest
import torch
from golden import golden

from fastmat.errors import UserError
from fastmat.evaluation import metrics
from fastmat.evaluation.metrics import (
    KS,
    Ranks,
    attack_success_rate,
    bootstrap_intervals,
    recall_at,
    recalls,
    success_rates,
    worst_case,
)
from fastmat.ops import retrieval_ranks
from fastmat.ops.ranks import ranks_of_scores


def random_ranks(seed: int, *, captions: tuple[int, ...], top: int = 15) -> Ranks:
    generator = torch.Generator().manual_seed(seed)
    txt2img = torch.repeat_interleave(torch.tensor(captions))
    return Ranks(
        tr=torch.randint(top, (len(captions),), generator=generator),
        ir=torch.randint(top, (len(txt2img),), generator=generator),
        txt2img=txt2img,
    )


@pytest.mark.parametrize("captions", [(5, 5, 5, 5), (1, 7, 3, 2, 5, 5, 6), (1,)])
def test_recall_and_asr_against_loops(captions: tuple[int, ...]) -> None:
    clean, after = random_ranks(1, captions=captions), random_ranks(2, captions=captions)
    recall, asr = recalls(after), success_rates(clean, after)
    assert len(recall) == len(asr) == 6
    for way in ("tr", "ir"):
        before, now = getattr(clean, way).tolist(), getattr(after, way).tolist()
        for k in KS:
            assert recall[f"{way}@{k}"] == pytest.approx(100 * sum(rank < k for rank in now) / len(now), abs=1e-12)
            right = [(b, a) for b, a in zip(before, now, strict=True) if b < k]
            expected = 100 * sum(a >= k for _, a in right) / len(right) if right else None
            assert asr[f"asr_{way}@{k}"] == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_no_query_right_has_no_asr() -> None:
    assert attack_success_rate(torch.tensor([1, 2]), torch.tensor([0, 0]), 1) is None
    ranks = Ranks(tr=torch.tensor([1, 2]), ir=torch.tensor([1, 2]), txt2img=torch.tensor([0, 1]))
    intervals = bootstrap_intervals(ranks, ranks, resamples=20)
    assert "asr_tr@1" not in intervals and intervals["asr_tr@5"] == (0.0, 0.0)
    assert math.isnan(metrics.recall_at(torch.tensor([], dtype=torch.int64), 1))


def test_bootstrap_against_loop() -> None:
    captions = (1, 7, 3, 2, 5, 4)
    clean, after = random_ranks(3, captions=captions), random_ranks(4, captions=captions)
    drawn = torch.randint(6, (40, 6), generator=torch.Generator().manual_seed(9))
    values: dict[str, list[float]] = {}
    for images in drawn.tolist():
        queries = [t for i in images for t in (after.txt2img == i).nonzero().flatten().tolist()]
        pick = {"tr": torch.tensor(images), "ir": torch.tensor(queries)}
        for way, rows in pick.items():
            before, now = getattr(clean, way)[rows], getattr(after, way)[rows]
            for k in KS:
                values.setdefault(f"{way}@{k}", []).append(metrics.recall_at(now, k))
                asr = attack_success_rate(before, now, k)
                values.setdefault(f"asr_{way}@{k}", []).extend([] if asr is None else [asr])
    intervals = bootstrap_intervals(after, clean, seed=9, resamples=40)
    assert set(intervals) == set(values)
    for name, found in values.items():
        expected = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        assert intervals[name] == pytest.approx(tuple(expected.tolist()), abs=1e-9)


def test_bootstrap_is_seeded_and_has_the_binomial_width() -> None:
    n = 400
    ranks = Ranks(tr=torch.arange(n) % 2, ir=torch.arange(n) % 2, txt2img=torch.arange(n))
    low, high = bootstrap_intervals(ranks, seed=1)["tr@1"]
    assert (low, high) == bootstrap_intervals(ranks, seed=1)["tr@1"] != bootstrap_intervals(ranks, seed=2)["tr@1"]
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(0.25 / n), rel=0.12)


def test_captions_travel_with_their_image() -> None:
    # Five identical captions per image carry the information of one: the interval must not shrink by sqrt(5).
    n = 100
    own = torch.arange(n) % 2
    single = Ranks(tr=own, ir=own, txt2img=torch.arange(n))
    fivefold = Ranks(tr=own, ir=own.repeat_interleave(5), txt2img=torch.arange(n).repeat_interleave(5))
    assert bootstrap_intervals(fivefold)["ir@1"] == pytest.approx(bootstrap_intervals(single)["ir@1"])


@pytest.mark.parametrize("case", ["uniform5", "ragged56", "ragged37", "asym"])
def test_golden_recall_and_asr(case: str) -> None:
    recorded, tensors = golden("metrics")
    expected = recorded["cases"][case]
    txt2img = torch.tensor(expected["txt2img"])
    images = torch.arange(expected["num_images"])

    def ranks(name: str) -> Ranks:
        tr = ranks_of_scores(tensors[f"{case}.{name}_i2t"], query_group=images, gallery_group=txt2img)
        ir = ranks_of_scores(tensors[f"{case}.{name}_t2i"], query_group=txt2img, gallery_group=images)
        assert torch.equal(tr, tensors[f"{case}.{name}_rank_i2t"]) and torch.equal(
            ir, tensors[f"{case}.{name}_rank_t2i"]
        )
        return Ranks(tr=tr, ir=ir, txt2img=txt2img)

    clean, after = ranks("clean"), ranks("adv")
    for name, now in (("expected_clean", clean), ("expected_adv_recall", after)):
        assert recalls(now) == pytest.approx(in_our_words(expected[name]), abs=1e-9)
    asr = {name: round(value, 2) for name, value in success_rates(clean, after).items() if value is not None}
    assert asr == {f"asr_{name}": value for name, value in in_our_words(expected["expected_conditional_asr"]).items()}
    for way, name in (("tr", "tr"), ("ir", "ir")):
        for k in KS:
            right = (getattr(clean, way) < k).nonzero().flatten()
            assert torch.equal(right, tensors[f"{case}.clean_correct_{name}{k}"].sort().values)


@pytest.mark.parametrize("case", ["rerank_k16", "rerank_k10"])
def test_golden_reranked_scores(case: str) -> None:
    recorded, tensors = golden("metrics")
    expected = recorded["cases"][case]
    txt2img, images = torch.tensor(expected["txt2img"]), torch.arange(expected["num_images"])
    found = Ranks(
        tr=ranks_of_scores(tensors[f"{case}.score_i2t"], query_group=images, gallery_group=txt2img),
        ir=ranks_of_scores(tensors[f"{case}.score_t2i"], query_group=txt2img, gallery_group=images),
        txt2img=txt2img,
    )
    assert recalls(found) == pytest.approx(in_our_words(expected["expected"]), abs=1e-9)


@pytest.mark.parametrize("case", ["rerank_k16", "rerank_k10"])
def test_golden_ranks_without_the_matrix(case: str) -> None:
    recorded, tensors = golden("metrics")
    txt2img = torch.tensor(recorded["cases"][case]["txt2img"])
    images, texts = tensors[f"{case}.image_feats"], tensors[f"{case}.text_feats"]
    found = retrieval_ranks(texts, images, query_group=txt2img, gallery_group=torch.arange(len(images)))
    order = (texts @ images.T).argsort(dim=1, descending=True)
    assert torch.equal(found, (order == txt2img[:, None]).int().argmax(1))


def in_our_words(expected: dict[str, float]) -> dict[str, float]:
    return {name.replace("txt_r", "tr@").replace("img_r", "ir@"): value for name, value in expected.items()}


def test_the_worst_case_is_right_only_where_every_run_is() -> None:
    runs = [random_ranks(seed, captions=(3,) * 40, top=6) for seed in range(3)]
    worst = worst_case(runs)
    for k in (1, 5):
        for way in ("tr", "ir"):
            queries = zip(*(getattr(run, way).tolist() for run in runs), strict=True)
            right = [all(rank < k for rank in query) for query in queries]
            assert recall_at(getattr(worst, way), k) == pytest.approx(100 * sum(right) / len(right))
    assert torch.equal(worst.txt2img, runs[0].txt2img)
    assert recall_at(worst.tr, 5) < min(recall_at(run.tr, 5) for run in runs)


def test_the_worst_case_needs_the_same_queries() -> None:
    one = Ranks(tr=torch.zeros(2), ir=torch.zeros(2), txt2img=torch.tensor([0, 1]))
    with pytest.raises(UserError, match="at least one"):
        worst_case([])
    with pytest.raises(UserError, match="runs must have the same queries, but there are 2 images and 2 captions"):
        worst_case([one, Ranks(tr=torch.zeros(2), ir=torch.zeros(3), txt2img=torch.tensor([0, 1, 1]))])
    with pytest.raises(UserError, match="other pairs"):
        worst_case([one, Ranks(tr=torch.zeros(2), ir=torch.zeros(2), txt2img=torch.tensor([0, 0]))])
