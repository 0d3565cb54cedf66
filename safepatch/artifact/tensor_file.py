"""The tensors of one open file: read when asked for, from one descriptor, and always what was hashed.

A block that is read twice must be the same twice, and `confirm` holds all that was read against the hash that the file
states. So it does not matter what happens to the file meanwhile: it is noticed, or it is of no consequence. Nothing
handed out is a view of the file.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from safepatch.artifact.container import DTYPES, header_of, naming, open_file, own_name, read_at
from safepatch.artifact.hashing import Block, all_blocks, blocks_of, flat_hash, is_flat, tree_hash
from safepatch.errors import ArtifactError

T = TypeVar("T")

SMALL = 1 << 23  # bytes that are read and hashed before a pool of threads would have started


class TensorFile(Mapping[str, Tensor]):
    """Name -> tensor, read anew at every access.

    Args:
        path: for messages.
        descriptor: of the file, which is closed with this object.
        digests: of every tensor's blocks, where they are known; by default those of the first reading count.

    Attributes:
        header: of the file.
        layout: dtype and shape of every tensor, by name, as meta tensors.
    """

    def __init__(self, path: Path, descriptor: int, digests: Mapping[str, Sequence[bytes]] | None = None) -> None:
        self.path = path
        self._file = _Descriptor(descriptor)
        self.header = header_of(descriptor)
        self._names = {own_name(name, self.header.metadata): name for name in self.header.tensors}
        self._seen: dict[tuple[str, int], bytes] = {
            (name, index): digest for name, known in (digests or {}).items() for index, digest in enumerate(known)
        }
        self.layout = {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            for name, entry in zip(self._names, self.header.tensors.values(), strict=True)
        }

    @classmethod
    def open(cls, path: Path, digests: Mapping[str, Sequence[bytes]] | None = None) -> "TensorFile":
        """The tensors of the file at `path`; raises `ArtifactError` when it cannot be read or its layout is damaged."""
        with naming(path):
            return cls(path, open_file(path), digests)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.layout  # the one that is inherited reads the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)  # a copy stands in memory: there is one descriptor, and one object closes it

    def under(self, prefix: str) -> "TensorFile":
        """The tensors whose names begin with `prefix`, called by what follows it."""
        part = TensorFile.__new__(TensorFile)
        part.__dict__ |= self.__dict__
        part._names = {n.removeprefix(prefix): own for n, own in self._names.items() if n.startswith(prefix)}
        part.layout = {name: self.layout[f"{prefix}{name}"] for name in part._names}
        return part

    def read(self, name: str, run: slice | None = None, room: memoryview | None = None) -> Tensor:
        """A tensor, or some of its values, flat; in `room`, bytes, if there is any and they suffice."""
        own, dtype = self._names[name], self.layout[name].dtype
        entry = self.header.tensors[own]
        begin, end = entry.begin, entry.end
        if run:
            begin, end = (entry.begin + place * dtype.itemsize for place in (run.start, run.stop))
        if begin == end:
            return torch.empty(entry.shape, dtype=dtype)
        blocks = list(blocks_of(own, entry, begin, end))
        first, size = blocks[0].begin, blocks[-1].end - blocks[0].begin
        held = np.empty(size, np.uint8).data if room is None or len(room) < size else room
        for block in blocks:
            self._fill(block, held[block.begin - first : block.end - first])
        values = torch.frombuffer(held, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin - first)
        return values if run else values.reshape(entry.shape)

    def load(self) -> dict[str, Tensor]:
        """Every tensor, in memory of its own; raises `ArtifactError` when the file's hash is not the one it states."""
        held = torch.empty(self.header.nbytes, dtype=torch.uint8)
        view = held.numpy().data
        blocks = list(all_blocks(self.header))
        spread(lambda block: self._fill(block, view[block.begin : block.end]), blocks, len(view))
        self.confirm()
        return {
            name: held[entry.begin : entry.end].view(DTYPES[entry.dtype]).reshape(entry.shape)
            for name, entry in zip(self._names, self.header.tensors.values(), strict=True)
        }

    def confirm(self) -> None:
        """Raise `ArtifactError` unless the file's hash is the one it states; what was not read yet is read for it."""
        blocks = list(all_blocks(self.header))
        if is_flat(self.header):
            found = flat_hash(self.header, map(self._read, blocks))
        else:
            unread = [block for block in blocks if block[:2] not in self._seen]
            spread(self._read, unread, sum(block.end - block.begin for block in unread))
            digests: dict[str, list[bytes]] = {name: [] for name in self.header.tensors}
            for block in blocks:
                digests[block.tensor].append(self._seen[block[:2]])
            found = tree_hash(self.header, digests)
        stated = self.header.stated_hash
        if found != stated:
            raise ArtifactError(
                f"{self.path}: altered: its content hash is {found[:12]}, it states {stated[:12]}; fetch the file again"
            )

    def _read(self, block: Block) -> memoryview:
        buffer = memoryview(bytearray(block.end - block.begin))
        self._fill(block, buffer)
        return buffer

    def _fill(self, block: Block, buffer: memoryview) -> None:
        """Read a block into `buffer`, which has its size."""
        try:
            read_at(self._file.number, buffer, self.header.start + block.begin)
            digest = sha256(buffer).digest()
            if self._seen.setdefault(block[:2], digest) != digest:
                raise ArtifactError("altered while it was read; see who writes to it, and start again")
        except (OSError, ArtifactError):
            with naming(self.path):
                raise


class _Descriptor:
    """A file descriptor that is closed when nobody holds it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def spread(work: Callable[[T], object], items: Sequence[T], nbytes: int) -> None:
    """Do `work` on every item, on all cores when it is about much memory; for work that holds no lock."""
    if nbytes <= SMALL:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(_cores()) as pool:
        for _ in pool.map(work, items):
            pass


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
