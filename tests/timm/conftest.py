"""timm needs torchvision, whose compiled operators do not load beside a CPU build of torch: their schemas will do.

`make test-timm` runs these tests in an environment of their own; elsewhere they are skipped.
"""

from importlib.util import find_spec

import pytest
import torch

_KEPT = []
"""The library object; its schemas are gone when it is."""


@pytest.fixture(scope="session", autouse=True)
def timm():
    """timm, or skip."""
    if find_spec("timm") is None:
        pytest.skip("timm is not installed here; run make test-timm")
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    return pytest.importorskip("timm")
