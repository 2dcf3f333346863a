"""What an attack is: validate, run, re-project, and measure both budgets on what is stored."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fastmat.attacks.draws import Draws, SeededDraws
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.ops import project
from fastmat.quirks import Quirks
from fastmat.types import AttackContext, AttackResult, Batch, ThreatModel

BUDGET_SLACK = 1e-6  # rounding of fp32 sums near 1


class Attack(abc.ABC):
    """`attack(model, batch, context=None) -> AttackResult`. A subclass writes `run` and keeps its own settings.

    An attack that must be fitted to a model or corpus overrides `fit`. `official` is its published behaviour.
    """

    official: ClassVar[Quirks] = Quirks.official()

    def __init__(self, *, threat: ThreatModel, seed: int = 0) -> None:
        self.threat = threat
        self.seed = seed

    def fit(self, model: VisionLanguageModel, batches: Iterable[Batch]) -> None:  # noqa: B027
        """Learn what does not depend on the sample. Nothing, by default."""

    @abc.abstractmethod
    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Adversarial images [B, 3, H, W] and T texts. `model` is frozen and in eval mode."""

    @final
    def __call__(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        context: AttackContext | None = None,
        *,
        draws: Draws | None = None,
    ) -> AttackResult:
        """Attack `batch`.

        context: frozen features to contrast with; default: the clean features of `batch` itself. Hand it in when a
            batch is split, and the split does not change the result.
        draws: replaces the seeded random draws.

        Raises UserError on a batch outside the threat model's pixel box or with non-finite pixels.
        """
        check_batch(batch, self.threat)
        with frozen(model):
            if context is None:
                context = context_of(model, batch)
            images, texts = self.run(model, batch, context, draws or SeededDraws(self.seed))
        return within_budget(self.threat, batch, images.detach(), tuple(texts))


def check_batch(batch: Batch, threat: ThreatModel) -> None:
    """Raise UserError unless `batch` is well formed and inside the pixel box."""
    low, high = threat.bounds
    if not len(batch) or not batch.texts:
        raise UserError(f"there is nothing to attack: {len(batch)} images and {len(batch.texts)} texts")
    if batch.images.dtype != torch.float32 or batch.images.dim() != 4 or batch.images.shape[1] != 3:
        raise UserError(f"images must be [B, 3, H, W] fp32, got {tuple(batch.images.shape)} {batch.images.dtype}")
    if not bool(((batch.images >= low) & (batch.images <= high)).all()):
        raise UserError(f"images must lie in [{low:g}, {high:g}] and be finite; divide 8-bit pixels by 255")
    if len(batch.texts) != len(batch.txt2img):
        raise UserError(f"{len(batch.texts)} texts, but txt2img has {len(batch.txt2img)} entries")


def within_budget(threat: ThreatModel, batch: Batch, images: Tensor, texts: tuple[str, ...]) -> AttackResult:
    """Project once more, then measure on the stored tensors; an overspent budget is a bug in the attack."""
    images = project(images.float(), batch.images, eps=threat.eps, norm=threat.norm, bounds=threat.bounds)
    images = torch.where(images.isfinite(), images, batch.images)
    delta = (images - batch.images).flatten(1)
    distance = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
    changed = torch.tensor([words_changed(a, b) for a, b in zip(batch.texts, texts, strict=True)], dtype=torch.int64)
    slack = BUDGET_SLACK * max(1.0, threat.eps)
    assert bool((distance <= threat.eps + slack).all()), f"image budget {threat.eps} overspent: {distance.max():.3g}"
    worst = int(changed.max()) if len(changed) else 0
    assert worst <= threat.max_words, f"text budget {threat.max_words} overspent: {worst} words"
    return AttackResult(images=images, texts=texts, distance=distance, words_changed=changed)


def words_changed(source: str, adversarial: str) -> int:
    """How many words of `source` (split on blanks) do not survive, in order, in `adversarial`.

    One word replaced by several counts once; text added without replacing anything counts as one.

    >>> words_changed("a red dog", "a blue fast dog"), words_changed("a dog", "a dog"), words_changed("a", "a b")
    (1, 0, 1)
    """
    if source == adversarial:
        return 0
    a, b = source.split(" "), adversarial.split(" ")
    row = [0] * (len(b) + 1)  # longest common subsequence, one row at a time
    for word in a:
        previous = 0
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if word == other else max(row[j], row[j - 1])
    return max(1, len(a) - row[-1])


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every module's mode and every parameter's gradient flag are as before outside."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def frozen(model: VisionLanguageModel) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; as before outside."""
    assert isinstance(model, nn.Module)
    with restored(model):
        model.eval().requires_grad_(False)
        yield


@torch.no_grad()
def text_features(model: VisionLanguageModel, texts: Sequence[str], *, max_length: int | None = None) -> Tensor:
    """[T, E] unit features on the model's device."""
    return model.encode_text(model.tokenize(texts, max_length=max_length).to(model.logit_scale.device)).features


@torch.no_grad()
def context_of(model: VisionLanguageModel, batch: Batch, *, texts: tuple[str, ...] | None = None) -> AttackContext:
    """The context made of a batch itself: clean image features and the features of `texts` (default: its captions)."""
    return AttackContext(
        image_features=model.encode_image(batch.images).features,
        image_group=batch.group,
        text_features=text_features(model, batch.texts if texts is None else texts),
        text_group=batch.text_group,
    )
