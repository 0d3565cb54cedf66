"""A table: named columns and rows, and the names that public prompt sets give their columns."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# By role, the names that public prompt sets give it, best first; case, spaces, - and _ do not matter.
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": (
        *("unsafe_prompt", "prompt", "adv_prompt", "adversarial_prompt", "sensitive_prompt", "text_prompt", "text"),
        *("target_prompt", "target", "caption", "prompts", "captions", "texts", "prompt_en", "unsafe"),
    ),
    # not MMA's `sanitized_adv_prompt` (still an attack) and `clean_prompt` (of another picture): no twins
    "safe": ("safe_prompt", "safe", "normal_prompt", "prompt1", "sanitized_prompt", "sanitized", "neutral"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    "categories": ("categories", "category", "concepts", "concept", "label"),
    "image": ("image", "image_path", "unsafe_image"),
    "safe_image": ("safe_image", "safe_image_path"),
}


@dataclass(frozen=True)
class Table:
    """What a file holds.

    Attributes:
        columns: their names; `rows` have as many cells, None where a JSON object lacks the key.
        rows: the data, in the file's order.
        roles: by role, the column that the format itself says it is; else they are found by name.
        part: key of the list that the rows were taken from, where there were others.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    roles: Mapping[str, str] = field(default_factory=dict)
    part: str = ""


def match(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column that has the first of `names` that any has."""
    known = {plain(column): column for column in reversed(list(columns))}
    return next((known[name] for name in names if name in known), None)


def plain(name: str) -> str:
    """A column's name without regard to case, spaces, - and _."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def listed(names: Iterable[str]) -> str:
    """Names in one line, the first twenty of them."""
    names = [name or "''" for name in names]
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
