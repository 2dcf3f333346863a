"""The inner attacks of fusion models: every objective in every defence and in SGA, no trace of them, and FARE."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from defences.labelled_batch import LastWord
from training.synthetic import THREAT, SwapWord, Synthetic, make_batch, settings

from fastmat.attacks.base import context_of
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.fusion import KLFusedFromClean
from fastmat.attacks.matching import ITM, ITCAndITM
from fastmat.attacks.objectives import Contrastive
from fastmat.attacks.sga import SGA
from fastmat.defences.fare import FARE
from fastmat.defences.mat import MAT
from fastmat.defences.matching import Matching, MatchingSettings
from fastmat.defences.tecoa_itr import TeCoAITR
from fastmat.models.tiny_fusion import tiny_albef, tiny_blip
from fastmat.training.loop import train

MODELS = {"albef": tiny_albef, "blip": tiny_blip}
OBJECTIVES = {"contrastive": Contrastive(), "itm": ITM(), "itc_itm": ITCAndITM(), "kl_fused": KLFusedFromClean()}
DEFENCES = {
    "tecoa_itr": lambda objective: TeCoAITR(threat=THREAT, steps=2, objective=objective),
    "mat": lambda objective: MAT(threat=THREAT, text_search=SwapWord(), steps=2, objective=objective),
}
EVERY = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def spread(name: str) -> torch.nn.Module:
    """Weights far enough from the start that images matter to the matching head; in train mode, with dropout."""
    model = MODELS[name]()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2 * (p.dim() > 0))
    return model.train()


def within(images: torch.Tensor, clean: torch.Tensor) -> bool:
    return bool(((images - clean).abs().amax() <= THREAT.eps + 1e-6) & (images.amin() >= 0) & (images.amax() <= 1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("defence_name", DEFENCES)
@EVERY
def test_every_inner_objective_rises_and_leaves_no_trace(objective, defence_name: str, name: str) -> None:
    """Not in weights (the temperature is one), gradients, modes (dropout), queue or random streams; the momentum
    encoders make the one step of every training step."""
    model, batch = spread(name), make_batch()
    settings = MatchingSettings(queue=12, ema_decay=0.9)
    defence = Matching(defence=DEFENCES[defence_name](objective), model=model, settings=settings)
    with torch.no_grad():
        model.itm_head.bias.add_(1)
    before, memory = copy.deepcopy(model.state_dict()), copy.deepcopy(defence.memory.state_dict())
    modes = [module.training for module in model.modules()]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    views = defence.perturb(model, batch, SeededDraws(0))

    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert np.array_equal(np.random.get_state()[1], streams[2])  # noqa: NPY002
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [module.training for module in model.modules()] == modes
    for key, value in defence.memory.state_dict().items():
        stepped = key == "model.itm_head.bias"
        torch.testing.assert_close(value, memory[key] + 0.1 if stepped else memory[key], msg=key)

    adv = views.images["adv"]
    assert within(adv, batch.images) and not adv.requires_grad
    model.eval().requires_grad_(False)
    # MAT's image attack reads the adversarial captions where those come first.
    read = batch.replace(texts=views.texts["adv"]) if defence_name == "mat" else batch
    value = objective.bind(model, read, context_of(model, read))
    clean, attacked = (value(model.encode_image(images)) for images in (batch.images, adv))
    assert float(attacked.sum()) > float(clean.sum())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("objective", [None, *OBJECTIVES.values()], ids=["cosine", *OBJECTIVES])
def test_sga_with_every_objective(objective, name: str) -> None:
    model, batch = spread(name).eval(), make_batch()
    before = copy.deepcopy(model.state_dict())
    attack = SGA(threat=THREAT, candidates=LastWord(), steps=2, scales=(0.5,), objective=objective)
    found = attack(model, batch)
    assert within(found.images, batch.images) and int(found.words_changed.max()) <= 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if objective is not None:
        model.requires_grad_(False)
        value = objective.bind(model, batch, context_of(model, batch))
        clean, attacked = (value(model.encode_image(images)) for images in (batch.images, found.images))
        assert float(attacked.sum()) > float(clean.sum())


@pytest.mark.parametrize("name", MODELS)
def test_fare_keeps_the_projected_image_embedding(name: str, tmp_path: Path) -> None:
    """Its image tower and projection train, towards the clean embeddings of the first model; nothing else moves."""
    model = spread(name)
    first = copy.deepcopy(model).eval()
    defence, batch = FARE(threat=THREAT, teacher=model, steps=2), make_batch()
    views = defence.perturb(model, batch, SeededDraws(0))
    with torch.no_grad():
        embeds = first.encode_image(batch.images).embeds
        moved = first.encode_image(views.images["adv"]).embeds
    torch.testing.assert_close(views.targets["teacher"], embeds)
    assert float((moved - embeds).square().sum()) > 0

    class Same(Synthetic):
        def iterate(self, start: int, stop: int, *, rank: int = 0, world: int = 1):
            return iter([batch] * (stop - start))

    told = settings(steps=6, lr=3e-3, save_every=6)
    train(model, defence, Same(), settings=told, out=tmp_path / "run", config={})
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, first.state_dict()[key])}
    assert changed == {
        key for key, _ in model.named_parameters() if key.startswith(("image_tower", "image_projection"))
    }
    with torch.no_grad():
        now = model.eval().encode_image(views.images["adv"]).embeds
    assert float((now - embeds).square().sum()) < 0.8 * float((moved - embeds).square().sum())
