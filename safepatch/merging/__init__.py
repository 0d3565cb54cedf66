"""Several patches of one architecture into one file; needs artifacts only, no model and no GPU."""

from safepatch.merging.engine import combine, merge
from safepatch.merging.methods import METHODS, Options
from safepatch.merging.parts import split
from safepatch.merging.recipe import MergeRecipe, load_recipe

__all__ = ["METHODS", "MergeRecipe", "Options", "combine", "load_recipe", "merge", "split"]
