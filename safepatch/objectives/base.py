"""What an objective is: it owns its data, its players and its losses; the training loop knows no more of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from safepatch.data.bank import DataConfig
from safepatch.diffusion import TEXT_ENCODERS, UNET, Host
from safepatch.errors import ConfigError
from safepatch.patch import Patch

Losses = dict[str, Tensor]
STARTS = ("zero", "closed_form")


@dataclass
class Player:
    """A module that learns, and how.

    Attributes:
        name: of its losses in logs, and of its state in checkpoints; the patch's is `patch`.
        module: what learns.
        optimizer: of its parameters.
        every: it moves at every so many-th step.
        rides: it has no loss of its own, but learns from the gradients that the patch's leaves behind.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    every: int = 1
    rides: bool = False


class Rows(Protocol):
    """Training data: whatever it holds, (step, size, seed) stands for one batch of it."""

    def batch(self, step: int, size: int, seed: int) -> Any:
        """The batch, with a method `to(device)`."""
        ...


@dataclass(frozen=True)
class Turn:
    """One batch to learn from.

    Attributes:
        host: the frozen model.
        patch: what learns, perhaps wrapped by a distributed trainer.
        instruction: text states of the safety instruction, (1, tokens, width).
        batch: of the objective's own rows.
        generator: CPU generator that everything random is drawn from.
        others: the other players' modules, by name.
    """

    host: Host
    patch: nn.Module
    instruction: Tensor
    batch: Any
    generator: torch.Generator
    others: Mapping[str, nn.Module] = field(default_factory=dict)


class Objective(Protocol):
    """What a patch is trained for; a typed configuration of this kind is one line of `OBJECTIVES`.

    Attributes:
        has_steps: whether it learns step by step, by `players` and `loss`; else `solve` is all there is.
        selects: whether a detector may choose what it learns from.
    """

    has_steps: ClassVar[bool]
    selects: ClassVar[bool]

    @property
    def name(self) -> str:
        """Its key in `OBJECTIVES`."""
        ...

    def suited(self, patch: Patch) -> Patch:
        """A fresh patch, cut down to what the objective trains of it; before anything is drawn.

        Raises:
            ConfigError: when it cannot train a patch of that kind.
        """
        ...

    def recorded(self, host: Host) -> dict[str, Any]:
        """What the patch's file must say of how pictures are drawn with it."""
        ...

    def prepare(self, host: Host, corpus: Any, data: DataConfig) -> Rows:
        """Everything that is learned from, made once; of a `Corpus`, or of several where the objective is for more."""
        ...

    def solve(self, host: Host, patch: Patch, rows: Any) -> Mapping[str, float]:
        """Compute the patch's weights at once; returns what is to be logged."""
        ...

    def players(self, patch: Player, rows: Any) -> list[Player]:
        """Who learns: the patch first, then whoever plays with it or against it."""
        ...

    def loss(self, player: Player, turn: Turn) -> Losses:
        """The total `loss` of a player, and its parts, scalars."""
        ...


@dataclass(frozen=True, kw_only=True)
class Usual:
    """What most objectives do: they train all of a patch, of any kind, step by step, and nobody else learns.

    Attributes:
        kinds: of patches that it can train.
        components: of a pipeline that such a patch may change.
        has_steps: whether it learns step by step.
        selects: whether it learns from pictures of both members of a pair, among which a detector may choose.
        takes_wordless: whether rows of `data.wordless` mean something to it.
        start: what a patch begins with: `zero`, no effect; `closed_form`, of a lora patch, what that objective solves
            for in seconds, as far as the patch's rank and layers hold it.
    """

    kinds: ClassVar[tuple[str, ...]] = ("control", "lite", "lora")
    components: ClassVar[tuple[str, ...]] = (UNET.component, *TEXT_ENCODERS)
    has_steps: ClassVar[bool] = True
    selects: ClassVar[bool] = False
    takes_wordless: ClassVar[bool] = False
    start: str = "zero"

    @property
    def _name(self) -> str:
        return getattr(self, "name", type(self).__name__)

    @property
    def rows_per_pair(self) -> int:
        """Rows of the patched host that each pair of a batch takes."""
        return 1

    @property
    def held_per_pair(self) -> int:
        """Rows of the host for each pair through which gradients reach the patch, all at once."""
        return self.rows_per_pair

    @property
    def pictures_per_pair(self) -> int:
        """Pictures that are drawn for each pair."""
        return self.rows_per_pair

    @property
    def calls_per_pair(self) -> int:
        """Rows of the host that a step takes for each pair, beside a teacher, an answer and a backward pass of each."""
        return 0

    def suited(self, patch: Patch) -> Patch:
        """All of it; raises `ConfigError` for a kind or component that is none of its own, or that cannot start so."""
        if self.start not in STARTS:
            raise ConfigError(f"objective.start must be one of {', '.join(STARTS)}, not '{self.start}'")
        if patch.component not in self.components:
            raise ConfigError(
                f"objective={self._name} cannot train a patch of the {patch.component}; set patch.component="
                f"{' or '.join(self.components)}"
            )
        if self.start != "zero" and patch.component != UNET.component:
            raise ConfigError(f"objective.start={self.start} is for patches of the unet; set objective.start=zero")
        if self.start != "zero" and patch.kind != "lora":
            raise ConfigError(f"objective.start={self.start} is for lora patches; set patch.kind=lora, or start=zero")
        if patch.kind not in self.kinds:
            raise ConfigError(
                f"objective={self._name} cannot train a {patch.kind} patch; set patch.kind={' or '.join(self.kinds)}"
            )
        return patch

    def recorded(self, host: Host) -> dict[str, Any]:
        """What a file must say of how pictures are drawn with the patch; nothing of most."""
        return {}

    def solve(self, host: Host, patch: Patch, rows: Any) -> Mapping[str, float]:
        """Nothing: it takes steps."""
        raise NotImplementedError(f"objective={self._name} learns step by step")

    def players(self, patch: Player, rows: Any) -> list[Player]:
        """The patch alone."""
        return [patch]
