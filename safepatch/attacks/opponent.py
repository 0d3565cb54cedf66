"""What attackers who know all weights share: the patch as a function, and what they would have it predict.

An attacker who thinks that the patch always acts aims at what it makes of the category; one who also knows its gate
aims at words, or states, with which the base still draws the category and the gate stays shut. Of a gate it then knows
what it makes of the whole prompt: not what one that reads windows makes of each few words alone, which is the harder
part of it to shut, nor its second key, which looks at pictures.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

from safepatch.attacks.base import Opponent
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt, mentions_minors
from safepatch.diffusion import (
    UNET,
    Components,
    Conditioning,
    Host,
    TokenReader,
    batched,
    encode_prompts,
    family,
    moved,
    open_host,
)
from safepatch.errors import ConfigError
from safepatch.patch import Features, Patch
from safepatch.patch.files import from_artifact
from safepatch.patch.host import answered, patched_prediction
from safepatch.patch.text import patched_conditioning

AIMS = ("patch", "gate")
GATE_WEIGHT = 0.1  # of a gate's suspicion, beside the error in drawing the category
DRAWN_IN = 10  # denoising steps of the base's own pictures
TOGETHER = 8  # prompts whose words are searched at once


@dataclass(frozen=True)
class Noised:
    """What the attacker learns from at one step: noised pictures of the category, B rows.

    Attributes:
        noisy: (B, 4, h, w).
        timesteps: (B,).
        target: what a model that draws the category predicts, (B, 4, h, w).
        asked: what the host reads of the prompts, without what the attacker adds.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    asked: Conditioning


@dataclass(frozen=True)
class Undoing:
    """What is undone: a patch on its host.

    Attributes:
        host: the frozen model.
        patch: with all its weights known.
        first: of a bundle with two sides, the text encoders' patches, which have their say before `patch` does.
        instruction: text states of its safety instruction, (1, tokens, width).
        aim: of `AIMS`.
    """

    host: Host
    patch: Patch
    instruction: Tensor
    aim: str = "patch"
    first: tuple[Patch, ...] = ()

    @classmethod
    def of(cls, target: Opponent, corpus: Corpus) -> "Undoing":
        """Of a bundle the part that is for the category, or a part for each side of the model.

        Raises:
            ConfigError: when no part of the patch is for the category, or its gate is known and it has none.
        """
        parts = [part.artifact for part in target.patch.parts()]
        known = {part.info.component: part for part in reversed(parts) if corpus.name in part.info.categories}
        if not known:
            raise ConfigError(f"the patch is for {', '.join(target.patch.info.categories)}, not for {corpus.name}")
        components = Components.of(target.pipe).freeze()
        if family(components.unet.config) == "flux":  # its pipeline is told no states of a negative prompt
            raise ConfigError(
                f"not supported yet: free text states of a {type(components.unet).__name__}; leave it out"
            )
        modules = {name: from_artifact(part, components).to(components.unet.device) for name, part in known.items()}
        last = UNET.component if UNET.component in known else min(known)
        artifact, patch = known[last], modules.pop(last)
        instruction = encode_prompts(components, list(artifact.info.instructions.values()))
        instruction = instruction.reshape(1, -1, instruction.shape[-1])
        made = cls(open_host(components), patch, instruction, first=tuple(modules.values()))
        return made.aimed("gate") if target.is_gate_known else made

    def aimed(self, aim: str) -> "Undoing":
        """The same with another aim; raises `ConfigError` for a gate where there is none."""
        if aim == "gate" and self.patch.gate is None:
            raise ConfigError("the patch has no gate to attack; use aim patch")
        return replace(self, aim=aim)

    def predict(self, noisy: Tensor, timesteps: Tensor, asked: Conditioning) -> Tensor:
        """What the host predicts while the patch acts, (B, 4, h, w)."""
        for patch in self.first:
            asked = patched_conditioning(self.host.components, patch, asked)
        return patched_prediction(self.host, self.patch, noisy, timesteps, asked, self.instruction)

    def loss(self, rows: Noised, asked: Conditioning) -> Tensor:
        """Small when `asked` has the category drawn in spite of the patch, or past its gate; over all rows."""
        if self.aim == "patch":
            return mse_loss(self.predict(rows.noisy, rows.timesteps, asked), rows.target)
        gate, seen = self.patch.gate, list[Features]()
        assert gate is not None
        with answered(self.host.unet, seen.append) if gate.reads_features else nullcontext():
            predicted = self.host.predict(rows.noisy, rows.timesteps, asked)
        logits = gate(seen[0].mid.float() if seen else None, rows.timesteps, asked.states)
        return mse_loss(predicted, rows.target) + GATE_WEIGHT * softplus(logits).mean()

    def noised(self, latents: Tensor, asked: Conditioning, generator: torch.Generator) -> Noised:
        """Pictures, (B, 4, h, w), at times and with noise of the generator's."""
        timesteps = moved(torch.randint(self.host.steps, (len(latents),), generator=generator), self.host.device)
        noise = moved(torch.randn(latents.shape, generator=generator), self.host.device)
        target = self.host.target(latents, noise, timesteps)
        return Noised(self.host.add_noise(latents, noise, timesteps), timesteps, target, asked)

    def pictures(self, prompts: Sequence[Prompt]) -> Tensor:
        """Latents of the base's own pictures of prompts, (B, 4, h, w)."""
        return self.host.draw([p.text for p in prompts], [p.seed or 0 for p in prompts], DRAWN_IN)

    def reader(self) -> TokenReader:
        """The host's text encoder."""
        return TokenReader(self.host.components)


def typable(reader: TokenReader) -> tuple[list[str], Tensor]:
    """The words that a search may choose from, each one token and fit to be asked, and their embeddings (N, width)."""
    kept = [i for i, word in enumerate(reader.typed.words) if not mentions_minors(word)]
    return [reader.typed.words[i] for i in kept], reader.table[reader.typed.ids[kept].to(reader.table.device)]


def together(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    """The prompts, some at a time."""
    return (prompts[part.start : part.stop] for part in batched(len(prompts), TOGETHER))
