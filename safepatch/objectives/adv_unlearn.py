"""adv_unlearn: adversarial unlearning (AdvUnlearn; Zhang et al. 2024, NeurIPS, arXiv 2405.15234): ESD under attack.

    p* = argmin_p |ε_θ(x_t, p + c) - ε(x_t, c)|²        the prefix that brings the concept c back best
    |ε_θ(x_t, p* + c) - [ε(x_t, ∅) - η (ε(x_t, c) - ε(x_t, ∅))]|² + w |ε_θ(y_t, r) - ε(y_t, r)|²

with pictures y of prompts r to retain. Published: a text encoder learns, at 1e-5 for 1000 steps, the first 200 of them
without an attack; one prefix token, 30 steps at 1e-3; η 1, w 0.3 with 5 retained prompts a step; every step of the
attack draws its latents anew. `attack: fast` is a single step (Wong et al. 2020, arXiv 2001.03994).

With `patch.component: text_encoder` what learns is a low-rank update of the text encoder, as published but for the
rank, and the prefix is embeddings that it reads between the first token's and the prompt's. With any other patch the
prefix is text states there, and near those random ones start.

Ours: a patch learns and the model is frozen, so that what the attack looks at does not depend on what is learned and is
drawn once, by the base; steps go by the sign of the gradient of that step alone (the released code adds up gradients);
there is an attack from the first step on.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from safepatch.data.bank import Batch, DataConfig, PairBank, build_retained
from safepatch.data.concepts import drawn, erased, prompt_bank, require_prompts
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Conditioning, Host, joined, moved
from safepatch.errors import ConfigError
from safepatch.objectives.adversary import Attackable, attacked
from safepatch.objectives.base import Losses, Player, Turn
from safepatch.objectives.esd import negatively_guided
from safepatch.objectives.noising import noised
from safepatch.patch import Patch
from safepatch.patch.host import patched_prediction
from safepatch.patch.text import embeddings, reads_words, room_for

ATTACKS = ("fast", "standard")


@dataclass(frozen=True)
class AdvUnlearnConfig(Attackable):
    """Unlearn what an adversary's prefix brings back, at every step anew, and retain the rest (AdvUnlearn).

    Attributes:
        name: `adv_unlearn`.
        attack: `fast`, one step as long as all; `standard`, `attack_steps` of them, each at the cost of a step more.
        attack_steps, attack_rate: how many, and how far each moves every value of a text state; or of an embedding, in
            standard deviations of the vocabulary's.
        tokens: of the prefix.
        negative_guidance: η, see `esd`.
        preservation: w, weight of what is retained.
        prompts: what is unlearned, see `esd`: `concepts` or `captions`.
        timestep_power: exponent of the uniform draw of timesteps.
    """

    name: str = "adv_unlearn"
    attack: str = "fast"
    attack_steps: int = 30
    attack_rate: float = 0.02
    tokens: int = 1
    negative_guidance: float = 1.0
    preservation: float = 0.3
    prompts: str = "concepts"
    timestep_power: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.attack not in ATTACKS:
            raise ConfigError(f"objective.attack must be one of {', '.join(ATTACKS)}, not '{self.attack}'")
        if min(self.attack_steps, self.tokens) < 1 or min(self.attack_rate, self.timestep_power) <= 0:
            raise ConfigError(
                "objective.attack_steps and tokens must be at least 1, attack_rate and timestep_power above 0"
            )
        if min(self.negative_guidance, self.preservation) < 0:
            raise ConfigError("objective.negative_guidance and preservation must be at least 0")
        require_prompts(self.prompts)

    @property
    def rows_per_pair(self) -> int:
        """The prompt's and the retained one's."""
        return 2

    @property
    def calls_per_pair(self) -> int:
        """The empty prompt's teacher, and the attack's steps, each with a teacher and a backward pass."""
        return 1 + 3 * (1 if self.attack == "fast" else self.attack_steps)

    def prepare(self, host: Host, corpus: Corpus, data: DataConfig) -> PairBank:
        """What the base draws of the concepts, and of what is retained."""
        asked = [pair.unsafe for pair in erased(corpus, self.prompts, data.pairs, data.seed, data.companions)]
        latents = drawn(host, asked, data, f"drawing {corpus.name}")
        kept, texts = build_retained(host, corpus, data.pairs, data), [prompt.text for prompt in asked]
        return prompt_bank(host, corpus, data, latents, [texts, [""] * len(texts)], kept)

    def loss(self, player: Player, turn: Turn) -> Losses:
        """The total, its part `correct` under attack, and its part `preserve` before it is weighed."""
        batch, host, n = cast(Batch, turn.batch), turn.host, len(turn.batch.latents)
        retain = cast(Conditioning, batch.retain)
        prefix = self._worst(turn)
        noisy, timesteps, _ = noised(
            turn, torch.cat((batch.latents, cast(Tensor, batch.retain_latents))), self.timestep_power
        )
        with torch.no_grad():
            concept, kept = host.predict(noisy, timesteps, joined([batch.unsafe, retain])).split([n, len(noisy) - n])
            empty = host.predict(noisy[:n], timesteps[:n], batch.safe)
        asked = attacked(turn, prefixed(batch.unsafe, prefix, reads_words(turn.patch)))
        made = patched_prediction(host, turn.patch, noisy[:n], timesteps[:n], asked, turn.instruction)
        still = patched_prediction(host, turn.patch, noisy[n:], timesteps[n:], retain, turn.instruction)
        correct = mse_loss(made, negatively_guided(concept, empty, self.negative_guidance))
        preserve = mse_loss(still, kept)
        return {"loss": correct + self.preservation * preserve, "correct": correct, "preserve": preserve}

    def _worst(self, turn: Turn) -> Tensor:
        """The adversary's prefix of each row, (B, tokens, width): what brings the base's prediction back best."""
        batch, host = cast(Batch, turn.batch), turn.host
        patch = cast(Patch, getattr(turn.patch, "module", turn.patch))
        near, words = batch.unsafe.states.float().flatten(0, 1), reads_words(patch)
        if words:
            near = embeddings(host.components, patch.component)
        random = torch.randn(len(batch.latents), self.tokens, near.shape[1], generator=turn.generator)
        prefix = near.mean(0) + near.std(0) * moved(random, near.device)
        steps = 1 if self.attack == "fast" else self.attack_steps
        length = self.attack_rate * self.attack_steps / steps * (near.std() if words else 1.0)
        for _ in range(steps):
            noisy, timesteps, _ = noised(turn, batch.latents, self.timestep_power)
            with torch.no_grad():
                target = host.predict(noisy, timesteps, batch.unsafe)
            with torch.enable_grad():
                prefix = prefix.requires_grad_(True)
                asked = prefixed(batch.unsafe, prefix, words)
                made = patched_prediction(host, patch, noisy, timesteps, asked, turn.instruction)
                (slope,) = torch.autograd.grad(mse_loss(made, target), prefix)
            prefix = (prefix - length * slope.sign().nan_to_num()).detach()
        return prefix


def prefixed(asked: Conditioning, prefix: Tensor, words: bool = False) -> Conditioning:
    """Prompts with `prefix` (B, tokens, width) between the beginning's state, or if `words` token, and their own."""
    states = asked.states
    if words and asked.tokens is not None:
        return asked._replace(tokens=room_for(asked.tokens, prefix.shape[1]), prefix=prefix)
    return asked._replace(states=torch.cat((states[:, :1], prefix.to(states.dtype), states[:, 1:]), dim=1))
