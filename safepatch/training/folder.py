"""The folder of a training run: its configuration, its log, its checkpoint, and at the end the patch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch.errors import SafepatchError


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes.

    Attributes:
        path: an existing folder that can be written to.
    """

    path: Path

    @classmethod
    def claim(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """The folder `path`, made and tried; a checkpoint of another configuration in it is refused."""
        out = cls(path)
        try:
            out.path.mkdir(parents=True, exist_ok=True)
            out._write_config(json.dumps(config, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            raise SafepatchError(f"cannot write to {out.path} ({error.strerror}); choose another output=") from error
        return out

    @property
    def checkpoint(self) -> Path:
        """Where an interrupted run goes on from; gone when the run is done."""
        return self.path / "checkpoint.pt"

    def _write_config(self, text: str) -> None:
        record = self.path / "config.json"
        if record.is_file() and record.read_text() == text:  # another process may have written the same just now
            return
        if self.checkpoint.is_file():
            raise SafepatchError(
                f"{self.path} holds the checkpoint of another configuration; delete it or choose another output="
            )
        record.write_text(text)

    @property
    def _log(self) -> Path:
        return self.path / "log.jsonl"

    def rewind_log(self, step: int) -> None:
        """Drop what an earlier run logged after `step`, where this one goes on."""
        lines = self._log.read_text().splitlines() if self._log.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        self._log.write_text("".join(f"{line}\n" for line in kept))

    def log(self, values: dict[str, Any]) -> None:
        """Add one line."""
        with self._log.open("a") as file:
            file.write(json.dumps(values) + "\n")
