"""Triton kernels in the vocabulary of tiles. These modules import triton, so import them when a kernel is to run."""
