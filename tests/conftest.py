"""One thread, one seed and the same examples for all tests: results stay the same from run to run.

Triton decides while it is imported whether it compiles or interprets, and parts of PyTorch import it; so it is told
here to interpret, unless a GPU can run the same tests compiled.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
