"""The layout of a patch file, safetensors, and what must hold of a header before it is believed.

The layout (https://github.com/huggingface/safetensors) is 8 bytes of little-endian header length, a JSON header, the
data. The header is read and written here because the library writes metadata in random order and accepts duplicate
keys. Nothing is allocated by what a header says that its file's length does not pay for.
"""

import json
import math
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.errors import ArtifactError, printable

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

HASH_KEY = "safepatch.hash_sha256"
VERSION_KEY = "safepatch.format_version"
GUARD_KEY = "safepatch.guard"  # of what a guard says of itself; its file is no patch
NO_HASH = "0x" + "0" * 64
OURS, STORED = "lora", "low_rank"  # what begins the names of low-rank updates: here, and in files of version 3
MAX_HEADER = 1 << 24  # bytes
METADATA, PER_TENSOR = 1 << 20, 1 << 12  # bytes of a header that are believed to be metadata, and about each tensor
MAX_SIDES, MAX_VALUES = 8, 1 << 40  # of a tensor, an empty one's other sides included


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        dtype: its name in the header.
        shape: of the tensor.
        begin: its first byte, counted from the end of the header.
        end: its last byte + 1.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        text: as it stands there.
        metadata: texts by key.
        tensors: what it says of each tensor, by name, in the order of their bytes.
    """

    text: bytes
    metadata: dict[str, str]
    tensors: dict[str, Entry]

    @classmethod
    def of(cls, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> "Header":
        """The header of a file that holds `tensors`, of which meta tensors will do."""
        entries: dict[str, Entry] = {}
        end = 0
        for name, tensor in in_file_order(tensors):
            begin, end = end, end + tensor.nbytes
            entries[stored_name(name, metadata)] = Entry(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), begin, end)
        said = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.begin, entry.end]}
            for name, entry in entries.items()
        }
        text = canonical_json({"__metadata__": dict(metadata), **said}).encode()
        return cls(text + b" " * (-len(text) % 8), dict(metadata), entries)

    @property
    def prefix(self) -> bytes:
        """What stands before the header: its length."""
        return len(self.text).to_bytes(8, "little")

    @property
    def start(self) -> int:
        """The data's first byte in the file."""
        return 8 + len(self.text)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of data."""
        return max((entry.end for entry in self.tensors.values()), default=0)

    @property
    def stated_hash(self) -> str:
        """The content hash that the file states, zeros where it states none."""
        return self.metadata.get(HASH_KEY, NO_HASH)


def stored_name(name: str, metadata: Mapping[str, str]) -> str:
    """What a tensor is called in a file with this metadata.

    Programs that load LoRAs take a file for one whose tensors all have "lora" in their names, find no layer that they
    know, and go on without it. From version 3 on none of ours has, and diffusers refuses the file.
    """
    return _swapped(name) if metadata.get(VERSION_KEY, "1") not in ("1", "2") else name


def own_name(stored: str, metadata: Mapping[str, str]) -> str:
    """The inverse, which is the same."""
    return stored_name(stored, metadata)


def _swapped(name: str) -> str:
    """Of a part of a bundle, what stands behind the part's number; both ways, so that no two names become one."""
    other = {OURS: STORED, STORED: OURS}
    return re.sub(rf"^((?:part\d+\.)*)({OURS}|{STORED})\.", lambda found: f"{found[1]}{other[found[2]]}.", name)


def in_file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Names and tensors in the order of their bytes in a file, which keeps every value aligned."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they stand in a file."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# Reading


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Any failure to read inside becomes one `ArtifactError` line that starts with the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file; give the path of a .safetensors file") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except ArtifactError as error:
        if str(error).startswith(printable(f"{path}: ")):
            raise
        raise ArtifactError(f"{path}: {error}") from error


