"""leco: Low-rank adaptation for Erasing COncepts (p1atdev 2023, github.com/p1atdev/LECO; ai-toolkit's and sd-scripts'
sliders descend from it): ESD's target with four prompts, on latents that the model draws as the patch has made it.

    ε_θ(x_t, target)  <-  ε(x_t, neutral) -+ g (ε(x_t, positive) - ε(x_t, unconditional))        - erases, + enhances

x_t is where the patched model has come, from pure noise, after a random number of at most 50 steps towards the target
under guidance 3. No pictures and nothing cached, for about 25 guided steps before each that learns. Published settings:
rank 4, rate 1e-4, 500 steps of batch 2 (sd-scripts: rank 8 at half strength, batch 1, at most 40 steps).

Ours: all rows of a batch stop at the same step; what guidance points away from is the base's own, because at run time
a patch leaves the negative prompt's rows alone; where no prompts are given, the category's concepts take turns.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from safepatch.data.bank import Batch, DataConfig, PairBank
from safepatch.data.concepts import erased, prompt_bank, require_prompts
from safepatch.data.corpus import Corpus
from safepatch.data.latents import Latents
from safepatch.data.prompts import EMPTY, Prompt
from safepatch.diffusion import Conditioning, Host, moved
from safepatch.errors import ConfigError
from safepatch.objectives.adversary import Attackable, attacked
from safepatch.objectives.base import Losses, Player, Turn
from safepatch.patch.host import patched_prediction

ACTIONS: dict[str, float] = {"erase": -1.0, "enhance": 1.0}


@dataclass(frozen=True)
class LECOConfig(Attackable):
    """Erase a concept on latents that the patched model itself draws (LECO); prompts only.

    Attributes:
        name: `leco`.
        action: `erase`, or `enhance`.
        target: the prompt that is trained; by default each of the category's concepts in turn.
        positive: what the direction leads towards; by default the target itself.
        unconditional: what it leads away from.
        neutral: where the target is to end up; by default the unconditional prompt.
        guidance_scale: g, how far along the direction.
        prompts: where targets come from, see `esd`: `concepts` or `captions`.
        denoising_steps: of a whole denoising; at least 2.
        denoising_guidance: guidance under which latents are drawn.
    """

    name: str = "leco"
    action: str = "erase"
    target: str | None = None
    positive: str | None = None
    unconditional: str = ""
    neutral: str | None = None
    guidance_scale: float = 1.0
    prompts: str = "concepts"
    denoising_steps: int = 50
    denoising_guidance: float = 3.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.action not in ACTIONS:
            raise ConfigError(f"objective.action must be one of {', '.join(ACTIONS)}, not '{self.action}'")
        if self.guidance_scale <= 0 or self.denoising_steps < 2:
            raise ConfigError("objective.guidance_scale must be above 0, objective.denoising_steps at least 2")
        require_prompts(self.prompts)

    @property
    def pictures_per_pair(self) -> int:
        """None before training."""
        return 0

    @property
    def calls_per_pair(self) -> int:
        """Two more teachers, and what is drawn: half of the steps on average, each of two rows."""
        return 2 + self.denoising_steps

    def prepare(self, host: Host, corpus: Corpus, data: DataConfig) -> PairBank:
        """The prompts, without pictures: nothing is drawn before training."""
        if self.target is None:
            pairs = erased(corpus, self.prompts, data.pairs, data.seed, data.companions)
            targets = [pair.unsafe.text for pair in pairs]
        else:
            targets = [Prompt(self.target).text] * data.pairs
        neutral = self.unconditional if self.neutral is None else self.neutral
        shared = [_admitted(text) for text in (neutral, self.positive, self.unconditional)]
        sides = [targets, *([text] * len(targets) if text is not None else targets for text in shared)]
        blank = torch.zeros(()).expand(len(targets), *host.latent_shape)
        return prompt_bank(host, corpus, data, cast(Latents, blank), sides)

    def loss(self, player: Player, turn: Turn) -> Losses:
        """The mean squared distance to the target, where the patched model has come."""
        batch, host = cast(Batch, turn.batch), turn.host
        positive, empty = cast(Conditioning, batch.away), cast(Conditioning, batch.towards)

        def patched(noisy: Tensor, timesteps: Tensor, asked: Conditioning) -> Tensor:
            return patched_prediction(host, turn.patch, noisy, timesteps, asked, turn.instruction)

        (until,) = torch.randint(1, self.denoising_steps, (1,), generator=turn.generator).tolist()
        noise = moved(torch.randn(batch.latents.shape, generator=turn.generator), batch.latents.device)
        how = {"steps": self.denoising_steps, "guidance": self.denoising_guidance, "until": until}
        noisy, timestep = host.denoise(noise, batch.unsafe, empty, predict=patched, **how)
        timesteps = torch.full((len(noisy),), timestep, device=noisy.device)
        with torch.no_grad():
            towards, left, right = (host.predict(noisy, timesteps, asked) for asked in (batch.safe, positive, empty))
        target = towards + ACTIONS[self.action] * self.guidance_scale * (left - right)
        return {"loss": mse_loss(patched(noisy, timesteps, attacked(turn, batch.unsafe)), target)}


def _admitted(text: str | None) -> str | None:
    """A prompt of the settings, which must be one that may be used; the empty one is."""
    return text if text is None or text == EMPTY.text else Prompt(text).text
