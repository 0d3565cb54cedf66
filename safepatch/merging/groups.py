"""Parameters that have the category as their first dimension, a lite patch's and any gate's: merged by concatenation.

A merged lite patch computes the sum of its sources' corrections exactly. Narrower sources are filled up with zeros,
which stay zeros on their way through a branch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact.info import PatchInfo
from safepatch.errors import MergeError
from safepatch.merging.sources import Source

PICTURE = "picture"  # width of the keys that look at pictures, in a layout
FREE = {"rank": 0, "groups": 0, PICTURE: 0}  # in which lite patches that stand side by side may differ
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
        if {**layout, **FREE} != {**layouts[0], **FREE}:
            raise MergeError(
                f"{sources[0].name} and {source.name} differ in depth or gate; merge by bundle instead of cat"
            )
    groups = _categories(sources, "merge by bundle instead of cat")
    joint = {**layouts[0], "rank": max(layout["rank"] for layout in layouts), "groups": groups}
    return {name: size for name, size in joint.items() if name != PICTURE} | picture_layout(sources)


def picture_layout(sources: Sequence[Source]) -> dict[str, int]:
    """What a layout says of the widest key that looks at pictures; of a source without one, zeros stand beside it."""
    width = max(source.info.config.get("layout", {}).get(PICTURE, 0) for source in sources)
    return {PICTURE: width} if width else {}


def has_gate(source: Source) -> bool:
    """Whether the source, which is no bundle, has a gate."""
    return "gate" in source.info.config.get("layout", {})


def gates_layout(sources: Sequence[Source]) -> dict[str, int]:
    """What the layout of a sum says of its sources' gates, which stand side by side; nothing where none has one.

    Raises:
        MergeError: when only some have gates, or they differ in width, or two are for one category, or a source keeps
            its categories apart.
    """
    widths = {source.info.config["layout"]["gate"] if has_gate(source) else 0: source.name for source in sources}
    if len(widths) > 1:
        (width, first), (other, second), *_ = sorted(widths.items())
        differ = f"have gates of width {width} and {other}" if width else "have no gate and a gate"
        raise MergeError(f"{first} and {second} {differ}; fit alike (safepatch gate --width), or merge by bundle")
    if 0 in widths:
        return {}
    for source in sources:
        if source.info.config["layout"].get("groups", 1) > 1:
            raise MergeError(f"{source.name} keeps its categories apart; merge by cat or bundle")
    gates = _categories(sources, "merge by bundle, which keeps both gates")
    return {"gate": next(iter(widths)), **({"gates": gates} if gates > 1 else {}), **picture_layout(sources)}


def gate_records(sources: Sequence[Source]) -> dict[str, Any]:
    """What the sources say of their gates, by category."""
    return {name: gate for source in sources for name, gate in source.info.config.get("gate", {}).items()}


def _categories(sources: Sequence[Source], advice: str) -> int:
    """How many there are; raises `MergeError` when two sources share one."""
    names = [name for source in sources for name in source.info.categories]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise MergeError(f"more than one patch is for '{twice[0]}'; {advice}")
    return len(names)


def joined_shape(sources: Sequence[Source], name: str) -> tuple[int, ...]:
    """One group per category of the sources, and the widest of each other side.

    Raises:
        MergeError: when a source has not one group per category there, or the sources differ in how many sides it has.
    """
    shapes = {source: shape for source in sources if (shape := source.shape(name)) is not None}
    sides = len(next(iter(shapes.values())))
    for source, shape in shapes.items():
        if len(shape) != sides or shape[:1] != (len(source.info.categories),):
            raise MergeError(f"'{name}' is {list(shape)} in {source.name}; merge patches of one configuration")
    widest = map(max, zip(*(shape[1:] for shape in shapes.values()), strict=True))
    return (sum(len(source.info.categories) for source in sources), *widest)


def places(sources: Sequence[PatchInfo], index: int) -> list[int]:
    """Where the groups of source `index` stand in the merged patch, whose groups are in the order of its categories."""
    merged = sorted(name for info in sources for name in info.categories)
    return [merged.index(name) for name in sources[index].categories]


def side_by_side(sources: Sequence[Source], name: str, shape: tuple[int, ...]) -> Tensor:
    """Parameter `name` of all sources, (groups, *), float32, each source's weight in its joints; zero where missing."""
    merged = torch.zeros(shape)
    infos = [source.info for source in sources]
    for index, source in enumerate(sources):
        if source.shape(name) is None:
            continue
        source.stored(name)  # refuses what is not finite
        values = source.artifact.delta(name) * (source.weight if name.endswith(f".{JOINT}") else 1.0)
        for place, group in zip(places(infos, index), values, strict=True):
            merged[place][tuple(slice(side) for side in group.shape)] = group
    return merged


def cut_out(merged: Tensor, name: str, shape: Sequence[int], groups: Sequence[int], weight: float) -> Tensor:
    """The part of a merged parameter, (groups, *), that a source of `shape` put at `groups`."""
    part = merged[list(groups)][(slice(None), *(slice(side) for side in shape[1:]))].float()
    return part / weight if name.endswith(f".{JOINT}") else part
