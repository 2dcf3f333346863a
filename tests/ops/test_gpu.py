"""What only a GPU can show: nothing waits for the host, and a whole step goes into a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from fastmat import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Deterministic algorithms, which other tests of this folder ask for, may wait where these may not.
    pytest.mark.usefixtures("free_to_race"),
]


@pytest.fixture
def free_to_race() -> None:
    torch.use_deterministic_algorithms(False)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device="cuda")


def calls() -> dict[str, Callable[[], object]]:
    x0, x, grad, state = (images(4, 3, 32, 32) for _ in range(4))
    eps, index, txt2img = images(4) + 0.1, torch.arange(4, device="cuda"), torch.arange(8, device="cuda") // 2
    a, b = (F.normalize(images(n, 40) - 0.5, dim=1).requires_grad_(True) for n in (4, 8))
    scale = torch.tensor(14.0, device="cuda", requires_grad=True)
    groups = {"image_group": index, "text_group": txt2img}
    noise = images(2, 4, 3, 32, 32)

    def steps() -> None:
        for norm in ("linf", "l2"):
            common = {"eps": eps, "step_size": 0.1, "norm": norm}
            ops.pgd_step(x, grad, x0, **common)
            ops.momentum_step(x, state, grad, x0, decay=0.9, **common)
            ops.apgd_step(x, state, grad, x0, **common)
            ops.random_start(x0, eps=eps, norm=norm, seed=1, index=index)

    return {
        "steps": steps,
        "noise": lambda: ops.normal_noise(0, index, (3, 32, 32)),
        "contrastive_loss": lambda: ops.contrastive_loss(a, b, scale, **groups).backward(),
        "contrastive_rows": lambda: (
            ops.contrastive_rows(
                a, b, scale, row_group=index, column_group=txt2img, soft_rows=a.detach(), soft_weight=0.4,
                queue=b.detach(), queue_group=txt2img - 9,
            ).sum().backward()
        ),
        "cosine_to_set": lambda: ops.cosine_to_set(a, b, txt2img).sum().backward(),
        "scale_views": lambda: ops.scale_views(
            x.clone().requires_grad_(True), (0.5, 1.5), noise, antialias=True
        ).sum().backward(),
        "topk_shortlist": lambda: ops.topk_shortlist(a, b, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["steps", "noise", "contrastive_loss", "contrastive_rows", "cosine_to_set", "scale_views", "topk_shortlist"]
)
def test_nothing_waits_for_the_host(name: str) -> None:
    call = calls()[name]
    call()  # compiles, and moves constant tables to the device
    torch.cuda.synchronize()
    with no_waiting():
        call()


def test_a_whole_step_is_captured_in_a_cuda_graph() -> None:
    weight, x0 = torch.randn(3 * 32 * 32, 7, device="cuda"), images(4, 3, 32, 32)
    x = x0.clone()

    def step() -> None:
        live = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad((live.flatten(1) @ weight).square().sum(), live)
        ops.pgd_step(x, grad, x0, eps=8 / 255, step_size=2 / 255, out=x)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.copy_(x0)
    for _ in range(3):
        graph.replay()
    replayed = x.clone()
    x.copy_(x0)
    for _ in range(3):
        step()
    torch.testing.assert_close(replayed, x, atol=1e-6, rtol=0)


def test_the_memory_of_the_loss_is_linear() -> None:
    n, d = 16384, 64
    a, b = (F.normalize(images(n, d), dim=1).requires_grad_(True) for _ in range(2))
    ops.contrastive_loss(a[:128], b[:128], 100.0).backward()
    a.grad = b.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.contrastive_loss(a, b, 100.0).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 100 * 2**20 < 4 * n * n / 8, f"{peak / 2**20:.0f} MiB, where the logits alone take {4 * n * n >> 20}"
