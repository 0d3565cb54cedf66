"""Several patches of one architecture into one file; needs artifacts only, no model and no GPU."""

from safepatch.merging.engine import combine, merge
from safepatch.merging.methods import METHODS
from safepatch.merging.recipe import MergeRecipe

__all__ = ["METHODS", "MergeRecipe", "combine", "merge"]
