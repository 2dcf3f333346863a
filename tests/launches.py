"""Calls of the public operators that together reach every branch of every launcher, for the tests of the kernels.

`python tests/launches.py` (without TRITON_INTERPRET) makes them too, but compiles each launch for an H200 instead of
running it, which needs no GPU, and prints one line per kernel: its name and the most shared memory it asks for.
"""

import itertools
import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from fastmat import ops

HALF = (torch.float32, torch.float16, torch.bfloat16)


def pgd() -> Iterator[Callable[[], object]]:
    x = torch.rand(2, 3, 8, 8)
    each = torch.full((2,), 0.1)
    byte = (x * 255).to(torch.uint8)
    sizes = ((0.1, 0.1), (each, 0.1), (each, each), (0.1, each))
    for (norm, x0), (eps, step_size) in zip(itertools.product(("linf", "l2"), (x, byte)), sizes, strict=True):
        common = {"eps": eps, "step_size": step_size, "norm": norm, "backend": "triton"}
        for dtype in HALF:
            yield lambda dtype=dtype, x0=x0, o=common: ops.pgd_step(x, x.to(dtype), x0, **o)
        yield lambda x0=x0, o=common: ops.apgd_step(x, x.clone(), x, x0, **o)
        for rule in ("mi", "fare"):
            yield lambda x0=x0, o=common, rule=rule: ops.momentum_step(x, x.clone(), x, x0, decay=1.0, rule=rule, **o)
    yield lambda: ops.pgd_step(x[:0], x[:0], x[:0], eps=0.1, step_size=0.1, backend="triton")


def noise() -> Iterator[Callable[[], object]]:
    index, x = torch.arange(2), torch.rand(2, 3, 8, 8)
    for draw in (ops.uniform_noise, ops.normal_noise):
        yield lambda draw=draw: draw(0, index, (3, 8, 8), backend="triton")
    yield lambda: ops.uniform_noise(0, index[:0], (3,), backend="triton")
    for x0, eps, norm in itertools.product(
        (x, (x * 255).to(torch.uint8)), (0.1, torch.full((2,), 0.1)), ("linf", "l2")
    ):
        common = {"x0": x0, "eps": eps, "norm": norm, "backend": "triton"}
        yield lambda o=common: ops.random_start(**o, seed=1)
        radius = torch.ones(2) if norm == "l2" else None
        yield lambda o=common, radius=radius: ops.random_start(**o, draw=x, radius=radius)
    yield lambda: ops.random_start(x[:0], eps=0.1, seed=1, backend="triton")


def contrastive() -> Iterator[Callable[[], object]]:
    ids = torch.arange(4)
    for dtype in HALF:
        a, b = (F.normalize(torch.rand(4, 8), dim=1).to(dtype).requires_grad_(True) for _ in range(2))
        scale = torch.tensor(10.0, requires_grad=True)
        groups = {"row_group": ids, "column_group": ids}
        yield lambda a=a, b=b, s=scale: ops.contrastive_loss(a, b, s, backend="triton").backward()
        yield (
            lambda a=a, b=b, s=scale, g=groups: (
                ops.contrastive_rows(
                    a,
                    b,
                    s,
                    **g,
                    soft_rows=b.detach(),
                    soft_weight=0.4,
                    queue=b.detach(),
                    queue_group=ids + 4,
                    backend="triton",
                )
                .sum()
                .backward()
            )
        )
        yield (
            lambda a=a, b=b, s=scale: (
                ops.contrastive_statistics(
                    a, b, s, row_group=ids // 2, column_group=ids // 2, negatives_only=True, backend="triton"
                )
                .row_lse.sum()
                .backward()
            )
        )
    # The operator has tiles this large, and writes halves, on a GPU only.
    from fastmat.kernels.contrastive import launch_fold, launch_weigh

    many, large = torch.arange(512), torch.rand(512, 512)
    yield lambda: launch_fold(
        large, torch.tensor(10.0), torch.zeros(3, 512), torch.zeros(3, 512), many, many, negatives_only=False
    )

    tile, row_state, column_state = torch.rand(4, 4), torch.rand(3, 4), torch.rand(3, 4)
    for dtype, columns, negatives_only in itertools.product(HALF[1:], (column_state, None), (True, False)):
        out = torch.empty(4, 4, dtype=dtype)
        yield lambda out=out, arguments=(row_state, columns, ids, ids, negatives_only): launch_weigh(
            tile, out, torch.tensor(10.0), *arguments
        )


