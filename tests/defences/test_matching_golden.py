"""One training step of ALBEF and of BLIP against recordings of the official code: losses, the weights of negatives,
gradients, momentum encoders and queues; the second recorded step wraps around the queue."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden import golden
from golden_models import golden_albef, golden_blip
from torch import Tensor

import fastmat.defences.matching as matching
from fastmat.attacks.draws import SeededDraws
from fastmat.defences.base import Features, Views
from fastmat.defences.finetune import FineTune
from fastmat.defences.matching import Matching, MatchingSettings
from fastmat.defences.momentum import Momentum
from fastmat.models.blip import official_names
from fastmat.models.fusion_checkpoint import FusionCheckpoint, first_fusion_layer
from fastmat.models.protocol import FusionState, TextState
from fastmat.models.weights import read_state
from fastmat.types import Batch

MODELS = {"albef": golden_albef, "blip": golden_blip}


def recorded_start(name: str, folder: Path) -> tuple[torch.nn.Module, Momentum]:
    model = MODELS[name](folder)
    state = official_names(read_state(Path(os.environ["FASTMAT_GOLDEN"]) / f"{name}_weights.pth"))
    parts = FusionCheckpoint.of(state, first=first_fusion_layer(state))
    memory = Momentum(model, queue=12, ema_decay=0.995)
    memory.load_official(parts.momentum, parts.queues)
    return model, memory


def recorded_step(name: str, step: str, memory: Momentum) -> tuple[Matching, Batch, dict[str, Tensor]]:
    said, tensors = golden(name)
    settings = MatchingSettings(
        ema_decay=None,
        soft_weight=said[step]["alpha"],
        negatives="momentum" if name == "albef" else "online",
    )
    defence = Matching(defence=FineTune(), model=memory.model, settings=settings)
    defence.memory = memory
    texts = tuple(said[step]["texts"])
    rows = torch.tensor(said[step]["image_rows"])
    images = tensors["images_u8"]
    batch = Batch(
        images=images[rows] / 255,
        texts=texts,
        txt2img=torch.arange(len(texts)),
        index=rows,
        group=tensors[f"{step}.idx"],
    )
    return defence, batch, {k.removeprefix(f"{step}."): v for k, v in tensors.items() if k.startswith(step)}


def encoded(model, views: Views, batch: Batch) -> Features:
    image, text = model.encode_image(batch.images), model.encode_text(model.tokenize(batch.texts))
    return Features(
        images={"clean": image},
        texts={"clean": text},
        targets={},
        logit_scale=model.logit_scale,
        group=batch.group,
        text_group=batch.text_group,
    )


def fused(model, features: Features, pairs) -> FusionState:
    text = TextState(*(of[pairs.text_rows] for of in features.texts[pairs.texts]))
    return model.fuse(features.images[pairs.images], text, pairs.image_rows)


@pytest.mark.parametrize("name", list(MODELS))
def test_two_training_steps(name: str, tmp_path, monkeypatch) -> None:
    """No optimiser steps between them; the momentum model and the queue go on."""
    model, memory = recorded_start(name, tmp_path)
    for step in ("train0", "train1"):
        model.zero_grad()
        check_step(name, step, model, memory, monkeypatch)
    assert memory.steps == 2


def check_step(name: str, step: str, model, memory: Momentum, monkeypatch) -> None:
    defence, batch, want = recorded_step(name, step, memory)
    recorded = iter([want["neg_image_for_text"], want["neg_text_for_image"]])
    weights: list[Tensor] = []

    def as_recorded(of: Tensor, uniform: Tensor) -> Tensor:
        weights.append(of)
        return next(recorded)

    monkeypatch.setattr(matching, "draw_columns", as_recorded)
    views = defence.perturb(model, batch, SeededDraws(0))
    features = encoded(model, views, batch)
    with torch.no_grad():
        pairs = views.match(features)["clean-clean"]
    for of, name_of in zip(weights, ("weights_t2i", "weights_i2t"), strict=True):
        whole = want[name_of]
        near(of, whole / whole.sum(1, keepdim=True))
    terms = defence.loss(replace(features, fused={"clean-clean": fused(model, features, pairs)}))
    near(terms["contrastive"], want["loss_ita"])
    near(terms["matching"], want["loss_itm"])

    sum(terms.values()).backward()
    first = 2 if name == "albef" else 0
    gradients = {key.removeprefix("grad."): value for key, value in want.items() if key.startswith("grad.")}
    named = dict(model.named_parameters())
    for key, value in ours(gradients, first).items():
        torch.testing.assert_close(named[key].grad, value, atol=2e-5 * float(value.abs().max()), rtol=1e-4, msg=key)
    assert len(gradients) >= 6

    defence.remember()
    after = {key.removeprefix("after."): value for key, value in want.items() if key.startswith("after.")}
    kept = FusionCheckpoint.of(after, first=first)
    copies = dict(defence.memory.model.named_parameters())
    assert len(kept.momentum) >= 3
    for key, value in kept.momentum.items():
        torch.testing.assert_close(copies[key].detach(), value, atol=1e-7, rtol=1e-6)
    near(defence.memory.images.features, kept.queues["image_queue"].T)
    near(defence.memory.texts.features, kept.queues["text_queue"].T)
    pointer = next(int(value) for key, value in kept.queues.items() if "ptr" in key)
    for queue in (defence.memory.images, defence.memory.texts):
        assert torch.equal(queue.group, kept.queues["idx_queue"][0])
        assert queue.start == pointer


def ours(tensors: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    return dict(FusionCheckpoint.of(tensors, first=first).model)


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want, atol=1e-5, rtol=1e-5)
