"""APGD against AutoAttack's and RobustVLM's recordings, MI-FGSM against torchattacks'."""

import pytest
import torch
import torch.nn.functional as F
from golden import golden
from golden_models import golden_classifier
from recorded import RecordedDraws
from torch import Tensor, nn

from fastmat.attacks.apgd import APGD
from fastmat.attacks.mi_fgsm import MIFGSM
from fastmat.quirks import Quirks
from fastmat.types import AttackContext, Batch, ThreatModel

EPS = 8 / 255


class PerSample:
    """An objective that is a function of the embeddings."""

    def __init__(self, loss) -> None:
        self.loss = loss

    def bind(self, model: nn.Module, batch: Batch, context: AttackContext):
        return lambda state: self.loss(state.embeds)


def no_context(batch: Batch) -> AttackContext:
    features = torch.zeros(len(batch), 1)
    return AttackContext(
        image_features=features, image_group=batch.group, text_features=features, text_group=batch.group
    )


def share_different(images: Tensor, recorded: Tensor) -> float:
    return float(((images - recorded).abs() > 1e-6).float().mean())


@pytest.mark.parametrize("name", ["aa_ce_linf", "aa_ce_l2", "aa_ce_linf_small", "aa_ce_linf_50", "aa_ce_linf_n2"])
def test_autoattack(name: str) -> None:
    meta, recorded = golden("apgd")
    settings = meta["attacks"][name]
    model, head, batch, labels = golden_classifier()
    attack = APGD(
        threat=ThreatModel(eps=settings["eps"], norm="linf" if settings["norm"] == "Linf" else "l2"),
        objective=PerSample(lambda embeds: F.cross_entropy(head(embeds), labels, reduction="none")),
        steps=settings["n_iter"],
        quirks=Quirks(zero_history=True),
    )
    draws = RecordedDraws({"start/0": recorded[f"{name}.start_draw"]})
    images = attack(model, batch, no_context(batch), draws=draws).images
    loss = F.cross_entropy(head(model.encode_image(images).embeds), labels, reduction="none")
    torch.testing.assert_close(loss, recorded[f"{name}.loss_best"], atol=1e-5, rtol=1e-4)
    if settings["norm"] == "Linf":
        assert share_different(images, recorded[f"{name}.x_best"]) <= 0.01
    else:
        torch.testing.assert_close(images, recorded[f"{name}.x_best"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["rvlm_apgd_ce_linf", "rvlm_apgd_ce_n2"])
def test_robustvlm_where_its_last_iterate_is_its_best(name: str) -> None:
    meta, recorded = golden("apgd_rvlm")
    settings = meta["attacks"][name]
    model, _, batch, _ = golden_classifier()
    targets, classes = recorded[f"{name}.targets"], recorded["class_text"]
    attack = APGD(
        threat=ThreatModel(eps=settings["eps"]),
        objective=PerSample(
            lambda embeds: F.cross_entropy(100 * F.normalize(embeds, dim=1) @ classes, targets, reduction="none")
        ),
        steps=settings["n_iter"],
        random_start=False,
        quirks=Quirks(zero_history=True),
    )
    images = attack(model, batch, no_context(batch)).images
    assert all(best == settings["n_iter"] for best in settings["best_loss_iterate"])
    assert share_different(images, recorded[f"{name}.returned"]) <= 0.01


@pytest.mark.parametrize(("decay", "name"), [(1.0, "mifgsm"), (0.5, "mifgsm_decay05")])
def test_torchattacks_mi_fgsm(decay: float, name: str) -> None:
    _, recorded = golden("pgd")
    model, head, batch, labels = golden_classifier()
    attack = MIFGSM(
        threat=ThreatModel(eps=EPS),
        objective=PerSample(lambda embeds: F.cross_entropy(head(embeds), labels, reduction="none")),
        steps=10,
        step_size=2 / 255,
        decay=decay,
    )
    images = attack(model, batch, no_context(batch)).images
    final = recorded["mifgsm.iterates"][-1] if name == "mifgsm" else recorded[f"{name}.final"]
    assert share_different(images, final) <= 0.005
