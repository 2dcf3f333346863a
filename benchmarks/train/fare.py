"""FARE (RobustVLM, train/adversarial_training_clip.py and pgd_train.py, 7de10ee) at eps 4/255 with 10 steps.

As published: gradients of the pixels alone, but through weights that ask for theirs; momentum 0.9 and a start outside
the box; four waits per step; the clean embedding computed with its graph and used for a log line alone; seven values
read; the cache emptied. The gate runs the same loop without momentum and from a start in the box, which is the paper's
PGD and fastmat's: other images, the same work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.attacks.draws import Draws
from fastmat.benchmarks.attacks.setting import Setting
from fastmat.benchmarks.opponents import fare as published_update
from fastmat.benchmarks.train.job import Contestant, Dtype, Job, Step, Stepped
from fastmat.benchmarks.train.loop import Loop
from fastmat.benchmarks.train.meter import Split
from fastmat.benchmarks.train.pairs import Pairs
from fastmat.benchmarks.train.plain import attack_mode, lowered, moved, noisy, updated
from fastmat.defences.fare import FARE
from fastmat.training.parameters import trained_parameters
from fastmat.types import Batch, ThreatModel

EPS, STEP, STEPS, MOMENTUM = 4 / 255, 1 / 255, 10, 0.9


def job(setting: Setting, split: Split, pairs: Pairs) -> Job:
    model, teacher = setting.unfrozen, setting.model
    trained = trained_parameters(model, ("image",))
    optimizer, fused = (torch.optim.AdamW(trained, lr=0.0, fused=fused) for fused in (False, True))

    def plain(kind: str, dtype: Dtype, step: Step, gated: Step | None = None) -> Contestant:
        own = fused if kind == "tuned" else optimizer
        return Contestant(
            kind=kind, dtype=dtype, step=step, model=model, optimizer=own, watched=(teacher,), gated=gated
        )

    def published(*, momentum: float, clamp: bool) -> Step:
        def run(batch: Batch, draws: Draws) -> Stepped:
            x0 = batch.images
            with split("image"):
                with torch.no_grad():
                    original = teacher.encode_image(x0).embeds
                assert x0.max() < 1 + 1e-6 and x0.min() > -1e-6
                delta, velocity = noisy(batch, EPS, draws, clamp=clamp) - x0, torch.zeros_like(x0)
                for _ in range(STEPS):
                    delta.requires_grad_()
                    loss = distance(model.encode_image(x0 + delta).embeds, original)
                    (gradient,) = torch.autograd.grad(loss, delta)
                    delta, velocity = published_update(delta.detach(), velocity, gradient, x0, EPS, STEP, momentum)
                x = x0 + delta
            with split("outer"):
                clean = model.encode_image(x0).embeds
                adversarial = model.encode_image(x).embeds
                loss = distance(adversarial, original)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    near = [F.cosine_similarity(of, original, dim=1).mean() for of in (clean, adversarial)]
                for value in (loss, near[1], loss, near[1], loss, *near):  # two meters, a line, a log
                    value.item()
                if setting.device.type == "cuda":
                    torch.cuda.empty_cache()
            return Stepped(x, batch.texts, loss.detach())

        return run

    def tuned(dtype: Dtype) -> Step:
        def run(batch: Batch, draws: Draws) -> Stepped:
            x0 = batch.images
            with split("image"), attack_mode(model, dtype):
                with torch.no_grad():
                    original = teacher.encode_image(x0).embeds
                x = noisy(batch, EPS, draws)
                for _ in range(STEPS):
                    x.requires_grad_()
                    loss = distance(model.encode_image(x).embeds, original)
                    x = moved(x, torch.autograd.grad(loss, x)[0], x0, eps=EPS, step_size=STEP)

            def outer_loss() -> Tensor:
                with lowered(model, dtype):
                    embeds = model.encode_image(x).embeds
                return distance(embeds, original)

            with split("outer"):
                return Stepped(x, batch.texts, updated(fused, outer_loss))

        return run

    ours = Loop(setting, split, trains=FARE.trains)
    threat = ThreatModel(eps=EPS, max_words=0)
    low: tuple[Dtype, Dtype] = ("float32", "bfloat16")

    @torch.no_grad()
    def values(made: Stepped) -> Tensor:
        original = teacher.encode_image(pairs(0).images).embeds
        return F.mse_loss(model.encode_image(made.images).embeds, original, reduction="none").sum(1)

    def loss(made: Stepped) -> Tensor:
        with torch.no_grad():
            original = teacher.encode_image(pairs(0).images).embeds
        return distance(model.encode_image(made.images).embeds, original)

    return Job(
        name="fare",
        batch=pairs,
        model=model,
        values=values,
        loss=loss,
        contestants=(
            plain(
                "published",
                "float32",
                published(momentum=MOMENTUM, clamp=False),
                gated=published(momentum=0.0, clamp=True),
            ),
            *(plain("tuned", dtype, tuned(dtype)) for dtype in low),
            *(
                ours.contestant(FARE(threat=threat, teacher=teacher, steps=STEPS, step_size=STEP), dtype)
                for dtype in low
            ),
        ),
    )


def distance(embeds: Tensor, original: Tensor) -> Tensor:
    """Squared, summed over dimensions, the mean over images."""
    return F.mse_loss(embeds, original, reduction="none").sum(1).mean()
