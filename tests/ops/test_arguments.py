"""What a stranger hands to the operators by mistake: one sentence that names the argument, from every operator."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmat import ops
from fastmat.errors import UserError

X, IDS = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
FEATURES, SIZES = torch.rand(2, 5), {"eps": 0.1, "step_size": 0.1}
GROUPS = {"query_group": IDS, "gallery_group": IDS}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: ops.pgd_step(X.numpy(), X, X, **SIZES)),
        ("grad", lambda: ops.pgd_step(X, None, X, **SIZES)),
        ("x0", lambda: ops.project(X, X.numpy(), eps=0.1)),
        ("out", lambda: ops.pgd_step(X, X, X, **SIZES, out=True)),
        ("velocity", lambda: ops.momentum_step(X, None, X, X, decay=1.0, **SIZES)),
        ("previous", lambda: ops.apgd_step(X, None, X, X, **SIZES)),
        ("x0", lambda: ops.random_start(X.numpy(), eps=0.1, seed=0)),
        ("index", lambda: ops.random_start(X, eps=0.1, seed=0, index=[0, 1])),
        ("draw", lambda: ops.random_start(X, eps=0.1, draw=X.numpy())),
        ("radius", lambda: ops.random_start(X, eps=0.1, norm="l2", draw=X, radius=0.5)),
        ("index", lambda: ops.uniform_noise(0, [0, 1], (3,))),
        ("text_features", lambda: ops.cosine_to_set(FEATURES, FEATURES.numpy(), IDS)),
        ("txt2img", lambda: ops.cosine_to_set(FEATURES, FEATURES, [0, 1])),
        ("queries", lambda: ops.topk_shortlist(FEATURES.numpy(), FEATURES, 1)),
        ("gallery", lambda: ops.retrieval_ranks(FEATURES, FEATURES.numpy(), **GROUPS)),
        ("query_group", lambda: ops.ranks_of_scores(torch.eye(2), query_group=[0, 1], gallery_group=IDS)),
        ("noise", lambda: ops.scale_views(X, [0.5], 0.05, antialias=True)),
        ("image_features", lambda: ops.contrastive_loss(FEATURES.numpy(), FEATURES, 10.0)),
        ("image_group", lambda: ops.contrastive_loss(FEATURES, FEATURES, 10.0, image_group=[0, 1], text_group=IDS)),
    ],
)
def test_what_is_no_tensor(name: str, call: Callable[[], Tensor]) -> None:
    with pytest.raises(UserError, match=f"^{name} must be a tensor, got (ndarray|NoneType|bool|list|float)$"):
        call()


@pytest.mark.parametrize("value", [[0.1, 0.1], "8/255", None, np.array([0.1, 0.1])], ids=str)
def test_sizes_are_numbers_or_tensors(value: object) -> None:
    for name in SIZES:
        with pytest.raises(UserError, match=rf"^{name} must be a number or a tensor \[B\], got "):
            ops.pgd_step(X, X, X, **SIZES | {name: value})
    with pytest.raises(UserError, match=r"^decay must be a number"):
        ops.momentum_step(X, X, X, X, decay=value, **SIZES)
    with pytest.raises(UserError, match=r"^inertia must be a number"):
        ops.apgd_step(X, X, X, X, inertia=value, **SIZES)


def test_numbers_of_numpy_are_numbers() -> None:
    a, b = (ops.random_start(X, eps=kind(0.125), seed=seed) for kind, seed in ((float, 3), (np.float32, np.int64(3))))
    assert torch.equal(a, b)
    assert torch.equal(
        ops.topk_shortlist(FEATURES, FEATURES, np.int64(1))[1], ops.topk_shortlist(FEATURES, FEATURES, 1)[1]
    )


@pytest.mark.parametrize(
    "bounds", [None, 1.0, (0, 1, 2), ("0", "1"), (torch.zeros(3), torch.ones(3)), (1, 0), (1, 1), (0.0, math.nan)]
)
def test_bounds_are_two_numbers_in_order(bounds: object) -> None:
    for call in (
        lambda: ops.pgd_step(X, X, X, **SIZES, bounds=bounds),
        lambda: ops.random_start(X, eps=0.1, seed=0, bounds=bounds),
        lambda: ops.scale_views(X, [0.5], None, antialias=True, bounds=bounds),
    ):
        with pytest.raises(UserError, match=r"^bounds must be \(low, high\) with low < high, got "):
            call()


def test_an_eps_in_units_of_bytes() -> None:
    message = r"^eps must be in the units of the pixels, got 8 for bounds \(0.0, 1.0\); is it 8/255\?$"
    for call in (
        lambda **options: ops.pgd_step(X, X, X, step_size=2, **options),
        lambda **options: ops.project(X, X, **options),
        lambda **options: ops.random_start(X, seed=0, **options),
    ):
        with pytest.raises(UserError, match=message):
            call(eps=8)
        for fine in ({"eps": 1.0}, {"eps": 8, "bounds": (0, 255)}, {"eps": 1.0, "bounds": (0.2, 0.3)}):
            call(**fine)
        call(eps=8, norm="l2")


def test_an_index_of_one_caption_is_named_and_not_all() -> None:
    with pytest.raises(UserError, match=r"^txt2img must be in \[0, 2\), the rows of image_features, got 2$"):
        ops.cosine_to_set(FEATURES, torch.rand(999, 5), torch.arange(999))


@pytest.mark.parametrize("seed", [None, 1.5, torch.tensor(3), torch.Generator()], ids=lambda seed: type(seed).__name__)
def test_seeds_are_whole_numbers(seed: object) -> None:
    with pytest.raises(UserError, match=r"^seed must be a whole number, got "):
        ops.uniform_noise(seed, IDS, (3,))


@pytest.mark.parametrize("shape", [3, (3, -1)])
def test_a_shape_is_the_sides_of_an_image(shape: object) -> None:
    with pytest.raises(UserError, match=r"^shape must be the sides of one image, none of them negative, got "):
        ops.normal_noise(0, IDS, shape)


def test_one_scale_is_no_sequence() -> None:
    with pytest.raises(UserError, match=r"^scales must be a sequence of factors, got 0\.5$"):
        ops.scale_views(X, 0.5, None, antialias=True)
