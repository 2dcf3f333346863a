"""The three properties that decide whether an augmentation helps (arXiv 2405.18770): measured, with intervals.

The paper names them; the definitions are this project's. Features are unit rows of one given model.

alignment: mean cosine between image and caption. Of a source of captions: each of its captions with its image; of a
    source of images: each of its images with every human caption of its group. Images count equally.
relative alignment: alignment less that of human captions with human images, over the same groups.
diversity: 1 less the mean cosine between any two captions of an image, human captions and those of the source
    together, so that it says what the source adds; images of a group alike. An image with one caption has none.
diversity of words: 1 less the share of n-grams that any two of the same captions have in common, of those that either
    has (Jaccard), the mean of n = 1 and n = 2; words are lower case between blanks. Unlike distinct-n (Li et al., NAACL
    2016), which falls with every further caption, it does not depend on how many captions there are.
gap: squared maximum mean discrepancy between human captions and those of the source (images alike), with KID's kernel
    (x.y / d + 1)^3 (Binkowski et al., ICLR 2018) on features scaled to length sqrt(d), times 1,000. Only pairs from
    different groups enter, so that it is 0 on the average where the source makes what humans make (unbiased, hence
    sometimes negative), although both are about the same images.

Intervals are 95 % percentile bootstraps over groups (a human image with all that belongs to it), since what belongs
to one image is not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
from torch import Tensor

from fastmat.augment.offline import makers_of
from fastmat.augment.results import Estimate, SourceReport
from fastmat.data.provenance import HUMAN
from fastmat.data.retrieval import RetrievalSet
from fastmat.errors import UserError

ROWS_PER_CHUNK = 1024  # of a kernel matrix: with 30,000 captions 250 MB


@dataclass(frozen=True, kw_only=True)
class Items:
    """Captions or images with unit features [M, E] float64 and the group [M], 0 to G - 1, that each belongs to."""

    features: Tensor
    group: Tensor
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.group)

    def __add__(self, other: Items) -> Items:
        return Items(
            features=torch.cat([self.features, other.features]),
            group=torch.cat([self.group, other.group]),
            texts=self.texts + other.texts,
        )


def measure(
    dataset: RetrievalSet, image_features: Tensor, text_features: Tensor, *, resamples: int = 1000, seed: int = 0
) -> list[SourceReport]:
    """One report per source: human captions, then every generator of the set in order of first appearance.

    image_features [N, E], text_features [T, E]: unit rows, images and captions in the order of the set.
    Raises UserError when humans made nothing in the set.
    """
    groups = torch.tensor(dataset.group)
    owner = [(row, maker) for row in range(dataset.n_images) for maker in makers_of(dataset, row)]
    texts = [caption for captions in dataset.captions for caption in captions]
    painted = {row: maker.generator for row, maker in owner if maker is not None and maker.made == "image"}
    written = {
        i: maker.generator if maker is not None else HUMAN for i, (row, maker) in enumerate(owner) if row not in painted
    }

    def captions_by(source: str) -> Items:
        places = [i for i, generator in written.items() if generator == source]
        return Items(
            features=text_features[places].cpu().double(),
            group=groups[[owner[i][0] for i in places]],
            texts=tuple(texts[i] for i in places),
        )

    def images_by(source: str) -> Items:
        rows = [row for row in range(dataset.n_images) if painted.get(row, HUMAN) == source]
        return Items(features=image_features[rows].cpu().double(), group=groups[rows])

    images, captions = images_by(HUMAN), captions_by(HUMAN)
    if not len(images) or not len(captions):
        raise UserError(f"{dataset.name}/{dataset.split} has no image or no caption of a human to compare with")
    shared = {"n_groups": int(groups.max()) + 1, "resamples": resamples, "seed": seed}
    compare = _Comparison(images=images, captions=captions, **shared)
    reports = [compare.captions_of(HUMAN, None)]
    reports += [compare.captions_of(name, captions_by(name)) for name in _distinct(written.values())]
    return reports + [compare.images_of(name, images_by(name)) for name in _distinct(painted.values())]


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """What humans made, and the resamples that all sources share."""

    images: Items
    captions: Items
    n_groups: int
    resamples: int
    seed: int

    def captions_of(self, source: str, made: Items | None) -> SourceReport:
        """made: None for the human captions themselves."""
        own = self.captions if made is None else made
        together = self.captions if made is None else self.captions + made
        return self._report(
            source,
            "caption",
            own,
            alignment=cosines(self.images, own, self.n_groups),
            diversity=spread(together, self.n_groups),
            word_diversity=word_spread(together, self.n_groups),
            against=None if made is None else self.captions,
        )

    def images_of(self, source: str, made: Items) -> SourceReport:
        return self._report(
            source,
            "image",
            made,
            alignment=cosines(made, self.captions, self.n_groups),
            diversity=spread(self.images + made, self.n_groups),
            word_diversity=None,
            against=self.images,
        )

    def _report(
        self,
        source: str,
        kind: str,
        own: Items,
        *,
        alignment: Tensor,
        diversity: Tensor,
        word_diversity: Tensor | None,
        against: Items | None,
    ) -> SourceReport:
        human = cosines(self.images, self.captions, self.n_groups)
        return SourceReport(
            source=source,
            made=kind,
            images=len(own.group.unique()),
            items=len(own),
            alignment=self._mean(alignment),
            relative_alignment=None if against is None else self._mean(alignment - human),
            diversity=self._mean(diversity),
            word_diversity=None if word_diversity is None else self._mean(word_diversity),
            gap=None if against is None else self._gap(against, own),
        )

    def _mean(self, values: Tensor) -> Estimate | None:
        """Over groups; values [G], nan where a group has none."""
        has = ~values.isnan()
        total, count = values.nan_to_num(0), has.double()
        return self._estimate(lambda weights: (weights @ total) / (weights @ count))

    def _gap(self, human: Items, made: Items) -> Estimate | None:
        sums = [kernel_sums(*pair, n_groups=self.n_groups) for pair in ((human, human), (made, made), (human, made))]

        def value(weights: Tensor) -> Tensor:
            within, of_made, across = (
                ((weights @ kernel) * weights).sum(1) / ((weights @ count) * weights).sum(1) for kernel, count in sums
            )
            return 1000 * (within + of_made - 2 * across)

        return self._estimate(value)

    def _estimate(self, value: Callable[[Tensor], Tensor]) -> Estimate | None:
        """value: of weights [R, G], how often each group counts. None where the set gives no value."""
        here = float(value(torch.ones(1, self.n_groups, dtype=torch.float64))[0])
        if here != here:
            return None
        drawn = torch.randint(
            self.n_groups, (self.resamples, self.n_groups), generator=torch.Generator().manual_seed(self.seed)
        )
        weights = torch.zeros(self.resamples, self.n_groups, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones(1, 1, dtype=torch.float64).expand_as(drawn))
        bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = value(weights).nanquantile(bounds).tolist()
        return Estimate(value=here, low=low, high=high)


def cosines(images: Items, captions: Items, n_groups: int) -> Tensor:
    """[G] mean cosine of each group's images with its captions; nan where it lacks either. The mean over all pairs is
    the product of the two mean features."""
    return (mean_features(images, n_groups) * mean_features(captions, n_groups)).sum(1)


def mean_features(items: Items, n_groups: int) -> Tensor:
    """[G, E]; nan for a group without items."""
    total = torch.zeros(n_groups, items.features.shape[1], dtype=torch.float64)
    total.index_add_(0, items.group, items.features)
    return total / counts(items, n_groups)[:, None]


def counts(items: Items, n_groups: int) -> Tensor:
    """[G] items of each group."""
    return torch.bincount(items.group, minlength=n_groups).double()


def spread(items: Items, n_groups: int) -> Tensor:
    """[G] one less the mean cosine between two different items of a group; nan where there are not two.

    Over the ordered pairs of n unit features the cosines sum to |sum|^2 - n.
    """
    n = counts(items, n_groups)
    squared = (mean_features(items, n_groups) * n[:, None]).square().sum(1)
    return torch.where(n > 1, 1 - (squared - n) / (n * (n - 1)), torch.nan)


def word_spread(items: Items, n_groups: int) -> Tensor:
    """[G] mean `word_distance` between two different captions of a group; nan where there are not two."""
    by_group: list[list[str]] = [[] for _ in range(n_groups)]
    for group, text in zip(items.group.tolist(), items.texts, strict=True):
        by_group[group].append(text)
    means = []
    for texts in by_group:
        grams = [ngrams(text) for text in texts]
        apart = [word_distance(one, other) for one, other in combinations(grams, 2)]
        means.append(sum(apart) / len(apart) if apart else float("nan"))
    return torch.tensor(means, dtype=torch.float64)


def word_distance(one: Sequence[set[str]], other: Sequence[set[str]]) -> float:
    """Between two captions, as `ngrams` gives them; an n for which neither has any is left out.

    >>> word_distance(ngrams("a red dog"), ngrams("A dog"))  # words: 1 - 2/3; pairs of words: 1 - 0/3
    0.6666666666666667
    """
    both = [(a, b) for a, b in zip(one, other, strict=True) if a or b]
    return 1 - sum(len(a & b) / len(a | b) for a, b in both) / len(both) if both else 0.0


def ngrams(text: str) -> list[set[str]]:
    """The words of a caption, and its pairs of neighbouring words."""
    words = text.lower().split()
    return [set(words), set(map(" ".join, pairwise(words)))]


def kernel_sums(one: Items, other: Items, *, n_groups: int) -> tuple[Tensor, Tensor]:
    """[G, G] sums of the kernel over the pairs of items of two groups, and how many pairs; zero on the diagonal."""
    sums = torch.zeros(n_groups, n_groups, dtype=torch.float64)
    for start in range(0, len(one), ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        kernel = (one.features[rows] @ other.features.T + 1) ** 3
        by_group = torch.zeros(len(kernel), n_groups, dtype=torch.float64).index_add_(1, other.group, kernel)
        sums.index_add_(0, one.group[rows], by_group)
    pairs = counts(one, n_groups)[:, None] * counts(other, n_groups)
    return sums.fill_diagonal_(0), pairs.fill_diagonal_(0)


def _distinct(names: Iterable[str]) -> list[str]:
    """In order of first appearance, without the humans."""
    return [name for name in dict.fromkeys(names) if name != HUMAN]
