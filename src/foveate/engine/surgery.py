"""Change someone else's model, and undo it exactly.

Every change is one entry of a dictionary that PyTorch already keeps: a module's `_modules` (which submodule answers to
a name) or its `__dict__` (its own `forward`, or another method). A handle remembers each entry before and after;
`remove()` puts the very same objects back, so weights, state dict keys and outputs return bit for bit. Changes may lie
on top of each other and come off in reverse order; one that still has another on top of it refuses to be removed.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import nn

from foveate.errors import InputError

_ABSENT: Any = object()
_WILDCARDS = {"**.": r"(?:.*\.)?", "**": ".*", "*": "[^.]*", "?": "[^.]"}
_WILDCARD = re.compile(r"(\*\*\.|\*\*|\*|\?)")

What = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """One entry of one dictionary, before and after."""

    entries: dict[str, Any]
    key: str
    before: Any
    after: Any
    label: str
    mode: bool  # training flag of `after` when it was put in

    def undo(self) -> None:
        self._put(self.before)
        # Whoever called train() or eval() meanwhile meant the module that now comes back, too.
        if isinstance(self.before, nn.Module) and self.after.training != self.mode:
            self.before.train(self.after.training)

    def redo(self) -> None:
        self._put(self.after)

    def _put(self, value: Any) -> None:
        if value is _ABSENT:
            del self.entries[self.key]
        else:
            self.entries[self.key] = value


class Handle:
    """Undo a change to a model: call `remove()`, or use it as a context manager.

    Removing twice does nothing.

    Raises: InputError from `remove()` when a later change lies on top of this one; nothing is undone then.
    """

    def __init__(self, changes: Sequence[_Change]) -> None:
        self._changes = list(changes)

    @property
    def active(self) -> bool:
        """Whether there is something left to undo."""
        return bool(self._changes)

    def remove(self) -> None:
        """Put back what was there before, the very same objects."""
        self._check_on_top()
        for change in reversed(self._changes):
            change.undo()
        self._changes.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the model be as it was for as long as this is open.

        Raises: InputError as `remove`.
        """
        self._check_on_top()
        for change in reversed(self._changes):
            change.undo()
        try:
            yield
        finally:
            for change in self._changes:
                change.redo()

    def _check_on_top(self) -> None:
        top: dict[tuple[int, str], Any] = {}
        for change in reversed(self._changes):
            place = (id(change.entries), change.key)
            if top.get(place, change.entries.get(change.key, _ABSENT)) is not change.after:
                raise InputError(f"{change.label!r} was changed again since; remove the later change first.")
            top[place] = change.before

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def join(handles: Sequence[Handle]) -> Handle:
    """Make one handle of several, given in the order in which the changes were made; the parts become inactive."""
    changes = [change for handle in handles for change in handle._changes]
    for handle in handles:
        handle._changes.clear()
    return Handle(changes)


