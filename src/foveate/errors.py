"""What can go wrong, in the user's words.

Every message quotes what was passed, says what was expected, and ends with what to do. Command-line verbs print the
message alone (no traceback) and leave with exit code 2.
"""


class FoveateError(Exception):
    """Base of all errors that foveate raises on purpose."""


class InputError(FoveateError, ValueError):
    """A picture, tensor or argument that cannot be used as it is."""


class BudgetError(FoveateError, ValueError):
    """A budget that cannot be read, or that the system cannot meet."""


class UnknownSystemError(FoveateError, LookupError):
    """A name that no card in the catalogue carries."""


class NotBuiltError(FoveateError, LookupError):
    """A system that has a card but no code yet."""


class MissingExtraError(FoveateError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


class WeightsError(FoveateError, ValueError):
    """Weights that are absent, damaged, or made for another architecture."""


class PictureError(InputError):
    """A picture file that cannot be read or written."""


class BitstreamError(InputError):
    """A compressed file that is truncated, damaged, foreign, or made by a newer foveate."""
