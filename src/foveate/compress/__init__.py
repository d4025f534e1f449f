"""Pictures to bits and back: one container (docs/container.md), one entropy coder, a codec per file.

`foveate.compress` is this package and the verb at once: calling it compresses a picture.

    data = foveate.compress("in.png", method="predictive-sparse-decomposition", budget="0.5 bpp")
    image = foveate.decompress(data)
"""

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    """A package that can be called."""

    def __call__(self, image: Any, **arguments: Any) -> bytes:
        """See `foveate.compress.verbs.compress`."""
        from foveate.compress.verbs import compress

        return compress(image, **arguments)


sys.modules[__name__].__class__ = _Verb
