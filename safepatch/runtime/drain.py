"""Taking a patch off while threads draw with it: what is under way is finished first."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from safepatch.diffusion import Drawing, threads_inside
from safepatch.errors import ConfigError

PAUSE = 0.005  # seconds between two looks at the threads


class Drain:
    """Lets denoisings that have begun go on, and holds the calls of new ones back until the patch is off.

    Args:
        host: whose calls pass by.

    Attributes:
        is_over: whether the patch is off.
    """

    def __init__(self, host: nn.Module) -> None:
        self._host = host
        self.is_over = False
        self._one_at_a_time = threading.Lock()
        self._last: dict[int, Drawing] = {}  # by thread
        self._is_asked = False
        self._staying: list[Drawing] | None = None  # those that are finished first
        self._held: set[int] = set()  # threads whose call is held back
        self._gone = threading.Event()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Drain":
        """A copy's host is its own, and nobody has called it yet."""
        return Drain(memo[id(self._host)])

    def pass_by(self, by: Drawing | None) -> None:
        """A call of the host begins, made by this denoising; None by none that is known.

        Raises:
            ConfigError: as `require_undisturbed`.
        """
        if by is not None:
            self._meet(by)
            require_undisturbed(by)
        while self._is_asked and self._staying is None:
            time.sleep(PAUSE)
        if self._is_asked and not any(by is one for one in self._staying or ()):
            self._held.add(threading.get_ident())
            self._gone.wait()

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Within the block nobody is drawing.

        Raises:
            ConfigError: when this thread itself is in the midst of it.
        """
        own = threading.get_ident()
        mine = self._last.get(own)
        if (mine is not None and mine.is_running) or own in threads_inside(self._host):
            raise ConfigError("a denoising is under way in this thread; take the patch off when it has ended")
        with self._one_at_a_time:
            self._is_asked = True
            self._staying = [one for one in [*self._last.values()] if one.is_running]
            while any(one.is_running for one in self._staying) or threads_inside(self._host) - self._held:
                time.sleep(PAUSE)
            try:
                yield
            finally:
                self.is_over = True
                self._is_asked, self._staying = False, None
                self._gone.set()

    def _meet(self, by: Drawing) -> None:
        """Note down who draws; a denoising that begins while another thread draws with its pipeline disturbs both."""
        if self._last.get(by.thread) is by:
            return
        self._last[by.thread] = by
        beside = [one for one in [*self._last.values()] if one.is_beside(by)]
        for one in [*beside, by] if beside else ():
            one.is_disturbed = True


def require_undisturbed(by: Drawing) -> None:
    """Raise `ConfigError` where two threads draw with one pipeline, which holds one image's state; neither gets any."""
    if by.is_disturbed:
        raise ConfigError(
            "two threads draw with one pipeline, which holds the state of one image; give each thread a pipeline, "
            "scheduler and tokenizer of its own: they may share the models"
        )
