"""Numeric kernels: a plain PyTorch reference each, and fast paths held equal to it by tests.

A fast path is taken where device and dtype allow it and nobody needs a gradient through it. `use("reference")` switches
all of them off, `use("fast")` on again; as a context manager it is undone at the end:

>>> with use("reference"):
...     fast_allowed()
False
>>> fast_allowed()
True
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from foveate.errors import InputError

_PATHS = ("fast", "reference")
_state = {"path": "fast"}


def use(path: str) -> AbstractContextManager[None]:
    """Choose between "fast" (default) and "reference" kernels for this process.

    Raises: InputError for another name.
    """
    if path not in _PATHS:
        raise InputError(f"there is no path {path!r}; use one of {', '.join(map(repr, _PATHS))}.")
    before = _state["path"]
    _state["path"] = path
    return _restoring(before)


@contextmanager
def _restoring(before: str) -> Iterator[None]:
    try:
        yield
    finally:
        _state["path"] = before


def fast_allowed() -> bool:
    """Whether fast paths may be taken."""
    return _state["path"] == "fast"
