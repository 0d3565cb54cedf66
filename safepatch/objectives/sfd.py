"""sfd: Score Forgetting Distillation (Chen et al. 2024, ICLR 2025, arXiv 2409.11219): scores teach to forget.

    x = G_θ(z, c)                what the generator draws of a prompt c from noise z
    |ε_ψ(x_t, c) - ε|²           the fake score ψ, a second player, learns what the generator draws
    (f - f_ψ) · ((f - x) - k (f - f_ψ)) / ω        ω = mean |x - f|;  the generator's loss, over pixels

where f = f(x_t, c) are the clean latents that the frozen base sees in x_t, f_ψ(x_t, c) those that the fake score sees.
That is Score identity Distillation (Zhou et al. 2024, arXiv 2404.04057), which ends where the generator draws
what the base does. Of prompts that are to be forgotten the base is asked for another one, the override concept, and
the fake score for the prompt itself; both losses, `forget` and `remain`, are added up. The two players take turns, and
nobody needs a picture. Published: a one-step generator, distilled before; all of its weights and the fake score's at
1e-6 and 3e-6, Adam (0, 0.999), batch 8, 12500 steps; k = 1, both losses at weight 1; t from 20 to 980; the generator
begins at t = 625; guidance 4.5 of both scores.

Ours: generator and fake score are low-rank updates of one frozen host, a patch and a player beside it; the override
concept is the prompt's safe twin; only the base's score is guided, so none of the fake score's prompts are dropped.
Without `one_step` the generator is the patched model itself, which goes on drawing in as many steps as one likes: it
draws in `denoising_steps` of them, unguided, and gradients reach one of these steps, whichever comes up, as if whatever
that step moves its clean latents by moved the picture as much. With `one_step` it draws from pure noise in one, and
since we have no generator that was distilled before, a regression on what the base draws from the same noise in many
steps leads it there (as in DMD; Yin et al. 2024, arXiv 2311.18828); the pictures are the base's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from safepatch.data.corpus import Corpus
from safepatch.data.prompt_rows import Asked, PromptRows, build_prompt_rows
from safepatch.data.settings import DataConfig
from safepatch.diffusion import Conditioning, Host, joined, moved
from safepatch.errors import ConfigError
from safepatch.objectives.adversary import Attackable, attacked
from safepatch.objectives.base import Losses, Player, Turn
from safepatch.objectives.noising import draw_timesteps
from safepatch.patch import LoraPatch, Patch
from safepatch.patch.host import patched_prediction
from safepatch.patch.layers import linear_layers
from safepatch.patch.lora import fresh_updates, updated

SCORE = "score"  # the second player's name
BETWEEN = (0.02, 0.98)  # shares of the schedule that timesteps are within
BEGIN = 0.625  # the share at which one step begins, of a model that predicts noise


class Seen(NamedTuple):
    """What the generator has drawn under noise: latents (B, 4, h, w), at integer timesteps (B,)."""

    noisy: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class SFDConfig(Attackable):
    """Draw of an unsafe prompt what the base draws of its safe twin, by scores alone (SFD); prompts only.

    Attributes:
        name: `sfd`.
        one_step: draw every picture in one step from pure noise; a lora patch that is always on, and has no gate.
        forget, remain: weights of both losses.
        alpha: k, how far the loss goes beyond the plain product of the scores' difference and the generator's error.
        regression: weight of what the base draws in many steps; only with `one_step`.
        guidance: of the base's score; by default 1, or with `one_step`, which is drawn without any, what suits the
            family.
        denoising_steps: in which the patched model draws, unless it is `one_step`.
        timestep: at which one step begins; by default 625 of 1000 of a model that predicts noise, else the last.
        score_rank: of the fake score's updates.
        score_rate: its rate, as a multiple of the patch's.
    """

    name: str = "sfd"
    one_step: bool = False
    forget: float = 1.0
    remain: float = 1.0
    alpha: float = 1.0
    regression: float = 1.0
    guidance: float | None = None
    denoising_steps: int = 6
    timestep: int | None = None
    score_rank: int = 16
    score_rate: float = 3.0

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if min(self.forget, self.remain, self.regression) < 0:
            raise ConfigError("objective.forget, remain and regression must be at least 0")
        if not self.is_scored and not self.pictures_per_pair:
            raise ConfigError("nothing is learned: set objective.forget or remain, or one_step and regression, above 0")
        if min(self.denoising_steps, self.score_rank) < 1 or self.score_rate <= 0:
            raise ConfigError("objective.denoising_steps and score_rank must be at least 1, score_rate above 0")
        if (self.guidance or 1) < 1 or (self.timestep or 0) < 0:
            raise ConfigError("objective.guidance must be at least 1, objective.timestep at least 0")

    @property
    def is_scored(self) -> bool:
        """Whether scores are asked at all; without them nobody plays but the patch."""
        return self.forget + self.remain > 0

    @property
    def rows_per_pair(self) -> int:
        """The unsafe prompt's and one's that must stay."""
        return 2

    @property
    def pictures_per_pair(self) -> int:
        """None, unless one step is regressed on them."""
        return 2 if self.one_step and self.regression else 0

    @property
    def held_per_pair(self) -> int:
        """What is drawn, and what both scores see in it, the base's perhaps by two rows each."""
        is_guided = self.one_step if self.guidance is None else self.guidance > 1
        return 2 + (2 + (4 if is_guided else 2) if self.is_scored else 0)

    @property
    def calls_per_pair(self) -> int:
        """What both players draw, both scores with their backward passes, and what the fake one learns."""
        steps = 1 if self.one_step else self.denoising_steps + 1
        return 2 * (2 * steps + 3 * (2 + self.one_step) + 3)

    def suited(self, patch: Patch) -> Patch:
        """All of it; raises `ConfigError` where one step is asked of another kind than lora."""
        if self.one_step and patch.kind != "lora":
            raise ConfigError(f"objective.one_step cannot train a {patch.kind} patch; set patch.kind=lora")
        return super().suited(patch)

    def recorded(self, host: Host) -> dict[str, Any]:
        """At which timestep its one step begins."""
        return {"one_step": {"timestep": self._begin(host)}} if self.one_step else {}

    def prepare(self, host: Host, corpus: Corpus, data: DataConfig) -> PromptRows:
        """The prompts; and pictures, where one step is regressed on them."""
        if self.one_step:
            self._begin(host)
        return build_prompt_rows(host, corpus, data, linear_layers(host.unet), draw=bool(self.pictures_per_pair))

    def players(self, patch: Player, rows: PromptRows) -> list[Player]:
        """The patch, its adversary if there is one, and the fake score, which begins as the base's."""
        if not self.is_scored:
            return super().players(patch, rows)
        score = LoraPatch(fresh_updates(rows.layers, self.score_rank, seed=1), self.score_rank)
        group = {"params": [*score.parameters()], "multiple": self.score_rate}
        optimizer = torch.optim.AdamW([group], lr=1.0, betas=(0.0, 0.999), weight_decay=0.0)
        return [*super().players(patch, rows), Player(SCORE, score, optimizer)]

    def loss(self, player: Player, turn: Turn) -> Losses:
        """The patch's total and its parts before they are weighed; or what the fake score misses."""
        batch = cast(Asked, turn.batch)
        retain, host, n = cast(Conditioning, batch.retain), turn.host, len(batch.latents)
        plain = joined([batch.unsafe, retain])
        if player.name == SCORE:
            with torch.no_grad():
                drawn = self._drawn(turn, plain)
            seen = noised(turn, drawn)
            made = patched_prediction(host, turn.others[SCORE], *seen, plain, turn.instruction)
            return {"loss": mse_loss(made, host.from_x0(*seen, drawn))}
        drawn = self._drawn(turn, attacked(turn, batch.unsafe, retain))
        weights, losses = {"forget": self.forget, "remain": self.remain, "regression": self.regression}, {}
        if self.is_scored:
            seen = noised(turn, drawn)
            real = host.to_x0(*seen, self._real(turn, seen, joined([batch.safe, retain])))
            fake = host.to_x0(*seen, _fake(turn, seen, plain))
            parts = identity_loss(drawn, real, fake, self.alpha).split([n, len(drawn) - n])
            losses = {name: part.mean() for name, part in zip(weights, parts, strict=False)}
        if batch.noise is not None:
            losses["regression"] = mse_loss(drawn, torch.cat((batch.latents, cast(Tensor, batch.retain_latents))))
        return {"loss": torch.stack([weights[name] * part for name, part in losses.items()]).sum(), **losses}

    def _drawn(self, turn: Turn, asked: Conditioning) -> Tensor:
        """What the generator draws of 2 B prompts, clean latents (2 B, 4, h, w); gradients reach one step of it."""
        batch, host = cast(Asked, turn.batch), turn.host
        given = (batch.noise, cast(Tensor, batch.retain_noise)) if batch.noise is not None else None
        shape = (len(asked.states), *batch.latents.shape[1:])
        noise = torch.cat(given) if given else torch.randn(shape, generator=turn.generator)
        noise = moved(noise, batch.latents.device)

        def patched(noisy: Tensor, timesteps: Tensor, asked: Conditioning) -> Tensor:
            return patched_prediction(host, turn.patch, noisy, timesteps, asked, turn.instruction)

        if self.one_step:
            times = torch.full((len(noise),), self._begin(host), device=noise.device)
            return host.to_x0(noise, times, patched(noise, times, asked))
        (step,) = torch.randint(self.denoising_steps, (1,), generator=turn.generator).tolist()
        how = {"steps": self.denoising_steps, "guidance": 1.0, "predict": patched}
        noisy, timestep = host.denoise(noise, asked, asked, until=step, **how)
        times = torch.full((len(noisy),), timestep, device=noisy.device)
        clean = host.to_x0(noisy, times, patched(noisy, times, asked))
        return host.denoise(noisy, asked, asked, since=step, **how).latents + clean - clean.detach()

    def _real(self, turn: Turn, seen: Seen, asked: Conditioning) -> Tensor:
        """The base's prediction, guided, through which gradients reach the latents."""
        host, empty = turn.host, cast(Conditioning, cast(Asked, turn.batch).empty)
        usual = host.guidance if self.one_step else 1.0
        guidance = usual if self.guidance is None else self.guidance
        with host.recomputed_in(nullcontext):
            if guidance <= 1:
                return host.predict(*seen, asked)
            twice = torch.cat((seen.noisy, seen.noisy)), torch.cat((seen.timesteps, seen.timesteps))
            base, towards = host.predict(*twice, joined([empty, empty, asked])).chunk(2)
        return base + guidance * (towards - base)

    def _begin(self, host: Host) -> int:
        """The timestep at which one step begins; raises `ConfigError` for a transformer, or past the schedule."""
        if host.predicts == "flow":
            raise ConfigError("not supported yet: one step of a transformer; set objective.one_step=false")
        if self.timestep is not None and self.timestep >= host.steps:
            raise ConfigError(f"objective.timestep must be below the model's {host.steps}, not {self.timestep}")
        usual = int(BEGIN * host.steps) if host.predicts == "epsilon" else host.steps - 1
        return usual if self.timestep is None else self.timestep


