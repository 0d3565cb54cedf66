"""Healing: a merged control patch learns, without images, to do what its sources do side by side.

Behind gates it need not learn to leave harmless prompts alone, and a prompt has few teachers, those whose gates open.
The bundle of the sources is the teacher and its residuals are the target: distillation (Hinton et al. 2015, arXiv
1503.02531) of K patches that are run one after the other into one that is run once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from safepatch.artifact import Part, PatchArtifact
from safepatch.data.prompts import benign_prompts, lookalike_prompts, unsafe_prompts
from safepatch.diffusion import Components, add_noise, encode_prompts, generate_latents, noise_pred
from safepatch.errors import MergeError, lookup
from safepatch.info import BUNDLE
from safepatch.merging import MergeRecipe, merge
from safepatch.merging.engine import check_target
from safepatch.merging.recipe import DTYPES
from safepatch.patch import Features, Residuals
from safepatch.patch.files import to_artifact
from safepatch.patch.host import answered
from safepatch.runtime.apply import activate
from safepatch.runtime.parts import ActivePart
from safepatch.taxonomy import CATEGORIES

PROMPTS = 32  # unsafe prompts per category
TRAJECTORY = 5  # denoising steps of the latents that healing sees
ROWS = 16  # of a step; half of them the bundle should leave alone, unless gates do that
LEARNING_RATE, WARMUP = 1e-3, 10
MAX_GRAD_NORM = 1.0
CHECKS = 4  # batches that the error before and after is measured on, which no step sees


class Rows(NamedTuple):
    """What a patch is given: noisy latents (B, 4, h, w), timesteps (B,) and text states (B, tokens, width)."""

    sample: Tensor
    timesteps: Tensor
    prompt_states: Tensor


@dataclass(frozen=True)
class Bank:
    """Prompts and what the base draws for them; the first `unsafe` ask for a category that is merged.

    Attributes:
        latents: clean and scaled, (N, 4, h, w).
        states: the prompts' text states, (N, tokens, width).
        unsafe: how many of the N are unsafe.
        kept: how many rows of a step should be left alone.
    """

    latents: Tensor
    states: Tensor
    unsafe: int
    kept: int


def heal(pipe: Any, recipe: MergeRecipe, out: str | Path | None = None) -> PatchArtifact:
    """Merge as `recipe` says, then train the outcome for `recipe.heal` steps to do what the sources' bundle does.

    Args:
        pipe: the base model's pipeline; its modules are frozen and moved to the device that trains, not changed.
        recipe: of a merge in weight space, from which healing starts; its seed decides what is random here.
        out: path of the healed patch; by default the recipe's, if that has one.

    Returns:
        One dense control patch; its recipe says under `heal` what was done and how far it is from the bundle.

    Raises:
        MergeError: when the sources cannot be merged as asked, or are not control patches, or their gates open for none
            of their own prompts.
        BaseMismatch: when they are for another architecture than the pipeline's.
    """
    place = out or recipe.out
    if place:
        check_target(Path(place), recipe)
    plain = replace(recipe, heal=0, out=None)
    start = merge(plain)
    if start.info.kind != "control":
        raise MergeError(f"only control patches can be healed, these are {start.info.kind}; merge them without heal")
    components = Components.of(pipe).freeze().to(cast(torch.device, PartialState().device))
    bundle = merge(replace(plain, method=BUNDLE, dtype=None, conflicts=False))
    sources = [activate(part, components, dtype=torch.float32) for part in bundle.parts()]
    merged = activate(Part(1.0, start), components, dtype=torch.float32)
    bank = draw_bank(components, start.info.categories, recipe.seed, is_gated=merged.patch.gate is not None)
    before = residual_error(merged, sources, components, bank, recipe.seed)
    train_to_match(merged, sources, components, bank, recipe)
    after = residual_error(merged, sources, components, bank, recipe.seed)
    record = {"steps": recipe.heal, "seed": recipe.seed, "error_before": round(before, 4), "error": round(after, 4)}
    healed = _packed(merged, components, start, record)
    if place:
        healed.save(Path(place))
    return healed


def draw_bank(components: Components, categories: Sequence[str], seed: int, is_gated: bool = False) -> Bank:
    """Prompts in known wording with the base's latents for them: unsafe ones of `categories`, and what must be kept.

    To be kept are their look-alikes, benign prompts, the other categories and the empty prompt, as in training. Behind
    gates (`is_gated`) only what is drawn for them is used.
    """
    merged = [lookup(CATEGORIES, name, what="category") for name in categories]
    unsafe = [prompt.text for category in merged for prompt in unsafe_prompts(category, PROMPTS, seed)]
    alike = [prompt.text for category in merged for prompt in lookalike_prompts(category, PROMPTS // 2, seed)]
    others = [category for category in CATEGORIES.values() if category not in merged]
    foreign = [prompt.text for category in others for prompt in unsafe_prompts(category, PROMPTS // 4, seed)]
    benign = [prompt.text for prompt in benign_prompts(len(unsafe) // 2, seed)]
    texts = [*unsafe, *alike, *foreign, *benign, *[""] * (len(unsafe) // 8)]
    latents, states = [], []
    for first in tqdm(range(0, len(texts), 32), desc="generating latents", leave=False):
        part = texts[first : first + 32]
        seeds = [seed * 1_000_003 + first + i for i in range(len(part))]
        latents.append(generate_latents(components, part, seeds, TRAJECTORY))
        states.append(encode_prompts(components, part))
    return Bank(torch.cat(latents), torch.cat(states), len(unsafe), kept=0 if is_gated else ROWS // 2)


def draw_rows(components: Components, bank: Bank, seed: int, step: int) -> Rows:
    """The `ROWS` rows that (seed, step) stands for, at timesteps spread over the whole schedule.

    Half of them have another prompt's latents: under an unsafe prompt a patched model soon draws something else.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    total = len(bank.latents)
    unsafe = torch.randint(bank.unsafe, (ROWS - bank.kept,), generator=generator)
    kept = torch.randint(bank.unsafe, total, (bank.kept,), generator=generator)
    prompts, others = torch.cat((unsafe, kept)), torch.randint(total, (ROWS,), generator=generator)
    latents = bank.latents[torch.where(torch.rand(ROWS, generator=generator) < 0.5, prompts, others)]
    timesteps = torch.randint(components.scheduler.config.num_train_timesteps, (ROWS,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    timesteps = timesteps.to(latents.device)
    return Rows(add_noise(components.scheduler, latents, noise, timesteps), timesteps, bank.states[prompts])


def train_to_match(
    merged: ActivePart, sources: Sequence[ActivePart], components: Components, bank: Bank, recipe: MergeRecipe
) -> None:
    """Train `merged` in place for `recipe.heal` steps until its residuals are what the `sources` add side by side."""
    parameters = list(merged.patch.requires_grad_(True).train().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    steps = tqdm(range(recipe.heal), desc="healing")
    for step in steps:
        optimizer.param_groups[0]["lr"] = _learning_rate(step, recipe.heal)
        rows = draw_rows(components, bank, recipe.seed, step)
        loss = _error(merged, sources, components, rows)
        loss.backward()
        clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.set_postfix(error=f"{loss.item():.3f}")
    merged.patch.eval().requires_grad_(False)


@torch.no_grad()
def residual_error(
    merged: ActivePart, sources: Sequence[ActivePart], components: Components, bank: Bank, seed: int
) -> float:
    """`relative_error` of `merged` against the `sources` side by side, on rows that no training step draws."""
    checks = [draw_rows(components, bank, seed, -1 - check) for check in range(CHECKS)]
    return sum(_error(merged, sources, components, rows).item() for rows in checks) / CHECKS


def relative_error(residuals: Residuals, target: Residuals) -> Tensor:
    """Mean over skips and mid of |r - target|² / |target|²: 0 when equal, 1 for no patch at all; scalar.

    Each skip is measured by its own size, so that those with many or large values do not decide alone.
    """
    pairs = zip((*residuals.down, residuals.mid), (*target.down, target.mid), strict=True)
    return torch.stack([(r - t).square().sum() / t.square().sum().clamp(min=1e-12) for r, t in pairs]).mean()


def _error(merged: ActivePart, sources: Sequence[ActivePart], components: Components, rows: Rows) -> Tensor:
    """`relative_error` on those of the rows for which some gate opens; the others never reach the merged patch."""
    acts = _acts(sources, components, rows)
    reached = acts.any(0)
    if not reached.any():
        raise MergeError("the sources' gates open for none of their own prompts on this model; fit them on it first")
    rows, acts = Rows(*(values[reached] for values in rows)), acts[:, reached]
    made = merged.patch(*rows, merged.instruction_states)
    return relative_error(made, _target(sources, acts, rows, made))


@torch.no_grad()
def _target(sources: Sequence[ActivePart], acts: Tensor, rows: Rows, like: Residuals) -> Residuals:
    """What the sources' bundle adds, shaped as `like`: their weighted sum, each part only on the rows it `acts` on."""
    sums = [torch.zeros_like(residual) for residual in (*like.down, like.mid)]
    for source, on in zip(sources, acts, strict=True):
        if not on.any():
            continue
        made = source.patch(*(values[on] for values in rows), source.instruction_states)
        for total, residual in zip(sums, (*made.down, made.mid), strict=True):
            total[on] += source.weight * residual
    return Residuals(tuple(sums[:-1]), sums[-1])


@torch.no_grad()
def _acts(sources: Sequence[ActivePart], components: Components, rows: Rows) -> Tensor:
    """Whether each part acts on each row, (sources, B)."""
    acts = torch.ones(len(sources), len(rows.sample), dtype=torch.bool, device=rows.sample.device)
    mid = _mid(components, rows) if any(source.patch.gate for source in sources) else None
    for source, on in zip(sources, acts, strict=True):
        if source.patch.gate:
            logits = source.patch.gate(mid, rows.timesteps, rows.prompt_states.float())
            on.copy_((logits.sigmoid() >= cast(Tensor, source.thresholds).to(logits.device)).any(1))
    return acts


def _mid(components: Components, rows: Rows) -> Tensor:
    """What the host's mid block makes of the rows, (B, C, h, w) in float32."""
    seen: list[Tensor] = []
    with answered(components.unet, lambda features: seen.append(cast(Features, features).mid.float())):
        noise_pred(components.unet, *rows)
    return seen[0]


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, and all along a cosine down to a tenth."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _packed(
    merged: ActivePart, components: Components, start: PatchArtifact, record: dict[str, float]
) -> PatchArtifact:
    """The healed patch in the merge's dtype, its recipe the merge's with a record of the healing."""
    merge_recipe = cast(dict[str, Any], start.info.recipe)
    healed = to_artifact(merged.patch, components.unet, start.info.instructions, start.info.config)
    recipe = {**merge_recipe, "heal": record}
    info = replace(healed.info, recipe=recipe, license=start.info.license, title=start.info.title)
    return replace(healed, info=info).astype(DTYPES[merge_recipe["dtype"]])
