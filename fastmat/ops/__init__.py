"""Fused attack operators: Triton kernels on CUDA, PyTorch references elsewhere; importable with torch and NumPy alone."""

from fastmat.ops.contrastive import contrastive_loss, contrastive_rows
from fastmat.ops.cosine import cosine_to_set
from fastmat.ops.noise import normal_noise, uniform_noise
from fastmat.ops.pgd import apgd_step, momentum_step, pgd_step, project
from fastmat.ops.ranks import retrieval_ranks
from fastmat.ops.start import random_start
from fastmat.ops.views import scale_views

__all__ = [
    "apgd_step",
    "contrastive_loss",
    "contrastive_rows",
    "cosine_to_set",
    "momentum_step",
    "normal_noise",
    "pgd_step",
    "project",
    "random_start",
    "retrieval_ranks",
    "scale_views",
    "uniform_noise",
]
