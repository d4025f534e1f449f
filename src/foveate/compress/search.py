"""The smallest amount that reaches a quality: bisection on the logarithm.

Quality is taken to rise with the amount, which holds for the codecs but for small wiggles; what is returned reached
the quality, wiggles or not.
"""

from collections.abc import Callable
from math import exp, inf, log
from typing import TypeVar

from foveate.compress.codec import Progress
from foveate.errors import BudgetError

T = TypeVar("T")


def smallest(
    attempt: Callable[[float, Progress], tuple[T, float]],
    quality: float,
    least: float,
    most: float,
    progress: Progress | None = None,
    name: str = "The method",
    tries: int = 12,
    close: float = 0.05,
) -> T:
    """Find the result of the smallest amount whose quality suffices.

    Args:
        attempt: (amount, progress) -> (result, its quality in dB); a BudgetError counts as too small an amount.
        quality: in dB.
        least, most: the amounts between which to search, above 0.
        progress: told the share of the tries done; when it returns True, the best attempt so far is kept.
        name: of the method, for messages.
        tries: attempts at most.
        close: an excess in dB with which the search is content.

    Raises: BudgetError when no amount suffices.

    >>> round(smallest(lambda amount, _: (amount, 10 * amount), 20, 0.1, 100, tries=30, close=0), 3)
    2.0
    """
    best: tuple[T, float] | None = None
    low, high, stopped = log(least), log(most), False
    for done in range(tries):

        def report(share: float, dB: float | None, done: int = done) -> bool:
            nonlocal stopped
            stopped = stopped or bool(progress and progress((done + share) / tries, dB))
            return stopped

        amount, reached = (low + high) / 2, -inf
        try:
            result, reached = attempt(exp(amount), report)
            if best is None or _better(reached, best[1], quality):
                best = (result, reached)
        except BudgetError:
            pass
        if report(1.0, reached if reached > -inf else None) or quality <= reached <= quality + close:
            break
        low, high = (low, amount) if reached >= quality else (amount, high)
    if best is None or (best[1] < quality and not stopped):
        most_reached = f"{best[1]:.2f} dB" if best else "no file"
        raise BudgetError(f"{name} reaches {most_reached} at most on this picture, asked {quality:g} dB; ask for less.")
    return best[0]


def _better(reached: float, best: float, quality: float) -> bool:
    """Whether a reached quality is nearer to the wish: enough beats too little, then the nearer of the two."""
    if (reached >= quality) != (best >= quality):
        return reached >= quality
    return reached < best if best >= quality else reached > best