def open_file(path: Path) -> int:
    """A descriptor of the regular file at `path`; a device or a pipe is refused, and never waited for."""
    waiting = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        descriptor = os.open(path, os.O_RDONLY | waiting | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise ArtifactError(f"no path of a file ({error}); give the path of a .safetensors patch") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ArtifactError("refused: a folder, a device or a pipe, no regular file; give the path of a patch")
    return descriptor


def read_at(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with the file's bytes from `offset` on; raises `ArtifactError` when there are too few."""
    while buffer:
        count = _read_some(descriptor, buffer, offset)
        if not count:
            raise ArtifactError("truncated: it ends before what its header promises; fetch the file again")
        buffer, offset = buffer[count:], offset + count


def _read_some(descriptor: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    with _SEEKING:  # Windows has one place per descriptor
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


_SEEKING = threading.Lock()


def read_header(path: Path) -> Header:
    """The header of the file at `path`, its layout checked against the file's length."""
    descriptor = open_file(path)
    try:
        return header_of(descriptor)
    finally:
        os.close(descriptor)


def header_of(descriptor: int) -> Header:
    """The header of an open file, its layout checked against the file's length."""
    size, start = os.fstat(descriptor).st_size, bytearray(9)
    if size >= len(start):
        read_at(descriptor, memoryview(start), 0)
    length = int.from_bytes(start[:8], "little")
    if start[8:] != b"{" or length > MAX_HEADER:
        raise ArtifactError("refused: not a safetensors file; pickle and other formats can run code or hide damage")
    if 8 + length > size:
        raise ArtifactError(f"truncated: {size} bytes end inside the header; fetch the file again")
    text = bytearray(length)
    read_at(descriptor, memoryview(text), 8)
    check_bound(bytes(text))
    header = _parse_header(bytes(text))
    _check_layout(header, size)
    return header


def check_bound(text: bytes) -> None:
    """Raise `ArtifactError` for a header larger than its tensors explain, before it is parsed."""
    bound = min(MAX_HEADER, METADATA + PER_TENSOR * text.count(b'"data_offsets"'))
    if len(text) > bound:
        raise ArtifactError(f"refused: a header of {len(text)} bytes, where its tensors explain {bound}")


def _parse_header(text: bytes) -> Header:
    try:
        tensors = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("damaged: its header is not JSON; fetch the file again") from error
    metadata = tensors.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ArtifactError("damaged: its metadata is not a table of texts; fetch the file again")
    entries = {name: _entry(name, said) for name, said in tensors.items()}
    return Header(text, metadata, dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end))))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ArtifactError("refused: its header holds a key twice, so readers may disagree; fetch the file again")
    return table


def _entry(name: str, said: Any) -> Entry:
    """What the header says of one tensor, once every value is known to be of its kind and within bounds."""
    try:
        dtype, shape, (begin, end) = said["dtype"], tuple(said["shape"]), said["data_offsets"]
        itemsize = DTYPES[dtype].itemsize
        name.encode()
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"damaged: bad header entry of tensor '{name}' ({error}); fetch the file again") from error
    numbers = [*shape, begin, end]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) > MAX_SIDES:
        raise ArtifactError(f"damaged: bad header entry of tensor '{name}' ({numbers}); fetch the file again")
    if math.prod(max(side, 1) for side in shape) > MAX_VALUES or end - begin != math.prod(shape) * itemsize:
        raise ArtifactError(f"damaged: shape and size of tensor '{name}' disagree; fetch the file again")
    if begin % itemsize:
        raise ArtifactError(f"damaged: tensor '{name}' is not aligned to its values; fetch the file again")
    return Entry(dtype, shape, begin, end)


def _check_layout(header: Header, size: int) -> None:
    """Raise unless the tensors fill the data without gaps and the data fill the file."""
    end = 0
    for name, entry in header.tensors.items():
        if entry.begin != end:
            raise ArtifactError(
                f"damaged: tensor '{name}' starts at byte {entry.begin}, not {end}; fetch the file again"
            )
        end = entry.end
    expected = header.start + end
    if size != expected:
        problem = "truncated" if size < expected else "damaged"
        raise ArtifactError(f"{problem}: {size} bytes where the header promises {expected}; fetch the file again")
