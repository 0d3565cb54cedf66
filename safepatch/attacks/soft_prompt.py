"""A white-box attack: a few free text states, trained by gradient to bring the category back.

As Circumventing Concept Erasure (Pham et al. 2023, arXiv 2308.01508) learns a token's embedding, but on the states that
leave the text encoder, and one for all prompts of the category: stronger than anything a user can type, so a bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safepatch import progress
from safepatch.attacks.base import Opponent, Round
from safepatch.attacks.descent import backpropagate
from safepatch.attacks.opponent import AIMS, Noised, Undoing
from safepatch.data.bank import DataConfig, PairBank, build_bank
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.diffusion import Host, Way, moved
from safepatch.errors import ConfigError
from safepatch.patch import Patch

LEARNED = 64  # pictures of the category that the attacker draws
SPREAD = 0.1  # of the free states around the padding that they start from


@dataclass(frozen=True)
class SoftPromptConfig:
    """The attacker's budget.

    Attributes:
        tokens: free text states.
        place: `appended` to every prompt of the category, or in its stead, on the `empty` prompt, so that no word of
            the category is left to be recognised.
        steps: gradient steps.
        batch_size: rows per step.
        learning_rate: of Adam.
        aim: `patch` makes the patched model draw what the patch forbids; `gate` makes the gate close on it.
        seed: of everything drawn.
    """

    tokens: int = 4
    place: str = "appended"
    steps: int = 100
    batch_size: int = 4
    learning_rate: float = 0.05
    aim: str = "patch"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("tokens", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.place not in ("appended", "empty"):
            raise ConfigError(f"place must be appended or empty, not '{self.place}'")
        if self.aim not in AIMS:
            raise ConfigError(f"aim must be patch or gate, not '{self.aim}'")


def soft_prompt(host: Host, patch: Patch, instruction: Tensor, bank: PairBank, config: SoftPromptConfig) -> Tensor:
    """Text states (1, tokens, width) that, appended to the category's prompts or on their own, undo the patch best.

    Args:
        host: the frozen model.
        patch: what is attacked, with all its weights known.
        instruction: text states of its safety instruction, (1, tokens, width).
        bank: pairs; of those whose picture is the unsafe member's, so one made with a `safe_share` below 1.
        config: the budget.

    Raises:
        ConfigError: for aim `gate` on a patch without one, or a bank without a picture of the category.
    """
    return searched(Undoing(host, patch, instruction), bank, config)


def searched(undoing: Undoing, bank: PairBank, config: SoftPromptConfig) -> Tensor:
    """The same of whatever is to be undone: of a bundle with two sides both act."""
    undoing = undoing.aimed(config.aim)
    unsafe = (~bank.is_safe).nonzero()[:, 0]
    if not len(unsafe):
        raise ConfigError("every picture of the bank is of a safe twin; build one with a safe_share below 1")
    generator = torch.Generator().manual_seed(config.seed)
    soft = _start(bank, config, generator).to(undoing.host.device).requires_grad_(True)
    optimizer = torch.optim.Adam([soft], lr=config.learning_rate)
    undoing.patch.eval().requires_grad_(False)
    steps = progress.bar(range(config.steps), desc=f"attacking the {config.aim}")
    for _ in steps:
        rows = _noised(undoing, bank, unsafe, config, generator)
        asked = rows.asked._replace(states=with_soft_prompt(rows.asked.states, soft))
        loss = undoing.loss(rows, asked)
        backpropagate(loss, optimizer)
        optimizer.step()
        steps.set_postfix(loss=f"{loss.item():.4f}")
    return soft.detach()


def find_soft_prompts(
    target: Opponent, corpus: Corpus, prompts: Sequence[Prompt], seed: int, budget: int
) -> list[Round]:
    """One image with states that undo the patch, and where it has a gate, one with states that also close that.

    The pictures that the attacker learns from are the model's own, of prompts that patches are trained on.

    Args:
        target: what is attacked; of a bundle the part that is for the category.
        corpus: the category's words.
        prompts: of the category.
        seed: of everything drawn.
        budget: gradient steps, for each of the two.

    Raises:
        ConfigError: when no part of the patch is for the category.
    """
    undoing = Undoing.of(target, corpus)
    drawn = DataConfig(pairs=LEARNED, companions=0.5, seed=seed)
    bank = build_bank(undoing.host, corpus, drawn, safe_share=0, retain=False)
    aims = ("patch", "gate") if undoing.patch.gate else ("patch",)
    configs = [SoftPromptConfig(steps=budget, aim=aim, seed=seed) for aim in aims]
    found = [searched(undoing, bank, config) for config in configs]
    return [Round(tuple(prompts), Way(appended=soft.cpu())) for soft in found]


def with_soft_prompt(states: Tensor, soft: Tensor) -> Tensor:
    """`states` (B, tokens, width) followed by the same `soft` (1, n, width) in every row."""
    return torch.cat((states, soft.expand(len(states), -1, -1)), dim=1)


def _start(bank: PairBank, config: SoftPromptConfig, generator: torch.Generator) -> Tensor:
    """The end of a prompt's padding with some noise, (1, tokens, width)."""
    states = bank.texts[bank.unsafe[:1]].states.float()
    return states[:, -config.tokens :] + SPREAD * torch.randn(1, config.tokens, states.shape[-1], generator=generator)


def _noised(
    undoing: Undoing, bank: PairBank, unsafe: Tensor, config: SoftPromptConfig, generator: torch.Generator
) -> Noised:
    """Some of the rows whose numbers are `unsafe`, noised."""
    picked, host = unsafe[torch.randint(len(unsafe), (config.batch_size,), generator=generator)], undoing.host
    latents = moved(bank.latents[picked], host.device)
    empty = config.place == "empty"
    asked = host.encode([""]).expand(len(latents)) if empty else bank.texts[bank.unsafe[picked]]
    return undoing.noised(latents, asked.to(host.device, torch.float32), generator)
