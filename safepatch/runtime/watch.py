"""Fail-closed: what is noticed of a host that runs, or an image that is made, without the patch that hangs on it."""

import threading
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from safepatch.diffusion import HostKind, denoiser, host_kind, threads_inside, uncompiled
from safepatch.errors import PatchBypassed
from safepatch.runtime.call import Begun
from safepatch.runtime.denoising import Denoising
from safepatch.runtime.drain import Drain


class Watch:
    """Raises `PatchBypassed` where a host went without its patch.

    Args:
        host: which the patch hangs on.
        kind: of it.
        drain: knows when the patch is taken off.
        fail_closed: whether to raise; else a window that no step meets is a warning, and all else passes.
    """

    def __init__(self, host: nn.Module, kind: HostKind, drain: Drain, fail_closed: bool) -> None:
        self.fail_closed = fail_closed
        self._host, self._kind, self._drain = host, kind, drain
        self._earlier: set[int] | None = None  # threads in a call that began before the patch was here

    def begin(self) -> None:
        """The patch hangs on the host from now on, but in the calls that are under way."""
        self._earlier = threads_inside(self._host)

    def let_in(self) -> None:
        """This thread calls the host anew, now with the patch."""
        if self._earlier:
            self._earlier.discard(threading.get_ident())

    def require_hanging(self, all_hang: bool) -> None:
        """A call is about to be made: all hooks of the patch must hang."""
        if self.fail_closed and not all_hang:
            self._bypassed("hooks inside it are lost; apply the patch again")

    def enter(self, begun: Begun) -> None:
        """The host's first layer is about to run, however it was called: the patch must have had its say."""
        if begun.has_entered or not begun.is_prepared:
            self.require_earlier()
        begun.has_entered = begun.is_prepared

    def require_earlier(self) -> None:
        """The host ran, and the patch was not asked: an error, unless it was not there when the call began."""
        thread, earlier = threading.get_ident(), self._earlier
        if not self.fail_closed or self._drain.is_over or earlier is None or thread in earlier:
            return
        name = self._kind.component
        self._bypassed(f"its hook is lost, or {name}.forward() was called; call {name}()")

    def require_taken(self, begun: Begun, missed: Sequence[str]) -> None:
        """A call has ended in which something was to be corrected: it must have been.

        Args:
            begun: the call.
            missed: what did not happen in it.
        """
        if self.fail_closed and not begun.has_entered:
            self._bypassed(f"its {self._kind.entry} was replaced or not called; apply the patch again")
        if self.fail_closed and missed:
            self._bypassed(f"{missed[0]}: hooks inside it are lost, or it was wrapped; apply the patch again")

    def require_met(self, denoising: Denoising, window: tuple[float, float]) -> None:
        """A denoising begins: some step of it must be within the window, as far as its pipeline tells; said once."""
        if denoising.will_miss:
            denoising.will_miss, denoising.is_met = False, True
            self._say_missed(window)

    def require_same(self, pipe: Any) -> None:
        """An image is about to be made: the pipeline that the patch was applied to must still draw with this host."""
        if pipe is not None and uncompiled(denoiser(pipe)) is not self._host:
            raise PatchBypassed(
                f"pipe.{self._kind.component} was replaced after the patch was applied; apply the patch again"
            )

    def refuse_unpatched(self, caller: Any) -> NoReturn:
        """The image would be that of another pipeline with the same VAE, on whose host no patch hangs."""
        noun = host_kind(uncompiled(denoiser(caller))).noun
        raise PatchBypassed(
            f"{type(caller).__name__} shares this VAE but its {noun} carries no patch; apply the patch to it too"
        )

    def require_acted(self, drawn: Denoising, window: tuple[float, float]) -> None:
        """An image is about to be made: some step of its denoising must have been within the window."""
        if drawn.is_missed:
            self._say_missed(window)

    def _say_missed(self, window: tuple[float, float]) -> None:
        start, end = window
        text = f"no step of this denoising is within the patch's window, {start} to {end}; widen it, or take more steps"
        if self.fail_closed:
            raise PatchBypassed(text)
        warnings.warn(text, stacklevel=2)

    def _bypassed(self, why: str) -> NoReturn:
        raise PatchBypassed(f"the {self._kind.noun} ran without its patch: {why}")
