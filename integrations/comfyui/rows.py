"""Which rows of one of ComfyUI's calls carry which prompt, and what they say of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEGATIVE = "safepatch_negative"  # in ComfyUI's options: ids of the negative prompt's conditionings
CHUNK = 77  # tokens that CLIP reads at once

Rows = slice | Tensor


def rows_to_correct(options: Mapping[str, Any], batch: int) -> Rows | None:
    """Which rows carry a prompt; None for none. The negative prompt's are left alone, where it is known which they are.

    ComfyUI puts several conditionings into one call, each with an equal share of the rows, in any order.
    """
    ids, negative = options.get("uuids") or (), options.get(NEGATIVE, frozenset())
    if not any(each in negative for each in ids):
        return slice(0, batch)
    share = batch // len(ids)
    kept = [row for row in range(batch) if ids[row // share] not in negative]
    if not kept:
        return None
    is_run = kept == list(range(kept[0], kept[-1] + 1))
    return slice(kept[0], kept[-1] + 1) if is_run else torch.tensor(kept)


def unrepeated(states: Tensor) -> Tensor:
    """Text states (B, 77 n, width) without repeats: ComfyUI repeats a prompt's until all of a call's are as long.

    A host reads the same of repeats; a clone, which reads its instruction beside them, would not.
    """
    tokens = states.shape[1]
    for length in range(CHUNK, tokens // 2 + 1, CHUNK):
        if tokens % length == 0 and torch.equal(states[:, length:], states[:, :-length]):
            return states[:, :length]
    return states
