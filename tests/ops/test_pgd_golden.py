"""The update against recorded iterates of torchattacks, RobustVLM and AutoAttack, step by step from each iterate."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from golden import golden
from golden_models import golden_classifier
from torch import Tensor

from fastmat.ops import apgd_step, momentum_step, pgd_step, random_start

EPS = 8 / 255


def gradient(loss, x: Tensor) -> Tensor:
    live = x.clone().requires_grad_(True)
    return torch.autograd.grad(loss(live).mean(), live)[0]


def cross_entropy():
    model, head, batch, labels = golden_classifier()
    return lambda x: F.cross_entropy(head(model.encode_image(x).embeds), labels, reduction="none"), batch.images


def close(got: Tensor, recorded: Tensor, norm: str) -> None:
    if norm == "linf":
        assert float(((got - recorded).abs() > 1e-6).float().mean()) <= 0.005
    else:
        torch.testing.assert_close(got, recorded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["pgd", "pgdl2"])
def test_pgd(name, backend) -> None:
    _, recorded = golden("pgd")
    loss, x0 = cross_entropy()
    settings = {"eps": EPS, "step_size": 2 / 255} if name == "pgd" else {"eps": 1.0, "step_size": 0.2, "norm": "l2"}
    for before, after in pairwise(recorded[f"{name}.iterates"]):
        got = pgd_step(before, gradient(loss, before), x0, **settings, backend=backend)
        close(got, after, settings.get("norm", "linf"))


def test_pgd_starts(backend) -> None:
    _, recorded = golden("pgd")
    _, x0 = cross_entropy()
    start = random_start(x0, eps=EPS, draw=recorded["pgd.start_noise"] / EPS, backend=backend)
    torch.testing.assert_close(start, recorded["pgd.iterates"][0], atol=1e-6, rtol=0)
    draw, radius = recorded["pgdl2.start_normal"], recorded["pgdl2.start_radius"].flatten()
    start = random_start(x0, eps=1.0, norm="l2", draw=draw, radius=radius, backend=backend)
    torch.testing.assert_close(start, recorded["pgdl2.iterates"][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("decay", "name"), [(1.0, "mifgsm"), (0.5, "mifgsm_decay05")])
def test_mi_fgsm(decay, name, backend) -> None:
    _, recorded = golden("pgd")
    loss, x0 = cross_entropy()
    x, velocity = x0.clone(), torch.zeros_like(x0)
    for step in range(10):
        options = {"eps": EPS, "step_size": 2 / 255, "decay": decay, "out": x, "backend": backend}
        momentum_step(x, velocity, gradient(loss, x), x0, **options)
        if name == "mifgsm":
            close(x, recorded["mifgsm.iterates"][step + 1], "linf")
    close(x, recorded["mifgsm.iterates"][-1] if name == "mifgsm" else recorded[f"{name}.final"], "linf")


@pytest.mark.parametrize("name", ["rvlm_linf_l2loss", "rvlm_l2_l2loss", "rvlm_linf_celoss"])
def test_robustvlm(name, backend) -> None:
    meta, recorded = golden("fare_pgd")
    settings = meta["attacks"][name]
    model, _, batch, labels = golden_classifier()
    x0 = batch.images
    clean = model.encode_image(x0).embeds.detach()

    def loss(x: Tensor) -> Tensor:
        embeds = model.encode_image(x).embeds
        if settings["loss"] == "l2":
            return (embeds - clean).square().sum(1)
        return F.cross_entropy(100 * F.normalize(embeds, dim=1) @ recorded["class_text"], labels, reduction="none")

    options = {key: settings[key] for key in ("norm", "eps")} | {"step_size": settings["stepsize"]}
    velocity = torch.zeros_like(x0)
    # Each step from the recorded iterate; the velocity is carried, since it is not recorded.
    for before, after in pairwise(recorded[f"{name}.iterates"]):
        grad = gradient(loss, before)
        got = momentum_step(before, velocity, grad, x0, decay=0.9, rule="fare", **options, backend=backend)
        close(got, after, settings["norm"])


@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [
        ("aa_ce_linf.iterates_first3", "linf", EPS),
        ("aa_ce_linf_n2.iterates", "linf", EPS),
        ("aa_ce_l2.iterates", "l2", 0.5),
    ],
)
def test_apgd(name, norm, eps, backend) -> None:
    """The first step has no inertia. Before the first checkpoint (two steps of ten, four of twenty) the step size is
    2 eps; after it, every image goes on from its last or its best iterate with 2 eps halved some times."""
    _, recorded = golden("apgd")
    loss, x0 = cross_entropy()
    iterates = recorded[name]
    losses = torch.stack([loss(x).detach() for x in iterates])
    options = {"eps": eps, "norm": norm, "backend": backend}
    for k in range(len(iterates) - 1):
        last = iterates[k]
        best = iterates[losses[: k + 1].argmax(0), torch.arange(len(x0))]
        matches = torch.zeros(len(x0), dtype=torch.bool)
        for x in (last, best) if k >= 2 else (last,):
            for halvings in range(4) if k >= 2 else (0,):
                size = torch.full((len(x0),), 2 * eps / 2**halvings)
                previous = iterates[max(k - 1, 0)].clone()
                inertia = 0.75 if k else 1.0
                got = apgd_step(x, previous, gradient(loss, x), x0, step_size=size, inertia=inertia, **options)
                assert torch.equal(previous, x)
                off = (got - iterates[k + 1]).flatten(1).abs()
                matches |= (off > 1e-6).float().mean(1) <= 0.005 if norm == "linf" else off.amax(1) <= 1e-5
        assert matches.all(), f"step {k}: images {(~matches).nonzero().flatten().tolist()}"
