"""Does a patch stop variants: a harmless subject of somebody's pictures, edited into something unsafe?

Unsafe Diffusion (Qu et al., CCS 2023, arXiv 2305.13873, section 6) made variants of given pictures by three editing
methods. Here a subject that the category has nothing to do with is put beside the category's concepts, by a start
picture, by a word that was learned of its pictures, and by a LoRA that was; with patches and without.
"""

from safepatch.variants.run import run_variants
from safepatch.variants.ways import WAYS, Learning

__all__ = ["WAYS", "Learning", "run_variants"]
