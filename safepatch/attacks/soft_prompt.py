"""A white-box attack: a few free text states, trained by gradient to bring the category back.

As Circumventing Concept Erasure (Pham et al. 2023, arXiv 2308.01508) learns a token's embedding, but on the states that
leave the text encoder, and one for all prompts of the category: stronger than anything a user can type, so a bound.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softplus
from tqdm import tqdm

from safepatch.data.pairs import PairBank
from safepatch.diffusion import Components, add_noise, encode_prompts, noise_pred, training_target
from safepatch.errors import ConfigError
from safepatch.patch import Features, Patch
from safepatch.patch.host import answered, patched_noise_pred


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
        if self.aim not in ("patch", "gate"):
            raise ConfigError(f"aim must be patch or gate, not '{self.aim}'")


def soft_prompt(
    components: Components, patch: Patch, instruction: Tensor, bank: PairBank, config: SoftPromptConfig
) -> Tensor:
    """Text states (1, tokens, width) that, appended to the category's prompts or on their own, undo the patch best.

    Args:
        components: the frozen host.
        patch: what is attacked, with all its weights known.
        instruction: text states of its safety instruction, (1, tokens, width).
        bank: unsafe prompts, and latents of what they ask for.
        config: the budget.

    Raises:
        ConfigError: for aim `gate` on a patch without one.
    """
    if config.aim == "gate" and patch.gate is None:
        raise ConfigError("the patch has no gate to attack; use aim patch")
    generator = torch.Generator().manual_seed(config.seed)
    states = bank.rows.unsafe_states
    empty = encode_prompts(components, [""]).expand(config.batch_size, -1, -1)
    start = states[:1, -config.tokens :] + 0.1 * torch.randn(1, config.tokens, states.shape[-1], generator=generator)
    soft = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([soft], lr=config.learning_rate)
    patch.eval().requires_grad_(False)
    bar = tqdm(range(config.steps), desc=f"attacking the {config.aim}")
    for step in bar:
        batch = bank.batch(step, config.batch_size, config.seed)
        latents = batch.unsafe_latents
        timesteps = torch.randint(
            0, components.scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        )
        noise = torch.randn(latents.shape, generator=generator)
        noisy = add_noise(components.scheduler, latents, noise, timesteps)
        target = training_target(components.scheduler, latents, noise, timesteps)
        attacked = with_soft_prompt(empty if config.place == "empty" else batch.unsafe_states, soft)
        if config.aim == "patch":
            predicted = patched_noise_pred(components.unet, patch, noisy, timesteps, attacked, instruction)
            loss = mse_loss(predicted, target)
        else:
            loss = _gate_loss(components, patch, noisy, timesteps, attacked, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    return soft.detach()


def _gate_loss(
    components: Components, patch: Patch, noisy: Tensor, timesteps: Tensor, states: Tensor, target: Tensor
) -> Tensor:
    """Small when the base still draws the category and the gate is closed on it."""
    seen: list[Features] = []
    with answered(components.unet, lambda features: seen.append(features)):
        predicted = noise_pred(components.unet, noisy, timesteps, states)
    assert patch.gate is not None
    logits = patch.gate(seen[0].mid, timesteps, states)
    return mse_loss(predicted, target) + 0.1 * softplus(logits).mean()


def with_soft_prompt(states: Tensor, soft: Tensor) -> Tensor:
    """`states` (B, tokens, width) followed by the same `soft` (1, n, width) in every row."""
    return torch.cat((states, soft.expand(len(states), -1, -1)), dim=1)
