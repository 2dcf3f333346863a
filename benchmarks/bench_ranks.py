"""Ranks of the best positive and the k best columns, against rankers that hold the whole score matrix.

fastmat bench ops --only ranks
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmat.benchmarks.harness import Case, Implementation, Tensors, Work
from fastmat.ops.ranks import ranks_of_scores, retrieval_ranks
from fastmat.ops.shortlist import topk_shortlist

WIDTH, CAPTIONS = 256, 5  # ALBEF's


def cases(device: torch.device, short: bool) -> list[Case]:
    images, k = (7, 3) if short else (5000, 256)
    name, shape = f"{images} x {images * CAPTIONS}", {"queries": images, "gallery": images * CAPTIONS, "width": WIDTH}
    # Scores within rounding of each other may swap: a few ranks of thousands.
    ranks = Case(
        operator="retrieval_ranks",
        name=name,
        shape=shape,
        dtype="float32",
        tolerance=1e-3,
        build=lambda: build_ranks(images, device),
        memory=not short,
    )
    shortlist = Case(
        operator="topk_shortlist",
        name=f"{name} k={k}",
        shape={**shape, "k": k},
        dtype="float32",
        tolerance=1e-5 if device.type == "cpu" else 1e-3,
        build=lambda: build_shortlist(images, k, device),
        memory=not short,
    )
    given = replace(
        ranks, operator="ranks_of_scores", memory=False, build=lambda: build_ranks(images, device, given=True)
    )
    return [ranks, given, shortlist]


def test_ranks(benchmark: Callable[[Callable[[], Tensors]], Tensors], micro: Callable[[], Tensors]) -> None:
    """With pytest-benchmark; see conftest.py."""
    benchmark(micro)


def features(images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Queries and a gallery whose captions resemble their image a little, so that ranks spread over the gallery."""
    generator = torch.Generator(device).manual_seed(0)
    queries = F.normalize(torch.randn(images, WIDTH, generator=generator, device=device), dim=1)
    noise = F.normalize(torch.randn(images * CAPTIONS, WIDTH, generator=generator, device=device), dim=1)
    return queries, F.normalize(noise + 0.05 * queries.repeat_interleave(CAPTIONS, 0), dim=1)


def build_ranks(images: int, device: torch.device, *, given: bool = False) -> Work:
    """given: the matrix of scores is an input, as it is for itm_eval, and its product is not timed."""
    queries, gallery = features(images, device)
    query_group = torch.arange(images, device=device)
    gallery_group = query_group.repeat_interleave(CAPTIONS)

    matrix = queries @ gallery.T if given else None
    own = torch.arange(images * CAPTIONS, device=device).view(images, CAPTIONS)

    def ours() -> Tensors:
        if matrix is not None:
            return (ranks_of_scores(matrix, query_group=query_group, gallery_group=gallery_group),)
        return (retrieval_ranks(queries, gallery, query_group=query_group, gallery_group=gallery_group),)

    def scores() -> Tensor:
        return queries @ gallery.T if matrix is None else matrix

    def argsort() -> Tensors:
        """RetrievalEval.py, itm_eval (Co-Attack, 96f2c0e, from ALBEF): each row is sorted whole, on the host."""
        ranks = np.zeros(images)
        for row, score in enumerate(scores().cpu().numpy()):
            order = np.argsort(score)[::-1]
            ranks[row] = min(np.where(order == column)[0][0] for column in range(row * CAPTIONS, (row + 1) * CAPTIONS))
        return (torch.from_numpy(ranks).to(device),)

    def counted() -> Tensors:
        """The whole matrix, but comparisons instead of a sort."""
        made = scores()
        return ((made > made.gather(1, own).amax(1, keepdim=True)).sum(1),)

    def exact() -> Tensors:
        wide, found = gallery.double(), []
        for block, positives in zip(queries.double().split(512), own.split(512), strict=True):
            made = block @ wide.T
            found.append((made > made.gather(1, positives).amax(1, keepdim=True)).sum(1))
        return (torch.cat(found),)

    found = [
        Implementation(name="fastmat", kind="fastmat", call=ours),
        Implementation(name="argsort on the host", kind="published", call=argsort),
        Implementation(name="whole matrix, counted", kind="tuned", call=counted),
    ]
    if not given:
        found.append(Implementation(name="scores alone", kind="limit", call=lambda: (queries @ gallery.T,)))
    return Work(exact, found)


def build_shortlist(images: int, k: int, device: torch.device) -> Work:
    queries, gallery = features(images, device)

    def row_by_row() -> Tensors:
        """RetrievalEval.py, retrieval_eval (as above): one topk per row of the matrix."""
        return (torch.stack([row.topk(k)[0] for row in queries @ gallery.T]),)

    return Work(
        lambda: (torch.cat([(block @ gallery.double().T).topk(k)[0] for block in queries.double().split(512)]),),
        [
            Implementation(name="fastmat", kind="fastmat", call=lambda: (topk_shortlist(queries, gallery, k)[0],)),
            Implementation(name="topk per row", kind="published", call=row_by_row),
            Implementation(name="topk of the matrix", kind="tuned", call=lambda: ((queries @ gallery.T).topk(k)[0],)),
            Implementation(name="scores alone", kind="limit", call=lambda: (queries @ gallery.T,)),
        ],
    )
