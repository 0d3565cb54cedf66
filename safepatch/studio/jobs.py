"""What takes long is done by one thread, one thing at a time; whoever asked looks in and may stop it."""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from safepatch.errors import SafepatchError, UnknownName, printable
from safepatch.progress import heard_by

LOG = logging.getLogger(__name__)
KEPT, WAITING = 16, 8  # results that may still be fetched; things that may wait


class Stopped(SafepatchError):
    """Somebody stopped it."""


class Busy(SafepatchError):
    """More waits than may."""


@dataclass
class State:
    """How a job stands.

    Attributes:
        stage: `waiting`, `running`, `done`, `failed`.
        text: what is being done, or one line about what failed.
        share: of it that is done, 0 to 1; None where nobody knows.
        html: what it came to.
    """

    stage: str = "waiting"
    text: str = "waiting for what was asked before"
    share: float | None = None
    html: str = ""
    is_stopped: bool = False


class Jobs:
    """The line and its thread; `with` starts and ends it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting = deque[tuple[State, Callable[[], str]]]()
        self._states = OrderedDict[int, State]()
        self._count, self._is_closed = 0, False
        self._thread = threading.Thread(target=self._run, name="safepatch-studio", daemon=True)

    def __enter__(self) -> "Jobs":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What runs is stopped at its next step."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            for state in self._states.values():
                state.is_stopped = True
            self._changed.notify_all()
        self._thread.join()

    def submit(self, work: Callable[[], str]) -> int:
        """Line up `work`, which returns HTML; the number to ask by. Raises `Busy` when too much waits."""
        with self._changed:
            if len(self._waiting) >= WAITING:
                raise Busy(f"{WAITING} things are waiting already; stop one, or wait")
            self._count += 1
            state = self._states[self._count] = State()
            while len(self._states) > KEPT + WAITING:
                self._states.popitem(last=False)
            self._waiting.append((state, work))
            self._changed.notify_all()
            return self._count

    def state(self, number: int) -> State:
        """How it stands; raises `UnknownName` for a number that was never given, or is long past."""
        if number not in self._states:
            raise UnknownName("what was asked is no longer known; ask again")
        return self._states[number]

    def stop(self, number: int) -> None:
        """Stop it at its next step, or before it begins."""
        self.state(number).is_stopped = True

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                state, work = self._waiting.popleft()
            self._do(state, work)

    def _do(self, state: State, work: Callable[[], str]) -> None:
        def hear(text: str, done: int, total: int | None) -> None:
            if state.is_stopped:
                raise Stopped("stopped")
            state.text, state.share = text, (done / total if total else None)

        try:
            hear("beginning", 0, None)
            state.stage = "running"
            with heard_by(hear):
                state.html = work()
            state.stage = "done"
        except SafepatchError as error:
            state.text, state.stage = str(error), "failed"
        except Exception as error:  # whatever it was, the page goes on
            LOG.exception("what was asked failed")
            first = (str(error).splitlines() or [""])[0][:200]
            state.text, state.stage = printable(f"{type(error).__name__}: {first}"), "failed"