def cosine() -> Iterator[Callable[[], object]]:
    for image, text in zip(HALF, (torch.float32, torch.bfloat16, torch.float32), strict=True):
        arguments = (torch.rand(2, 8).to(image), torch.rand(3, 8).to(text), torch.tensor([0, 0, 1]))
        yield lambda arguments=arguments: ops.cosine_to_set(*arguments, backend="triton")
    yield lambda: ops.cosine_to_set(torch.rand(0, 8), torch.rand(0, 8), torch.arange(0), backend="triton")


def views() -> Iterator[Callable[[], object]]:
    for antialias, bare in itertools.product((True, False), (True, False)):
        x = torch.rand(1, 3, 8, 8, requires_grad=True)
        noise = None if bare else torch.rand(2, 1, 3, 8, 8, requires_grad=True)
        yield (
            lambda x=x, noise=noise, antialias=antialias: (
                ops.scale_views(x, (0.5, 1.5), noise, antialias=antialias, backend="triton").sum().backward()
            )
        )
    yield lambda: ops.scale_views(torch.rand(0, 3, 8, 8), (0.5,), None, antialias=True, backend="triton")


def ranking() -> Iterator[Callable[[], object]]:
    ids = torch.arange(3)
    for dtype in HALF:
        features, scores = torch.rand(3, 8).to(dtype), torch.rand(3, 3).to(dtype)
        groups = {"query_group": ids, "gallery_group": ids}
        yield lambda f=features, g=groups: ops.retrieval_ranks(f, f, **g, backend="triton")
        yield lambda s=scores, g=groups: ops.ranks_of_scores(s, **g, backend="triton")
    yield lambda: ops.ranks_of_scores(scores[:0], query_group=ids[:0], gallery_group=ids, backend="triton")
    wide = torch.rand(200, 8)
    for k in (1, 150):
        yield lambda k=k: ops.topk_shortlist(wide[:2], wide, k, backend="triton")
    yield lambda: ops.topk_shortlist(wide[:0], wide, 3, backend="triton")


CALLS = {"pgd": pgd, "noise": noise, "contrastive": contrastive, "cosine": cosine, "views": views, "ranking": ranking}


def compile_for_h200() -> None:
    """Replace every launch by a compilation for sm_90 with the argument types of the launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from fastmat.ops import backend

    shared: dict[str, int] = {}
    seen: set[tuple[object, ...]] = set()
    scalar = {bool: "i1", float: "fp32"}
    pointer = {
        torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
        torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
    }  # fmt: skip

    def kind(value: object) -> str:
        if isinstance(value, torch.Tensor):
            return pointer[value.dtype]
        if isinstance(value, int) and not isinstance(value, bool):
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return scalar[type(value)]

    def run(self: JITFunction, *arguments: object, grid: object, warmup: bool, **named: object) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in named}
        assert "enable_fp_fusion" in options, f"{self.__name__}: the default differs between versions of Triton"
        values = dict(zip(self.arg_names, arguments, strict=False)) | named
        constant = {p.name for p in self.params if p.is_constexpr}
        constant |= {name for name, value in values.items() if value is None}
        # As Triton itself: an integer 1 is a constant.
        constant |= {name for name, value in values.items() if type(value) is int and value == 1}
        signature = {n: "constexpr" if n in constant else kind(values[n]) for n in self.arg_names}
        constants = {(self.arg_names.index(name),): values[name] for name in constant}
        key = (self.__name__, *signature.values(), *map(str, constants.items()), *options.items())
        if key in seen:
            return
        seen.add(key)
        source = ASTSource(fn=self, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert len(compiled.asm["cubin"])
        shared[self.__name__] = max(shared.get(self.__name__, 0), compiled.metadata.shared)

    JITFunction.run = run
    backend._why_no_kernel = lambda device: None
    for calls in CALLS.values():
        for call in calls():
            call()
    for name, most in sorted(shared.items()):
        print(name, most)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    compile_for_h200()
