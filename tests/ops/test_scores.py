"""Ranks and shortlist in a process of their own: memory of one tile where the score matrix takes many."""

import subprocess
import sys

import pytest
import torch

from fastmat.ops.scores import TILE_BYTES, score_tiles

SCRIPT = """
import torch
from fastmat.ops.ranks import retrieval_ranks
from fastmat.ops.shortlist import topk_shortlist

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def shown(call, queries, gallery):
    before = peak()
    call(queries, gallery)
    print(peak() - before)

def ranks(queries, gallery):
    group = torch.arange(len(gallery)) % 5000
    retrieval_ranks(queries, gallery, query_group=group[: len(queries)], gallery_group=group)

torch.set_num_threads(1)
queries, gallery = torch.randn(5000, 8), torch.randn(20000, 8)
for call in (ranks, lambda a, b: topk_shortlist(a, b, 16)):
    call(queries[:1], gallery)  # what libraries take at a first call
    shown(call, queries, gallery)
shown(lambda a, b: a @ b.T, queries, gallery)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_peak_memory_is_a_tile() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    ranks, shortlist, matrix = map(int, done.stdout.split())
    assert matrix > 4 * TILE_BYTES["cpu"]
    assert ranks < 1.5 * TILE_BYTES["cpu"]
    assert shortlist < 1.5 * TILE_BYTES["cpu"]


def test_a_tile_is_no_larger_than_the_matrix() -> None:
    tiles = score_tiles(torch.ones(8, 2), torch.ones(3, 2), columns=2**18)
    ((rows, columns, tile),) = tiles
    assert (rows, columns) == (slice(0, 8), slice(0, 3)) and torch.equal(tile, torch.full((8, 3), 2.0))
    assert tile.untyped_storage().nbytes() == 4 * 8 * 3
