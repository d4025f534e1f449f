"""FLOPs of a call, counted while it runs: two per multiply-accumulate.

The count rests on `torch.utils.flop_counter`, which watches every ATen operator and adds a closed formula of its
shapes: 2 m k n for a matrix product, 2 B H' W' C_in C_out k^2 / groups for a convolution, 2 B h N M (d_q + d_v) for
attention. This module adds what PyTorch leaves at zero and an image pipeline does spend: attention on the CPU,
matrix-vector products, pairwise distances, recurrent layers, grid sampling, resizing, Fourier transforms.

    resize, grid sample   2 per tap and output value (bilinear 4 taps, bicubic 16, trilinear 8; nearest is free)
    antialiased resize    two separable passes of ceil(support * max(1, in / out)) taps
    FFT                   5 N log2 N for complex, half of it for real signals (Frigo and Johnson 2005)
    pairwise distance     2 n m d, as the matrix product that dominates it

By the convention of the literature, elementwise work, normalisation, softmax, pooling, sorting and copies count
nothing, and causal or padded attention counts as full. Counted is what the calling thread runs through PyTorch: while
counting, foveate's own kernels take their reference path, whose work is the same; other code that bypasses PyTorch
(NumPy, numba) is seen once it is a custom operator with a formula given to `register`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from foveate import ops
from foveate.errors import InputError

Formula = Callable[..., int]
Shape = tuple[int, ...]

_aten = torch.ops.aten
_formulas: dict[Any, Formula] = {}


def register(op: Any, formula: Formula) -> None:
    """Teach the counter an operator, or correct it.

    Args:
        op: the operator, such as `torch.ops.mylib.blur`.
        formula: called with the operator's arguments, each tensor replaced by its shape, and with `out_shape`, the
            shape of the result (a tuple of shapes where there are several); returns FLOPs.

    Raises: InputError when `op` is not an operator or `formula` is not callable.
    """
    packet = op.overloadpacket if isinstance(op, torch._ops.OpOverload) else op
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise InputError(f"register got {op!r}, expected a PyTorch operator. Pass torch.ops.<library>.<name>.")
    if not callable(formula):
        raise InputError(f"register got the formula {formula!r}. Pass a function of shapes that returns FLOPs.")
    _formulas[packet] = formula


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run `fn(*args, **kwargs)` once and count its FLOPs, two per multiply-accumulate.

    The count is the same with gradients, under `torch.no_grad` and under `torch.inference_mode`. A call that runs
    backward has that counted too. Adaptive code is counted as it ran on these very arguments.

    >>> count_flops(nn.Linear(16, 8), torch.zeros(4, 16))
    1024
    """
    if not callable(fn):
        raise InputError(f"count_flops got {fn!r}, expected something to call. Pass a module or a function.")
    with _counting() as counter:
        fn(*args, **kwargs)
    return int(counter.get_total_flops())


def by_module(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Run a module once and count FLOPs per submodule, nested ones included in their parents.

    Returns: {name: FLOPs} in the order of `module.named_modules()`, with "" for the whole. A submodule counts what
    ran while it was being called, so one whose methods are called around `__call__` shows under its parent only.

    >>> by_module(nn.Sequential(nn.Linear(16, 8), nn.ReLU()), torch.zeros(4, 16))
    {'': 1024, '0': 1024, '1': 0}
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"by_module got {type(module).__name__}, expected an nn.Module. Use count_flops instead.")
    with _counting() as counter:
        module(*args, **kwargs)
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(module).__name__
    names = [name for name, _ in module.named_modules()]
    return {name: int(counts.get(f"{root}.{name}" if name else "Global", 0)) for name in names}


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    # Named one by one, overloads are counted before PyTorch can take them apart: under inference_mode a resize would
    # fall into indexing and sums that cost nothing.
    mapping = {key: f for op, f in _formulas.items() for key in (op, *(getattr(op, o) for o in op.overloads()))}
    # nn.MultiheadAttention has a fused inference path that hides its matrix products inside one operator.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # A count within a count (a network that works out its own cost) is not part of the outer one.
        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        with _disable_current_modes(), ops.use("reference"), counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    *heads, n, d_query = query
    return 2 * math.prod(heads) * n * key[-2] * (d_query + value[-1])


