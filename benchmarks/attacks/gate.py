"""Before any figure: does an implementation attack as the published loop does?"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastmat.benchmarks.attacks.job import Dtype, Half, Job, Outcome, features
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.harness import QualityError

MARGIN = 1e-5  # lead of the chosen text over the runner-up
ORDER = 1e-3  # lead of a word's importance over the next one's, relative: KLs of 1e-5 are sums of fp32 terms near 1
OBJECTIVE = 0.01
SINGLE = 0.1  # of one image, where nothing averages
AGREEMENT, POINTS = 0.98, 0.5


class Judged(NamedTuple):
    """What is compared, in fp32. objective: [B]; guide: [T, E] features of each caption's final image; correct: queries
    answered before the attack; fooled: of those, the ones that fail after it."""

    objective: torch.Tensor
    guide: torch.Tensor
    correct: int
    fooled: int


def judge(setting: Setting, job: Job, outcome: Outcome) -> Judged:
    """Captions and images of the batch are each other's gallery; both directions, R@1."""
    model, batch = setting.model, job.batch
    clean_images, clean_texts = image_features(setting, batch.images), features(model, batch.texts)
    images, texts = image_features(setting, outcome.images), features(model, outcome.texts)
    before, after = (right(i @ t.T, batch.txt2img) for i, t in ((clean_images, clean_texts), (images, texts)))
    objective = job.objective(outcome.images, batch.texts).double()
    return Judged(objective, images[batch.txt2img], int(before.sum()), int((before & ~after).sum()))


@torch.no_grad()
def image_features(setting: Setting, images: torch.Tensor) -> torch.Tensor:
    return setting.model.encode_image(images).features


def objective_off(ours: torch.Tensor, theirs: torch.Tensor, clean: torch.Tensor) -> tuple[float, float]:
    """How far the mean objective [B] is off and the standard error of that, relative to its value or gain.

    >>> objective_off(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0]), torch.zeros(2))[0]
    0.0
    """
    difference = (ours - theirs).double()
    mean = float(theirs.double().mean())
    scale = max(abs(mean), abs(mean - float(clean.double().mean())), 1e-12)
    error = float(difference.std()) / len(difference) ** 0.5 / scale if len(difference) > 1 else SINGLE / 2
    return abs(float(difference.mean())) / scale, error


def right(similarity: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """[B + T] bool: the image finds one of its captions first, the caption its image.

    >>> right(torch.eye(2), torch.tensor([0, 1])).tolist()
    [True, True, True, True]
    """
    rows = torch.arange(len(similarity), device=owner.device)
    return torch.cat([owner[similarity.argmax(1)] == rows, similarity.argmax(0) == owner])


def compare(
    setting: Setting, job: Job, half: Half, dtype: Dtype, name: str, got: Outcome, published: Outcome
) -> dict[str, float]:
    """How `got` differs from the published loop's outcome, which had the same start and noise.

    fp32: the same text wherever the published choice was clear, and the final objective within 1 %. A choice is clear
    when the lead of every chosen text is more than MARGIN, and more than a guide that differs could move it: rounding
    turns signs of small gradients, so final images differ, and the guides made of them. For the same reason the mean
    objective may be off by two standard errors where that is more. bf16: 98 % of the texts, and the success rate
    within half a point; one caption or query is always allowed, since a small set has no finer grain.
    Raises QualityError beyond that.
    """
    ours, theirs = judge(setting, job, got), judge(setting, job, published)
    off, error = objective_off(ours.objective, theirs.objective, job.objective(job.batch.images, job.batch.texts))
    differ = [t for t, (a, b) in enumerate(zip(got.texts, published.texts, strict=True)) if a != b]
    trace, count = published.trace, len(published.texts)
    unclear: set[int] = set()
    if trace is not None:
        moved = (2 * (ours.guide - theirs.guide).norm(dim=1)).tolist()
        unclear = {t for t in range(count) if trace.margin[t] <= MARGIN + moved[t] or trace.order[t] <= ORDER}
    queries = max(1, theirs.correct)
    points = 100 * abs(ours.fooled - theirs.fooled) / queries
    found = {
        "agreement": 1 - len(differ) / count,
        "unclear": float(len(unclear)),
        "objective_off": off,
        "objective_error": error,
        "asr": 100 * ours.fooled / queries,
        "asr_published": 100 * theirs.fooled / queries,
        "queries": float(theirs.correct),
    }
    wrong = None
    if off != off or not bool(got.images.isfinite().all()):
        wrong = "images are NaN or infinite"
    elif dtype == "float32":
        clear = [t for t in differ if t not in unclear]
        if clear:
            wrong = f"{len(clear)} texts differ although the published choice is clear, first: {got.texts[clear[0]]!r}"
        elif off > max(OBJECTIVE, 2 * error):
            wrong = f"the final objective is {off:.1%} off, of which {2 * error:.1%} may be rounding's"
    elif len(differ) > max(1, (1 - AGREEMENT) * count):
        wrong = f"only {found['agreement']:.1%} of the texts agree with fp32"
    elif points > max(POINTS, 100 / queries):
        wrong = f"the success rate differs by {points:.1f} points"
    if wrong is not None:
        raise QualityError(f"{job.name} ({half}), {name} {dtype}: {wrong}; it is not timed")
    return found
