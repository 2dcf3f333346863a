"""Fused attack operators: Triton kernels on CUDA, PyTorch references elsewhere; torch and NumPy are all they need."""

from fastmat.ops.contrastive import contrastive_loss, contrastive_rows, contrastive_statistics
from fastmat.ops.cosine import cosine_to_set
from fastmat.ops.noise import normal_noise, uniform_noise
from fastmat.ops.pgd import apgd_step, momentum_step, pgd_step, project
from fastmat.ops.ranks import ranks_of_scores, retrieval_ranks
from fastmat.ops.shortlist import topk_shortlist
from fastmat.ops.start import random_start
from fastmat.ops.views import scale_views

__all__ = [
    "apgd_step",
    "contrastive_loss",
    "contrastive_rows",
    "contrastive_statistics",
    "cosine_to_set",
    "momentum_step",
    "normal_noise",
    "pgd_step",
    "project",
    "random_start",
    "ranks_of_scores",
    "retrieval_ranks",
    "scale_views",
    "topk_shortlist",
    "uniform_noise",
]
