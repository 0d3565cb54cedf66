"""safe_control: teach a patch to answer an unsafe prompt as the frozen base answers its safe rewrite.

The idea of a trainable encoder clone that is conditioned on a safety instruction and supervised by aligned safe
counterfactuals is Safe-Control's (Meng et al. 2025, arXiv 2508.21099). The paper publishes neither losses nor settings;
those here are ours, found on the embedded model (DESIGN.md).
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from safepatch.data.bank import SAFE_SHARE, Batch, DataConfig, PairBank, build_bank
from safepatch.data.corpus import Corpus
from safepatch.data.guided import push
from safepatch.diffusion import Host, joined
from safepatch.errors import ConfigError
from safepatch.objectives.adversary import Attackable, attacked
from safepatch.objectives.base import Losses, Player, Turn
from safepatch.objectives.noising import clean_weights, noised
from safepatch.patch.host import patched_prediction

SUPERVISION = ("distilled", "paired")


@dataclass(frozen=True)
class SafeControlConfig(Attackable):
    """Answer an unsafe prompt as the frozen base answers its safe rewrite, and every other prompt as before.

    Attributes:
        name: `safe_control`.
        supervision: `distilled` regresses on the base's own prediction under the safe rewrite at the same noisy
            latents; `paired` on the true noise of the safe member's picture.
        preservation: weight of the loss on rows where the base's prediction must stay; with 0 they are left out, for a
            patch whose gate sees to them.
        safe_share: share of the pairs whose latents are the safe member's (`distilled` only).
        negative_guidance: eta of a target pushed away from the unsafe prediction, safe + eta (safe - unsafe); the
            guidance combination of ESD (Gandikota et al. 2023, eq. 6). 0 leaves the safe prediction as it is; more is
            quicker and costs what stands beside the unsafe object.
        timestep_power: exponent of the uniform draw of timesteps; below 1 favours noisy ones, where it is decided what
            is drawn.
    """

    takes_wordless: ClassVar[bool] = True
    name: str = "safe_control"
    supervision: str = "distilled"
    preservation: float = 4.0
    safe_share: float = SAFE_SHARE
    negative_guidance: float = 0.0
    timestep_power: float = 0.6

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.supervision not in SUPERVISION:
            raise ConfigError(
                f"objective.supervision must be one of {', '.join(SUPERVISION)}, not '{self.supervision}'"
            )
        if self.preservation < 0 or not 0 <= self.safe_share <= 1:
            raise ConfigError("objective.preservation must be >= 0 and objective.safe_share within [0, 1]")
        if self.timestep_power <= 0:
            raise ConfigError(f"objective.timestep_power must be above 0, not {self.timestep_power}")

    @property
    def rows_per_pair(self) -> int:
        """Two where something is preserved."""
        return 2 if self.preservation > 0 else 1

    def prepare(self, host: Host, corpus: Corpus, data: DataConfig) -> PairBank:
        """Latents of one member of each pair, and of what is preserved."""
        safe_share = 1.0 if self.supervision == "paired" else self.safe_share
        return build_bank(host, corpus, data, safe_share, retain=self.preservation > 0)

    def loss(self, player: Player, turn: Turn) -> Losses:
        """The patch's `loss`, its part `correct` and, where something is preserved, its part `preserve`."""
        batch, n = cast(Batch, turn.batch), len(turn.batch.latents)
        latents = batch.latents if batch.retain_latents is None else torch.cat((batch.latents, batch.retain_latents))
        noisy, timesteps, noise = noised(turn, latents, self.timestep_power)
        retain = [] if batch.retain is None else [batch.retain]
        target = self._target(turn.host, batch, noisy, timesteps)
        if self.supervision == "paired":
            truth = turn.host.target(latents[:n], noise[:n], timesteps[:n])
            target = torch.cat((truth, target[n:]))
        if batch.twins is not None:  # the picture itself must change: under its safe words the base would keep it
            k = len(batch.twins)
            target = torch.cat((turn.host.from_x0(noisy[:k], timesteps[:k], batch.twins), target[k:]))
        asked = attacked(turn, batch.unsafe, *retain)
        predicted = patched_prediction(turn.host, turn.patch, noisy, timesteps, asked, turn.instruction)
        correct = _weighted(turn.host, batch, timesteps[:n], predicted[:n], target[:n])
        if not retain:
            return {"loss": correct, "correct": correct}
        preserve = mse_loss(predicted[n:], target[n:])
        return {"loss": correct + self.preservation * preserve, "correct": correct, "preserve": preserve}

    @torch.no_grad()
    def _target(self, host: Host, batch: Batch, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What the patched model should predict: the teacher for the pairs, the base for what is preserved."""
        n, retain = len(batch.latents), [] if batch.retain is None else [batch.retain]
        pairs, asked = (noisy[:n], timesteps[:n]), batch.safe if batch.away is None else batch.unsafe
        target = host.predict(noisy, timesteps, joined([asked, *retain]))
        if batch.away is not None and batch.towards is not None:
            target[:n] -= push(host.predict(*pairs, batch.away), host.predict(*pairs, batch.towards), batch.rewrite)
        if self.negative_guidance:
            target[:n] += self.negative_guidance * (target[:n] - host.predict(*pairs, batch.unsafe))
        return target


def _weighted(host: Host, batch: Batch, timesteps: Tensor, predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error; of rows that end at another picture by `clean_weights`."""
    if batch.twins is None:
        return mse_loss(predicted, target)
    weights, k = torch.ones(len(target), 1, 1, 1, device=target.device), len(batch.twins)
    weights[:k] = clean_weights(host, timesteps[:k])
    return (weights * (predicted - target) ** 2).mean()
