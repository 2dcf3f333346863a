"""TeCoA (ZSRobust4FoundationModel, finetuning.py, 1243db6) at eps 1/255 with 2 steps and 1,000 class prompts.

As published: every forward encodes all prompts again, padded to the full length and in the graph; the attack's backward
goes through all weights and its gradients stay in `.grad`, of which the scaler leaves 1/65536 in the update; loss and
accuracy are read. On a GPU the original runs in fp16 autocast, which is measured beside. The image tower alone trains.
Tuned: the prompts are encoded once for all steps, and weights are frozen in the attack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.train.job import Contestant, Dtype, Job, Step, Stepped
from fastmat.benchmarks.train.loop import Loop
from fastmat.benchmarks.train.meter import Split
from fastmat.benchmarks.train.pairs import Labelled, Pairs
from fastmat.benchmarks.train.plain import attack_mode, lowered, moved, noisy, updated
from fastmat.defences.tecoa import TeCoA
from fastmat.training.parameters import trained_parameters
from fastmat.types import Batch, ThreatModel

EPS, STEP, STEPS = 1 / 255, 1 / 255, 2
SCALE = 65536.0  # GradScaler's first


def job(setting: Setting, split: Split, pairs: Pairs) -> Job:
    model, data = setting.unfrozen, Labelled(pairs)
    prompts = data.prompts
    trained = trained_parameters(model, ("image",))
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)

    def plain(kind: str, dtype: Dtype, step: Step) -> Contestant:
        return Contestant(kind=kind, dtype=dtype, step=step, model=model, optimizer=optimizer)

    def published(dtype: Dtype) -> Step:
        scaler = torch.amp.GradScaler(setting.device.type, init_scale=SCALE)

        def run(batch: Batch, draws: Draws) -> Stepped:
            optimizer.zero_grad()
            x0, labels = batch.images, data.labels(batch)
            tokens = model.tokenize(prompts, pad=True).to(setting.device)

            def logits(images: Tensor) -> Tensor:
                texts = model.logit_scale * model.encode_text(tokens).features
                return model.encode_image(images).features @ texts.T

            with lowered(model, dtype):
                with split("image"):
                    delta = (noisy(batch, EPS, draws) - x0).requires_grad_()
                    for _ in range(STEPS):
                        F.cross_entropy(logits(x0 + delta), labels).backward()
                        assert delta.grad is not None
                        x = moved(x0 + delta, delta.grad, x0, eps=EPS, step_size=STEP)
                        delta.data = x - x0
                        delta.grad.zero_()
                with split("outer"):
                    output = logits(x0 + delta)
                    loss = F.cross_entropy(output, labels)
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
            with split("outer"):
                scaler.update()
                accuracy = (output.argmax(1) == labels).float().mean()
                for value in (loss, accuracy):
                    value.item()
            return Stepped((x0 + delta).detach(), batch.texts, loss.detach())

        return run

    def tuned(dtype: Dtype) -> Step:
        with attack_mode(model, dtype), torch.no_grad():
            chunks = [prompts[n : n + 32] for n in range(0, len(prompts), 32)]
            found = [model.encode_text(model.tokenize(chunk).to(setting.device)).features for chunk in chunks]
            texts = model.logit_scale * torch.cat(found)

        def run(batch: Batch, draws: Draws) -> Stepped:
            x0, labels = batch.images, data.labels(batch)
            with split("image"), attack_mode(model, dtype):
                x = noisy(batch, EPS, draws)
                for _ in range(STEPS):
                    x.requires_grad_()
                    loss = F.cross_entropy(model.encode_image(x).features @ texts.T, labels)
                    x = moved(x, torch.autograd.grad(loss, x)[0], x0, eps=EPS, step_size=STEP)

            def outer_loss() -> Tensor:
                with lowered(model, dtype):
                    features = model.encode_image(x).features
                return F.cross_entropy(features @ texts.T, labels)

            with split("outer"):
                return Stepped(x, batch.texts, updated(optimizer, outer_loss))

        return run

    ours = Loop(setting, split, trains=TeCoA.trains)
    threat = ThreatModel(eps=EPS, max_words=0)
    low: tuple[Dtype, Dtype] = ("float32", "bfloat16")
    classes = tuple((prompt,) for prompt in prompts)

    def losses(made: Stepped) -> Tensor:
        texts = model.logit_scale * model.encode_text(model.tokenize(prompts).to(setting.device)).features
        return F.cross_entropy(
            model.encode_image(made.images).features @ texts.T, data.labels(data(0)), reduction="none"
        )

    return Job(
        name="tecoa",
        batch=data,
        model=model,
        values=torch.no_grad()(losses),
        loss=lambda made: losses(made).mean(),
        contestants=(
            plain("published", "float32", published("float32")),
            *([plain("published", "float16", published("float16"))] if setting.device.type == "cuda" else []),
            *(plain("tuned", dtype, tuned(dtype)) for dtype in low),
            *(
                ours.contestant(TeCoA(threat=threat, prompts=classes, steps=STEPS, step_size=STEP), dtype)
                for dtype in low
            ),
        ),
    )
