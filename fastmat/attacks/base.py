"""What an attack is: validate, run, re-project, and measure both budgets on what is stored."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fastmat.attacks.draws import Draws, SeededDraws
from fastmat.attacks.engine import Engine, active, executing
from fastmat.errors import UserError
from fastmat.memory import Chunks
from fastmat.models.protocol import VisionLanguageModel
from fastmat.ops import project
from fastmat.quirks import Quirks
from fastmat.types import AttackContext, AttackResult, Batch, ThreatModel

BUDGET_SLACK = 1e-6  # rounding of fp32 sums near 1


class Attack(abc.ABC):
    """`attack(model, batch, context=None) -> AttackResult`. A subclass writes `run` and keeps its own settings.

    `official` is its published behaviour. An attack that learns from other data before it attacks overrides `fit`, has
    `save(path)` and `load(path)` for what it has learnt, and says so while there is nothing:

    needs_fit: whether `fit` or `load` must come before a call.
    splits: False where an image's result depends on the rest of its batch; such a batch is never split.
    per_image: names of attributes in which `run` leaves a [B] tensor; after a split they are those of the whole batch.
    budgeted: False for what keeps no budget, such as fog; how far it went is measured all the same.
    """

    official: ClassVar[Quirks] = Quirks.official()
    needs_fit: bool = False
    splits: bool = True
    per_image: ClassVar[tuple[str, ...]] = ()
    budgeted: ClassVar[bool] = True

    def __init__(self, *, threat: ThreatModel, seed: int = 0) -> None:
        self.threat = threat
        self.seed = seed
        self._images = Chunks(item="image", advice="attack on a device with more of it, or a smaller model")
        self._batches = Chunks(item="batch", advice="choose a smaller batch_size; this attack cannot split a batch")

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
        engine: Engine | None = None,
    ) -> AttackResult:
        """Attack `batch`.

        context: frozen features to contrast with; default: the clean features of `batch` itself. Hand it in when a
            batch is split, and the split does not change the result.
        draws: replaces the seeded random draws.
        engine: how it is executed; None: as the attack that calls this one, else the plain way. Where memory runs out,
            the batch goes on in halves, and so do later ones.

        Raises UserError on a batch outside the threat model's pixel box or with non-finite pixels, and where memory
        does not hold one image (an attack that never splits: the batch).
        """
        check_batch(batch, self.threat)
        engine = engine or active()
        draws = draws or SeededDraws(self.seed)
        with frozen(model), executing(engine, model):
            if context is None:
                context = self._context(model, batch, engine)
            images, texts = self._in_parts(model, batch, context, draws, engine)
        return (within_budget if self.budgeted else measured)(self.threat, batch, images, texts)

    def _context(self, model: VisionLanguageModel, batch: Batch, engine: Engine) -> AttackContext:
        """Of the whole batch, encoded in parts."""
        features = self._images.run(
            len(batch),
            lambda start, stop: image_features(model, batch.images[start:stop]),
            at_most=engine.micro_batch,
        )
        return context_of(model, batch, features=torch.cat(features))

    def _in_parts(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws, engine: Engine
    ) -> tuple[Tensor, tuple[str, ...]]:
        """`run` on as many images at a time as the engine and the memory allow."""

        def part(start: int, stop: int) -> tuple[Tensor, tuple[str, ...], list[Tensor]]:
            rows = batch if stop - start == len(batch) else batch.rows(start, stop)
            images, texts = self.run(model, rows, context, draws)
            return images.detach(), tuple(texts), [getattr(self, name) for name in self.per_image]

        if not self.splits:
            images, texts, _ = self._batches.run(1, lambda *_: part(0, len(batch)))[0]
            return images, texts
        parts = self._images.run(len(batch), part, at_most=engine.micro_batch)
        for name, values in zip(self.per_image, zip(*(left for *_, left in parts), strict=True), strict=True):
            setattr(self, name, torch.cat(values))
        return torch.cat([images for images, *_ in parts]), tuple(text for _, texts, _ in parts for text in texts)


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
    result = measured(threat, batch, images, texts)
    slack = BUDGET_SLACK * max(1.0, threat.eps)
    furthest = float(result.distance.max())
    assert furthest <= threat.eps + slack, f"image budget {threat.eps} overspent: {furthest:.3g}"
    worst = int(result.words_changed.max()) if len(texts) else 0
    assert worst <= threat.max_words, f"text budget {threat.max_words} overspent: {worst} words"
    return result


def measured(threat: ThreatModel, batch: Batch, images: Tensor, texts: tuple[str, ...]) -> AttackResult:
    """How far images and texts are from those of `batch`, in the threat model's norm, whatever its budget."""
    delta = (images - batch.images).flatten(1)
    distance = delta.abs().amax(1) if threat.norm == "linf" else delta.norm(dim=1)
    changed = torch.tensor([words_changed(a, b) for a, b in zip(batch.texts, texts, strict=True)], dtype=torch.int64)
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
def image_features(model: VisionLanguageModel, images: Tensor) -> Tensor:
    """[B, E] unit features."""
    return model.encode_image(images).features


@torch.no_grad()
def context_of(
    model: VisionLanguageModel, batch: Batch, *, texts: tuple[str, ...] | None = None, features: Tensor | None = None
) -> AttackContext:
    """The context made of a batch itself: clean image features and the features of `texts` (default: its captions).

    features: [B, E], those of the images where they are known.
    """
    return AttackContext(
        image_features=image_features(model, batch.images) if features is None else features,
        image_group=batch.group,
        text_features=text_features(model, batch.texts if texts is None else texts),
        text_group=batch.text_group,
    )
