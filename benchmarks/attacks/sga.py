"""SGA (attacker.py, f49e692): text, image over five views, text again; 8 images at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.job import Job, Outcome, Runner, features
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.attacks.words import Published, Trace, Tuned
from fastmat.build import Component
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import Batch, ThreatModel

EPS, STEPS, STEP = 2 / 255, 10, 0.5 / 255
SCALES, NOISE = (0.5, 0.75, 1.25, 1.5), 0.05
LENGTH, MIDDLE = 77, 30  # BERT pieces; the second is what the misspelt `max_lemgth` leaves
IMAGES = 8  # per published batch


def job(setting: Setting) -> Job:
    batch, tokenizer = setting.batch, setting.tokenizer

    def published(threat: ThreatModel) -> Runner:
        model, bert = setting.unfrozen, setting.unfrozen_bert
        words = Published(model=model, bert=bert, tokenizer=tokenizer, length=LENGTH, part="features", with_graph=True)
        parts = [batch.rows(start, start + IMAGES) for start in range(0, len(batch), IMAGES)]
        return in_turn([attack(model, words, part, threat, published_images) for part in parts])

    def tuned(threat: ThreatModel, model: DualEncoder) -> Runner:
        words = Tuned(model=model, bert=setting.mlm.model, tokenizer=tokenizer, length=LENGTH, part="features")
        return attack(model, words, batch, threat, tuned_images)

    def objective(images: Tensor, texts: Sequence[str]) -> Tensor:
        own = features(setting.model, texts)
        with torch.no_grad():
            cosines = (setting.model.encode_image(images).features[batch.txt2img] * own).sum(-1)
        return -cosines.new_zeros(len(images)).index_add_(0, batch.txt2img, cosines)

    return Job(
        name="sga",
        component=Component(name="sga", arguments={"parity": "official", "step_size": STEP}),
        batch=batch,
        threat=ThreatModel(eps=EPS, max_words=1),
        published=published,
        tuned=tuned,
        objective=objective,
    )


def in_turn(runners: Sequence[Runner]) -> Runner:
    """One after the other; images, texts and traces behind one another."""

    def run(draws: Draws) -> Outcome:
        made = [one(draws) for one in runners]
        traces = [one.trace for one in made if one.trace is not None]
        whole = {name: [v for trace in traces for v in getattr(trace, name)] for name in vars(Trace())}
        texts = [text for one in made for text in one.texts]
        return Outcome(torch.cat([one.images for one in made]), texts, Trace(**whole) if traces else None)

    return run


ImageLoop = Callable[[DualEncoder, Batch, Tensor, ThreatModel, Draws], Tensor]


def attack(
    model: DualEncoder, words: Published | Tuned, batch: Batch, threat: ThreatModel, image_loop: ImageLoop
) -> Runner:
    def run(draws: Draws) -> Outcome:
        texts: Sequence[str] = batch.texts
        if threat.max_words:
            with torch.no_grad():
                clean = model.encode_image(batch.images).features
            texts = words(batch.texts, clean[batch.txt2img])
        images = batch.images
        if threat.eps:
            with torch.no_grad():
                own = words.encode(texts, length=MIDDLE)
            images = image_loop(model, batch, own, threat, draws)
        if threat.max_words:
            with torch.no_grad():
                moved = model.encode_image(images).features
            texts = words(batch.texts, moved[batch.txt2img])
        return Outcome(images, texts, words.trace if threat.max_words and isinstance(words, Published) else None)

    return run


def published_images(model: DualEncoder, batch: Batch, own: Tensor, threat: ThreatModel, draws: Draws) -> Tensor:
    """Labels filled one by one for every view, the loss read back every time, gradients of all weights."""
    x0, count = batch.images, len(batch)
    owners = batch.txt2img.tolist()
    x = (x0 + threat.eps * draws.uniform("start", batch.index, x0.shape[1:])).clamp(0.0, 1.0)
    for step in range(STEPS):
        x = x.detach().requires_grad_()
        embeds = model.encode_image(torch.cat(views(x, step, batch, draws))).features
        model.zero_grad()
        loss = torch.zeros((), device=x.device)
        history = []
        for view in range(1 + len(SCALES)):
            similarity = embeds[view * count : (view + 1) * count] @ own.T
            labels = torch.zeros(similarity.shape, device=x.device)
            for caption, image in enumerate(owners):
                labels[image, caption] = 1
            value = -(similarity * labels).sum(-1).mean()
            history.append(value.item())
            loss = loss + value
        loss.backward()
        assert x.grad is not None
        gradient = x.grad / x.grad.abs().mean(dim=(1, 2, 3), keepdim=True)
        x = x.detach() + STEP * gradient.sign()
        x = torch.min(torch.max(x, x0 - threat.eps), x0 + threat.eps).clamp(0.0, 1.0)
    return x


def tuned_images(model: DualEncoder, batch: Batch, own: Tensor, threat: ThreatModel, draws: Draws) -> Tensor:
    """The loss is linear in the features, so its gradient there is one constant per image."""
    x0 = batch.images
    seed = -torch.zeros(len(batch), own.shape[1], device=x0.device).index_add_(0, batch.txt2img, own)
    seed = seed.repeat(1 + len(SCALES), 1)
    x = (x0 + threat.eps * draws.uniform("start", batch.index, x0.shape[1:])).clamp_(0.0, 1.0)
    for step in range(STEPS):
        x.requires_grad_()
        loss = (model.encode_image(torch.cat(views(x, step, batch, draws))).features * seed).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach().add_(gradient.sign_(), alpha=STEP)
        x = torch.min(torch.max(x, x0 - threat.eps), x0 + threat.eps).clamp_(0.0, 1.0)
    return x


def views(x: Tensor, step: int, batch: Batch, draws: Draws) -> list[Tensor]:
    """The image and its four scaled, noisy copies; tensor resize without antialiasing, as published."""
    side = x.shape[-2:]
    found = [x]
    for i, scale in enumerate(SCALES):
        noisy = x + NOISE * draws.normal(f"scale/{step}/{i}", batch.index, x.shape[1:])
        small = F.interpolate(noisy, [int(scale * n) for n in side], mode="bicubic", align_corners=False)
        found.append(F.interpolate(small.clamp(0.0, 1.0), list(side), mode="bicubic", align_corners=False))
    return found