def find(model: nn.Module, what: What) -> dict[str, nn.Module]:
    """Find submodules by class, name or predicate.

    Args:
        model: where to look; the model itself is not among the results.
        what: a module class or a tuple of them; a name with wildcards (`*` stands for anything within one part of the
            dotted name, `**` for any number of parts); or a function of (name, module).

    Returns: {name: module} in the model's order; a module held under several names appears once, under its first.

    >>> list(find(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2))), nn.Linear))
    ['0', '1.1']
    """

    def fits(name: str, module: nn.Module) -> bool:
        if isinstance(what, str):
            pattern = "".join(_WILDCARDS.get(piece, re.escape(piece)) for piece in _WILDCARD.split(what))
            return re.fullmatch(pattern, name) is not None
        if isinstance(what, type | tuple):
            return isinstance(module, what)
        return what(name, module)

    return {name: m for name, m in model.named_modules() if name and fits(name, m)}


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> Handle:
    """Put other modules in the place of a model's own.

    A module held under several names is replaced under all of them, so it stays one module. The replacement takes
    over the training or evaluation mode; modules of the original that it holds inside keep theirs.

    Args:
        model: changed in place.
        modules: {dotted name: replacement}, names as in `model.named_modules()`.

    Returns: the handle that undoes it.

    Raises: InputError for a name that the model has not (with the nearest ones), a replacement that is not a module,
        or two replacements for one shared module; the model is unchanged then.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with replace(model, {"1": nn.GELU()}):
    ...     print(model[1])
    GELU(approximate='none')
    >>> model[1]
    ReLU()
    """
    named = dict(model.named_modules(remove_duplicate=False))
    wanted: dict[int, tuple[str, nn.Module]] = {}
    for name, new in modules.items():
        if not name or name not in named:
            near = difflib.get_close_matches(name, [n for n in named if n], n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; see model.named_modules()."
            raise InputError(f"The model {type(model).__name__} has no submodule {name!r}{hint}")
        if not isinstance(new, nn.Module):
            raise InputError(f"The replacement for {name!r} is a {type(new).__name__}; pass an nn.Module.")
        first, other = wanted.setdefault(id(named[name]), (name, new))
        if other is not new:
            raise InputError(f"{first!r} and {name!r} are one shared module; give both the same replacement.")

    changes = []
    for parent in list(model.modules()):
        for key, old in parent._modules.items():
            if old is not None and id(old) in wanted:
                name, new = wanted[id(old)]
                changes.append(_Change(parent._modules, key, old, new, name, old.training))
    for change in changes:
        _adopt_mode(change.after, change.before)
        change.entries[change.key] = change.after
    return Handle(changes)


def _adopt_mode(new: nn.Module, old: nn.Module) -> None:
    own = [(m, m.training) for m in old.modules()]
    new.train(old.training)
    for module, training in own:
        module.training = training


def add(module: nn.Module, name: str, new: nn.Module) -> Handle:
    """Hang a submodule into a module that has none of this name; its parameters train and save with the model.

    Raises: InputError when the name is taken, or is not one that a submodule can have.

    >>> model = nn.Sequential(nn.ReLU())
    >>> with add(model, "extra", nn.Linear(1, 1)):
    ...     print(list(model.state_dict()))
    ['extra.weight', 'extra.bias']
    """
    if not name.isidentifier() or hasattr(module, name):
        raise InputError(f"{type(module).__name__} cannot take a submodule {name!r}; choose a name that is free.")
    new.train(module.training)
    change = _Change(module._modules, name, _ABSENT, new, f"{type(module).__name__}.{name}", module.training)
    change.redo()
    return Handle([change])


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The dotted name under which a model holds a module, as `replace` takes it; "" for the model itself.

    Raises: InputError when the model does not hold it.
    """
    for name, found in model.named_modules():
        if found is module:
            return name
    raise InputError(f"The model {type(model).__name__} does not hold this {type(module).__name__}; pass one it holds.")


def patch_forward(module: nn.Module, fn: Callable[..., Any]) -> Handle:
    """Let a function run in the place of a module's forward.

    Args:
        module: changed in place; its class, submodules and parameters stay as they are.
        fn: called as fn(forward, *args, **kwargs), where `forward` is what ran before.

    Returns: the handle that undoes it.

    >>> import torch
    >>> layer = nn.Identity()
    >>> with patch_forward(layer, lambda forward, x: 2 * forward(x)):
    ...     print(layer(torch.tensor(3)))
    tensor(6)
    """
    return patch_method(module, "forward", fn)


def patch_method(module: nn.Module, name: str, fn: Callable[..., Any]) -> Handle:
    """Let a function run in the place of any method of a module; see `patch_forward`."""
    original = getattr(module, name, None)
    if not callable(original):
        raise InputError(f"{type(module).__name__} has no method {name!r}.")
    # A partial, unlike a closure, follows its module through copy.deepcopy; the wrapper keeps the signature visible.
    patched = functools.update_wrapper(functools.partial(fn, original), original)
    before = module.__dict__.get(name, _ABSENT)
    change = _Change(module.__dict__, name, before, patched, f"{type(module).__name__}.{name}", module.training)
    change.redo()
    return Handle([change])
