"""Soft prompts that are trained against a patch while it learns: a player that any objective can have.

Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843): in the backward pass that trains the patch, each soft
prompt in use takes a step up the loss, so an adversary costs no pass of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from safepatch.diffusion import UNET, Conditioning, joined, moved
from safepatch.errors import ConfigError
from safepatch.objectives.base import Player, Turn, Usual
from safepatch.patch import Patch

ADVERSARY = "adversary"  # the player's name
SPREAD = 0.1  # of fresh soft prompts around the padding they start from


@dataclass(frozen=True)
class AdversaryConfig:
    """How strong the adversary is.

    Attributes:
        count: soft prompts; 0 trains without.
        tokens: text states of each.
        rate: how far each of their values moves per step.
        life: steps after which one starts anew, as an attack of that many steps does.
        share: of the unsafe prompts, that carry one.
    """

    count: int = 0
    tokens: int = 4
    rate: float = 0.05
    life: int = 100
    share: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.count < 0 or min(self.tokens, self.life) < 1 or not 0 <= self.share <= 1:
            raise ConfigError("adversary.count must be >= 0, tokens and life at least 1, and share within [0, 1]")


class SoftPrompts(nn.Module):
    """Soft prompts near the end of a prompt's padding, all at different ages.

    Args:
        config: how many, and how long they live.
        start: the padding's text state, (width,).
    """

    start: Tensor
    age: Tensor

    def __init__(self, config: AdversaryConfig, start: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("start", start.detach().float().cpu().clone())
        self.register_buffer("age", torch.arange(config.count) * config.life // config.count)
        self.states = nn.Parameter(self._fresh(torch.Generator().manual_seed(0)))

    def appended(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """`states` (B, T, width) with a soft prompt behind a share of the rows, and more padding behind the others."""
        self._restart(generator)
        rows = len(states)
        pick = moved(torch.randint(len(self.states), (rows,), generator=generator), states.device)
        attacked = moved(torch.rand(rows, generator=generator) < self.config.share, states.device)[:, None, None]
        soft = torch.where(attacked, self.states[pick].to(states.dtype), padding(states, self.config.tokens))
        return torch.cat((states, soft), dim=1)

    @torch.no_grad()
    def _restart(self, generator: torch.Generator) -> None:
        """Soft prompts that have lived long enough start anew."""
        old = self.age >= self.config.life
        self.states.copy_(torch.where(old[:, None, None], self._fresh(generator), self.states))
        self.age.copy_(torch.where(old, torch.zeros_like(self.age), self.age))

    def _fresh(self, generator: torch.Generator) -> Tensor:
        shape = (self.config.count, self.config.tokens, len(self.start))
        return self.start + SPREAD * moved(torch.randn(shape, generator=generator), self.start.device)


class SignAscent(torch.optim.Optimizer):
    """A step of fixed length up the loss for each value that has a gradient (Goodfellow et al. 2015, eq. 1)."""

    def __init__(self, prompts: SoftPrompts) -> None:
        super().__init__([prompts.states], {"lr": prompts.config.rate})
        self._prompts = prompts

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move, and count a step of life for those in use."""
        for group in self.param_groups:
            for states in (p for p in group["params"] if p.grad is not None):
                states.add_(states.grad.sign().nan_to_num(), alpha=group["lr"])  # fp16 may have overflowed
                self._prompts.age += states.grad.flatten(1).any(1)


def adversary(config: AdversaryConfig, states: Tensor) -> Player:
    """The player whose soft prompts start from the end of prompts' padding, the last of `states` (1, T, width)."""
    prompts = SoftPrompts(config, states[0, -1])
    return Player(ADVERSARY, prompts, SignAscent(prompts), rides=True)


@dataclass(frozen=True, kw_only=True)
class Attackable(Usual):
    """What objectives that learn step by step do: an adversary may play against the patch.

    Attributes:
        adversary: soft prompts that are trained against the patch while it learns.
    """

    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)

    def suited(self, patch: Patch) -> Patch:
        """All of it; raises `ConfigError` also for a text encoder's, which would not read a soft prompt."""
        if self.adversary.count and patch.component != UNET.component:
            raise ConfigError(
                f"the adversary's soft prompts are text states, which a patch of the {patch.component} makes itself; "
                "set objective.adversary.count=0, or objective=adv-unlearn"
            )
        return super().suited(patch)

    def players(self, patch: Player, rows: Any) -> list[Player]:
        """The patch, and the adversary if there is one; its padding is that of the first of the rows' texts."""
        return [patch, adversary(self.adversary, rows.texts[[0]].states)] if self.adversary.count else [patch]


def attacked(turn: Turn, unsafe: Conditioning, *others: Conditioning) -> Conditioning:
    """What the patched model is asked, side by side, the unsafe prompts first.

    Where an adversary plays, a share of the unsafe prompts end in a soft prompt, and all others in as much padding.
    """
    if ADVERSARY not in turn.others:
        return joined([unsafe, *others])
    prompts = cast(SoftPrompts, turn.others[ADVERSARY])
    tokens, states = prompts.config.tokens, prompts.appended(unsafe.states, turn.generator)
    padded = [one._replace(states=torch.cat((one.states, padding(one.states, tokens)), dim=1)) for one in others]
    return joined([unsafe._replace(states=states), *padded])


def padding(states: Tensor, tokens: int) -> Tensor:
    """The end of the padding, the last of `states` (B, T, width), `tokens` more times."""
    return states[:, -1:].expand(-1, tokens, -1)