def _attention_backward(_grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    # The scores again, then the gradients of scores, value, query and key: five matrix products.
    *heads, n, d_query = query
    return 2 * math.prod(heads) * n * key[-2] * (3 * d_query + 2 * value[-1])


def _convolution_backward(
    grad: Shape, x: Shape, weight: Shape, _bias: Any, _stride: Any, _padding: Any, _dilation: Any, *rest: Any, **_: Any
) -> int:
    # Each of the two gradients costs what the forward pass cost; PyTorch's own formula forgets the groups.
    transposed, _out_padding, _groups, mask = rest
    positions = math.prod((x if transposed else grad)[2:])
    return 2 * x[0] * positions * math.prod(weight) * (int(mask[0]) + int(mask[1]))


def _distances(a: Shape, _b: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(out_shape) * a[-1]


def _grouped_mm(a: Shape, b: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    # Two flat operands share their inner dimension out among the groups, so no group sees all of it.
    return 2 * a[0] * a[1] * b[1] if len(a) == len(b) == 2 else 2 * math.prod(out_shape) * a[-1]


def _grid_sample(x: Shape, grid: Shape, mode: int = 0, *_: Any, out_shape: Shape, **__: Any) -> int:
    linear = 2 ** (len(x) - 2)
    return 2 * math.prod(out_shape) * (linear, 0, 16)[mode]


def _grid_sample_backward(
    grad: Shape, x: Shape, grid: Shape, mode: int, _padding: int, _align: bool, mask: tuple[bool, bool], **_: Any
) -> int:
    return _grid_sample(x, grid, mode, out_shape=grad) * (int(mask[0]) + int(mask[1]))


def _resize(taps: int) -> Formula:
    return lambda x, *_, out_shape, **__: 2 * taps * math.prod(out_shape)


def _resize_backward(taps: int) -> Formula:
    return lambda grad, *_, **__: 2 * taps * math.prod(grad)


def _separable(source: Shape, target: Shape, support: int) -> int:
    *batch, h_in, w_in = source
    h_out, w_out = target[-2:]
    across, down = (math.ceil(support * max(1.0, i / o)) for i, o in ((w_in, w_out), (h_in, h_out)))
    return 2 * math.prod(batch) * w_out * (h_in * across + h_out * down)


def _antialiased(support: int) -> Formula:
    return lambda x, *_, out_shape, **__: _separable(x, out_shape, support)


def _antialiased_backward(support: int) -> Formula:
    return lambda grad, _size, x, *_, **__: _separable(x, grad, support)


def _fft(share: float, real_output: bool = False) -> Formula:
    def formula(x: Shape, dim: list[int], *_: Any, out_shape: Shape, **__: Any) -> int:
        signal = out_shape if real_output else x
        return round(share * 5 * math.prod(signal) * math.log2(math.prod(signal[d] for d in dim)))

    return formula


def _rnn_layer(x: Shape, w_input: Shape, w_hidden: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(w_input) + math.prod(w_hidden))


def _rnn(x: Shape, weights: list[Shape], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def _register_aten() -> None:
    """Register the formulas above; operators that this PyTorch does not have are passed over."""
    formulas: dict[str, Formula] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
        "_scaled_dot_product_attention_math_for_mps": _attention,
        "convolution_backward": _convolution_backward,
        "conv_tbc": lambda x, w, *_, out_shape, **__: 2 * math.prod(out_shape[:2]) * math.prod(w),
        "dot": lambda a, b, **_: 2 * math.prod(a),
        "vdot": lambda a, b, **_: 2 * math.prod(a),
        "mv": lambda a, b, **_: 2 * math.prod(a),
        "addmv": lambda c, a, b, **_: 2 * math.prod(a),
        "addbmm": lambda c, a, b, **_: 2 * math.prod(a) * b[-1],
        "_int_mm": lambda a, b, **_: 2 * math.prod(a) * b[-1],
        "_grouped_mm": _grouped_mm,
        "_euclidean_dist": _distances,
        "_cdist_forward": _distances,
        "mkldnn_rnn_layer": _rnn_layer,
        "_cudnn_rnn": _rnn,
        "grid_sampler_2d": _grid_sample,
        "grid_sampler_3d": _grid_sample,
        "cudnn_grid_sampler": _grid_sample,
        "grid_sampler_2d_backward": _grid_sample_backward,
        "grid_sampler_3d_backward": _grid_sample_backward,
        "_fft_c2c": _fft(1.0),
        "_fft_r2c": _fft(0.5),
        "_fft_c2r": _fft(0.5, real_output=True),
    }
    for kind, taps in (("linear1d", 2), ("bilinear2d", 4), ("bicubic2d", 16), ("trilinear3d", 8)):
        formulas[f"upsample_{kind}"] = _resize(taps)
        formulas[f"upsample_{kind}_backward"] = _resize_backward(taps)
    for kind, support in (("bilinear2d", 2), ("bicubic2d", 4), ("lanczos2d", 6)):
        formulas[f"_upsample_{kind}_aa"] = _antialiased(support)
        formulas[f"_upsample_{kind}_aa_backward"] = _antialiased_backward(support)
    for name, formula in formulas.items():
        if hasattr(_aten, name):
            register(getattr(_aten, name), formula)


_register_aten()
