"""Restarts of PGD; its steps are in test_base.py and test_pgd_golden.py."""

import pytest
import torch
from batches import random_batch

from fastmat.attacks.base import context_of
from fastmat.attacks.draws import SeededDraws
from fastmat.attacks.objectives import Contrastive
from fastmat.attacks.pgd import PGD
from fastmat.attacks.search import random_start
from fastmat.errors import UserError
from fastmat.models.tiny import tiny_clip
from fastmat.quirks import Quirks
from fastmat.types import ThreatModel

THREATS = [ThreatModel(eps=8 / 255), ThreatModel(eps=1.0, norm="l2")]


class OneRestart:
    """The draws of restart `number`, under the names of the first."""

    def __init__(self, number: int) -> None:
        self.suffix = f"/{number}" if number else ""
        self.draws = SeededDraws(0)

    def uniform(self, name, index, shape):
        return self.draws.uniform(name + self.suffix, index, shape)

    def normal(self, name, index, shape):
        return self.draws.normal(name + self.suffix, index, shape)


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_every_image_keeps_its_best_restart(threat: ThreatModel) -> None:
    model, batch = tiny_clip().eval(), random_batch((1, 2, 1, 1, 3, 1, 1, 1))
    context = context_of(model, batch)
    single = PGD(threat=threat, steps=2)
    runs = [single(model, batch, context, draws=OneRestart(number)).images for number in range(3)]
    assert torch.equal(runs[0], single(model, batch, context).images)
    with torch.no_grad():
        value = Contrastive().bind(model, batch, context)
        values = torch.stack([value(model.encode_image(images)) for images in runs])
    best = values.argmax(0)
    assert len(best.unique()) > 1, "one restart is the best everywhere, so the choice is not seen"
    expected = torch.stack([runs[k][i] for i, k in enumerate(best.tolist())])
    assert torch.equal(PGD(threat=threat, steps=2, restarts=3)(model, batch, context).images, expected)


def test_every_start_obeys_the_quirks() -> None:
    batch = random_batch().replace(images=torch.full((4, 3, 32, 32), 0.5))
    threat = ThreatModel(eps=0.25)
    starts = [random_start(batch, threat, SeededDraws(0), restart=k, one_sided=True) for k in (0, 1)]
    assert all(start.min() >= 0.5 for start in starts) and not torch.equal(*starts)
    model = tiny_clip().eval()
    attack = PGD(threat=threat, steps=1, step_size=0.0, restarts=2, quirks=Quirks(one_sided_start=True))
    assert attack(model, batch).images.min() >= 0.5


def test_restarts_that_make_no_sense_are_refused() -> None:
    for settings, reason in [
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"restarts": 2, "random_start": False}, "restarts must be 1 without random_start"),
    ]:
        with pytest.raises(UserError, match=reason):
            PGD(threat=THREATS[0], **settings)
