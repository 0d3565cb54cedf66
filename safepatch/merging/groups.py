"""Patches whose parameters have the group, one per category, as their first dimension: merged by concatenation.

The merged patch computes the sum of its sources' corrections exactly. Narrower sources are filled up with zeros, which
stay zeros on their way through a branch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safepatch.errors import MergeError
from safepatch.info import PatchInfo
from safepatch.merging.sources import Source

JOINT = "up"  # last part of the names of the parameters that end a branch: a weight enters there, once


def is_grouped(info: PatchInfo) -> bool:
    """Whether the patch's parameters begin with a group dimension."""
    return "groups" in info.config.get("layout", {})


def merged_layout(sources: Sequence[Source]) -> dict[str, Any]:
    """The layout of the sources side by side.

    Raises:
        MergeError: when they differ in more than rank, or two are for one category, or one has mixed its categories.
    """
    layouts = [source.info.config["layout"] for source in sources]
    for source, layout in zip(sources, layouts, strict=True):
        if layout["groups"] != len(source.info.categories):
            raise MergeError(f"{source.name} has mixed its categories in one group; merge by bundle instead of cat")
        if {**layout, "rank": 0, "groups": 0} != {**layouts[0], "rank": 0, "groups": 0}:
            raise MergeError(
                f"{sources[0].name} and {source.name} differ in depth or gate; merge by bundle instead of cat"
            )
    names = [name for source in sources for name in source.info.categories]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MergeError(f"more than one patch is for '{twice[0]}'; merge by bundle instead of cat")
    return {**layouts[0], "rank": max(layout["rank"] for layout in layouts), "groups": len(names)}


def places(sources: Sequence[PatchInfo], index: int) -> list[int]:
    """Where the groups of source `index` stand in the merged patch, whose groups are in the order of its categories."""
    merged = sorted(name for info in sources for name in info.categories)
    return [merged.index(name) for name in sources[index].categories]


def side_by_side(sources: Sequence[Source], name: str, shape: tuple[int, ...]) -> Tensor:
    """Parameter `name` of all sources, (groups, *), float32, each source's weight in its joints."""
    merged = torch.zeros(shape)
    infos = [source.info for source in sources]
    for index, source in enumerate(sources):
        values = source.stored(name)["delta"].float() * (source.weight if name.endswith(f".{JOINT}") else 1.0)
        for place, group in zip(places(infos, index), values, strict=True):
            merged[place][tuple(slice(side) for side in group.shape)] = group
    return merged


def cut_out(merged: Tensor, name: str, shape: Sequence[int], groups: Sequence[int], weight: float) -> Tensor:
    """The part of a merged parameter, (groups, *), that a source of `shape` put at `groups`."""
    part = merged[list(groups)][(slice(None), *(slice(side) for side in shape[1:]))].float()
    return part / weight if name.endswith(f".{JOINT}") else part
