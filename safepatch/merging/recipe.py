"""What to merge and how, as a value that can be checked before any file is opened."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safepatch.artifact import container
from safepatch.artifact.info import BUNDLE
from safepatch.config import load_config
from safepatch.errors import MergeError, lookup
from safepatch.merging.methods import METHODS, USES

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in container.DTYPES.values()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
EXACT = ("cat", BUNDLE)  # methods whose sources can be split off again
HEALED = "linear"  # the method that healing starts from where none is named
SHARES = ("density", "epsilon", "outliers")


@dataclass(frozen=True)
class MergeRecipe:
    """One merge; a recipe that cannot be run cannot be constructed.

    Attributes:
        sources: names of the patches, usually paths.
        weights: one number above 0 per source; empty is all 1.
        method: a key of `METHODS`, or `bundle`.
        dtype: of the merged tensors; None is the narrowest that holds every source's.
        density: share of each delta's entries that a sparsifying method keeps, in [0, 1].
        epsilon: width of della's window of drop probabilities, in [0, 1].
        outliers: share of each delta's largest entries that breadcrumbs drops, in [0, 1].
        seed: of the methods that drop at random, and of healing.
        rank: with `cat`, re-compress by SVD what has a larger rank; 0 keeps the sum exact.
        heal: steps of training, without images, that the merged patch then takes to do what `bundle` does; see
            `safepatch.heal`, which needs the base model. 0 is none.
        heal_rate: learning rate of that; models much smaller than Stable Diffusion take ten times as much.
        conflicts: compare the sources pair by pair and record it in the file; takes one more pass over them.
        out: where a recipe file writes; not recorded.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...] = ()
    method: str = BUNDLE
    dtype: str | None = None
    density: float = 0.5
    epsilon: float = 0.1
    outliers: float = 0.01
    seed: int = 0
    rank: int = 0
    heal: int = 0
    heal_rate: float = 1e-4
    conflicts: bool = True
    out: str | None = None

    def __post_init__(self) -> None:
        """Normalize, and refuse nonsense with one line."""
        object.__setattr__(self, "sources", tuple(map(str, self.sources)))
        object.__setattr__(self, "weights", tuple(map(float, self.weights)) or (1.0,) * len(self.sources))
        lookup(dict.fromkeys((*METHODS, BUNDLE)), self.method, what="merge method")
        if self.dtype is not None:
            lookup(DTYPES, self.dtype, what="dtype")
        self._check_numbers()
        if self.method == BUNDLE and self.dtype is not None:
            raise MergeError("bundle keeps its parts as they are; leave out dtype")
        if self.method == "slerp" and len(self.sources) > 2:
            raise MergeError(
                f"slerp goes from one patch to another, not through {len(self.sources)}; merge two, or use linear"
            )
        if self.rank and self.method != "cat":
            raise MergeError(f"a rank belongs to method cat, not to {self.method}; leave it out")
        if self.heal and self.method in EXACT:
            raise MergeError(f"{self.method} loses nothing that could be healed; leave out heal, or heal method linear")

    def _check_numbers(self) -> None:
        if not self.sources:
            raise MergeError("nothing to merge; give at least one patch")
        if len(self.weights) != len(self.sources):
            raise MergeError(f"{len(self.weights)} weights for {len(self.sources)} patches; give one weight per patch")
        for source, weight in zip(self.sources, self.weights, strict=True):
            if not 0 < weight < math.inf:
                raise MergeError(f"{source} has weight {weight:g}; give a number above 0, or leave it out")
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise MergeError(f"{name} is {getattr(self, name)}; give a share from 0 to 1")
        if self.rank < 0:
            raise MergeError(f"rank is {self.rank}; give 0 for an exact sum, or at least 1")
        if not 0 < self.heal_rate < math.inf:
            raise MergeError(f"heal_rate is {self.heal_rate}; give a learning rate above 0, such as 1e-4")
        if self.heal < 0:
            raise MergeError(f"heal is {self.heal}; give a number of training steps, or 0 for none")

    @property
    def is_identity(self) -> bool:
        """Whether the merge is one patch of weight 1, which every method returns as it is."""
        return self.weights == (1.0,) and not self.rank and self.method != BUNDLE

    def used_options(self) -> dict[str, Any]:
        """The options that the method reads, by name."""
        return {name: getattr(self, name) for name in USES.get(self.method, ())}


def load_recipe(path: str | Path) -> MergeRecipe:
    """The recipe in a YAML file, whose keys are the fields of `MergeRecipe`; paths are relative to the current folder.

    Raises:
        ConfigError: for anything unknown, missing, unreadable or of a wrong type.
    """
    return load_config(MergeRecipe, Path(path))
