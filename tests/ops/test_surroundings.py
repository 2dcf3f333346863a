"""What a program sets around a call, such as the default dtype of some model loaders, changes no operator."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

from fastmat import ops

X = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
FEATURES, IDS = X.flatten(1), torch.arange(2)
CALLS: dict[str, Callable[..., object]] = {
    "pgd_step": lambda **o: ops.pgd_step(X, X - 0.5, X, eps=0.1, step_size=0.1, norm="l2", **o),
    "random_start": lambda **o: ops.random_start(X, eps=0.1, norm="l2", seed=1, **o),
    "noise": lambda **o: ops.normal_noise(0, IDS, (3,), **o),
    "contrastive_loss": lambda **o: ops.contrastive_loss(FEATURES, FEATURES, 10.0, **o),
    "cosine_to_set": lambda **o: ops.cosine_to_set(FEATURES, FEATURES.half(), IDS, **o),
    "retrieval_ranks": lambda **o: ops.retrieval_ranks(FEATURES, FEATURES, query_group=IDS, gallery_group=IDS, **o),
    "topk_shortlist": lambda **o: ops.topk_shortlist(FEATURES, FEATURES, 2, **o),
    "scale_views": lambda **o: ops.scale_views(X, (0.5,), None, antialias=True, **o),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_surroundings_change_nothing(call, around, backend) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the calls are made on CPU tensors, through the interpreter")
    want = call(backend=backend)
    with around():
        got = call(backend=backend)
    for one, other in zip(*([each] if isinstance(each, Tensor) else each for each in (got, want)), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
