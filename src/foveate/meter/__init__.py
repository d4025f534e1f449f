"""What was spent and what it bought: FLOPs, parameters, time, memory, energy; PSNR, SSIM, MS-SSIM; comparisons.

The names below are imported on first use, so that `import foveate.meter` stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.meter.comparison import Comparison, compare, slope
    from foveate.meter.cost import Measurement, count_parameters, measure, peak_memory, stored_bytes, time_call
    from foveate.meter.flops import by_module, count_flops, register
    from foveate.meter.quality import ms_ssim, psnr, psnr_y, ssim

_HOME = {
    "by_module": "flops",
    "count_flops": "flops",
    "register": "flops",
    "Measurement": "cost",
    "count_parameters": "cost",
    "measure": "cost",
    "peak_memory": "cost",
    "stored_bytes": "cost",
    "time_call": "cost",
    "Comparison": "comparison",
    "compare": "comparison",
    "slope": "comparison",
    "ms_ssim": "quality",
    "psnr": "quality",
    "psnr_y": "quality",
    "ssim": "quality",
}

__all__ = [
    "Comparison",
    "Measurement",
    "by_module",
    "compare",
    "count_flops",
    "count_parameters",
    "measure",
    "ms_ssim",
    "peak_memory",
    "psnr",
    "psnr_y",
    "register",
    "slope",
    "ssim",
    "stored_bytes",
    "time_call",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'foveate.meter' has no attribute {name!r}")
    return getattr(import_module(f"foveate.meter.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
