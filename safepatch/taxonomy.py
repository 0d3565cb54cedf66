"""What a patch is for: a harm category, as a value. Categories are files (`safepatch.data.category`), none built in."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Category:
    """A harm class a patch can be trained for.

    Attributes:
        name: identifier, used in file metadata, configs and reports.
        definition: one line a person can decide by.
        instruction: the textual safety instruction a control or lite patch reads through its cross-attention.
        labels: of each detector, by its name, the labels that count as this category.
    """

    name: str
    definition: str
    instruction: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
