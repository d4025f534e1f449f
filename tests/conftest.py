"""One thread for all tests: small tensors gain nothing from more, and results stay the same on every machine.

Triton decides while it is imported whether it compiles or interprets, and parts of PyTorch import it; so it is told
here to interpret, unless a GPU can run the same tests compiled.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
