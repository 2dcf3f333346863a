"""The three properties against their definitions written out pair by pair, and where they must lie."""

import itertools
import math

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastmat.augment.measure import Items, measure, word_distance, word_spread
from fastmat.augment.measure import ngrams as grams_of
from fastmat.augment.results import SourceReport
from fastmat.data.provenance import Provenance
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError

EDA = Provenance(generator="eda", model="lexicon", source="x", seed=0)
BLIP = Provenance(generator="caption", model="blip", source="0", seed=0)
PAINTED = Provenance(generator="text_to_image", model="sd", source="x", seed=0, made="image")
SOME_WORDS = ["a", "red", "dog", "runs", "two", "black", "cats", "sit", "the", "park", "snow", "ball"]


def random_set(*, n: int = 7, seed: int = 0) -> RetrievalSet:
    """n human images with one to three human captions, some by EDA and one by a captioner for every second one; then a
    painted image for the first two. The second and third image are one group."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    makers = [(*[None] * number(1, 4), *[EDA] * number(1, 3), *[BLIP] * (row % 2)) for row in range(n)] + [
        (PAINTED,),
        (PAINTED,),
    ]
    captions = [tuple(" ".join(SOME_WORDS[number(0, 12)] for _ in range(number(1, 6))) for _ in own) for own in makers]
    group = [0, 1, 1, *range(2, n - 1), 0, 1]
    return RetrievalSet(
        name="tiny",
        split="train",
        captions=tuple(captions),
        ids=tuple(map(str, range(n + 2))),
        group=tuple(group),
        load=lambda row: Image.new("RGB", (4, 4)),
        provenance=tuple(makers),
    )


def unit(rows: int, *, seed: int, towards: Tensor | None = None) -> Tensor:
    features = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(features + (0 if towards is None else towards), dim=1)


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(x * y for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def jaccard_distance(one: str, other: str) -> float:
    """Mean over words and pairs of words, those n for which neither has any left out."""
    shares = []
    for n in (1, 2):
        a, b = ({tuple(t.lower().split()[i : i + n]) for i in range(len(t.split()) - n + 1)} for t in (one, other))
        if a | b:
            shares.append(1 - len(a & b) / len(a | b))
    return mean(shares)


def by_hand(dataset: RetrievalSet, images: Tensor, texts: Tensor, source: str) -> dict[str, float]:
    """The definitions, with loops over groups and pairs."""
    n_groups = max(dataset.group) + 1
    human_images: list[list[Tensor]] = [[] for _ in range(n_groups)]
    made_images: list[list[Tensor]] = [[] for _ in range(n_groups)]
    human: list[list[tuple[str, Tensor]]] = [[] for _ in range(n_groups)]
    made: list[list[tuple[str, Tensor]]] = [[] for _ in range(n_groups)]
    place = 0
    for row, (captions, makers) in enumerate(zip(dataset.captions, dataset.provenance, strict=True)):
        group = dataset.group[row]
        if makers[0] is not None and makers[0].made == "image":
            made_images[group].append(images[row])
        else:
            human_images[group].append(images[row])
        for caption, maker in zip(captions, makers, strict=True):
            if maker is None:
                human[group].append((caption, texts[place]))
            elif maker.made == "caption" and maker.generator == source:
                made[group].append((caption, texts[place]))
            place += 1

    aligned, human_aligned, diverse, worded = [], [], [], []
    ours: list[list[Tensor]] = [[] for _ in range(n_groups)]
    theirs: list[list[Tensor]] = [[] for _ in range(n_groups)]
    for group in range(n_groups):
        reference = mean([dot(i, f) for i in human_images[group] for _, f in human[group]])
        if source == "text_to_image":
            pairs = [dot(i, f) for i in made_images[group] for _, f in human[group]]
            together = [("", i) for i in human_images[group] + made_images[group]]
            ours[group], theirs[group] = human_images[group], made_images[group]
        else:
            chosen = human[group] if source == "human" else made[group]
            pairs = [dot(i, f) for i in human_images[group] for _, f in chosen]
            together = human[group] + made[group]
            ours[group], theirs[group] = [f for _, f in human[group]], [f for _, f in made[group]]
        aligned.append(mean(pairs))
        human_aligned.append(aligned[-1] - reference)
        diverse.append(mean([1 - dot(a, b) for (_, a), (_, b) in itertools.combinations(together, 2)]))
        worded.append(mean([jaccard_distance(a, b) for (a, _), (b, _) in itertools.combinations(together, 2)]))

    def across(one: list[list[Tensor]], other: list[list[Tensor]]) -> float:
        return mean(
            [
                (dot(a, b) + 1) ** 3
                for g, h in itertools.permutations(range(n_groups), 2)
                for a in one[g]
                for b in other[h]
            ]
        )

    def over_groups(values: list[float]) -> float:
        return mean([value for value in values if value == value])

    return {
        "alignment": over_groups(aligned),
        "relative_alignment": over_groups(human_aligned),
        "diversity": over_groups(diverse),
        "word_diversity": over_groups(worded),
        "gap": 1000 * (across(ours, ours) + across(theirs, theirs) - 2 * across(ours, theirs)),
    }


def measured(dataset: RetrievalSet, *, seed: int = 0, resamples: int = 50) -> tuple[list[SourceReport], Tensor, Tensor]:
    images, texts = unit(dataset.n_images, seed=1), unit(dataset.n_captions, seed=2)
    return measure(dataset, images, texts, seed=seed, resamples=resamples), images, texts


@pytest.mark.parametrize("seed", [0, 1])
def test_every_property_is_its_definition(seed: int) -> None:
    dataset = random_set(seed=seed)
    reports, images, texts = measured(dataset)
    assert [(report.source, report.made) for report in reports] == [
        ("human", "caption"),
        ("eda", "caption"),
        ("caption", "caption"),
        ("text_to_image", "image"),
    ]
    for report in reports:
        expected = by_hand(dataset, images, texts, report.source)
        without = {"human": {"relative_alignment", "gap"}, "text_to_image": {"word_diversity"}}
        for name, value in expected.items():
            estimate = getattr(report, name)
            if name in without.get(report.source, set()):
                assert estimate is None
            else:
                assert estimate.value == pytest.approx(value, rel=1e-5, abs=1e-6), f"{report.source} {name}"
                assert estimate.low <= estimate.high
    flat = [maker for makers in dataset.provenance for maker in makers]
    assert [report.items for report in reports] == [flat.count(maker) for maker in (None, EDA, BLIP, PAINTED)]
    assert [report.images for report in reports] == [6, 6, 3, 2]


def test_intervals_are_the_bootstrap_over_groups() -> None:
    """Those of an alignment, from group means and resamples drawn as documented: groups with replacement."""
    dataset = random_set(n=30)
    reports, images, texts = measured(dataset, resamples=4000)
    again, *_ = measured(dataset, resamples=4000)
    assert again == reports
    eda = reports[1].alignment
    assert eda is not None
    owner = [row for row, captions in enumerate(dataset.captions) for _ in captions]
    flat = [maker for makers in dataset.provenance for maker in makers]
    groups: dict[int, list[float]] = {}
    for place, (row, maker) in enumerate(zip(owner, flat, strict=True)):
        if maker == EDA:
            for other in range(30):
                if dataset.group[other] == dataset.group[row]:
                    groups.setdefault(dataset.group[row], []).append(dot(images[other], texts[place]))
    means = torch.tensor([mean(values) for values in groups.values()])
    drawn = torch.randint(len(means), (20000, len(means)), generator=torch.Generator().manual_seed(9))
    low, high = means[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert (eda.low, eda.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def paired_set(n: int, per_source: int = 3) -> RetrievalSet:
    """n images, each with as many human captions as by EDA."""
    return RetrievalSet(
        name="pairs",
        split="train",
        captions=tuple(tuple(f"caption {i} {k}" for k in range(2 * per_source)) for i in range(n)),
        ids=tuple(map(str, range(n))),
        group=tuple(range(n)),
        load=lambda row: Image.new("RGB", (4, 4)),
        provenance=((*[None] * per_source, *[EDA] * per_source),) * n,
    )


def test_the_gap_is_nothing_between_equals_and_grows_with_a_shift() -> None:
    """Captions of an image share much, human or not; still the same distribution has no gap."""
    n = 60
    dataset = paired_set(n)
    image = unit(n, seed=3)
    values = []
    for shift in (0.0, 0.4, 0.8):
        direction = torch.zeros(n, 6, 6)
        direction[:, 3:, 0] = shift
        around = image[:, None] * 2 + torch.randn(n, 6, 6, generator=torch.Generator().manual_seed(4)) / 2 + direction
        texts = torch.nn.functional.normalize(around, dim=2).flatten(0, 1)
        _, eda = measure(dataset, image, texts, resamples=300)
        assert eda.gap is not None
        values.append(eda.gap)
    assert values[0].low < 0 < values[0].high
    assert 0 < values[1].low < values[1].high < values[2].low


def test_the_worse_captions_are_seen_as_such() -> None:
    """Paraphrases by copying are aligned and not diverse; by noise the other way round."""
    n = 40
    image = unit(n, seed=3)
    human = torch.nn.functional.normalize(image[:, None] + unit(3 * n, seed=5).view(n, 3, 6) * 0.8, dim=2)
    kinds = {"copies": human.clone(), "noise": unit(3 * n, seed=6).view(n, 3, 6)}
    found = {}
    for name, made in kinds.items():
        reports = measure(paired_set(n), image, torch.cat([human, made], 1).flatten(0, 1), resamples=300)
        found[name] = reports[1]
        plain = reports[0]
    assert found["copies"].relative_alignment is not None and found["noise"].relative_alignment is not None
    assert found["copies"].relative_alignment.value == pytest.approx(0, abs=1e-6)
    assert found["noise"].relative_alignment.high < -0.3
    assert (
        found["copies"].diversity is not None and found["noise"].diversity is not None and plain.diversity is not None
    )
    assert found["copies"].diversity.high < plain.diversity.low < plain.diversity.high < found["noise"].diversity.low


def test_words_by_hand_and_whatever_the_number_of_captions() -> None:
    assert word_distance(grams_of("a dog"), grams_of("A dog")) == 0
    assert word_distance(grams_of("dog"), grams_of("cat")) == 1
    assert word_distance(grams_of(""), grams_of("")) == 0
    texts = ("a red dog", "a dog", "two cats")
    few = Items(features=torch.zeros(3, 1), group=torch.tensor([0, 0, 2]), texts=texts)
    found = word_spread(few, 3).tolist()
    assert found[0] == pytest.approx((1 / 3 + 1) / 2) and math.isnan(found[1]) and math.isnan(found[2])
    drawn = torch.randint(12, (80, 5), generator=torch.Generator().manual_seed(0))
    random = [" ".join(SOME_WORDS[i] for i in row) for row in drawn.tolist()]
    group = torch.arange(80) // 4
    four = word_spread(Items(features=torch.zeros(80, 1), group=group, texts=tuple(random)), 20).mean()
    twenty = word_spread(Items(features=torch.zeros(80, 1), group=group // 5, texts=tuple(random)), 4).mean()
    assert abs(float(four - twenty)) < 0.05


def test_something_human_is_needed() -> None:
    dataset = paired_set(2)
    nobody = RetrievalSet(**{**vars(dataset), "provenance": ((EDA,) * 6,) * 2})
    with pytest.raises(UserError, match="no image or no caption of a human"):
        measure(nobody, unit(2, seed=0), unit(12, seed=1))
