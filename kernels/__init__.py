"""Triton kernels, one file per operator; imported as `fastmat.kernels`."""
