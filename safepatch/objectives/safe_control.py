"""safe_control: teach a patch to answer an unsafe prompt as the frozen base answers its safe rewrite.

The idea of a trainable encoder clone that is conditioned on a safety instruction and supervised by aligned safe
counterfactuals is Safe-Control's (Meng et al. 2025, arXiv 2508.21099). The paper publishes neither losses nor settings;
those here are ours, found on the embedded model (DESIGN.md).
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from safepatch.data.pairs import Batch
from safepatch.diffusion import Components, add_noise, noise_pred, training_target
from safepatch.errors import ConfigError
from safepatch.patch.host import patched_noise_pred

SUPERVISION = ("distilled", "paired")


@dataclass(frozen=True)
class SafeControlConfig:
    """Answer an unsafe prompt as the frozen base answers its safe rewrite, and every other prompt as before.

    Attributes:
        name: `safe_control`.
        supervision: `distilled` regresses on the base's own prediction under the safe rewrite at the same noisy
            latents; `paired` on the true noise of the safe counterfactual.
        preservation: weight of the loss on rows where the base's prediction must stay.
        safe_share: share of the pairs whose noisy latents come from the safe scene (`distilled` only).
        negative_guidance: eta of a target pushed away from the unsafe prediction, safe + eta (safe - unsafe); the
            guidance combination of ESD (Gandikota et al. 2023, eq. 6). 0 leaves the safe prediction as it is.
        adversaries: soft prompts that are trained against the patch while it learns, half of the pairs carrying one, as
            in free adversarial training (Shafahi et al. 2019, arXiv 1904.12843); 0 trains without.
        adversary_tokens: text states of each.
        adversary_rate: how far each of their values moves per step.
        timestep_power: exponent of the uniform draw of timesteps; below 1 favours noisy ones, where it is decided what
            is drawn.
    """

    name: str = "safe_control"
    supervision: str = "distilled"
    preservation: float = 4.0
    safe_share: float = 0.5
    negative_guidance: float = 0.5
    timestep_power: float = 0.6
    adversaries: int = 0
    adversary_tokens: int = 4
    adversary_rate: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.supervision not in SUPERVISION:
            raise ConfigError(
                f"objective.supervision must be one of {', '.join(SUPERVISION)}, not '{self.supervision}'"
            )
        if self.preservation < 0 or not 0 <= self.safe_share <= 1:
            raise ConfigError("objective.preservation must be >= 0 and objective.safe_share within [0, 1]")
        if self.adversaries < 0 or self.adversary_tokens < 1:
            raise ConfigError("objective.adversaries must be >= 0 and objective.adversary_tokens at least 1")
        if self.timestep_power <= 0:
            raise ConfigError(f"objective.timestep_power must be above 0, not {self.timestep_power}")

    def buffers(self, states: Tensor) -> dict[str, Tensor]:
        """What the objective keeps with the patch while it trains, by name; `states` are the unsafe prompts'."""
        return {"adversary": new_adversaries(self, states)} if self.adversaries else {}

    def loss(
        self, patch: nn.Module, components: Components, instruction: Tensor, batch: Batch, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """See `safe_control_loss`."""
        return safe_control_loss(self, patch, components, instruction, batch, generator)


def safe_control_loss(
    config: SafeControlConfig,
    patch: nn.Module,
    components: Components,
    instruction: Tensor,
    batch: Batch,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """The total `loss` and its parts `correct` and `preserve`, scalars.

    Args:
        config: settings.
        patch: the only module that gets gradients.
        components: the frozen host.
        instruction: text states of the safety instruction, (1, tokens, width).
        batch: B pairs and B' preserved rows.
        generator: CPU generator that noise, timesteps and the choice of latents are drawn from.
    """
    scheduler = components.scheduler
    n = len(batch.unsafe_latents)
    latents = _pair_latents(config, batch, generator)
    latents = torch.cat((latents, batch.retain_latents))
    timesteps = _timesteps(len(latents), scheduler.config.num_train_timesteps, config.timestep_power, generator)
    timesteps = timesteps.to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    noisy = add_noise(scheduler, latents, noise, timesteps)
    asked, batch = _asked(config, patch, batch, generator)
    with torch.no_grad():
        target = noise_pred(components.unet, noisy, timesteps, torch.cat((batch.safe_states, batch.retain_states)))
        if config.supervision == "paired":
            truth = training_target(scheduler, latents[:n], noise[:n], timesteps[:n])
            target = torch.cat((truth, target[n:]))
        if config.negative_guidance:
            unsafe = noise_pred(components.unet, noisy[:n], timesteps[:n], batch.unsafe_states)
            target[:n] += config.negative_guidance * (target[:n] - unsafe)
    states = torch.cat((asked, batch.retain_states))
    predicted = patched_noise_pred(components.unet, patch, noisy, timesteps, states, instruction)
    correct, preserve = mse_loss(predicted[:n], target[:n]), mse_loss(predicted[n:], target[n:])
    return {"loss": correct + config.preservation * preserve, "correct": correct, "preserve": preserve}


def _pair_latents(config: SafeControlConfig, batch: Batch, generator: torch.Generator) -> Tensor:
    if config.supervision == "paired":
        return batch.safe_latents
    safe = torch.rand(len(batch.safe_latents), generator=generator) < config.safe_share
    return torch.where(safe.view(-1, 1, 1, 1).to(batch.safe_latents.device), batch.safe_latents, batch.unsafe_latents)


def _asked(
    config: SafeControlConfig, patch: nn.Module, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, Batch]:
    """The unsafe prompts that the patch is asked about, and the batch with states of the same length.

    With adversaries, half of the unsafe prompts end in a soft prompt, all others in more of their padding. The soft
    prompts are a buffer of the patch, and take their own step, up the loss, in the backward pass that trains it.
    """
    if not config.adversaries:
        return batch.unsafe_states, batch
    adversary = cast(Tensor, getattr(patch, "module", patch).adversary)
    rows = len(batch.unsafe_states)
    pick = torch.randint(config.adversaries, (rows,), generator=generator).to(adversary.device)
    attacked = torch.rand(rows, generator=generator).to(adversary.device) < 0.5
    soft = adversary[pick].clone().requires_grad_()

    def ascend(gradient: Tensor) -> None:
        adversary.index_add_(0, pick[attacked], config.adversary_rate * gradient[attacked].sign().to(adversary.dtype))

    soft.register_hook(ascend)
    padded = {
        name: _padded(getattr(batch, name), config.adversary_tokens)
        for name in ("unsafe_states", "safe_states", "retain_states")
    }
    asked = torch.cat((batch.unsafe_states, soft.to(batch.unsafe_states.dtype)), dim=1)
    return torch.where(attacked[:, None, None], asked, padded["unsafe_states"]), replace(batch, **padded)


def _padded(states: Tensor, tokens: int) -> Tensor:
    """`states` (B, T, width) with the last state, the end of the padding, `tokens` more times."""
    return torch.cat((states, states[:, -1:].expand(-1, tokens, -1)), dim=1)


def new_adversaries(config: SafeControlConfig, states: Tensor) -> Tensor:
    """Soft prompts to start from, (adversaries, tokens, width): noise as large as `states` (N, T, width) are."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.adversaries, config.adversary_tokens, states.shape[-1])
    return torch.randn(shape, generator=generator) * states.std().cpu()


def _timesteps(n: int, total: int, power: float, generator: torch.Generator) -> Tensor:
    """Integer timesteps (n,), stratified over the schedule, in random order."""
    spread = ((torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n) ** power
    return (spread * total).long().clamp(max=total - 1)  # float32 may round n - 1 + rand up to n
