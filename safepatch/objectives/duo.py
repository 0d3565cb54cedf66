"""duo: Direct Unlearning Optimization (Park et al. 2024, NeurIPS, arXiv 2407.21035): preference between two pictures.

    Δ(x) = |ε_θ(x_t) - ε|² - |ε_ref(x_t) - ε|²        of a picture x, the noise ε, and the reference, the frozen base
    L = -log sigmoid(-β [Δ(x⁺) - Δ(x⁻)]) + λ |ε_θ(z, T) - ε_ref(z, T)|²        x⁺ chosen (safe), x⁻ rejected (unsafe)

which is Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) and a term that holds the prediction for pure noise z at
the last timestep T. As in the published scripts, all of it is asked with the empty prompt: the patch learns what
pictures look like, and no word of them; the two share their noise, and each has a timestep of its own below 750 of
1000; lora patches learn at self-attention. Published: β 500 (nudity) or 1000 (violence), rate 3e-4 · 100 / β,
λ = 1e6 · β / 100, 500 to 1000 steps of batch 4, rank 32, weight decay 0.01.

Ours: errors are those of the model's own prediction, which is the noise in the paper; x⁺ and x⁻ are what the base draws
of an unsafe prompt and of its safe twin from the same starting noise. The authors make x⁺ by SDEdit of x⁻, with the
unsafe prompt as the negative one (`data.strength`; published: .75 for nudity, .8 for violence), and repeat both until
the detector that also judges the patch agrees: none chooses here unless `data.select` names one, at most `data.tries`
times; the trainer's own rate holds unless one is set; `prompted` asks with the pictures' prompts, as the paper's text
has it.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch.nn.functional import logsigmoid

from safepatch.data.corpus import Corpus
from safepatch.data.settings import DataConfig
from safepatch.data.twin_pictures import TwinBank, Twins
from safepatch.diffusion import UNET, Conditioning, Host, joined, moved
from safepatch.errors import ConfigError
from safepatch.objectives.adversary import Attackable, attacked
from safepatch.objectives.base import Losses, Player, Turn
from safepatch.objectives.noising import draw_timesteps
from safepatch.objectives.selection import selected_twins
from safepatch.patch import Patch
from safepatch.patch.host import patched_prediction

# A transformer attends to text and image at once; DUO's authors train all of that in SD3.
SELF_ATTENTION = r"(attentions\..*\.attn1\.|^(single_)?transformer_blocks\.\d+\.attn2?\.)"


@dataclass(frozen=True)
class DUOConfig(Attackable):
    """Prefer the safe picture of each pair to the unsafe one, whatever the prompt (DUO); pictures only.

    Attributes:
        name: `duo`.
        beta: β, how much being surer than the base counts; higher stays nearer to it.
        preservation: λ / β, weight of the prediction for pure noise.
        below: share of the schedule that timesteps are below.
        prompted: ask with the pictures' own prompts instead of the empty one; a lora patch then learns everywhere.
    """

    selects: ClassVar[bool] = True

    name: str = "duo"
    beta: float = 500.0
    preservation: float = 1e4
    below: float = 0.75
    prompted: bool = False

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.beta <= 0 or self.preservation < 0 or not 0 < self.below <= 1:
            raise ConfigError("objective.beta must be above 0, preservation at least 0, and below within (0, 1]")

    @property
    def rows_per_pair(self) -> int:
        """Both pictures, and pure noise."""
        return 3

    @property
    def pictures_per_pair(self) -> int:
        """Both members'."""
        return 2

    def suited(self, patch: Patch) -> Patch:
        """Self-attention of a lora patch, unless prompts are read; all of any other kind."""
        if patch.component != UNET.component and not self.prompted:
            raise ConfigError(f"a patch of the {patch.component} learns from prompts; set objective.prompted=true")
        if patch.kind == "lora" and not self.prompted:
            patch.keep_layers(SELF_ATTENTION)
        return super().suited(patch)

    def prepare(self, host: Host, corpus: Corpus, data: DataConfig) -> TwinBank:
        """Both members of each pair."""
        return selected_twins(host, corpus, data)

    def loss(self, player: Player, turn: Turn) -> Losses:
        """The total, its part `preference`, its part `prior` before it is weighed, and `margin`, Δ(x⁻) - Δ(x⁺)."""
        batch, host = cast(Twins, turn.batch), turn.host
        n = len(batch.safe)
        timesteps = draw_timesteps(2 * n, int(host.steps * self.below), 1.0, turn.generator)
        timesteps = moved(torch.cat((timesteps, torch.full((n,), host.steps - 1))), batch.safe.device)
        noise, pure = moved(torch.randn(2, *batch.safe.shape, generator=turn.generator), batch.safe.device)
        clean = torch.cat((batch.unsafe, batch.safe))
        noisy = torch.cat((host.add_noise(clean, torch.cat((noise, noise)), timesteps[: 2 * n]), pure))
        with torch.no_grad():
            reference = host.predict(noisy, timesteps, joined(self._asked(batch)))
        asked = attacked(turn, *self._asked(batch))
        made = patched_prediction(host, turn.patch, noisy, timesteps, asked, turn.instruction)
        pairs = noisy[: 2 * n], timesteps[: 2 * n]
        target = host.from_x0(*pairs, clean)
        errors = [(prediction[: 2 * n] - target).square().flatten(1).mean(1) for prediction in (made, reference)]
        rejected, chosen = (errors[0] - errors[1]).chunk(2)
        preference = -logsigmoid(-self.beta * (chosen - rejected)).mean()
        prior = (made[2 * n :] - reference[2 * n :]).square().mean()
        total = preference + self.beta * self.preservation * prior
        return {"loss": total, "preference": preference, "prior": prior, "margin": (rejected - chosen).mean()}

    def _asked(self, batch: Twins) -> list[Conditioning]:
        if self.prompted:
            return [batch.unsafe_prompt, batch.safe_prompt, batch.empty]
        return [batch.empty] * 3
