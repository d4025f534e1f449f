"""The lower bytes of samples of 16 bits or more, when the upper ones are known.

A sample is predicted from its neighbours at full precision, as the median of W, N and W + N - NW, and the prediction is
held to what the upper bytes allow. What is coded is the difference modulo 256, by a table learned as it goes. Where
that is longer, the prediction is a constant 0, or the byte above (samples of 8 bits stretched to 16 repeat it).
"""

from functools import lru_cache
from typing import Any

import numpy as np

from foveate.compress.entropy import Decoder, Encoder, Ints
from foveate.compress.fields import Reader

_ZERO, _REPEATED, _MEDIAN = range(3)


def encode(samples: Ints) -> bytes:
    """Code the lowest byte of samples [C, H, W], given the rest."""
    tried = []
    for rule in (_ZERO, _REPEATED, _MEDIAN):
        differences = np.empty(samples.shape, np.int64)
        _kernel()(samples, differences, rule, False)
        counts = np.bincount(differences.reshape(-1), minlength=256)
        bits = -(counts * np.log2(np.maximum(counts, 1) / samples.size)).sum()
        tried.append((float(bits), rule, differences))
    _, rule, differences = min(tried, key=lambda one: one[:2])
    coder = Encoder()
    coder.put_adaptive(differences, 256)
    return bytes([rule]) + coder.finish()


def decode(data: bytes, upper: Ints) -> Ints:
    """Samples [C, H, W] out of what `encode` gave, and all above their lowest bytes.

    Raises: BitstreamError when it makes no sense.
    """
    section = Reader(data, "low bytes")
    rule = section.byte()
    if rule > _MEDIAN:
        raise section.error(f"a rule {rule}")
    coder = Decoder(section.rest(), "low bytes")
    differences = coder.get_adaptive(upper.size, 256).reshape(upper.shape)
    coder.end()
    samples = upper << 8
    _kernel()(samples, differences, rule, True)
    return samples


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """The pass over the samples, compiled when first used."""
    from numba import njit

    @njit(nogil=True, cache=True)
    def run(samples: Any, differences: Any, rule: int, decode: bool) -> None:
        for c in range(samples.shape[0]):
            for y in range(samples.shape[1]):
                for x in range(samples.shape[2]):
                    base = samples[c, y, x] & ~255
                    expected = 0
                    if rule == _REPEATED:
                        expected = (base >> 8) & 255
                    elif rule == _MEDIAN and (x > 0 or y > 0):
                        w = samples[c, y, x - 1] if x > 0 else samples[c, y - 1, x]
                        n = samples[c, y - 1, x] if y > 0 else w
                        nw = samples[c, y - 1, x - 1] if x > 0 and y > 0 else n
                        median = max(min(w, n), min(max(w, n), w + n - nw))
                        expected = min(max(median - base, 0), 255)
                    if decode:
                        samples[c, y, x] = base + ((expected + differences[c, y, x]) & 255)
                    else:
                        differences[c, y, x] = (samples[c, y, x] - base - expected) & 255

    return run
