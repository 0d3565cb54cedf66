"""Counters of what a patch does, whatever threads draw with it."""

import threading
from dataclasses import dataclass

_COUNTING = threading.Lock()


@dataclass
class Stats:
    """What happened since the patch was attached.

    Attributes:
        unet_calls: times the host's first layer ran, however it was called.
        patched_calls: calls in which the patch could act: switched on, within its window, on rows with a prompt.
        acted_calls: those of them in which it changed something.
        acted_rows: rows that it changed.
        gated_rows: rows that a gate has judged, counted per step and category.
        open_rows: those of them for which it opened.
        picture_rows: those that the picture spoke against and the words did not, of a gate that looks at pictures.
        wordless_rows: rows whose words are unknown to a gate that reads words, because somebody else's encoder, or
            none, made their text states; it judged them by those alone. Counted once a denoising.
    """

    unet_calls: int = 0
    patched_calls: int = 0
    acted_calls: int = 0
    acted_rows: int = 0
    gated_rows: int = 0
    open_rows: int = 0
    picture_rows: int = 0
    wordless_rows: int = 0

    def count(self, **more: int) -> None:
        """Add to the counters, whatever other threads do."""
        with _COUNTING:
            for name, number in more.items():
                setattr(self, name, getattr(self, name) + number)
