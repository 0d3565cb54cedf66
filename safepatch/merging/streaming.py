"""A merge's values on all cores, piece after piece; memory holds a few pieces at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from safepatch.artifact.container import raw_bytes
from safepatch.artifact.hashing import Hashed
from safepatch.merging.job import Job, Piece

T = TypeVar("T")
R = TypeVar("R")
Pool = ThreadPoolExecutor | None  # None: the work is done on the spot

BUDGET = 300_000_000  # bytes that merging ahead may take; a larger piece is merged alone
BATCH = 50_000_000  # bytes that merging pieces in one go may take
AHEAD = 6  # batches that may be merged ahead of the one that is written


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor | None]:
    """As many workers as torch had threads, or None for one; torch's own are off inside.

    So the work is shared at one place only, and no matrix product depends on the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            yield None
        else:
            with ThreadPoolExecutor(threads) as pool:
                yield pool
    finally:
        torch.set_num_threads(threads)


def stream(job: Job, pool: Pool) -> Iterator[Hashed]:
    """The bytes of the merged file's tensors, in its order; it ends well only if the sources were what they state."""

    def merged(pieces: list[Piece]) -> list[Hashed]:
        return [Hashed.of(raw_bytes(job.values(piece))) for piece in pieces]

    def cost(pieces: list[Piece]) -> int:
        return sum(map(job.cost, pieces))

    for _, batch in ahead(pool, merged, _batches(job), cost):
        yield from batch
    _confirm(job)


def _batches(job: Job) -> Iterator[list[Piece]]:
    """All pieces, several at a time: handing them from thread to thread costs as much as merging a small one."""
    batch, cost = [], 0
    for piece in job.pieces():
        if batch and cost + job.cost(piece) > BATCH:
            yield batch
            batch, cost = [], 0
        batch.append(piece)
        cost += job.cost(piece)
    yield batch


def in_memory(job: Job) -> dict[str, Tensor]:
    """The merged tensors by name."""
    merged = {}
    for name, pieces in groupby(job.pieces(), lambda piece: piece.tensor):
        values = [job.values(piece) for piece in pieces]
        merged[name] = (torch.cat(values) if len(values) > 1 else values[0]).reshape(job.layout[name].shape)
    _confirm(job)
    return merged


def _confirm(job: Job) -> None:
    for source in job.sources:
        source.confirm()


def ahead(pool: Pool, work: Callable[[T], R], items: Iterable[T], cost: Callable[[T], int]) -> Iterator[tuple[T, R]]:
    """Each item with what `work` makes of it, in order, at most `AHEAD` in progress, costing at most `BUDGET`."""
    if pool is None:
        yield from ((item, work(item)) for item in items)
        return
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for item in items:
            while waiting and (len(waiting) == AHEAD or sum(cost(other) for other, _ in waiting) + cost(item) > BUDGET):
                done, future = waiting.popleft()
                yield done, future.result()
            waiting.append((item, pool.submit(work, item)))
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
