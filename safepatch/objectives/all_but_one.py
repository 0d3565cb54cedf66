"""all_but_one: surgical concept erasing with model preservation (Hong et al. 2024, AAAI, arXiv 2312.12807).

    |[ε_θ(x_t, c) - ε_θ(x_t, ∅)] - [ε(x_t, c') - ε(x_t, ∅)]|² + λ |ε_θ(x_t, ∅) - ε(x_t, ∅)|²

Of a concept's guidance term, conditional minus unconditional, an alternative's is made, and the unconditional
prediction is held where it was, since every picture is drawn with it. c' is the alternative that the user chooses.

The paper is known to us by its abstract, which speaks of updating the guidance term, of constraining the drift of the
unconditional score, and of the choice of an alternative. That both are squared errors, that the gradient passes through
both terms of the patched model's guidance, λ, and where x_t comes from (what the base draws of either prompt) is our
reading of it. Ours too: the alternative is each prompt's safe twin, and prompts may be captions.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch.nn.functional import mse_loss

from safepatch.data.bank import Batch, DataConfig, PairBank
from safepatch.data.concepts import drawn, erased, prompt_bank, require_prompts
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Conditioning, Host, joined
from safepatch.errors import ConfigError
from safepatch.objectives.adversary import Attackable, attacked
from safepatch.objectives.base import Losses, Player, Turn
from safepatch.objectives.noising import noised
from safepatch.patch.host import patched_prediction


@dataclass(frozen=True)
class AllButOneConfig(Attackable):
    """Give a prompt the guidance of its safe twin and hold the empty prompt's prediction (All but One).

    Attributes:
        name: `all_but_one`.
        unconditional: λ, weight of the empty prompt's drift.
        prompts: `captions`, the category's unsafe prompts; `concepts`, each concept's name by itself.
        timestep_power: exponent of the uniform draw of timesteps.
    """

    name: str = "all_but_one"
    unconditional: float = 1.0
    prompts: str = "captions"
    timestep_power: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.unconditional < 0 or self.timestep_power <= 0:
            raise ConfigError("objective.unconditional must be at least 0, objective.timestep_power above 0")
        require_prompts(self.prompts)

    @property
    def rows_per_pair(self) -> int:
        """The prompt's and the empty prompt's."""
        return 2

    @property
    def pictures_per_pair(self) -> int:
        """One member's."""
        return 1

    def prepare(self, host: Host, corpus: Corpus, data: DataConfig) -> PairBank:
        """What the base draws of the prompts, or for half of them of the alternatives."""
        pairs = erased(corpus, self.prompts, data.pairs, data.seed, data.companions)
        members = [pair.safe if i % 2 else pair.unsafe for i, pair in enumerate(pairs)]
        latents = drawn(host, members, data, f"drawing {corpus.name}")
        texts = [[pair.unsafe.text for pair in pairs], [pair.safe.text for pair in pairs]]
        return prompt_bank(host, corpus, data, latents, [*texts, texts[0], [""] * len(pairs)])

    def loss(self, player: Player, turn: Turn) -> Losses:
        """The total, its part `guidance`, and its part `unconditional` before it is weighed."""
        batch, host = cast(Batch, turn.batch), turn.host
        empty = cast(Conditioning, batch.towards)
        noisy, timesteps, _ = noised(turn, batch.latents, self.timestep_power)
        twice = torch.cat((noisy, noisy)), torch.cat((timesteps, timesteps))
        with torch.no_grad():
            target, base = host.predict(*twice, joined([batch.safe, empty])).chunk(2)
        asked = attacked(turn, batch.unsafe, empty)
        made, still = patched_prediction(host, turn.patch, *twice, asked, turn.instruction).chunk(2)
        guidance, drift = mse_loss(made - still, target - base), mse_loss(still, base)
        return {"loss": guidance + self.unconditional * drift, "guidance": guidance, "unconditional": drift}
