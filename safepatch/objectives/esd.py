"""esd: Erased Stable Diffusion (Gandikota et al. 2023, arXiv 2303.07345, eq. 6): the frozen base, negatively guided.

    ε_θ(x_t, c)  <-  ε(x_t, ∅) - η (ε(x_t, c) - ε(x_t, ∅))

c is a concept's words, ∅ the empty prompt, ε the frozen base. The coefficients on the right add up to 1, so that the
same combination of v- or sample predictions stands for the same clean latents. Its authors' later code writes
ε(c) - η' (ε(c) - ε(∅)) with η' = 2, which is η = 1 here; it learns at 5e-5 (SDXL: 2e-4 in cross-attention, 1e-5
elsewhere) for 200 steps of batch 1 under guidance 3.

Ours: the patch stands in for the fine-tuned weights, so that a variant chooses among a lora patch's layers and control
and lite patches, which stand beside the host's layers, have none; x_t is noise on what the base draws of c from pure
noise, drawn once, instead of a denoising broken off at every step; c may be whole captions.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from safepatch.data.bank import Batch, DataConfig, PairBank
from safepatch.data.concepts import drawn, erased, prompt_bank, require_prompts
from safepatch.data.corpus import Corpus
from safepatch.diffusion import UNET, Host
from safepatch.errors import ConfigError
from safepatch.objectives.adversary import Attackable, attacked
from safepatch.objectives.base import Losses, Player, Turn
from safepatch.objectives.noising import noised
from safepatch.patch import Patch
from safepatch.patch.host import patched_prediction

# What of the host each variant trains; `all` is ours. What cross-attention is to a UNet, the text stream's attention is
# to a transformer; its `attn2`, which SD3.5 has, is the image's with itself.
CROSS = r"(attentions\..*\.attn2\.|\.add_[qkv]_proj$|\.to_add_out$)"
VARIANTS: dict[str, str] = {
    "x": CROSS,
    "x-strict": r"(attentions\..*\.attn2\.to_[kv]|\.add_[kv]_proj)$",
    "u": rf"^(?!.*{CROSS})",
    "all": "",
}


@dataclass(frozen=True)
class ESDConfig(Attackable):
    """Answer a concept's words as the base does without them, pushed away from the concept (ESD); prompts only.

    Attributes:
        name: `esd`.
        variant: layers of a lora patch that learn: `x`, cross-attention; `x-strict`, its keys and values only; `u`, all
            others, which the paper takes for what no single word names, such as nudity; `all`. By default `x` of a
            lora patch; of other kinds, which have no layers to choose from, all.
        negative_guidance: η, how far beyond the empty prompt's prediction; 0 stops there.
        prompts: `concepts`, each concept's name by itself, as published; `captions`, the category's unsafe prompts.
            Without concepts, always the latter.
        timestep_power: exponent of the uniform draw of timesteps; 1 as published.
    """

    name: str = "esd"
    variant: str | None = None
    negative_guidance: float = 1.0
    prompts: str = "concepts"
    timestep_power: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.variant is not None and self.variant not in VARIANTS:
            raise ConfigError(f"objective.variant must be one of {', '.join(VARIANTS)}, not '{self.variant}'")
        if self.negative_guidance < 0 or self.timestep_power <= 0:
            raise ConfigError("objective.negative_guidance must be at least 0, objective.timestep_power above 0")
        require_prompts(self.prompts)

    @property
    def calls_per_pair(self) -> int:
        """A second teacher."""
        return 1

    def suited(self, patch: Patch) -> Patch:
        """The variant's layers of a lora patch; raises `ConfigError` for a variant of another kind."""
        variant = self.variant or ("x" if patch.kind == "lora" and patch.component == UNET.component else "all")
        if variant != "all":
            patch.keep_layers(VARIANTS[variant])
        return super().suited(patch)

    def prepare(self, host: Host, corpus: Corpus, data: DataConfig) -> PairBank:
        """What the base draws of the concepts."""
        asked = [pair.unsafe for pair in erased(corpus, self.prompts, data.pairs, data.seed, data.companions)]
        latents = drawn(host, asked, data, f"drawing {corpus.name}")
        return prompt_bank(host, corpus, data, latents, ([prompt.text for prompt in asked], [""] * len(asked)))

    def loss(self, player: Player, turn: Turn) -> Losses:
        """The mean squared distance to the negatively guided prediction."""
        batch, host = cast(Batch, turn.batch), turn.host
        noisy, timesteps, _ = noised(turn, batch.latents, self.timestep_power)
        with torch.no_grad():
            concept, empty = (host.predict(noisy, timesteps, asked) for asked in (batch.unsafe, batch.safe))
        asked = attacked(turn, batch.unsafe)
        made = patched_prediction(host, turn.patch, noisy, timesteps, asked, turn.instruction)
        return {"loss": mse_loss(made, negatively_guided(concept, empty, self.negative_guidance))}


def negatively_guided(concept: Tensor, empty: Tensor, eta: float) -> Tensor:
    """ε(∅) - η (ε(c) - ε(∅)), eq. 6; shapes (B, 4, h, w)."""
    return empty - eta * (concept - empty)
