"""The bytes of a patch file: safetensors, written deterministically and hashed as a whole.

The layout is safetensors (https://github.com/huggingface/safetensors): 8 bytes of little-endian header length, a
JSON header, the data. The header is written here because the library writes metadata in random order and accepts
duplicate keys. The content hash is the SHA-256 of the whole file with the hash's own digits set to zero.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from safepatch.errors import ArtifactError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

HASH_KEY = "safepatch.hash_sha256"
NO_HASH = "0x" + "0" * 64
MAX_HEADER = 100_000_000  # bytes, the safetensors library's own limit
CHUNK = 1 << 22  # bytes read at once while hashing
RUN = 1 << 25  # bytes after which the disk is set to work, so that little is left to wait for at the end


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write a file that carries its own hash, all or nothing; equal input gives equal bytes."""
    write_stream(path, metadata, tensors, _data(tensors))


def write_stream(
    path: Path, metadata: Mapping[str, str], layout: Mapping[str, Tensor], data: Iterable[bytes | memoryview]
) -> None:
    """Write a file of which only the layout is in memory: header first, then `data` as it comes, the hash at the end.

    Args:
        path: where the file appears, all or nothing.
        metadata: texts by key, the hash being `NO_HASH`.
        layout: dtype and shape of every tensor; meta tensors will do.
        data: the tensors' bytes in the order of `in_file_order(layout)`, in pieces of any size.
    """
    text = _header_text(metadata, layout)
    size = 8 + len(text) + sum(tensor.nbytes for tensor in layout.values())
    try:
        _check_space(path, size)
        _write_atomically(path, text, data)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}; choose a writable folder with {size} bytes free"
        ) from error


def _check_space(path: Path, size: int) -> None:
    """Refuse before the first byte; the file being replaced stays until the end and needs its room too."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {free} bytes are free")


def content_hash(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """`0x` and 64 hex digits: the hash that `write` stores."""
    return _digest(_header_text(metadata, tensors), _data(tensors))


@dataclass(frozen=True)
class Header:
    """The header of a file: its text as it stands there, the metadata, and the entry of each tensor."""

    text: bytes
    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]


def in_file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Names and tensors in the order of their bytes in a file, which keeps every value aligned."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they stand in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _data(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for _, tensor in in_file_order(tensors):
        yield raw_bytes(tensor)


def _header_text(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in in_file_order(tensors):
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = canonical_json(entries).encode()
    return text + b" " * (-len(text) % 8)


def _slot(content_hash: str) -> bytes:
    return f'"{HASH_KEY}":"{content_hash}"'.encode()


def _prefix(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little")


def _digest(text: bytes, data: Iterable[bytes | memoryview]) -> str:
    sha = hashlib.sha256(_prefix(text) + text)
    for chunk in data:
        sha.update(chunk)
    return f"0x{sha.hexdigest()}"


def _write_atomically(path: Path, text: bytes, data: Iterable[bytes | memoryview]) -> None:
    """The header `text` with its hash's slot open, the data, then the hash into the slot, then the final name."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    sha = hashlib.sha256(_prefix(text) + text)
    try:
        with partial.open("xb") as file:
            file.write(_prefix(text) + text)
            sent = 0
            for chunk in data:
                sha.update(chunk)
                file.write(chunk)
                if (end := file.tell()) - sent >= RUN:
                    _begin_writeback(file.fileno(), sent, end)
                    sent = end
            file.seek(8 + text.index(_slot(NO_HASH)))
            file.write(_slot(f"0x{sha.hexdigest()}"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # still there only when something failed


def _begin_writeback(descriptor: int, start: int, end: int) -> None:
    """Have the kernel write these bytes to the disk by and by, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):  # Linux writes what it is told will not be needed; pages still dirty stay cached
        with suppress(OSError):  # a hint that cannot be given is no failure
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Any failure to read inside becomes one `ArtifactError` line that starts with the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file; give the path of a .safetensors patch") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except (ArtifactError, SafetensorError) as error:
        raise ArtifactError(f"{path}: {error}") from error


def read_header(path: Path) -> Header:
    """The header of the file at `path`, its layout checked against the file's length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or length > MAX_HEADER:
            raise ArtifactError("refused: not a safetensors file; pickle and other formats can run code or hide damage")
        if 8 + length > size:
            raise ArtifactError(f"truncated: {size} bytes end inside the header; fetch the file again")
        file.seek(8)
        header = _parse_header(file.read(length))
    _check_layout(header, size)
    return header


def _parse_header(text: bytes) -> Header:
    try:
        tensors = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("damaged: its header is not JSON; fetch the file again") from error
    metadata = tensors.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError("damaged: its metadata is not a table of texts; fetch the file again")
    return Header(text, metadata, tensors)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ArtifactError("refused: its header holds a key twice, so readers may disagree; fetch the file again")
    return table


def _check_layout(header: Header, size: int) -> None:
    end = 0
    for begin, stop, name in sorted((*_extent(name, entry), name) for name, entry in header.tensors.items()):
        if begin != end:
            raise ArtifactError(f"damaged: tensor '{name}' starts at byte {begin}, not {end}; fetch the file again")
        end = stop
    expected = 8 + len(header.text) + end
    if size != expected:
        problem = "truncated" if size < expected else "damaged"
        raise ArtifactError(f"{problem}: {size} bytes where the header promises {expected}; fetch the file again")


def _extent(name: str, entry: dict[str, Any]) -> tuple[int, int]:
    try:
        begin, end = entry["data_offsets"]
        fits = end - begin == math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"damaged: bad header entry of tensor '{name}' ({error}); fetch the file again") from error
    if not fits:
        raise ArtifactError(f"damaged: shape and size of tensor '{name}' disagree; fetch the file again")
    return begin, end


def check_hash(path: Path, header: Header) -> None:
    """Raise `ArtifactError` unless the file's hash is the one it states."""
    stored = header.metadata.get(HASH_KEY, NO_HASH)
    blank = header.text.replace(_slot(stored), _slot(NO_HASH))
    with path.open("rb") as file:
        file.seek(8 + len(header.text))
        found = _digest(blank, iter(lambda: file.read(CHUNK), b""))
    if found != stored:
        raise ArtifactError(f"altered: its content hash is {found[:12]}, it states {stored[:12]}; fetch the file again")


@dataclass(frozen=True)
class MappedTensors:
    """The tensors of a file, mapped into memory and read when they are used.

    Attributes:
        tensors: views on the file by name.
        offsets: first and last byte + 1 of each tensor in the file.
    """

    tensors: dict[str, Tensor]
    offsets: dict[str, tuple[int, int]]
    _map: mmap.mmap

    @classmethod
    def open(cls, path: Path, header: Header) -> "MappedTensors":
        """The tensors of the file at `path`, whose checked `header` is at hand."""
        start = 8 + len(header.text)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: nothing can reach the file
        offsets, tensors = {}, {}
        for name, entry in header.tensors.items():
            begin, end = (start + place for place in entry["data_offsets"])
            offsets[name] = (begin, end)
            dtype = DTYPES[entry["dtype"]]
            count = (end - begin) // dtype.itemsize
            empty = torch.empty(0, dtype=dtype)  # frombuffer refuses to read nothing
            flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin) if count else empty
            tensors[name] = flat.reshape(entry["shape"])
        return cls(tensors, offsets, mapped)

    def release(self, name: str) -> None:
        """Give the memory of tensor `name` back; the next use reads it from the file again."""
        begin, end = self.offsets[name]
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):  # Windows has no such call
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
