"""SA-AET (SA_AET.py, e9e664a): SGA's order, each step from the best of five mixtures of current, clean and last image.

Similarities are taken in a subspace: the features of a random 40 % of all captions are decomposed, and the first
direction is dropped. Published: those captions are encoded for every batch, the decomposition is computed at every loss
(140 times a batch), the mixture is chosen by the mean loss of the batch, and every trial is differentiated for nothing.
One batch of at most 8 images, so that the choice is among the same images for everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmat.attacks.draws import Draws, SeededDraws
from fastmat.benchmarks.attacks.job import Job, Outcome, Runner, features
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.attacks.sga import IMAGES, LENGTH, STEPS, views
from fastmat.benchmarks.attacks.words import Published, Tuned
from fastmat.build import Component
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import Batch, ThreatModel

EPS, STEP, SAMPLES = 8 / 255, 2 / 255, 5
SHARE = 0.4  # of all captions
WEIGHTS = (0.6, 0.2, 0.2)  # of clean, final and last but one image in the last text pass
# Percents of (current, clean, last) with current < last < clean, and their chances as the original draws them: the
# first uniform in 1..100, the second in what is left, again until they are in order.
TRIPLES = [[(a, b, 100 - a - b) for b in range(1, 100 - a) if a < 100 - a - b < b] for a in range(1, 33)]
CHANCES = torch.tensor([len(triples) / (100 - triples[0][0]) for triples in TRIPLES], dtype=torch.float64)


def job(setting: Setting) -> Job:
    batch, tokenizer = setting.batch.rows(0, IMAGES), setting.tokenizer
    every = (*batch.texts, *setting.batch.texts[len(batch.texts) :], *setting.others)
    drawn = SeededDraws(0).uniform("corpus", torch.arange(len(every)), ()).argsort(stable=True)
    corpus = [every[int(t)] for t in drawn[: max(2, int(SHARE * len(every)))]]

    def published(threat: ThreatModel) -> Runner:
        model, bert = setting.unfrozen, setting.unfrozen_bert
        words = Published(model=model, bert=bert, tokenizer=tokenizer, length=LENGTH, part="features", with_graph=True)
        return attack(model, words, batch, corpus, threat)

    def tuned(threat: ThreatModel, model: DualEncoder) -> Runner:
        words = Tuned(model=model, bert=setting.mlm.model, tokenizer=tokenizer, length=LENGTH, part="features")
        return attack(model, words, batch, corpus, threat)

    def objective(images: Tensor, texts: Sequence[str]) -> Tensor:
        own = features(setting.model, texts)
        with torch.no_grad():
            cosines = (setting.model.encode_image(images).features[batch.txt2img] * own).sum(-1)
        return -cosines.new_zeros(len(images)).index_add_(0, batch.txt2img, cosines)

    return Job(
        name="sa_aet",
        component=Component(name="sa_aet", arguments={"parity": "official", "choice": "batch", "step_size": STEP}),
        batch=batch,
        threat=ThreatModel(eps=EPS, max_words=1),
        published=published,
        tuned=tuned,
        objective=objective,
        others=every[len(batch.texts) :],
    )


def projector(corpus: Tensor) -> Tensor:
    """[E, E], onto the directions of corpus features [M, E] but the first."""
    basis = torch.linalg.svd(corpus.T.float(), full_matrices=False).U[:, 1:]
    return basis @ basis.T


def mixture(draws: Draws, step: int, batch: Batch) -> Tensor:
    """[SAMPLES, 3] weights of current, clean and last image, one set for the batch."""
    unit = draws.uniform(f"mixture/{step}", batch.index[:1], (SAMPLES, 2))[0].add(1).div(2).double().cpu()
    cumulative = CHANCES.cumsum(0)
    rows = torch.searchsorted(cumulative, unit[:, 0].contiguous() * cumulative[-1]).clamp_max(len(TRIPLES) - 1)
    found = [TRIPLES[row] for row in rows.tolist()]
    chosen = [
        of_it[min(int(v * len(of_it)), len(of_it) - 1)] for of_it, v in zip(found, unit[:, 1].tolist(), strict=True)
    ]
    return torch.tensor(chosen) / 100


def attack(
    model: DualEncoder, words: Published | Tuned, batch: Batch, corpus: Sequence[str], threat: ThreatModel
) -> Runner:
    loop = published_images if isinstance(words, Published) else tuned_images

    def encode(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model.encode_image(images).features

    def run(draws: Draws) -> Outcome:
        texts: Sequence[str] = batch.texts
        clean = encode(batch.images) if threat.max_words else None
        if clean is not None:
            texts = words(batch.texts, clean[batch.txt2img])
        images = last = batch.images
        if threat.eps:
            with torch.no_grad():
                own, every = words.encode(texts), words.encode(corpus)
            images, last = loop(model, batch, own, every, threat, draws)
        if clean is not None:
            ends = zip(WEIGHTS, (clean, encode(images), encode(last)), strict=True)
            guide = torch.stack([weight * end for weight, end in ends]).sum(0)
            texts = words(batch.texts, guide[batch.txt2img])
        return Outcome(images, texts, words.trace if threat.max_words and isinstance(words, Published) else None)

    return run


def published_images(
    model: DualEncoder, batch: Batch, own: Tensor, corpus: Tensor, threat: ThreatModel, draws: Draws
) -> tuple[Tensor, Tensor]:
    """The final and the last but one iterate; every loss decomposes the corpus and fills its labels anew."""
    owners = batch.txt2img.tolist()

    def loss(embeds: Tensor) -> Tensor:
        plane = projector(corpus)
        similarity = (embeds @ plane) @ (own @ plane).T
        labels = torch.zeros(similarity.shape, device=embeds.device)
        for caption, image in enumerate(owners):
            labels[image, caption] = 1
        return -(similarity * labels).sum(-1).mean()

    def gradient(point: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        point.requires_grad_()
        model.zero_grad()
        found = value(point)
        found.backward()
        assert point.grad is not None
        return point.grad / point.grad.abs().mean(dim=(1, 2, 3), keepdim=True), found.detach()

    def single(x: Tensor) -> Tensor:
        return loss(model.encode_image(x).features)

    def over_views(x: Tensor, step: int) -> Tensor:
        embeds = model.encode_image(torch.cat(views(x, step, batch, draws))).features
        return torch.stack([loss(part) for part in embeds.split(len(batch))]).sum()

    x = last = start(batch, threat, draws)
    for step in range(STEPS):
        point = x.clone()
        if step:
            points = [a * x + b * batch.images + c * last for a, b, c in mixture(draws, step, batch).tolist()]
            values = []
            for trial in points:
                moved = project(x + STEP * gradient(trial.clone(), single)[0].sign(), batch, threat)
                values.append(gradient(moved, single)[1].item())
            point = points[values.index(max(values))]
        direction, _ = gradient(point, lambda live, step=step: over_views(live, step))  # type: ignore[misc]
        x, last = project(x + STEP * direction.sign(), batch, threat), x
    return x, last


def tuned_images(
    model: DualEncoder, batch: Batch, own: Tensor, corpus: Tensor, threat: ThreatModel, draws: Draws
) -> tuple[Tensor, Tensor]:
    """One decomposition, gradients to the pixels alone, values of the trials without any."""
    plane = projector(corpus)
    seed = -torch.zeros(len(batch), own.shape[1], device=own.device).index_add_(0, batch.txt2img, own @ plane) @ plane

    def value(x: Tensor) -> Tensor:
        return (model.encode_image(x).features.view(-1, *seed.shape) * seed).sum(-1)

    def gradient(point: Tensor, step: int | None) -> Tensor:
        live = point.detach().requires_grad_()
        images = live if step is None else torch.cat(views(live, step, batch, draws))
        return torch.autograd.grad(value(images).sum(), live)[0]

    x = last = start(batch, threat, draws)
    for step in range(STEPS):
        point = x
        if step:
            points = [a * x + b * batch.images + c * last for a, b, c in mixture(draws, step, batch).tolist()]
            trials = [project(x + STEP * gradient(trial, None).sign(), batch, threat) for trial in points]
            with torch.no_grad():
                point = points[int(torch.stack([value(trial).mean() for trial in trials]).argmax())]
        x, last = project(x + STEP * gradient(point, step).sign(), batch, threat), x
    return x, last


def start(batch: Batch, threat: ThreatModel, draws: Draws) -> Tensor:
    noise = draws.uniform("start", batch.index, batch.images.shape[1:])
    return (batch.images + threat.eps * noise).clamp(0.0, 1.0)


def project(x: Tensor, batch: Batch, threat: ThreatModel) -> Tensor:
    x = torch.min(torch.max(x, batch.images - threat.eps), batch.images + threat.eps)
    return x.clamp(0.0, 1.0).detach()
