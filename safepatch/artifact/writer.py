"""Patch files are written deterministically, carry their own hash, and appear all or nothing."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from safepatch.artifact.container import NO_HASH, Header, check_bound, in_file_order, raw_bytes
from safepatch.artifact.hashing import Data, Hashed, Hashing, slot
from safepatch.errors import ArtifactError
from safepatch.files import replacing

RUN = 1 << 26  # bytes after which the disk is set to work, so that little is left to wait for at the end

Pieces = Iterable[Data]


def write_stream(
    path: Path, metadata: Mapping[str, str], layout: Mapping[str, Tensor], data: Pieces
) -> dict[str, list[bytes]]:
    """Write a file of which only the layout is in memory: header first, then `data` as it comes, the hash at the end.

    Args:
        path: where the file appears, all or nothing.
        metadata: texts by key, the hash being `NO_HASH`.
        layout: dtype and shape of every tensor; meta tensors will do.
        data: the tensors' bytes in the order of `in_file_order(layout)`, in pieces of any size.

    Returns:
        The digests of every tensor's blocks, by which what is read from the file can be told to be what was written.
    """
    header = Header.of(metadata, layout)
    check_bound(header.text)
    size = header.start + header.nbytes
    try:
        _check_space(path, size)
        with replacing(path) as file:
            return _write(file, header, data)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}; choose a writable folder with {size} bytes free"
        ) from error


def content_hash(metadata: Mapping[str, str], layout: Mapping[str, Tensor], data: Pieces) -> str:
    """`0x` and 64 hex digits: the hash that `write_stream` stores."""
    hashing = Hashing(Header.of(metadata, layout))
    for piece in data:
        hashing.update(piece)
    return hashing.content_hash()


def data_of(tensors: Mapping[str, Tensor], layout: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of `tensors`, one after the other, in the order of a file of this layout."""
    for name, _ in in_file_order(layout):
        yield raw_bytes(tensors[name])


def _check_space(path: Path, size: int) -> None:
    """Refuse before the first byte; the file being replaced stays until the end and needs its room too."""
    try:
        with suppress(FileNotFoundError):
            path.lstat()
        free = shutil.disk_usage(path.parent).free
    except ValueError as error:  # of a path with a NUL in it
        raise OSError(errno.EINVAL, f"no path of a file ({error})") from error
    if free < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {free} bytes are free")


def _write(file: BinaryIO, header: Header, data: Pieces) -> dict[str, list[bytes]]:
    """The header with its hash's slot open, the data, then the hash into the slot."""
    hashing = Hashing(header)
    file.write(header.prefix + header.text)
    with _syncing(file) as begin_sync:
        for piece in data:
            hashing.update(piece)
            file.write(piece.data if isinstance(piece, Hashed) else piece)
            begin_sync()
    file.seek(8 + header.text.index(slot(NO_HASH)))
    file.write(slot(hashing.content_hash()))
    return hashing.digests


@contextmanager
def _syncing(file: BinaryIO) -> Iterator[Callable[[], None]]:
    """A function that puts on the disk, beside other work, what `file` was given, whenever that is much.

    Raises:
        OSError: the disk's, once the block has ended.
    """
    syncs: list[Future[None]] = []
    synced = 0

    def begin() -> None:
        nonlocal synced
        if file.tell() - synced >= RUN and all(sync.done() for sync in syncs):
            file.flush()
            synced = file.tell()
            syncs.append(disk.submit(os.fsync, file.fileno()))

    with ThreadPoolExecutor(1) as disk:
        yield begin
        for sync in syncs:
            sync.result()
