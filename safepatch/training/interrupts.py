"""Ctrl-C while a run trains: it only asks to stop, so that whole steps are kept."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from safepatch.errors import SafepatchError


class Interrupted(SafepatchError):
    """Ctrl-C during training; a checkpoint was kept."""


@contextmanager
def ctrl_c_waits() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C only makes what is yielded true; a second one stops at once, at the last checkpoint."""
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield lambda: False  # signals are the main thread's, and what someone else arranged for them stays
        return
    presses: list[int] = []

    def ask(number: int, _: object) -> None:
        presses.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, usual)
