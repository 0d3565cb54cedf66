"""Files that appear whole or not at all, and locks that end with whoever holds them.

What is being written has a name of its own beside its final one and is locked by its writer. Death unlocks it, so what
has such a name and no lock was left by a killed process: whoever writes into the folder next removes it.
"""

import csv
import errno
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safepatch.errors import SafepatchError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, so nothing is taken for left over
    fcntl = None

PARTIAL = re.compile(r"\..+\.[0-9a-f]{12}\.partial")
LOCK = ".lock"


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends, unless by an error.

    Args:
        path: where it appears; its folder exists.
        durable: wait until it is on the disk, so that not even a power failure leaves half of it.

    Raises:
        OSError: when it cannot be written, or what is at `path` is a device, a pipe or a folder.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")
    with _partial(path, Path.touch) as partial:
        with partial.open("r+b") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A folder that is called `path` when the block ends, unless by an error; there is none of that name yet."""
    with _partial(path, Path.mkdir) as partial:
        yield partial
        partial.rename(path)


def write_text(path: Path, text: str) -> None:
    """Put `text` into `path` in place of what is there, all or nothing; raises `SafepatchError` when that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise unwritable(path, error) from error


def copy_file(source: Path, path: Path) -> None:
    """Put the bytes of `source` into `path`, all or nothing; raises `SafepatchError` when that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as content, replacing(path) as file:
            shutil.copyfileobj(content, file)
    except OSError as error:
        raise unwritable(path, error) from error


def require_writable(path: Path) -> None:
    """Raise `SafepatchError` where the file `path` could not be written, as it is a folder or for want of permission.

    Asked before there is any work.
    """
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.exists() and not path.is_file():
        raise unwritable(path, OSError(errno.EINVAL, "it is no regular file"), "name a file")
    if not folder.is_dir():
        raise unwritable(path, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(folder, os.W_OK):
        raise unwritable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`; what a living one writes stays."""
    for path in folder.iterdir():
        if PARTIAL.fullmatch(path.name):
            with suppress(OSError):  # somebody else removed it just now
                _remove_unlocked(path)


@contextmanager
def claimed(folder: Path, instead: str = "choose a folder you may write to") -> Iterator[None]:
    """Within the block `folder`, made if need be, is this process's own, and free of what killed ones left.

    Args:
        folder: to be claimed.
        instead: what to do where it cannot be written.

    Raises:
        SafepatchError: when another process has it, or it cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _held(path)
    except OSError as error:
        raise unwritable(folder, error, instead) from error
    try:
        sweep(folder)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError):  # on a full disk the lock holds too, it only cannot say whose it is
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def long_cells(most: int) -> Iterator[None]:
    """Within the block a cell of a CSV file may have so many characters; csv bounds them for all of a process."""
    before = csv.field_size_limit(most)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def is_full(error: BaseException) -> bool:
    """Whether a disk, or somebody's share of it, is full; libraries say so by text alone."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def unwritable(path: Path, error: Exception, instead: str = "choose a folder you may write to") -> SafepatchError:
    """What to tell whoever wanted `path` to be written."""
    if is_full(error):
        return SafepatchError(f"the disk is full: cannot write to {path}; make room and run the same command again")
    return SafepatchError(f"cannot write to {path} ({getattr(error, 'strerror', None) or error}); {instead}")


@contextmanager
def _partial(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Something that `make` made, beside `path`, locked; gone when the block ends, unless it got its name by then."""
    sweep(path.parent)
    partial, descriptor = _made(path, make)
    try:
        yield partial
    finally:
        _remove(partial)
        os.close(descriptor)


def _made(path: Path, make: Callable[[Path], object]) -> tuple[Path, int]:
    """The partial and a descriptor of it, locked; anew where a sweep came between making and locking it."""
    while True:
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
        make(partial)
        with suppress(FileNotFoundError):
            descriptor = os.open(partial, os.O_RDONLY)
            _lock(descriptor, wait=True)
            if _is_at(partial, descriptor):
                return partial, descriptor
            os.close(descriptor)


def _held(path: Path) -> int:
    """A descriptor of the lock file `path`, empty and locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise SafepatchError(
                f"{path.parent} is in use by {holder}; wait for it, or choose another folder"
            ) from None
        if _is_at(path, descriptor):
            os.truncate(descriptor, 0)
            return descriptor
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name; a holder removes it as it lets go."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Lock it, where the file system has locks; says whether it has. Raises `BlockingIOError` when another has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if _lock(descriptor):
            _remove(path)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
