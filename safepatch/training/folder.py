"""The folder of a training run: its configuration, its log, its checkpoint, and at the end the patch."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import get_int_from_env

from safepatch.errors import SafepatchError
from safepatch.files import claimed, write_text

# Where launchers tell a process which of a run's it is; accelerate's own state must not be made before its settings.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes.

    Attributes:
        path: an existing folder that can be written to.
    """

    path: Path

    @classmethod
    @contextmanager
    def claim(cls, path: Path, config: Mapping[str, Any], result: str = "") -> Iterator["RunFolder"]:
        """The folder `path`, made and tried, for one run at a time; a run's processes share it.

        Raises:
            SafepatchError: when it cannot be written, another run is in it, or a checkpoint of another configuration.
        """
        out = cls(path)
        is_first = get_int_from_env(RANKS, 0) == 0
        with claimed(path, "choose another output=") if is_first else nullcontext():
            out._write_config(json.dumps(config, indent=1, sort_keys=True) + "\n", result)
            yield out

    @property
    def checkpoint(self) -> Path:
        """Where an interrupted run goes on from; gone when the run is done."""
        return self.path / "checkpoint.pt"

    def is_finished(self, result: str) -> bool:
        """Whether a run of the same configuration has come to its end here, with a file of that name."""
        return (self.path / result).is_file() and not self.checkpoint.is_file()

    def _write_config(self, text: str, result: str) -> None:
        record = self.path / "config.json"
        if record.is_file() and record.read_text() == text:  # another process may have written the same just now
            return
        if self.checkpoint.is_file():
            raise SafepatchError(
                f"{self.path} holds the checkpoint of another configuration; delete it or choose another output="
            )
        if result and self.is_finished(result):
            raise SafepatchError(
                f"{self.path / result} is there, of another configuration; choose another output=, or delete it"
            )
        write_text(record, text)

    @property
    def _log(self) -> Path:
        return self.path / "log.jsonl"

    def rewind_log(self, step: int) -> None:
        """Drop what an earlier run logged after `step`, where this one goes on, and a line that a kill cut short."""
        lines = self._log.read_text().splitlines() if self._log.is_file() else []
        write_text(self._log, "".join(f"{line}\n" for line in lines if _step(line) <= step))

    def log(self, values: dict[str, Any]) -> None:
        """Add one line."""
        with self._log.open("a") as file:
            file.write(json.dumps(values) + "\n")


def _step(line: str) -> float:
    """Of a line of the log; never reached where it is not whole."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
