"""Numeric kernels: a plain PyTorch reference each, and fast paths held equal to it by tests."""
