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
        preservation: weight of the loss on rows where the base's prediction must stay; with 0 they are left out, for a
            patch whose gate sees to them.
        safe_share: share of the pairs whose noisy latents come from the safe scene (`distilled` only).
        negative_guidance: eta of a target pushed away from the unsafe prediction, safe + eta (safe - unsafe); the
            guidance combination of ESD (Gandikota et al. 2023, eq. 6). 0 leaves the safe prediction as it is; more is
            quicker and costs what stands beside the unsafe object.
        adversaries: soft prompts that are trained against the patch while it learns, half of the pairs carrying one, as
            in free adversarial training (Shafahi et al. 2019, arXiv 1904.12843); 0 trains without.
        adversary_tokens: text states of each.
        adversary_rate: how far each of their values moves per step.
        adversary_life: steps after which one starts anew from a prompt's padding, as an attack of that many steps does.
        timestep_power: exponent of the uniform draw of timesteps; below 1 favours noisy ones, where it is decided what
            is drawn.
    """

    name: str = "safe_control"
    supervision: str = "distilled"
    preservation: float = 4.0
    safe_share: float = 0.5
    negative_guidance: float = 0.0
    timestep_power: float = 0.6
    adversaries: int = 0
    adversary_tokens: int = 4
    adversary_rate: float = 0.05
    adversary_life: int = 100

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.supervision not in SUPERVISION:
            raise ConfigError(
                f"objective.supervision must be one of {', '.join(SUPERVISION)}, not '{self.supervision}'"
            )
        if self.preservation < 0 or not 0 <= self.safe_share <= 1:
            raise ConfigError("objective.preservation must be >= 0 and objective.safe_share within [0, 1]")
        if self.adversaries < 0 or min(self.adversary_tokens, self.adversary_life) < 1:
            raise ConfigError(
                "objective.adversaries must be >= 0, objective.adversary_tokens and adversary_life at least 1"
            )
        if self.timestep_power <= 0:
            raise ConfigError(f"objective.timestep_power must be above 0, not {self.timestep_power}")

    def buffers(self, states: Tensor) -> dict[str, Tensor]:
        """What the objective keeps with the patch while it trains, by name; `states` are the unsafe prompts'."""
        return new_adversaries(self, states) if self.adversaries else {}

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
    """The total `loss` and its parts `correct` and, where something is preserved, `preserve`, scalars.

    Args:
        config: settings.
        patch: the only module that gets gradients.
        components: the frozen host.
        instruction: text states of the safety instruction, (1, tokens, width).
        batch: B pairs and B' preserved rows.
        generator: CPU generator that noise, timesteps and the choice of latents are drawn from.
    """
    scheduler = components.scheduler
    if not config.preservation:
        batch = replace(batch, retain_latents=batch.retain_latents[:0], retain_states=batch.retain_states[:0])
    n = len(batch.unsafe_latents)
    latents = _pair_latents(config, batch, generator)
    latents = torch.cat((latents, batch.retain_latents))
    timesteps = draw_timesteps(len(latents), scheduler.config.num_train_timesteps, config.timestep_power, generator)
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
    correct = mse_loss(predicted[:n], target[:n])
    if not config.preservation:
        return {"loss": correct, "correct": correct}
    preserve = mse_loss(predicted[n:], target[n:])
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

    With adversaries, half of the unsafe prompts end in a soft prompt, all others in more of their padding.
    """
    if not config.adversaries:
        return batch.unsafe_states, batch
    rows = len(batch.unsafe_states)
    pick = torch.randint(config.adversaries, (rows,), generator=generator).to(batch.unsafe_states.device)
    attacked = torch.rand(rows, generator=generator).to(pick.device) < 0.5
    soft = _adversarial(config, getattr(patch, "module", patch), pick, attacked, generator)
    padded = {
        name: _padded(getattr(batch, name), config.adversary_tokens)
        for name in ("unsafe_states", "safe_states", "retain_states")
    }
    asked = torch.cat((batch.unsafe_states, soft.to(batch.unsafe_states.dtype)), dim=1)
    return torch.where(attacked[:, None, None], asked, padded["unsafe_states"]), replace(batch, **padded)


def _adversarial(
    config: SafeControlConfig, patch: nn.Module, pick: Tensor, attacked: Tensor, generator: torch.Generator
) -> Tensor:
    """The soft prompts that `pick` names, (B, tokens, width).

    They are buffers of the patch. In the backward pass that trains it, each of those in use takes a step up the loss.
    """
    adversary, age, start = (cast(Tensor, getattr(patch, f"adversary{part}")) for part in ("", "_age", "_start"))
    old = age >= config.adversary_life
    if old.any():
        adversary[old] = _fresh(config, start, generator).to(adversary)[old]
        age[old] = 0
    soft = adversary[pick].clone().requires_grad_()

    def ascend(gradient: Tensor) -> None:
        uphill = torch.zeros_like(adversary).index_add_(0, pick[attacked], gradient[attacked].to(adversary))
        adversary.add_(uphill.sign(), alpha=config.adversary_rate)
        age[pick[attacked].unique()] += 1

    soft.register_hook(ascend)
    return soft


def _padded(states: Tensor, tokens: int) -> Tensor:
    """`states` (B, T, width) with the last state, the end of the padding, `tokens` more times."""
    return torch.cat((states, states[:, -1:].expand(-1, tokens, -1)), dim=1)


def new_adversaries(config: SafeControlConfig, states: Tensor) -> dict[str, Tensor]:
    """Soft prompts `adversary`, (adversaries, tokens, width), and for each of them its age in steps.

    They start near the end of a prompt's padding, the last of `states` (N, T, width), all at different ages.
    """
    start = states[0, -1].float().cpu()
    age = torch.arange(config.adversaries) * config.adversary_life // config.adversaries
    fresh = _fresh(config, start, torch.Generator().manual_seed(0))
    return {"adversary": fresh, "adversary_age": age, "adversary_start": start}


def _fresh(config: SafeControlConfig, start: Tensor, generator: torch.Generator) -> Tensor:
    shape = (config.adversaries, config.adversary_tokens, len(start))
    return start.cpu() + 0.1 * torch.randn(shape, generator=generator)


def draw_timesteps(n: int, total: int, power: float, generator: torch.Generator) -> Tensor:
    """Integer timesteps (n,) below `total`, stratified over the schedule, in random order; see `timestep_power`."""
    spread = ((torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n) ** power
    return (spread * total).long().clamp(max=total - 1)  # float32 may round n - 1 + rand up to n
