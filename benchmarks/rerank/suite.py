"""The cases of `fastmat bench rerank`: one per model, on a GPU also with TF32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fastmat.benchmarks.harness import Case, Implementation, Tensors, Work
from fastmat.benchmarks.rerank.contestants import FILLER, Scores, misplaced, ours, published, tuned
from fastmat.benchmarks.rerank.setting import CAPTIONS, prepare
from fastmat.benchmarks.targets import Target

OPERATOR = "rerank"
PUBLISHED, TUNED = "published loop", "tuned loop"
# Images and candidates per query. On a GPU as many as keep it busy while the published loop ends within a minute.
SIZES = {"cpu": (6, 6), "cuda": (128, 64)}
TOLERANCE = {"float32": 5e-5, "tfloat32": 2e-2}
PRECISION = {"float32": "highest", "tfloat32": "high"}


def title(model: str, dtype: str, images: int, k: int) -> str:
    tf32 = ", TF32" if dtype == "tfloat32" else ""
    return f"{model} {images} images, k={k}{tf32}"


def full_title(model: str, device: str, dtype: str) -> str:
    return title(model, dtype, *SIZES[device])


TARGETS = (
    *(
        Target(
            device="cuda",
            operator=OPERATOR,
            case=full_title(model, "cuda", "tfloat32"),
            quantity="speed-up",
            bound=bound,
            opponents=(opponent,),
        )
        for model, opponent, bound in (
            ("albef", PUBLISHED, 20),
            ("blip", PUBLISHED, 30),
            ("albef", TUNED, 6),
            ("blip", TUNED, 6),
        )
    ),
    *(
        Target(
            device="cpu",
            operator=OPERATOR,
            case=full_title(model, "cpu", "float32"),
            quantity="speed-up",
            bound=4,
            opponents=(PUBLISHED,),
        )
        for model in ("albef", "blip")
    ),
)


def cases(name: str, device: torch.device, *, short: bool) -> list[Case]:
    images, k = (4, 3) if short else SIZES[device.type]
    return [
        Case(
            operator=OPERATOR,
            name=title(name, dtype, images, k),
            shape={"images": images, "captions": CAPTIONS * images, "k": k},
            dtype=dtype,
            tolerance=TOLERANCE[dtype],
            build=partial(build, name, device, images=images, k=k, short=short, dtype=dtype),
        )
        for dtype in (("float32", "tfloat32") if device.type == "cuda" else ("float32",))
    ]


def build(name: str, device: torch.device, *, images: int, k: int, short: bool, dtype: str) -> Work:
    """The gate holds scores to the published loop's in fp32, and every rank."""
    setting = prepare(name, device, images=images, k=k, short=short)
    assert setting.image.tokens is not None
    on_device = setting.image.tokens.to(device)
    who: dict[str, Callable[[], Scores]] = {
        "fastmat": with_precision(PRECISION[dtype], partial(ours, setting)),
        PUBLISHED: with_precision("highest", partial(published, setting)),
        TUNED: with_precision(PRECISION[dtype], partial(tuned, setting, on_device)),
    }
    exact: list[Scores] = []

    def expected() -> Tensors:
        exact.append(who[PUBLISHED]())
        return (*map(without_filler, exact[0]), torch.zeros((), device=device))

    def check(call: Callable[[], Scores]) -> Tensors:
        got = call()
        wrong = misplaced(setting, got, exact[0], tolerance=TOLERANCE[dtype])
        return (*map(without_filler, got), wrong)

    kinds = {"fastmat": "fastmat", PUBLISHED: "published", TUNED: "tuned"}
    return Work(
        expected,
        [
            Implementation(name=label, kind=kinds[label], call=call, check=partial(check, call))
            for label, call in who.items()
        ],
    )


def without_filler(scores: torch.Tensor) -> torch.Tensor:
    """Zero where a pair is on no shortlist, so that errors are relative to what was computed."""
    return scores.masked_fill(scores == FILLER, 0.0)


def with_precision(precision: str, call: Callable[[], Scores]) -> Callable[[], Scores]:
    def wrapped() -> Scores:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision(before)

    return wrapped
