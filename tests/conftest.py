"""One thread for all tests: small tensors gain nothing from more, and results stay the same on every machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
