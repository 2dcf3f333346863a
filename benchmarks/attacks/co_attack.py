"""Co-Attack before fusion (attack/multimodalAttack.py, `run_before_fusion` with adv 4, 96f2c0e), pair by pair.

Every caption brings a copy of its image, and the image of the last caption is the one that is kept. The text is
attacked twice with the same input; the tuned loop does that once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.job import Job, Outcome, Runner
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.attacks.words import Published, Tuned
from fastmat.build import Component
from fastmat.models.dual_encoder import DualEncoder
from fastmat.types import Batch, ThreatModel

EPS, STEPS, ALPHA = 2 / 255, 10, 3.0
LENGTH, FULL = 30, 77  # BERT pieces read by the text attack, and by the encoding between text and image
PAIRS = 32  # per batch


def job(setting: Setting) -> Job:
    batch, tokenizer = setting.batch, setting.tokenizer

    def published(threat: ThreatModel) -> Runner:
        model, bert = setting.unfrozen, setting.unfrozen_bert
        words = Published(model=model, bert=bert, tokenizer=tokenizer, length=LENGTH, part="embeds", with_graph=False)
        return attack(model, words, batch, threat)

    def tuned(threat: ThreatModel, model: DualEncoder) -> Runner:
        words = Tuned(model=model, bert=setting.mlm.model, tokenizer=tokenizer, length=LENGTH, part="embeds")
        return attack(model, words, batch, threat)

    def objective(images: Tensor, texts: Sequence[str]) -> Tensor:
        model = setting.model
        with torch.no_grad():
            clean, moved = (model.encode_image(x).embeds for x in (batch.images, images))
            last = [max(t for t, i in enumerate(batch.txt2img.tolist()) if i == n) for n in range(len(batch))]
            tokens = model.tokenize([texts[t] for t in last]).to(setting.device)
            return value(moved, clean, model.encode_text(tokens).embeds)

    return Job(
        name="co_attack",
        component=Component(name="co_attack", arguments={"parity": "official"}),
        batch=batch,
        threat=ThreatModel(eps=EPS, max_words=1),
        published=published,
        tuned=tuned,
        objective=objective,
    )


def value(moved: Tensor, clean: Tensor, texts: Tensor) -> Tensor:
    """[P], of pairs: away from the clean embedding and, `ALPHA` times, from the adversarial text's direction."""
    own = F.kl_div(moved.log_softmax(-1), clean.softmax(-1), reduction="none").sum(-1)
    towards = F.normalize(texts, dim=-1).softmax(-1)
    return own + ALPHA * F.kl_div(F.normalize(moved, dim=-1).log_softmax(-1), towards, reduction="none").sum(-1)


def attack(model: DualEncoder, words: Published | Tuned, batch: Batch, threat: ThreatModel) -> Runner:
    published = isinstance(words, Published)

    def run(draws: Draws) -> Outcome:
        images = batch.images.clone()
        texts: list[str] = []
        trace = None
        for start in range(0, len(batch.texts), PAIRS):
            captions = batch.texts[start : start + PAIRS]
            owner = batch.txt2img[start : start + PAIRS]
            attacked: Sequence[str] = words(captions) if threat.max_words else captions
            if threat.eps:
                pairs = ascend(model, words, batch, owner, attacked, threat, draws)
                for pair, image in enumerate(owner.tolist()):  # later captions overwrite earlier ones
                    images[image] = pairs[pair]
            if threat.max_words and isinstance(words, Published):
                attacked = words(captions)
                new = words.trace
                for name, values in vars(new).items():
                    if trace is not None:
                        values[:0] = getattr(trace, name)
                trace = new
            texts += attacked
        return Outcome(images, texts, trace if published else None)

    return run


def ascend(
    model: DualEncoder,
    words: Published | Tuned,
    batch: Batch,
    owner: Tensor,
    texts: Sequence[str],
    threat: ThreatModel,
    draws: Draws,
) -> Tensor:
    """[P, 3, H, W], one adversarial image per pair. The start is one-sided and may leave the pixel box."""
    x0, step = batch.images[owner], 1.25 * threat.eps / STEPS
    with torch.no_grad():
        targets = words.encode(texts, part="embeds", length=FULL)
        clean = model.encode_image(x0).embeds
    delta = threat.eps * (draws.uniform("start", batch.index[owner], x0.shape[1:]) + 1) / 2
    for _ in range(STEPS):
        delta = delta.detach().requires_grad_()
        loss = value(model.encode_image(x0 + delta).embeds, clean, targets).mean()
        if isinstance(words, Published):
            loss.backward()
            assert delta.grad is not None
            gradient = delta.grad.clone()
        else:
            (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + step * gradient.sign()).clamp(-threat.eps, threat.eps)
        delta = (x0 + delta).clamp(0, 1) - x0
    return (x0 + delta).detach()
