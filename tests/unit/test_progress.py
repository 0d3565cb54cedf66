"""Progress: bars where somebody looks, a line a minute where nobody does."""

import io
import sys
import threading

import pytest

from safepatch import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that tqdm believes have passed."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_a_minute_and_nothing_of_what_is_quick(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in progress.bar(range(50), desc="quick"):
        clock[0] += 1.0
    assert log.getvalue() == ""
    with progress.bar(total=100, desc="training") as shown:
        for _ in range(100):
            clock[0] += 2.0
            shown.update()
    lines = log.getvalue().splitlines()
    assert lines == [f"training: {n} of 100 ({n} %)" for n in (30, 60, 90)]


def test_processes_that_have_nothing_to_say_are_silent(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for _ in progress.bar(range(50), shown=False, desc="training"):
        clock[0] += 60.0
    assert log.getvalue() == ""
    progress.note("a line")
    assert log.getvalue() == "a line\n"  # control


def test_at_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in progress.bar(range(3), desc="training"):
        pass
    assert "training: 100%" in terminal.getvalue()


def test_whoever_listens_is_told_instead_and_can_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, told = io.StringIO(), []
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)

    def listen(text: str, done: int, total: int | None) -> None:
        told.append((text, done, total))
        if done == 2:
            raise KeyboardInterrupt

    with progress.heard_by(listen), pytest.raises(KeyboardInterrupt):
        for _ in progress.bar(range(5), desc="drawing"):
            pass
    assert told == [("drawing", 0, 5), ("drawing", 1, 5), ("drawing", 2, 5)]
    assert terminal.getvalue() == ""
    other = threading.Thread(target=lambda: list(progress.bar(range(1), desc="another")), daemon=True)
    other.start()
    other.join(60)
    assert not other.is_alive()  # no lock is left behind
    for _ in progress.bar(range(1), desc="drawing"):
        pass
    assert "drawing" in terminal.getvalue()  # control: who listened is gone
