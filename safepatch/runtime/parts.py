"""A patch module that is ready to act on one host, and how strongly it does."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from safepatch.errors import ConfigError
from safepatch.patch import Patch

Scale = float | Mapping[str, float]


class ActivePart(NamedTuple):
    """A patch module and what goes with it.

    Attributes:
        patch: the module, on the pipeline's UNet.
        instruction_states: states of the instructions it reads, (1, tokens, width).
        weight: its weight among the parts of a bundle.
        categories: what it is for, in the order of its instructions; empty if unknown.
        thresholds: probabilities above which each gate opens, (gates,); None without a gate.
        windows: words of the widest window that each gate reads alone; 0 for one that reads whole prompts only.
    """

    patch: Patch
    instruction_states: Tensor
    weight: float = 1.0
    categories: tuple[str, ...] = ()
    thresholds: Tensor | None = None
    windows: tuple[int, ...] = ()

    @property
    def reads_windows(self) -> bool:
        """Whether some gate of it reads windows."""
        return any(self.windows)

    def scales(self, scale: Scale) -> Tensor:
        """Scale times weight for each group of the part's patch, (groups,)."""
        if not isinstance(scale, Mapping):
            return torch.full((self.patch.groups,), scale * self.weight)
        scales = [scale.get(name, 1.0) for name in self.categories]
        if self.patch.groups == 1 and len(set(scales)) > 1:
            raise ConfigError(
                f"{', '.join(self.categories)} were merged into one and share one scale; merge by bundle, or lite "
                "patches by cat, to keep them apart"
            )
        return torch.tensor(scales[: self.patch.groups]) * self.weight
