"""Score tiles: the dot products of a few queries with the gallery at a time, in memory that is used again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastmat.errors import UserError
from fastmat.ops.arguments import check_device, check_dtype

# Rows enough for a matrix product near its peak (on one CPU core 64 rows reach 85 % of it, 256 rows 95 %), and on a
# GPU programs enough to fill it when each takes one row of 500 k columns.
TILE_BYTES = {"cpu": 2**26, "cuda": 2**29}


def score_tiles(queries: Tensor, gallery: Tensor, columns: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and scores [rows, columns] of every tile of `queries @ gallery.T`, row of tiles by row of tiles.

    queries [Q, D], gallery [G, D] of one dtype. Tiles have at most `columns` columns and at most TILE_BYTES bytes, or
    one row; the next tile overwrites the last. fp32 (fp64 for fp64): half precision is widened before the product, on
    CUDA within it. fp32 products follow torch.set_float32_matmul_precision.
    """
    if not len(queries):
        return
    dtype = torch.promote_types(queries.dtype, torch.float32)
    half_on_cuda = queries.is_cuda and queries.dtype != dtype
    if not half_on_cuda:
        queries, gallery = queries.to(dtype), gallery.to(dtype)
    columns = min(columns, len(gallery))
    budget = TILE_BYTES.get(queries.device.type, TILE_BYTES["cpu"])
    rows = min(len(queries), max(1, budget // (columns * dtype.itemsize)))
    memory = torch.empty(rows * columns, dtype=dtype, device=queries.device)
    for top in range(0, len(queries), rows):
        some = queries[top : top + rows]
        for left in range(0, len(gallery), columns):
            others = gallery[left : left + columns]
            tile = memory[: len(some) * len(others)].view(len(some), len(others))
            # A product into given memory is outside what autocast may turn to half precision.
            if half_on_cuda:
                torch.mm(some, others.T, out_dtype=dtype, out=tile)
            else:
                torch.mm(some, others.T, out=tile)
            yield slice(top, top + len(some)), slice(left, left + len(others)), tile


def check_features(queries: Tensor, gallery: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """[Q, D] and [G, D] of one dtype on one device."""
    check_dtype("queries", queries, allowed)
    check_dtype("gallery", gallery, (queries.dtype,))
    check_device(queries.device, gallery=gallery)
    for name, features in (("queries", queries), ("gallery", gallery)):
        if features.dim() != 2:
            raise UserError(f"{name} must have shape (rows, features), got {tuple(features.shape)}")
    if queries.shape[1] != gallery.shape[1]:
        raise UserError(f"gallery has {gallery.shape[1]} features per row, queries {queries.shape[1]}")
