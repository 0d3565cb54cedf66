"""match_bundle: a merged control patch learns, without images, to do what its sources do side by side.

The bundle of the sources is the teacher and the host's prediction with it is the target: distillation (Hinton et al.
2015, arXiv 1503.02531) of K patches that are run one after the other into one that is run once. Behind gates it need
not learn to leave harmless prompts alone, and a prompt has few teachers, those whose gates open.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from safepatch.data.bank import DataConfig, Drawing, Latents, Texts
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Conditioning, Host, moved
from safepatch.errors import MergeError
from safepatch.objectives.base import Losses, Player, Turn, Usual
from safepatch.objectives.noising import draw_timesteps
from safepatch.patch import Residuals
from safepatch.patch.host import answered
from safepatch.runtime.parts import ActivePart

PROMPTS = 128  # unsafe ones per category
STEPS = 5  # of denoising, in the latents that are learned from
TIMESTEP_POWER = 0.6  # of their uniform draw, as in training


@dataclass(frozen=True)
class MatchBatch:
    """Latents, (B, 4, h, w), clean and scaled, with the prompts they are for."""

    latents: Tensor
    prompts: Conditioning

    def to(self, device: torch.device) -> "MatchBatch":
        """The same rows on `device`."""
        return MatchBatch(moved(self.latents, device), self.prompts.to(device))


@dataclass(frozen=True)
class MatchRows:
    """Prompts, what the base draws for them, and what it draws with the bundle for those that are unsafe.

    Attributes:
        latents: of all prompts, the unsafe ones first.
        corrected: of the unsafe prompts, with the bundle.
        texts, numbers: what the host reads of each prompt.
        keeps: whether half of a batch should be left alone.
    """

    latents: Latents
    corrected: Latents
    texts: Texts
    numbers: Tensor
    keeps: bool

    def batch(self, step: int, size: int, seed: int) -> MatchBatch:
        """The batch of (step, size, seed): unsafe rows, half of them of what the bundle makes, then those to keep."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        kept = size // 2 if self.keeps else 0
        unsafe = torch.randint(len(self.corrected), (size - kept,), generator=generator)
        is_corrected = (torch.rand(len(unsafe), generator=generator) < 0.5).view(-1, 1, 1, 1)
        latents, prompts = torch.where(is_corrected, self.corrected[unsafe], self.latents[unsafe]), unsafe
        if kept:
            others = torch.randint(len(self.corrected), len(self.latents), (kept,), generator=generator)
            latents, prompts = torch.cat((latents, self.latents[others])), torch.cat((unsafe, others))
        return MatchBatch(latents, self.texts[self.numbers[prompts]])


