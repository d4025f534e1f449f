"""What the user is willing to spend: the one knob of foveate.

A budget is an amount and a unit. A *share* (0.5, "50%") is a part of what the full, non-adaptive work would cost;
every other unit is absolute and becomes a share once the full cost is known:

    share = min(1, amount / full cost in the same unit)

Compute is counted in floating point operations, two for each multiply-accumulate, so 1 GMAC is 2 GFLOPs.
"""

import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Self

from foveate.errors import BudgetError, InputError

UNITS = ("share", "gflops", "ms", "tokens", "bpp", "bytes", "gaussians")
EXAMPLES = "0.5, '50%', '20 GFLOPs', '35 ms', '64 tokens', '0.5 bpp', '200 kB' or '2000 gaussians'"

_LABELS = {unit: unit for unit in UNITS[1:]} | {"gflops": "GFLOPs"}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(.*?)\s*", re.IGNORECASE)
_BITS_OR_BYTES = re.compile(r"[kKmMgG]i?b")

# What one of each unit is worth in the canonical unit; keys are lower case.
_ALIASES: dict[str, tuple[str, float]] = {
    "": ("share", 1.0),
    "share": ("share", 1.0),
    "%": ("share", 0.01),
    "percent": ("share", 0.01),
    "us": ("ms", 1e-3),
    "µs": ("ms", 1e-3),
    "ms": ("ms", 1.0),
    "s": ("ms", 1e3),
    "sec": ("ms", 1e3),
    "seconds": ("ms", 1e3),
    "token": ("tokens", 1.0),
    "tokens": ("tokens", 1.0),
    "bpp": ("bpp", 1.0),
    "b": ("bytes", 1.0),
    "byte": ("bytes", 1.0),
    "bytes": ("bytes", 1.0),
    "kb": ("bytes", 1e3),
    "mb": ("bytes", 1e6),
    "gb": ("bytes", 1e9),
    "kib": ("bytes", 2.0**10),
    "mib": ("bytes", 2.0**20),
    "gib": ("bytes", 2.0**30),
    "gaussian": ("gaussians", 1.0),
    "gaussians": ("gaussians", 1.0),
}
for _prefix, _giga in {"": 1e-9, "k": 1e-6, "m": 1e-3, "g": 1.0, "t": 1e3, "p": 1e6}.items():
    for _word, _operations in {"flop": 1.0, "flops": 1.0, "mac": 2.0, "macs": 2.0}.items():
        _ALIASES[_prefix + _word] = ("gflops", _giga * _operations)


@dataclass(frozen=True, slots=True)
class Budget:
    """Say how much may be spent.

    Args:
        amount: how much, greater than 0; a share is at most 1.
        unit: one of "share" (default), "gflops", "ms", "tokens", "bpp" (bits per pixel), "bytes",
            "gaussians" (primitives of a picture made of them).

    Raises: BudgetError when the amount is not a positive finite number, a share exceeds 1, or the unit is unknown.

    >>> Budget.parse("20 GFLOPs").share_of(gflops=40)
    0.5
    >>> str(Budget.parse("64 tokens")), str(Budget.parse("50%"))
    ('64 tokens', '0.5')
    """

    amount: float
    unit: str = "share"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise BudgetError(f"Unknown budget unit {self.unit!r}; use one of {', '.join(UNITS)}.")
        if isinstance(self.amount, bool) or not isinstance(self.amount, Real):
            raise BudgetError(f"A budget's amount is a number, got {self.amount!r}; write for example {EXAMPLES}.")
        object.__setattr__(self, "amount", float(self.amount))
        if not math.isfinite(self.amount) or self.amount <= 0:
            raise BudgetError(f"A budget is a finite amount above 0, got {self}; write for example {EXAMPLES}.")
        if self.unit == "share" and self.amount > 1:
            meant = f" did you mean '{self.amount:g}%'?" if self.amount <= 100 else ""
            raise BudgetError(f"A share of the full cost is at most 1 (100%), got {self.amount:g};{meant or ' use 1.'}")

    @classmethod
    def parse(cls, x: "Budget | float | str") -> Self:
        """Read a budget as a user writes it.

        Args:
            x: a Budget (returned as it is), a share in (0, 1], or text with a unit such as "50%", "20 GFLOPs",
                "500 MFLOPs", "35 ms", "0.2 s", "64 tokens", "0.5 bpp", "200 kB", "1 MiB", "2000 gaussians". Case does
                not matter, but for the b of kB: a small one may mean bits.

        Raises: BudgetError when it cannot be read.
        """
        if isinstance(x, cls):
            return x
        if isinstance(x, str):
            return cls._parse_text(x)
        if isinstance(x, bool) or not isinstance(x, Real):
            raise BudgetError(f"Cannot read {x!r} as a budget; write for example {EXAMPLES}.")
        return cls(float(x))

    @classmethod
    def _parse_text(cls, text: str) -> Self:
        match = _NUMBER.fullmatch(text)
        if match is None:
            raise BudgetError(f"Cannot read {text!r} as a budget; write for example {EXAMPLES}.")
        number, unit = float(match[1]), match[2]
        if _BITS_OR_BYTES.fullmatch(unit):
            sure = unit[0].replace("K", "k") + unit[1:-1] + "B"
            raise BudgetError(f"{text!r} could mean bits or bytes; for bytes write '{match[1]} {sure}'.")
        if unit.lower() not in _ALIASES:
            raise BudgetError(f"Unknown unit {unit!r} in the budget {text!r}; write for example {EXAMPLES}.")
        canonical, factor = _ALIASES[unit.lower()]
        # Division by a whole number keeps "50%" at exactly 0.5 where a product with 0.01 may not.
        return cls(number * factor if factor >= 1 else number / round(1 / factor), canonical)

    def share_of(self, **full: float) -> float:
        """Give the budget as a share of the full cost.

        Args:
            full: what the full work costs, in each unit that the caller knows, e.g. `gflops=40, ms=120`.

        Returns: a share in (0, 1]; a budget above the full cost gives 1.

        Raises: BudgetError when the budget's unit is not among `full`; InputError for a full cost that is not a
            positive number or a unit that does not exist.
        """
        for unit, cost in full.items():
            if unit not in UNITS or unit == "share":
                raise InputError(f"share_of knows the units {', '.join(UNITS[1:])}, got {unit}={cost!r}.")
            if not (math.isfinite(cost) and cost > 0):
                raise InputError(f"The full cost must be a finite number above 0, got {unit}={cost!r}.")
        if self.unit == "share":
            return self.amount
        if self.unit not in full:
            known = " or in ".join(_LABELS[unit] for unit in full)
            raise BudgetError(
                f"The budget {self} cannot be weighed here; give a share such as 0.5"
                + (f", or a budget in {known}." if known else ".")
            )
        return min(1.0, self.amount / full[self.unit])

    def __str__(self) -> str:
        number = repr(self.amount).removesuffix(".0")
        return number if self.unit == "share" else f"{number} {_LABELS[self.unit]}"
