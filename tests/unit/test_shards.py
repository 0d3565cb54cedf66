"""Rows on disk: made once, whole after a kill at any moment, shared by processes, and never another model's."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor

from safepatch.data import shards
from safepatch.data.shards import Shards, usual_cache
from safepatch.errors import SafepatchError

KEY = {"model": "one", "steps": 3}
N = 2 * shards.ROWS + 5


def numbered(rows: range) -> dict[str, Tensor]:
    """Rows whose values are their numbers."""
    return {"latents": torch.tensor(rows).float()[:, None].expand(-1, 3), "other": 100 + torch.tensor(rows)}


class Counted:
    """Makes numbered rows, and remembers which it was asked for; `fails` is called before each file."""

    def __init__(self, fails: Callable[[range], object] = lambda _: None) -> None:
        self.made, self.fails = [], fails

    def __call__(self, rows: range) -> dict[str, Tensor]:
        self.fails(rows)
        self.made.append(rows)
        return numbered(rows)


def filled(folder: Path, make: Callable = numbered, key: dict | None = None, n: int = N) -> Shards:
    return Shards(folder, key or KEY, n).fill(make, "rows")


def all_rows(made: Shards) -> dict[str, Tensor]:
    return made.rows(range(made.n))


def assert_numbered(made: Shards) -> None:
    rows, wanted = all_rows(made), numbered(range(made.n))
    assert rows.keys() == wanted.keys()
    assert all(torch.equal(rows[name], wanted[name]) for name in wanted)


# ---- reading and writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, shards.ROWS, N])
def test_rows_come_back_by_their_numbers(tmp_path, n):
    made = filled(tmp_path, n=n)
    assert_numbered(made)
    picked = made.rows(torch.tensor([n - 1, 0, n - 1]))
    assert picked["other"].tolist() == [99 + n, 100, 99 + n]
    assert len(list(tmp_path.glob("*.safetensors"))) == -(-n // shards.ROWS)


def test_rows_are_made_once(tmp_path):
    first, second = Counted(), Counted()
    filled(tmp_path, first)
    assert_numbered(filled(tmp_path, second))
    assert [len(rows) for rows in first.made] == [shards.ROWS, shards.ROWS, 5]
    assert second.made == []


def test_the_users_cache_is_where_it_belongs(monkeypatch, tmp_path):
    assert usual_cache() == Path(os.environ["SAFEPATCH_CACHE"])  # that of these tests
    monkeypatch.delenv("SAFEPATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert usual_cache() == tmp_path / "safepatch"
    monkeypatch.setenv("SAFEPATCH_CACHE", "")  # says nothing
    assert usual_cache() == tmp_path / "safepatch"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert usual_cache() == Path.home() / ".cache" / "safepatch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert usual_cache() == Path.home() / ".cache" / "safepatch"


# ---- what goes wrong -------------------------------------------------------------------------------------------


def test_what_was_interrupted_is_finished_and_no_row_is_another(tmp_path):
    def stop(rows: range) -> None:
        if rows.start:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, Counted(stop))
    (tmp_path / "00001.123.partial").write_bytes(b"half a file of a process that is gone")
    rest = Counted()
    assert_numbered(filled(tmp_path, rest))
    assert [rows.start for rows in rest.made] == [shards.ROWS, 2 * shards.ROWS]


def test_a_file_that_is_gone_is_made_again(tmp_path):
    filled(tmp_path)
    (tmp_path / "00001.safetensors").unlink()
    again = Counted()
    assert_numbered(filled(tmp_path, again))
    assert again.made == [range(shards.ROWS, 2 * shards.ROWS)]


KILLED = """
import os, signal, sys, torch
from contextlib import contextmanager
from pathlib import Path
from safepatch.data import shards

replacing = shards.replacing

@contextmanager
def cut(path):  # half of the second file is written when the process is killed
    with replacing(path) as file:
        yield file
        if path.name.startswith("00001"):
            file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)

shards.replacing = cut
make = lambda rows: {"latents": torch.tensor(rows).float()[:, None].expand(-1, 3), "other": 100 + torch.tensor(rows)}
shards.Shards(Path(sys.argv[1]), {"model": "one", "steps": 3}, int(sys.argv[2])).fill(make, "rows")
"""


@pytest.mark.slow
def test_a_kill_leaves_whole_files_only(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(N)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".partial", ".safetensors"]
    rest = Counted()
    assert_numbered(filled(tmp_path, rest))
    assert len(rest.made) == 2
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]  # the next writer tidied up


def test_rows_of_another_model_are_refused_and_kept(tmp_path):
    filled(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for key in ({**KEY, "model": "two"}, {**KEY, "steps": 4}):
        make = Counted()
        with pytest.raises(SafepatchError, match="holds rows of another model or other prompts; delete it") as caught:
            filled(tmp_path, make, key)
        assert "\n" not in str(caught.value)
        assert make.made == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_numbered(filled(tmp_path))  # control


def test_a_full_disk_is_one_line_and_keeps_what_was_made(tmp_path, monkeypatch):
    replacing, opened = shards.replacing, []

    @contextmanager
    def full(path: Path) -> Iterator[BinaryIO]:
        opened.append(path)
        with replacing(path) as file:
            yield file
            if path.name.startswith("00001"):
                raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shards, "replacing", full)
        with pytest.raises(SafepatchError, match=r"the disk is full: .*; rows made so far are kept, free") as caught:
            filled(tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.safetensors", "key.json"]
    rest = Counted()
    assert_numbered(filled(tmp_path, rest))
    assert [rows.start for rows in rest.made] == [shards.ROWS, 2 * shards.ROWS]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SafepatchError, match=r"cannot write \(.*\): .*choose another data\.cache=") as caught:
        filled(tmp_path / "file" / "below")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path):
    filled(tmp_path)
    path = tmp_path / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SafepatchError, match=r"00001\.safetensors is damaged .*; delete it") as caught:
        all_rows(filled(tmp_path))
    assert "\n" not in str(caught.value)
    path.unlink()
    assert_numbered(filled(tmp_path))


# ---- several processes -----------------------------------------------------------------------------------------

SHARED = """
import sys, torch
from pathlib import Path
from accelerate import PartialState
from safepatch.data.shards import Shards

state = PartialState(cpu=True)

def make(rows):
    with Path(sys.argv[1], f"made-by-{state.process_index}").open("a") as file:
        print(rows.start, file=file)
    return {"latents": torch.tensor(rows).float()}

rows = Shards(Path(sys.argv[1]) / "rows", {"model": "one"}, 100).fill(make, "rows").rows(range(100))["latents"]
assert torch.equal(rows, torch.arange(100.0))
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    (tmp_path / "script.py").write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command += [str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [[int(line) for line in (tmp_path / f"made-by-{i}").read_text().split()] for i in range(2)]
    assert made == [[0, 64], [32, 96]]
