"""Triton kernels without a GPU: its interpreter runs them on CPU tensors, slowly, one program after the other."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def interpreted() -> Iterator[str]:
    """The device whose tensors Triton kernels take here: "cpu" through the interpreter, or "cuda" compiled.

    Ask for it in a test of a Triton kernel, and import the kernel's module inside the test. Keep grids below some 50
    programs: the interpreter needs milliseconds for each. Within such a test the kernels of `foveate.ops.tile` take CPU
    tensors too.
    """
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield "cuda"
        return
    from triton import language
    from triton.runtime.interpreter import InterpretedFunction

    from foveate.ops.tile import interpreting

    if not isinstance(language.cdiv, InterpretedFunction):
        pytest.skip("triton was imported to compile; run tests/ops alone, or with TRITON_INTERPRET=1")
    with interpreting():
        yield "cpu"