def identity_loss(drawn: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """(f - f_ψ) · ((f - x) - k (f - f_ψ)) / ω of each row, (B,), the mean over pixels; may be negative.

    Args:
        drawn: x, the generator's clean latents, (B, 4, h, w).
        real, fake: f and f_ψ, those that both scores see in them under noise.
        alpha: k.
    """
    omega = (drawn - real).detach().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
    return ((real - fake) * ((real - drawn) - alpha * (real - fake)) / omega).mean((1, 2, 3))


def noised(turn: Turn, drawn: Tensor) -> Seen:
    """What the generator has drawn, under noise of the turn's own."""
    low, high = (int(share * turn.host.steps) for share in BETWEEN)
    timesteps = low + draw_timesteps(len(drawn), high - low, 1.0, turn.generator)
    timesteps = moved(timesteps, drawn.device)
    noise = moved(torch.randn(drawn.shape, generator=turn.generator), drawn.device)
    return Seen(turn.host.add_noise(drawn, noise, timesteps), timesteps)


def _fake(turn: Turn, seen: Seen, asked: Conditioning) -> Tensor:
    """The fake score's prediction, through which gradients reach the latents and not the fake score."""
    score = cast(LoraPatch, getattr(turn.others[SCORE], "module", turn.others[SCORE]))

    @contextmanager
    def still() -> Iterator[None]:
        score.requires_grad_(False)
        try:
            with updated(turn.host.unet, score):
                yield
        finally:
            score.requires_grad_(True)

    with turn.host.recomputed_in(still), still():
        return turn.host.predict(*seen, asked)