@dataclass(frozen=True)
class MatchBundle(Usual):
    """Predict with one merged control patch as with its sources side by side.

    Attributes:
        merged: the patch that learns, ready to act.
        sources: the teachers.
        teacher: a hash of them, which what they draw is kept under.
        name: `match_bundle`.
    """

    merged: ActivePart
    sources: Sequence[ActivePart]
    teacher: str
    name: str = "match_bundle"

    def prepare(self, host: Host, corpus: Sequence[Corpus], data: DataConfig) -> MatchRows:
        """Latents of the categories' unsafe prompts, by the base and by the bundle, and of what must be kept."""
        corpora, data, keeps = corpus, replace(data, steps=STEPS), self.merged.patch.gate is None
        unsafe = [pair.unsafe.text for each in corpora for pair in each.pairs(PROMPTS, data.seed, companions=0.5)]
        kept = [prompt.text for each in corpora for prompt in each.retain(PROMPTS, data.seed)] if keeps else []
        drawings = [Drawing(text, data.seed * 1_000_003 + i) for i, text in enumerate((*unsafe, *kept))]
        texts = Texts(host, (*unsafe, *kept), data)

        def bundled(noisy: Tensor, timesteps: Tensor, prompts: Conditioning) -> Tensor:
            return self.target(host, noisy, timesteps, prompts, self._acts(host, noisy, timesteps, prompts).cpu())

        return MatchRows(
            Latents(host, drawings, data, "what the base draws"),
            Latents(host, drawings[: len(unsafe)], data, "what it draws with the bundle", bundled, self.teacher),
            texts,
            texts.numbers((*unsafe, *kept)),
            keeps,
        )

    def players(self, patch: Player, rows: MatchRows) -> list[Player]:
        """The merged patch alone."""
        return [patch]

    def loss(self, player: Player, turn: Turn) -> Losses:
        """|m - b|² / |b - h|² of the host's predictions with the merged patch, with the bundle, and with neither.

        0 is the bundle, 1 no patch at all. Only those of the rows count for which some gate opens; the others never
        reach the merged patch.

        Raises:
            MergeError: when no gate opens for any of the rows.
        """
        batch, host = cast(MatchBatch, turn.batch), turn.host
        timesteps = draw_timesteps(len(batch.latents), host.steps, TIMESTEP_POWER, turn.generator)
        timesteps = moved(timesteps, batch.latents.device)
        noise = moved(torch.randn(batch.latents.shape, generator=turn.generator), batch.latents.device)
        noisy, prompts = host.add_noise(batch.latents, noise, timesteps), batch.prompts
        acts = self._acts(host, noisy, timesteps, prompts).cpu()  # the one wait of a step: whom the teachers run for
        reached = _rows(acts.any(0), noisy.device)
        if not len(reached):
            raise MergeError(
                "the sources' gates open for none of their own prompts on this model; fit them on it first"
            )
        noisy, timesteps, prompts = noisy[reached], timesteps[reached], prompts.of(reached)
        acts = acts[:, acts.any(0)]
        with torch.no_grad():
            plain = host.predict(noisy, timesteps, prompts)
            target = self.target(host, noisy, timesteps, prompts, acts)
        made = turn.patch(*_inputs(host, noisy, timesteps, prompts, turn.instruction))
        error = host.predict(noisy, timesteps, prompts, made) - target
        return {"loss": error.square().sum() / (target - plain).square().sum().clamp(min=1e-12)}

    @torch.no_grad()
    def target(self, host: Host, noisy: Tensor, timesteps: Tensor, prompts: Conditioning, acts: Tensor) -> Tensor:
        """What the host predicts with the bundle, (B, 4, h, w).

        Each source acts on its own rows, those that are true of `acts`, (sources, B), which is on the CPU.
        """
        total: list[Tensor] = []
        for source, on in zip(self.sources, acts, strict=True):
            rows = _rows(on, noisy.device)
            if not len(rows):
                continue
            states = source.instruction_states.float()
            made = source.patch(*_inputs(host, noisy[rows], timesteps[rows], prompts.of(rows), states))
            parts = (*made.down, made.mid)
            total = total or [torch.zeros(len(noisy), *part.shape[1:], device=part.device) for part in parts]
            for each, part in zip(total, parts, strict=True):
                each[rows] += source.weight * part
        return host.predict(noisy, timesteps, prompts, Residuals(tuple(total[:-1]), total[-1]) if total else None)

    @torch.no_grad()
    def _acts(self, host: Host, noisy: Tensor, timesteps: Tensor, prompts: Conditioning) -> Tensor:
        """Whether each source acts on each row, (sources, B)."""
        acts = torch.ones(len(self.sources), len(noisy), dtype=torch.bool, device=noisy.device)
        if not any(source.patch.gate for source in self.sources):
            return acts
        mids: list[Tensor] = []
        if any(source.patch.gate.reads_features for source in self.sources if source.patch.gate):
            with answered(host.unet, lambda features: mids.append(features.mid.float())):
                host.predict(noisy, timesteps, prompts)
        words = host.words(prompts).float()
        for source, on in zip(self.sources, acts, strict=True):
            if source.patch.gate:
                logits = source.patch.gate(mids[0] if mids else None, timesteps, words)
                on.copy_((logits.sigmoid() >= moved(cast(Tensor, source.thresholds), logits.device)).any(1))
        return acts


def _rows(on: Tensor, device: torch.device) -> Tensor:
    """On `device`, the numbers of the rows that are true of a mask on the CPU; a mask there would be waited for."""
    return moved(on.nonzero()[:, 0], device)


def _inputs(
    host: Host, noisy: Tensor, timesteps: Tensor, prompts: Conditioning, instruction: Tensor
) -> tuple[object, ...]:
    """What a control patch in float32 is given."""
    conditions = {name: value.float() for name, value in host.conditions(prompts).items()}
    sample, times = host.shown(noisy, timesteps)
    return sample.float(), times, prompts.states.float(), instruction, conditions
