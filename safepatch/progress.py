"""Progress bars at a terminal, and none in log files and pipes."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(iterable: Iterable | None = None, shown: bool = True, **options: Any) -> Any:
    """A tqdm bar where somebody is looking; `shown` turns it off for processes that have nothing to say."""
    return tqdm(iterable, disable=None if shown else True, **options)
