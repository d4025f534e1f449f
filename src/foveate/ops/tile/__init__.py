"""Kernels written in one vocabulary of tiles, each beside the plain PyTorch it equals.

A tile is a small matrix that one program of a GPU holds; `foveate.ops.tile.vocabulary` has the words (load, multiply,
reduce, mask, store), `foveate.ops.tile.kernels` what is written in them, and the modules here the functions to call:

    gemm  attention  linear_attention  selective_scan  layer_norm  rotary

Each takes its Triton kernel for CUDA tensors of float32, float16 or bfloat16, and a plain or compiled path elsewhere.
Triton is imported when the first kernel runs. Its interpreter runs the same kernels on CPU tensors, to test them:

    TRITON_INTERPRET=1 python ...        with foveate.ops.tile.interpreting(): ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ops import fast_allowed

TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the Triton kernels compute with; sums are float32."""

_state = {"interpreting": False}


@contextmanager
def interpreting() -> Iterator[None]:
    """Let CPU tensors go through Triton's interpreter while this is open. Slow; for tests.

    Raises: InputError when Triton was not imported with TRITON_INTERPRET=1.
    """
    if not _interpreter_there():
        raise InputError("Triton does not interpret here; set TRITON_INTERPRET=1 before triton is first imported.")
    before = _state["interpreting"]
    _state["interpreting"] = True
    try:
        yield
    finally:
        _state["interpreting"] = before


def on_triton(*tensors: Tensor | None) -> bool:
    """Whether these tensors go through a Triton kernel; None stands for what was not given."""
    given = [t for t in tensors if t is not None]
    if not fast_allowed() or any(t.dtype not in TYPES for t in given):
        return False
    devices = {t.device.type for t in given}
    return (devices == {"cuda"} and _triton_there()) or (devices == {"cpu"} and _state["interpreting"])


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the device of its first argument."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n; tile sides are such, and 16 the least that a GPU multiplies.

    >>> power_of_two(5), power_of_two(70)
    (16, 128)
    """
    return max(least, 1 << (n - 1).bit_length())


@cache
def _triton_there() -> bool:
    return find_spec("triton") is not None


def _interpreter_there() -> bool:
    if not _triton_there():
        return False
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(language.cdiv, InterpretedFunction)
