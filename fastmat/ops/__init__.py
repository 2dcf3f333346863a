"""Attack operators in plain PyTorch; importable with torch alone."""

from fastmat.ops.contrastive import contrastive_loss, contrastive_rows
from fastmat.ops.cosine import cosine_to_set
from fastmat.ops.pgd import pgd_step, project
from fastmat.ops.ranks import retrieval_ranks
from fastmat.ops.views import scale_views

__all__ = [
    "contrastive_loss",
    "contrastive_rows",
    "cosine_to_set",
    "pgd_step",
    "project",
    "retrieval_ranks",
    "scale_views",
]
