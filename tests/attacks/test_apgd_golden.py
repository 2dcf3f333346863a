"""APGD against AutoAttack's and RobustVLM's recordings, MI-FGSM against torchattacks'."""

import pytest
import torch
import torch.nn.functional as F
from golden import golden
from golden_models import golden_classifier
from recorded import RecordedDraws
from torch import Tensor, nn

from fastmat.attacks.apgd import APGD, ascend_adaptively
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


class LastFooling:
    """RobustVLM's rule of what to return: of the iterates whose largest feature is not the target's, the last.

    It takes the features for logits, also those of a model that has no classes, so it stands here and not in the
    library; the start counts whether or not it fools.
    """

    def __init__(self, model: nn.Module, loss, targets: Tensor, start: Tensor) -> None:
        self.model, self.loss, self.targets = model, loss, targets
        self.returned, self.values = start, []

    def __call__(self, x: Tensor) -> Tensor:
        features = self.model.encode_image(x).features
        fooled = features.argmax(1) != self.targets
        self.returned = torch.where(fooled[:, None, None, None], x.detach(), self.returned)
        self.values.append(self.loss(features))
        return self.values[-1]


@pytest.mark.parametrize("name", ["rvlm_apgd_ce_linf", "rvlm_apgd_ce_init", "rvlm_apgd_l2loss", "rvlm_apgd_ce_n2"])
def test_robustvlm(name: str) -> None:
    meta, recorded = golden("apgd_rvlm")
    settings = meta["attacks"][name]
    model, _, batch, _ = golden_classifier()
    targets, embeds = recorded[f"{name}.targets"], recorded[f"{name}.target_embeds"]

    def loss(features: Tensor) -> Tensor:
        if settings["loss"] == "l2":
            return (features - embeds).square().sum(1)
        return F.cross_entropy(100 * features @ recorded["class_text"], targets, reduction="none")

    value = LastFooling(model.requires_grad_(False), loss, targets, batch.images)
    _, highest = ascend_adaptively(
        value,
        batch.images,
        batch.images,
        threat=ThreatModel(eps=settings["eps"]),
        steps=settings["n_iter"],
        step_size=settings["initial_stepsize"],
        zero_history=True,
    )
    values = torch.stack(value.values).detach()
    torch.testing.assert_close(values, recorded[f"{name}.loss_per_iterate"], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(highest, values.amax(0))
    assert share_different(value.returned, recorded[f"{name}.returned"]) <= 0.01
    for i, iterates in enumerate(settings["returned_is_iterate"]):
        assert (0 in iterates) == torch.equal(value.returned[i], batch.images[i])


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
