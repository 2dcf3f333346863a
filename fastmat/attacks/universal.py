"""A universal perturbation: one image delta and one word, fitted once, for every image and caption."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmat.attacks.base import Attack, check_batch, frozen
from fastmat.attacks.draws import Draws, SeededDraws
from fastmat.attacks.universal_contrast import Corpus, contrast, farthest, read_corpus
from fastmat.attacks.universal_file import UniversalPerturbation
from fastmat.attacks.universal_word import choose_word, frequent_words, read_words, with_word
from fastmat.errors import UserError
from fastmat.models.protocol import VisionLanguageModel
from fastmat.ops import project, scale_views
from fastmat.types import AttackContext, Batch, ThreatModel


class Universal(Attack):
    """C-PGC's attack (Fang et al., ICCV 2025, arXiv 2406.05491): fit on training data, apply to data never seen.

    `fit(model, batches)` learns delta and word, each by the objective of `fastmat.attacks.universal_contrast`; a call
    adds delta to every image and puts the word in the place of every caption's most important one, as the surrogate
    sees it. `save(path)` keeps both; `perturbation` loads them. Fit on a training split and judge on the test split: a
    perturbation judged on the images that it was fitted to is not universal.

    The published budget is eps 12/255 and one word. Of `max_words` one is used; at 0 captions stay as they are.

    epochs: passes over the batches (40). step_size: Adam's, in pixel units; None: a tenth of the radius (L2: of its
        root-mean-square share per pixel). Betas are the release's, 0.5 and 0.999.
    scales, noise_std: an image, moved uniformly within eps, is seen as it is and at these scales, as in SGA.
    temperature, alpha: of the objective (0.1, 0.1). targets: images drawn per sample, of which it is pulled to the
        farthest (4).
    vocabulary: file of words to choose from, one a line; None: the `n_words` most frequent of the captions fitted on.
    n_captions: captions that a word is judged in. perturbation: file of `save`; then no fit is needed.

    Adam moves delta itself. The paper trains a generator of one fixed noise, conditioned on each batch's captions, and
    keeps the last delta it gives; as nothing of the generator is used afterwards, here it is left out: this project's
    choice, with the objective, data, views and budget of the paper, and a step size of its own.

    A delta is fitted at the resolution of its batches and resized to that of what is attacked.

    Raises UserError on settings out of range, a file that holds no perturbation or one fitted within another budget;
    without fit or file, a call raises it too.
    """

    def __init__(
        self,
        *,
        threat: ThreatModel,
        epochs: int = 40,
        step_size: float | None = None,
        scales: Sequence[float] = (0.5, 0.75, 1.25, 1.5),
        noise_std: float = 0.05,
        temperature: float = 0.1,
        alpha: float = 0.1,
        targets: int = 4,
        vocabulary: Path | None = None,
        n_words: int = 500,
        n_captions: int = 64,
        perturbation: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(threat=threat, seed=seed)
        counts = {"epochs": epochs, "targets": targets, "n_words": n_words, "n_captions": n_captions}
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"{name} must be at least 1, got {count}")
        amounts = {"step_size": step_size or 0.0, "noise_std": noise_std, "alpha": alpha}
        for name, amount in amounts.items():
            if not 0 <= amount < math.inf:
                raise UserError(f"{name} must be a finite number that is not negative, got {amount}")
        if not 0 < temperature < math.inf:
            raise UserError(f"temperature must be a finite number above 0, got {temperature}")
        self.epochs = epochs
        self.step_size = step_size
        self.scales = tuple(scales)
        self.noise_std = noise_std
        self.temperature = temperature
        self.alpha = alpha
        self.targets = targets
        self.vocabulary = None if vocabulary is None else read_words(vocabulary)
        self.n_words = n_words
        self.n_captions = n_captions
        self.perturbation: UniversalPerturbation | None = None
        self.needs_fit = perturbation is None
        if perturbation is not None:
            self.load(perturbation)

    def fit(self, model: VisionLanguageModel, batches: Iterable[Batch]) -> None:
        """Learn delta and word from `batches`, which are gone through `epochs` + 1 times.

        Each pass must give the same images in the same order, as `fastmat.data.loader.evaluation_batches` and a list
        do. All images of one resolution. Replaces what was fitted or loaded before. Determined by model, batches and
        seed. Costs, per image and epoch, 1 + len(scales) forwards and as many forwards with backward.

        Raises UserError on an iterator, which can be gone through once only, and on batches that do not fit together.
        """
        if isinstance(batches, Iterator):
            raise UserError("batches must be a list or a loader that can be gone through again, got an iterator")
        draws = SeededDraws(self.seed)
        with frozen(model):
            corpus = read_corpus(model, self.checked(batches))
            delta = self.fit_delta(model, batches, corpus, draws)
            word = None
            if self.threat.max_words:
                word = choose_word(
                    model,
                    corpus,
                    self.vocabulary or frequent_words(corpus.captions, self.n_words),
                    draws,
                    n_captions=self.n_captions,
                    targets=self.targets,
                    temperature=self.temperature,
                    alpha=self.alpha,
                )
        self.perturbation = UniversalPerturbation(
            delta=delta.cpu(), word=word, eps=self.threat.eps, norm=self.threat.norm
        )

    def save(self, path: Path) -> None:
        """Write what was fitted, for `perturbation`. Raises UserError when nothing was."""
        self.fitted().save(path)

    def load(self, path: Path) -> None:
        """Take up what `save` wrote. Raises UserError unless it was fitted within this threat model's radius."""
        found, threat = UniversalPerturbation.load(path), self.threat
        if found.norm != threat.norm or not math.isclose(found.eps, threat.eps, rel_tol=1e-6):
            raise UserError(
                f"perturbation {path} was fitted within {found.norm} {found.eps:.6g}, but the threat model says "
                f"{threat.norm} {threat.eps:.6g}; fit one within it, or set eps and norm to the file's"
            )
        self.perturbation = found

    def run(
        self, model: VisionLanguageModel, batch: Batch, context: AttackContext, draws: Draws
    ) -> tuple[Tensor, tuple[str, ...]]:
        fitted, threat = self.fitted(), self.threat
        delta = fitted.at(*batch.images.shape[-2:]).to(batch.images.device)
        images = project(batch.images + delta, batch.images, eps=threat.eps, norm=threat.norm, bounds=threat.bounds)
        if fitted.word is None or not threat.max_words:
            return images, batch.texts
        return images, with_word(model, batch.texts, fitted.word)

    def fitted(self) -> UniversalPerturbation:
        if self.perturbation is None:
            raise UserError("no universal perturbation is fitted: call fit(model, batches) first, or set perturbation")
        return self.perturbation

    def checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, each well formed and of the first one's resolution."""
        shape = None
        for batch in batches:
            check_batch(batch, self.threat)
            shape = shape or batch.images.shape[1:]
            if batch.images.shape[1:] != shape:
                raise UserError(f"batches must have one resolution, got {tuple(shape)} and {tuple(batch.images.shape)}")
            yield batch

    def fit_delta(self, model: VisionLanguageModel, batches: Iterable[Batch], corpus: Corpus, draws: Draws) -> Tensor:
        """[3, H, W] after `epochs` passes of Adam, inside the ball after every step."""
        device, threat = corpus.images.device, self.threat
        delta: Tensor | None = None
        optimizer: torch.optim.Optimizer | None = None
        for epoch in range(self.epochs):
            done = 0
            for batch in batches:
                rows = torch.arange(done, done + len(batch))
                done += len(batch)
                if not torch.equal(corpus.index[done - len(batch) : done], batch.index.cpu()):
                    raise UserError("batches must give the same images in the same order every time; do not shuffle")
                here = batch.to(device)
                if delta is None or optimizer is None:
                    delta = torch.zeros_like(here.images[0]).requires_grad_(True)
                    optimizer = torch.optim.Adam([delta], lr=self.rate(delta), betas=(0.5, 0.999), maximize=True)
                views = self.views(here, draws, epoch)
                drawn = corpus.drawn(draws, f"targets/{epoch}", here.index, self.targets)
                optimizer.zero_grad()
                for view in views:
                    self.value(model, view, delta, corpus, rows.to(device), drawn).mean().backward()
                optimizer.step()
                with torch.no_grad():
                    ball = project(
                        delta[None], torch.zeros_like(delta[None]), eps=threat.eps, norm=threat.norm, bounds=(-1, 1)
                    )
                    delta.copy_(ball[0])
        assert delta is not None
        return delta.detach()

    def rate(self, delta: Tensor) -> float:
        """Adam's step size."""
        if self.step_size is not None:
            return self.step_size
        return self.threat.eps / 10 / (math.sqrt(delta.numel()) if self.threat.norm == "l2" else 1)

    @torch.no_grad()
    def views(self, batch: Batch, draws: Draws, epoch: int) -> list[Tensor]:
        """The images moved within the ball, and their scaled copies, fresh for every epoch."""
        x, threat, shape = batch.images, self.threat, batch.images.shape[1:]
        radius = threat.eps / (math.sqrt(x[0].numel()) if threat.norm == "l2" else 1)
        moved = (x + radius * draws.uniform(f"moved/{epoch}", batch.index, shape)).clamp(*threat.bounds)
        if not self.scales:
            return [moved]
        noise = [draws.normal(f"scale/{epoch}/{i}", batch.index, shape) for i in range(len(self.scales))]
        noises = torch.stack(noise).mul_(self.noise_std)
        return [moved, *scale_views(moved, self.scales, noises, antialias=True, bounds=threat.bounds)]

    @torch.enable_grad()
    def value(
        self, model: VisionLanguageModel, view: Tensor, delta: Tensor, corpus: Corpus, rows: Tensor, drawn: Tensor
    ) -> Tensor:
        """[B] objective of `view` + delta. rows [B]: of the images in the corpus; drawn [B, targets]: of others."""
        with torch.no_grad():
            clean = model.encode_image(view).features
            which = farthest(clean, corpus.own_mean[drawn], corpus.group[rows], corpus.group[drawn])
            other = drawn.gather(1, which[:, None])[:, 0]
        moved = model.encode_image((view + delta).clamp(*self.threat.bounds)).features
        return contrast(
            moved,
            clean,
            corpus.captions_of(rows),
            corpus.captions_of(other),
            temperature=self.temperature,
            alpha=self.alpha,
        )
