"""The matching head as what an attack ascends, against plain formulas, and the joint one."""

import pytest
import torch
import torch.nn.functional as F
from training.synthetic import THREAT, make_batch

from fastmat.attacks.base import context_of
from fastmat.attacks.matching import ITM, ITCAndITM
from fastmat.attacks.objectives import Contrastive
from fastmat.attacks.pgd import PGD
from fastmat.errors import UserError
from fastmat.models.protocol import TextState
from fastmat.models.tiny import tiny_clip
from fastmat.models.tiny_fusion import tiny_albef, tiny_blip

MODELS = {"albef": tiny_albef, "blip": tiny_blip}


def spread(name: str):
    """Weights far enough from the start that images matter to the matching head."""
    model = MODELS[name]().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_values(name: str) -> None:
    model, batch = spread(name), make_batch()
    context = context_of(model, batch)
    image, text = model.encode_image(batch.images), model.encode_text(model.tokenize(batch.texts))
    want = []
    for i in range(len(batch)):
        own = (batch.txt2img == i).nonzero().flatten()
        alone = type(image)(*(of[i : i + 1].expand(len(own), *of.shape[1:]) for of in image))
        logits = model.fuse(alone, TextState(*(of[own] for of in text))).itm_logits
        want.append(F.cross_entropy(logits, torch.ones(len(own), dtype=torch.int64)))
    matching = ITM().bind(model, batch, context)(image)
    torch.testing.assert_close(matching, torch.stack(want), atol=1e-5, rtol=1e-4)
    contrast = Contrastive().bind(model, batch, context)(image)
    joint = ITCAndITM(itc=0.25, itm=2.0).bind(model, batch, context)(image)
    torch.testing.assert_close(joint, 0.25 * contrast + 2.0 * matching)


@pytest.mark.parametrize("objective", [ITM(), ITCAndITM()], ids=["itm", "joint"])
def test_pgd_ascends(objective) -> None:
    model, batch = spread("albef"), make_batch()
    attacked = PGD(threat=THREAT, steps=5, objective=objective)(model, batch)
    value = objective.bind(model, batch, context_of(model, batch))
    before, after = (value(model.encode_image(images)) for images in (batch.images, attacked.images))
    assert bool((after > before).all())


def test_refusals() -> None:
    model, batch = tiny_clip().eval(), make_batch()
    with pytest.raises(UserError, match="does not fuse images with texts"):
        ITM().bind(model, batch, context_of(model, batch))
    with pytest.raises(UserError, match=r"one must be positive; got 0\.0 and 0\.0"):
        ITCAndITM(itc=0.0, itm=0.0)
