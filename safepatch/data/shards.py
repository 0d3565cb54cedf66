"""Rows of tensors that are computed once and kept on disk, in files of a few dozen rows each.

A file is written under another name and then renamed, so a kill at any moment leaves whole files only, and whoever
needs the rows next makes those that are missing. Files are mapped, not read: rows that nobody asks for cost no memory.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from safepatch.errors import SafepatchError
from safepatch.files import is_full, replacing
from safepatch.progress import bar

ROWS = 32  # of a file
Make = Callable[[range], Mapping[str, Tensor]]


def usual_cache() -> Path:
    """Where rows are kept if nobody says where: `SAFEPATCH_CACHE`, or a folder of the user's cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safepatch"
    return Path(os.environ.get("SAFEPATCH_CACHE") or usual)


@dataclass(frozen=True)
class Shards:
    """Some number of rows in the files of one folder.

    Attributes:
        folder: of these rows alone.
        key: what they depend on, plain JSON values; a folder of other rows is refused.
        n: how many there are.
    """

    folder: Path
    key: Mapping[str, object]
    n: int

    def fill(self, make: Make, label: str) -> "Shards":
        """Make the rows that are missing, `ROWS` at a time; several processes share the work. Returns itself.

        Args:
            make: computes the rows of these numbers: tensors by name, each with a first dimension of their count.
            label: of the progress bar.

        Raises:
            SafepatchError: when the folder cannot be written, or holds other rows.
        """
        state = PartialState()
        if state.is_main_process:
            self._claim()
        state.wait_for_everyone()
        every = range(state.process_index, -(-self.n // ROWS), state.num_processes)  # whatever others have just made
        own = [i for i in every if not self._file(i).is_file()]
        with bar(total=len(own) * ROWS, desc=label, unit="row", leave=False, shown=bool(own)) as progress:
            for i in own:
                rows = range(i * ROWS, min((i + 1) * ROWS, self.n))
                self._write(i, make(rows))
                progress.update(len(rows))
        state.wait_for_everyone()
        return self

    def rows(self, index: Sequence[int] | Tensor) -> dict[str, Tensor]:
        """The rows of these numbers, in memory, by name."""
        numbers = index.tolist() if isinstance(index, Tensor) else list(index)
        parts = self._parts
        return {name: torch.stack([parts[i // ROWS][name][i % ROWS] for i in numbers]) for name in parts[0]}

    @cached_property
    def _parts(self) -> list[dict[str, Tensor]]:
        return [self._read(i) for i in range(-(-self.n // ROWS))]

    def _claim(self) -> None:
        record, text = self.folder / "key.json", json.dumps(self.key, indent=1, sort_keys=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if record.is_file() and record.read_text() != text:
                raise SafepatchError(
                    f"{self.folder} holds rows of another model or other prompts; delete it or set another data.cache="
                )
            if not record.is_file():
                with replacing(record) as file:
                    file.write(text.encode())
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _file(self, i: int) -> Path:
        return self.folder / f"{i:05d}.safetensors"

    def _write(self, i: int, tensors: Mapping[str, Tensor]) -> None:
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            with replacing(self._file(i)) as file:
                file.write(save(kept))
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _read(self, i: int) -> dict[str, Tensor]:
        try:
            return load_file(self._file(i))
        except (OSError, SafetensorError) as error:
            raise SafepatchError(
                f"{self._file(i)} is damaged ({error}); delete it, the next run makes it again"
            ) from error


def _unwritable(folder: Path, error: OSError) -> SafepatchError:
    what = "the disk is full" if is_full(error) else f"cannot write ({error.strerror or error})"
    return SafepatchError(f"{what}: {folder}; rows made so far are kept, free some space or choose another data.cache=")
