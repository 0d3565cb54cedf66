"""What to merge and how, as a value that can be checked before any file is opened."""

import math
from dataclasses import dataclass

from safepatch import container
from safepatch.errors import MergeError, lookup
from safepatch.merging.methods import METHODS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in container.DTYPES.values()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class MergeRecipe:
    """One merge; a recipe that cannot be run cannot be constructed.

    Attributes:
        sources: names of the patches, usually paths.
        weights: one finite number per source.
        method: a key of `METHODS`.
        dtype: of the merged tensors.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    method: str = "task-arithmetic"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        """Refuse nonsense with one line."""
        lookup(METHODS, self.method, what="merge method")
        lookup(DTYPES, self.dtype, what="dtype")
        if not self.sources:
            raise MergeError("nothing to merge; give at least one patch")
        if len(self.weights) != len(self.sources):
            raise MergeError(f"{len(self.weights)} weights for {len(self.sources)} patches; give one weight per patch")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise MergeError(f"merge weights {list(self.weights)} are not all finite; give plain numbers")

    @property
    def is_identity(self) -> bool:
        """Whether the merge is one patch of weight 1, which every method returns as it is."""
        return self.weights == (1.0,)
