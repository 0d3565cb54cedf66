"""Hooks by which a patch acts inside its host: in the calls, at the places and on the rows that it is told to."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from safepatch.patch.hooks import Calls, Hooks


class Told(NamedTuple):
    """What of a call of the host a patch may read beside what passes through its places.

    Attributes:
        timesteps: as the host counts them, (B,).
        prompt_states: the rows' text states, (B, tokens, width).
        instruction_states: the safety instructions' text states, (1 or B, tokens, width).
    """

    timesteps: Tensor
    prompt_states: Tensor
    instruction_states: Tensor


@dataclass
class Acting:
    """What a patch is to do in one call of the host.

    Attributes:
        rows: of what the host is given, the last ones, those that it acts on; None for none.
        scale: strength, of all (1,), of each of `rows`, or of each of its groups too (1 or rows, groups); None for 1.
        left: places at which it has still to act.
        read: what it has made of what it was told.
    """

    rows: slice | None = None
    scale: Tensor | None = None
    left: set[str] = field(default_factory=set)
    read: Any = None


class PlaceHooks(ABC):
    """Hooks on modules of a host that change what they make.

    Args:
        unet: the host.
        places: names of the modules.
    """

    def __init__(self, unet: Any, places: Iterable[str]) -> None:
        self._places = tuple(places)
        self._calls = Calls(Acting)
        self.hooks = Hooks()
        for place in self._places:
            self.hooks.after(unet.get_submodule(place), partial(self._pass, place))

    def begin(self) -> None:
        """The host is about to be called, by default without the patch."""
        self._calls.begin()

    def update(self, rows: slice, scale: Tensor | None = None, skipped: Sequence[int] = ()) -> None:
        """The call that has begun is one with the patch.

        Args:
            rows: of what the host is given, the last ones, those that are changed.
            scale: strength, as in `Acting`; 1 by default.
            skipped: transformer blocks that this call leaves out, as SD3's skip layer guidance does.
        """
        now, out = self._calls.now, tuple(f"transformer_blocks.{index}." for index in skipped)
        now.rows, now.scale = rows, scale
        now.left = {place for place in self._places if not f"{place}.".startswith(out)}

    def tell(self, told: Told) -> None:  # noqa: B027 what most patches do with it is nothing
        """What the rows of this call are told; most patches read nothing of it."""

    @property
    def missed(self) -> list[str]:
        """What has not happened so far in the call that is under way."""
        left = sorted(self._calls.now.left)
        return [f"'{left[0]}' ({len(left)} layers in all) was not called as a layer"] if left else []

    def end(self) -> list[str]:
        """The call has ended; what did not happen in it."""
        missed = self.missed
        self._calls.end()
        return missed

    def _pass(self, place: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = self._calls.now
        return None if now.rows is None else self._changed(place, module, now, args, output)

    @abstractmethod
    def _changed(self, place: str, module: nn.Module, now: Acting, args: tuple[Any, ...], output: Any) -> Any:
        """What a place makes, changed; where it was, it is no longer `left`."""


@contextmanager
def lent(patch: Any, hooks: PlaceHooks) -> Iterator[None]:
    """Within the block `hooks` are the patch's own."""
    patch.hooks = hooks
    try:
        yield
    finally:
        hooks.hooks.remove()
        patch.hooks = None
