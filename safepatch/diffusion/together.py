"""How many pictures a pipeline draws at once: their size decides what a batch costs."""

from typing import Any

from safepatch.diffusion.sampling import own_sides

PIXELS = 1 << 20  # of the pictures of a batch together: four of 512 x 512, one of 1024 x 1024


def drawn_together(pipe: Any, most: int) -> int:
    """How many pictures a pipeline draws at once where nobody says so, at most `most`, at least one.

    An autoencoder decodes a batch as a whole, which takes some gigabytes for `PIXELS` of it.
    """
    edge, _ = own_sides(pipe)
    return max(1, min(most, PIXELS // edge**2))
