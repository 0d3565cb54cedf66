"""safegen: mitigating sexually explicit content without its words (Li et al. 2024, CCS, arXiv 2404.06666).

    w_1 |ε_θ(x_t, ∅) - (ε + z_x - z_s)|² + w_2 |ε_θ(b_t, ∅) - ε'|²

z_x are an unsafe picture's latents, z_s those of what the model shall make of it, the same picture under a mosaic, and
b a harmless picture; ∅ is the empty prompt, and self-attention alone learns, so that no wording leads around it.
Published: w_1 0.1, w_2 0.9, rate 1e-5, 1000 steps of batch 1 with 5 accumulated.

Its target has no signal-to-noise factor. A model that takes x_t for z_s under noise would predict

    ε + √(a / (1 - a)) (z_x - z_s)

which is z_s itself in clean latents; `target: exact` asks for that, `published` for the paper's.

Ours: errors of `exact` are those of the model's own prediction, and of the clean latents where little is noise (else of
SD 1.5 three quarters of them would come from a twentieth of the schedule, in which a picture is drawn already); those
of `published` of the noise that it stands for, so that a model may predict anything; in place of a mosaic stands what
the base draws of the safe twin from the same noise, since nobody should need pictures of what must not be drawn, or,
with `mosaic`, the mean of each block of that many latents of the unsafe picture itself.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from safepatch.data.corpus import Corpus
from safepatch.data.settings import DataConfig
from safepatch.data.twin_pictures import TwinBank, Twins
from safepatch.diffusion import UNET, Host
from safepatch.errors import ConfigError
from safepatch.objectives.adversary import Attackable, attacked
from safepatch.objectives.base import Losses, Player, Turn
from safepatch.objectives.duo import SELF_ATTENTION
from safepatch.objectives.noising import clean_weights, noised
from safepatch.objectives.selection import selected_twins
from safepatch.patch import Patch
from safepatch.patch.host import patched_prediction

TARGETS = ("exact", "published")


@dataclass(frozen=True)
class SafeGenConfig(Attackable):
    """Make an unsafe picture a safe one at self-attention, whatever the prompt (SafeGen); pictures only.

    Attributes:
        name: `safegen`.
        target: `exact`, the safe picture in clean latents; `published`, without the signal-to-noise factor.
        mosaic: edge in latents of the blocks of a mosaic of the unsafe picture, which then takes the safe one's place;
            0 is for the safe twin's picture.
        unsafe_weight, benign_weight: w_1 and w_2.
    """

    components: ClassVar[tuple[str, ...]] = (UNET.component,)
    selects: ClassVar[bool] = True

    name: str = "safegen"
    target: str = "exact"
    mosaic: int = 0
    unsafe_weight: float = 0.1
    benign_weight: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.target not in TARGETS:
            raise ConfigError(f"objective.target must be one of {', '.join(TARGETS)}, not '{self.target}'")
        if self.mosaic < 0 or self.unsafe_weight <= 0 or self.benign_weight < 0:
            raise ConfigError("objective.mosaic and benign_weight must be at least 0, unsafe_weight above 0")

    @property
    def rows_per_pair(self) -> int:
        """The unsafe picture and the harmless one."""
        return 2

    @property
    def pictures_per_pair(self) -> int:
        """Both members' and a harmless one."""
        return 3

    def suited(self, patch: Patch) -> Patch:
        """Self-attention of a lora patch; all of any other kind; raises `ConfigError` for a text encoder's."""
        super().suited(patch)
        if patch.kind == "lora":
            patch.keep_layers(SELF_ATTENTION)
        return patch

    def prepare(self, host: Host, corpus: Corpus, data: DataConfig) -> TwinBank:
        """Both members of each pair, and as many harmless pictures."""
        return selected_twins(host, corpus, data, retain=True)

    def loss(self, player: Player, turn: Turn) -> Losses:
        """The total, its part `correct`, and its part `preserve`, before they are weighed."""
        batch, host, n = cast(Twins, turn.batch), turn.host, len(turn.batch.unsafe)
        clean = torch.cat((batch.unsafe, cast(Tensor, batch.retain)))
        noisy, timesteps, noise = noised(turn, clean)
        safe = mosaic(batch.unsafe, self.mosaic) if self.mosaic else batch.safe
        asked = attacked(turn, batch.empty, batch.empty)
        made = patched_prediction(host, turn.patch, noisy, timesteps, asked, turn.instruction)
        if self.target == "published":
            made = host.to_noise(noisy, timesteps, made)
            target = torch.cat((noise[:n] + batch.unsafe - safe, noise[n:]))
        else:
            target = host.from_x0(noisy, timesteps, torch.cat((safe, clean[n:])))
        errors = (made - target).square()
        if self.target == "exact":
            errors = torch.cat((clean_weights(host, timesteps[:n]) * errors[:n], errors[n:]))
        correct, preserve = errors[:n].mean(), errors[n:].mean()
        total = self.unsafe_weight * correct + self.benign_weight * preserve
        return {"loss": total, "correct": correct, "preserve": preserve}


def mosaic(latents: Tensor, edge: int) -> Tensor:
    """Each block of `edge` x `edge` latents at its mean; (B, 4, h, w), of which h and w need not be multiples."""
    means = avg_pool2d(latents, edge, ceil_mode=True, count_include_pad=False)
    return interpolate(means, scale_factor=edge, mode="nearest")[..., : latents.shape[2], : latents.shape[3]]
