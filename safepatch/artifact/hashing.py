"""The content hash of a patch file.

Format 2 hashes a tree. A tensor is cut into blocks of 1 MiB, the last one being what is left; its hash is the SHA-256
of its blocks' SHA-256 digests in their order. The content hash is the SHA-256 of the canonical JSON of
`{"metadata": {...}, "tensors": {name: {"dtype": ..., "shape": ..., "sha256": ...}}}`, metadata being all but the hash
itself. So neither the order of the header nor its padding counts, blocks can be hashed by all cores, and one block can
be checked without the others.

Format 1 hashes the whole file with the hash's own digits set to zero.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import NamedTuple

from safepatch.artifact.container import HASH_KEY, NO_HASH, VERSION_KEY, Entry, Header, canonical_json

BLOCK = 1 << 20  # bytes; part of the format


class Block(NamedTuple):
    """A run of bytes of one tensor that is hashed on its own.

    Attributes:
        tensor: its name.
        index: of the block in the tensor.
        begin: first byte, counted from the end of the header.
        end: last byte + 1.
    """

    tensor: str
    index: int
    begin: int
    end: int


def blocks_of(name: str, entry: Entry, begin: int, end: int) -> Iterator[Block]:
    """The blocks of one tensor that hold its bytes `begin` to `end`, which are counted as the entry's are."""
    for index in range((begin - entry.begin) // BLOCK, -(-(end - entry.begin) // BLOCK)):
        start = entry.begin + index * BLOCK
        yield Block(name, index, start, min(start + BLOCK, entry.end))


def all_blocks(header: Header) -> Iterator[Block]:
    """The blocks of all tensors in the order of their bytes."""
    for name, entry in header.tensors.items():
        yield from blocks_of(name, entry, entry.begin, entry.end)


def is_flat(header: Header) -> bool:
    """Whether the file is of format 1, which has no tree."""
    return header.metadata.get(VERSION_KEY) == "1"


def slot(content_hash: str) -> bytes:
    """The hash as it stands in the header."""
    return f'"{HASH_KEY}":"{content_hash}"'.encode()


def tree_hash(header: Header, digests: Mapping[str, Sequence[bytes]]) -> str:
    """`0x` and 64 hex digits: the content hash of format 2, from the digests of every tensor's blocks."""
    metadata = {key: value for key, value in header.metadata.items() if key != HASH_KEY}
    tensors = {
        name: {"dtype": entry.dtype, "shape": entry.shape, "sha256": sha256(b"".join(digests[name])).hexdigest()}
        for name, entry in header.tensors.items()
    }
    return f"0x{sha256(canonical_json({'metadata': metadata, 'tensors': tensors}).encode()).hexdigest()}"


def flat_hash(header: Header, data: Iterable[bytes | memoryview]) -> str:
    """`0x` and 64 hex digits: the content hash of format 1, from all data in their order."""
    sha = sha256(header.prefix + header.text.replace(slot(header.stated_hash), slot(NO_HASH)))
    for piece in data:
        sha.update(piece)
    return f"0x{sha.hexdigest()}"


class Hashed(NamedTuple):
    """Bytes that are whole blocks of one tensor.

    Attributes:
        data: the bytes.
        digests: of their blocks.
    """

    data: memoryview
    digests: list[bytes]

    @classmethod
    def of(cls, data: memoryview) -> "Hashed":
        """Hash them, in whatever thread."""
        return cls(data, [sha256(data[at : at + BLOCK]).digest() for at in range(0, len(data), BLOCK)])


Data = bytes | memoryview | Hashed


class Hashing:
    """Hashes data as they are written, in pieces of any size.

    Attributes:
        digests: of the blocks of every tensor that have passed.
    """

    def __init__(self, header: Header) -> None:
        self.digests: dict[str, list[bytes]] = {name: [] for name in header.tensors}
        self._header = header
        self._blocks = all_blocks(header)
        self._flat = sha256(header.prefix + header.text) if is_flat(header) else None
        self._next()

    def update(self, piece: Data) -> None:
        """The next bytes of the file's data."""
        data = piece.data if isinstance(piece, Hashed) else piece
        if self._flat:
            self._flat.update(data)
        if isinstance(piece, Hashed):
            for digest in piece.digests:
                self._end_block(digest)
            return
        left = memoryview(data)
        while left and self._block:
            some, left = left[: self._missing], left[self._missing :]
            self._sha.update(some)
            self._missing -= len(some)
            if not self._missing:
                self._end_block(self._sha.digest())

    def content_hash(self) -> str:
        """The hash of the file, once all data have passed."""
        return f"0x{self._flat.hexdigest()}" if self._flat else tree_hash(self._header, self.digests)

    def _end_block(self, digest: bytes) -> None:
        assert self._block, "no data behind the last block"
        self.digests[self._block.tensor].append(digest)
        self._next()

    def _next(self) -> None:
        self._block = next(self._blocks, None)
        self._missing = self._block.end - self._block.begin if self._block else 0
        self._sha = sha256()
