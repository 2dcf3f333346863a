"""MAT: text attack, PGD-2 and InfoNCE of what they made, beside a plain loop, and beside fine-tuning without an attack.

The authors' code could not be read. The plain loop is the one that MAT's abstract and authors describe, written as its
neighbours are: the text attack of SGA and MMCoA caption by caption, texts padded to the full length, the inner
backward through all weights, fp32, the loss read in every step. Other images stay clean while one is attacked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.attacks.words import Published, Tuned
from fastmat.benchmarks.train.job import Contestant, Dtype, Job, Step, Stepped
from fastmat.benchmarks.train.loop import Loop
from fastmat.benchmarks.train.meter import Split
from fastmat.benchmarks.train.pairs import Pairs
from fastmat.benchmarks.train.plain import attack_mode, attacked_clip_loss, clip_loss, lowered, moved, noisy, updated
from fastmat.build import Component, build_defence
from fastmat.defences.base import Defence
from fastmat.defences.finetune import FineTune
from fastmat.models.protocol import TextTokens
from fastmat.types import Batch, ThreatModel

EPS, STEP, STEPS = 2 / 255, 1 / 255, 2
LENGTH = 77  # BERT pieces that the text attack reads


def job(setting: Setting, split: Split, pairs: Pairs) -> Job:
    model = setting.unfrozen
    optimizer, fused = (torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused) for fused in (False, True))
    bert, tokenizer = setting.unfrozen_bert, setting.tokenizer

    def plain(kind: str, dtype: Dtype, step: Step, like: str = "published") -> Contestant:
        own = fused if kind == "tuned" else optimizer
        return Contestant(kind=kind, dtype=dtype, step=step, model=model, optimizer=own, like=like)

    def published(batch: Batch, draws: Draws) -> Stepped:
        words = Published(model=model, bert=bert, tokenizer=tokenizer, length=LENGTH, part="features", with_graph=False)
        x0 = batch.images
        with split("image"), torch.no_grad():
            clean = model.encode_image(x0).features
        with split("text"):
            texts = tuple(words(batch.texts, clean[batch.txt2img]))
        tokens = model.tokenize(texts, pad=True).to(setting.device)
        with split("image"):
            with torch.no_grad():
                own = model.encode_text(tokens).features
            x = noisy(batch, EPS, draws)
            for _ in range(STEPS):
                x = x.detach().requires_grad_()
                features = model.encode_image(x).features
                attacked_clip_loss(features, own, clean, model.logit_scale).sum().backward()
                assert x.grad is not None
                x = moved(x, x.grad, x0, eps=EPS, step_size=STEP)
        with split("outer"):
            loss = updated(optimizer, lambda: outer_loss(x, tokens, "float32"))
        return Stepped(x, texts, loss, words.trace)

    def tuned(dtype: Dtype) -> Step:
        words = Tuned(model=model, bert=setting.mlm.model, tokenizer=tokenizer, length=LENGTH, part="features")

        def run(batch: Batch, draws: Draws) -> Stepped:
            x0 = batch.images
            with split("image"), attack_mode(model, dtype):
                with torch.no_grad():
                    clean = model.encode_image(x0).features
                with split("text"):
                    texts = tuple(words(batch.texts, clean[batch.txt2img]))
                tokens = model.tokenize(texts).to(setting.device)
                with torch.no_grad():
                    own = model.encode_text(tokens).features
                x = noisy(batch, EPS, draws)
                for _ in range(STEPS):
                    x.requires_grad_()
                    features = model.encode_image(x).features
                    value = attacked_clip_loss(features, own, clean, model.logit_scale).sum()
                    x = moved(x, torch.autograd.grad(value, x)[0], x0, eps=EPS, step_size=STEP)
            with split("outer"):
                loss = updated(fused, lambda: outer_loss(x, tokens, dtype))
            return Stepped(x, texts, loss)

        return run

    def outer_loss(images: Tensor, tokens: TextTokens, dtype: Dtype) -> Tensor:
        with lowered(model, dtype):
            image, text = model.encode_image(images), model.encode_text(tokens)
        return clip_loss(image.features, text.features, model.logit_scale)

    def plain_finetune(batch: Batch, draws: Draws) -> Stepped:
        tokens = model.tokenize(batch.texts).to(setting.device)
        with split("outer"):
            loss = updated(optimizer, lambda: outer_loss(batch.images, tokens, "float32"))
        return Stepped(batch.images, batch.texts, loss)

    ours = Loop(setting, split, trains=("image", "text"))

    def finetune(dtype: Dtype) -> Contestant:
        return ours.contestant(FineTune(), dtype, kind="finetune", like="plain finetune")

    @torch.no_grad()
    def values(made: Stepped) -> Tensor:
        images = model.encode_image(made.images).features
        texts = model.encode_text(model.tokenize(made.texts).to(setting.device)).features
        return attacked_clip_loss(images, texts, images, model.logit_scale)

    def loss(made: Stepped) -> Tensor:
        return outer_loss(made.images, model.tokenize(made.texts).to(setting.device), "float32")

    return Job(
        name="mat",
        batch=pairs,
        model=model,
        values=values,
        loss=loss,
        contestants=(
            plain("published", "float32", published),
            plain("plain finetune", "float32", plain_finetune, like="plain finetune"),
            plain("tuned", "float32", tuned("float32")),
            plain("tuned", "bfloat16", tuned("bfloat16")),
            ours.contestant(defence(setting), "float32"),
            ours.contestant(defence(setting), "bfloat16"),
            finetune("float32"),
            finetune("bfloat16"),
        ),
    )


def defence(setting: Setting) -> Defence:
    """Ours, with the published quirks of the text attack, so that texts can be equal; candidates come from the disk."""
    return build_defence(
        Component(name="mat", arguments={"parity": "official", "steps": STEPS, "step_size": STEP}),
        teacher=setting.model,
        threat=ThreatModel(eps=EPS, max_words=1),
        mlm=lambda: setting.mlm,
        seed=0,
        candidate_cache=setting.candidates,
    )
