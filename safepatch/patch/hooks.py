"""Hooks on a host that belong to one attachment, and what belongs to the call of the host that is under way."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from safepatch.errors import ConfigError

T = TypeVar("T")


def unpicklable(self: Any) -> NoReturn:
    """What a patch that is on a pipeline does when it is pickled with it, as a `__reduce__`."""
    raise ConfigError("a pipeline with a patch cannot be pickled; take the patch off, and apply it where it is used")


class Hook(NamedTuple):
    """One hook where it was put.

    Attributes:
        module: it hangs on.
        table: name of the module's table of such hooks.
        handle: with which to take it off.
    """

    module: nn.Module
    table: str
    handle: RemovableHandle

    @property
    def is_there(self) -> bool:
        """Whether nobody has taken it off."""
        return self.handle.id in getattr(self.module, self.table)


class Hooks:
    """Hooks that come off together, and of which it can be told whether all still hang."""

    def __init__(self) -> None:
        self._hooks: list[Hook] = []

    def before(self, module: nn.Module, function: Callable, with_kwargs: bool = False) -> None:
        """Call `function` before the module's forward."""
        handle = module.register_forward_pre_hook(function, with_kwargs=with_kwargs)
        self._hooks.append(Hook(module, "_forward_pre_hooks", handle))

    def after(
        self, module: nn.Module, function: Callable, always_call: bool = False, with_kwargs: bool = False
    ) -> None:
        """Call `function` after the module's forward, even one that failed if `always_call`."""
        handle = module.register_forward_hook(function, always_call=always_call, with_kwargs=with_kwargs)
        self._hooks.append(Hook(module, "_forward_hooks", handle))

    def remove(self) -> None:
        """Take them off; calling it twice is harmless."""
        while self._hooks:
            self._hooks.pop().handle.remove()

    @property
    def all_hang(self) -> bool:
        """Whether every hook is where it was put; and there is one."""
        return bool(self._hooks) and all(hook.is_there for hook in self._hooks)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._hooks)

    def __iter__(self) -> Iterator[Hook]:
        """Each of them."""
        return iter(self._hooks)


class Calls(Generic[T]):
    """What belongs to the host's call that is under way: each thread has its own, and so has a call within a call.

    Args:
        new: makes what a call begins with. Between calls a thread has one that no call begins with.
    """

    def __init__(self, new: Callable[[], T]) -> None:
        self._new = new
        self._own = threading.local()

    @property
    def now(self) -> T:
        """Of this thread's innermost call."""
        return self._stack()[-1]

    def begin(self) -> T:
        """A call begins; what belongs to the one around it is kept for when this one has ended."""
        self._stack().append(self._new())
        return self.now

    def end(self) -> T | None:
        """The innermost call has ended; what belonged to it, or None if none had begun."""
        return self._stack().pop() if len(self._stack()) > 1 else None

    def _stack(self) -> list[T]:
        if not hasattr(self._own, "stack"):
            self._own.stack = [self._new()]
        return self._own.stack

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calls[T]":
        """A copied host is in no call."""
        return Calls(copy.deepcopy(self._new, memo))
