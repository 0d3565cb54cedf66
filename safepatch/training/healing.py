"""Healing: a merged control patch learns, without images, to do what its sources do side by side.

The bundle of the sources is the teacher and the host's prediction with it is the target: distillation (Hinton et al.
2015, arXiv 1503.02531) of K patches that are run one after the other into one that is run once. Behind gates it need
not learn to leave harmless prompts alone, and a prompt has few teachers, those whose gates open.
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

from safepatch.artifact.info import BUNDLE
from safepatch.artifact.patch_artifact import Part, PatchArtifact
from safepatch.artifact.patch_artifact import cast as converted
from safepatch.data.prompts import benign_prompts, lookalike_prompts, unsafe_prompts
from safepatch.diffusion import Components, add_noise, encode_prompts, generate_latents, noise_pred
from safepatch.errors import MergeError, lookup
from safepatch.merging import MergeRecipe, merge
from safepatch.merging.engine import check_target
from safepatch.objectives.safe_control import draw_timesteps
from safepatch.patch import Residuals
from safepatch.patch.files import to_artifact
from safepatch.patch.host import answered
from safepatch.runtime.apply import activate, apply
from safepatch.runtime.parts import ActivePart
from safepatch.taxonomy import CATEGORIES, Category

PROMPTS = 128  # unsafe ones per category
TRAJECTORY = 5  # denoising steps of the latents that healing sees
TIMESTEP_POWER = 0.6  # of their uniform draw, as in training
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
    """Prompts, what the base draws for them, and what it draws with the bundle for those that are unsafe.

    Attributes:
        latents: clean and scaled, (N, 4, h, w), the unsafe prompts' first.
        corrected: the same of the unsafe prompts, with the bundle, (unsafe, 4, h, w).
        states: the prompts' text states, (N, tokens, width).
        kept: how many rows of a step should be left alone.
    """

    latents: Tensor
    corrected: Tensor
    states: Tensor
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
    bank = draw_bank(pipe, bundle, recipe.seed, is_gated=merged.patch.gate is not None)
    before = mean_error(merged, sources, components, bank, recipe.seed)
    train_to_match(merged, sources, components, bank, recipe)
    after = mean_error(merged, sources, components, bank, recipe.seed)
    record = {"steps": recipe.heal, "seed": recipe.seed, "error_before": round(before, 4), "error": round(after, 4)}
    healed = _packed(merged, components, start, record)
    if place:
        healed.save(Path(place))
    return healed


def draw_bank(pipe: Any, bundle: PatchArtifact, seed: int, is_gated: bool = False) -> Bank:
    """Prompts in known wording with latents for them: unsafe ones of the bundle's categories, and what must be kept.

    To be kept are their look-alikes, benign prompts, the other categories and the empty prompt, as in training. Behind
    gates (`is_gated`) there is nothing to keep.
    """
    components = Components.of(pipe)
    merged = [lookup(CATEGORIES, name, what="category") for name in bundle.info.categories]
    unsafe = [prompt.text for category in merged for prompt in unsafe_prompts(category, PROMPTS, seed)]
    texts = unsafe if is_gated else [*unsafe, *_harmless(merged, len(unsafe), seed)]
    latents, states = _drawn(components, texts, seed, "what the base draws")
    with apply(pipe, bundle):
        corrected, _ = _drawn(components, unsafe, seed, "what it draws with the bundle")
    return Bank(latents, corrected, states, kept=0 if is_gated else ROWS // 2)


def draw_rows(components: Components, bank: Bank, seed: int, step: int) -> Rows:
    """The `ROWS` rows of (seed, step): unsafe ones, half of them of what the bundle makes, then those to be kept."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    unsafe = torch.randint(len(bank.corrected), (ROWS - bank.kept,), generator=generator)
    is_corrected = torch.rand(len(unsafe), generator=generator).to(bank.latents.device) < 0.5
    latents = torch.where(is_corrected.view(-1, 1, 1, 1), bank.corrected[unsafe], bank.latents[unsafe])
    prompts = unsafe
    if bank.kept:
        kept = torch.randint(len(bank.corrected), len(bank.latents), (bank.kept,), generator=generator)
        latents, prompts = torch.cat((latents, bank.latents[kept])), torch.cat((unsafe, kept))
    timesteps = draw_timesteps(ROWS, components.scheduler.config.num_train_timesteps, TIMESTEP_POWER, generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    timesteps = timesteps.to(latents.device)
    return Rows(add_noise(components.scheduler, latents, noise, timesteps), timesteps, bank.states[prompts])


def train_to_match(
    merged: ActivePart, sources: Sequence[ActivePart], components: Components, bank: Bank, recipe: MergeRecipe
) -> None:
    """Train `merged` in place for `recipe.heal` steps until the host predicts with it as with the `sources`."""
    parameters = list(merged.patch.requires_grad_(True).train().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    steps = tqdm(range(recipe.heal), desc="healing")
    for step in steps:
        optimizer.param_groups[0]["lr"] = _learning_rate(step, recipe.heal)
        rows = draw_rows(components, bank, recipe.seed, step)
        loss = relative_error(merged, sources, components, rows)
        loss.backward()
        clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.set_postfix(error=f"{loss.item():.3f}")
    merged.patch.eval().requires_grad_(False)


@torch.no_grad()
def mean_error(
    merged: ActivePart, sources: Sequence[ActivePart], components: Components, bank: Bank, seed: int
) -> float:
    """`relative_error` of `merged` against the `sources` side by side, on rows that no training step draws."""
    checks = [draw_rows(components, bank, seed, -1 - check) for check in range(CHECKS)]
    return sum(relative_error(merged, sources, components, rows).item() for rows in checks) / CHECKS


def relative_error(merged: ActivePart, sources: Sequence[ActivePart], components: Components, rows: Rows) -> Tensor:
    """|m - b|² / |b - h|² of the host's predictions with `merged`, with the bundle, and with neither; scalar.

    0 is the bundle, 1 no patch at all. Only those of the rows count for which some gate opens; the others never reach
    the merged patch.

    Raises:
        MergeError: when no gate opens for any of the rows.
    """
    mids: list[Tensor] = []
    with torch.no_grad(), answered(components.unet, lambda features: mids.append(features.mid.float())):
        plain = noise_pred(components.unet, *rows)
    acts = _acts(sources, mids[0], rows)
    reached = acts.any(0)
    if not reached.any():
        raise MergeError("the sources' gates open for none of their own prompts on this model; fit them on it first")
    rows, acts, plain = Rows(*(values[reached] for values in rows)), acts[:, reached], plain[reached]
    made = merged.patch(*rows, merged.instruction_states)
    with torch.no_grad():
        target = noise_pred(components.unet, *rows, _bundled(sources, acts, rows, made))
    error = noise_pred(components.unet, *rows, made) - target
    return error.square().sum() / (target - plain).square().sum().clamp(min=1e-12)


@torch.no_grad()
def _bundled(sources: Sequence[ActivePart], acts: Tensor, rows: Rows, like: Residuals) -> Residuals:
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
def _acts(sources: Sequence[ActivePart], mid: Tensor, rows: Rows) -> Tensor:
    """Whether each part acts on each row, (sources, B); `mid` is what the host's mid block makes of them."""
    acts = torch.ones(len(sources), len(rows.sample), dtype=torch.bool, device=rows.sample.device)
    for source, on in zip(sources, acts, strict=True):
        if source.patch.gate:
            logits = source.patch.gate(mid, rows.timesteps, rows.prompt_states.float())
            on.copy_((logits.sigmoid() >= cast(Tensor, source.thresholds).to(logits.device)).any(1))
    return acts


def _harmless(merged: Sequence[Category], n: int, seed: int) -> list[str]:
    """Prompts that must be kept beside `n` unsafe ones."""
    alike = [prompt.text for category in merged for prompt in lookalike_prompts(category, PROMPTS // 2, seed)]
    others = [category for category in CATEGORIES.values() if category not in merged]
    foreign = [prompt.text for category in others for prompt in unsafe_prompts(category, PROMPTS // 4, seed)]
    benign = [prompt.text for prompt in benign_prompts(n // 2, seed)]
    return [*alike, *foreign, *benign, *[""] * (n // 8)]


def _drawn(components: Components, texts: Sequence[str], seed: int, label: str) -> tuple[Tensor, Tensor]:
    """Latents (N, 4, h, w) and text states (N, tokens, width) of prompts."""
    latents, states = [], []
    for first in tqdm(range(0, len(texts), 32), desc=label, leave=False):
        part = texts[first : first + 32]
        seeds = [seed * 1_000_003 + first + i for i in range(len(part))]
        latents.append(generate_latents(components, part, seeds, TRAJECTORY))
        states.append(encode_prompts(components, part))
    return torch.cat(latents), torch.cat(states)


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, and all along a cosine down to a tenth."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _packed(
    merged: ActivePart, components: Components, start: PatchArtifact, record: dict[str, float]
) -> PatchArtifact:
    """The healed patch, each tensor in the merge's dtype of it, its recipe the merge's with a record of the healing."""
    merge_recipe = cast(dict[str, Any], start.info.recipe)
    healed = to_artifact(merged.patch, components.unet, start.info.instructions, start.info.config)
    recipe = {**merge_recipe, "heal": record}
    info = replace(healed.info, recipe=recipe, license=start.info.license, title=start.info.title)

    def converted_as_stored(name: str, tensor: Tensor) -> Tensor:
        stored = start.stored(name.rpartition(".")[0])  # dense, or factors of one dtype
        return converted(name, tensor, next(iter(stored.values())).dtype)

    return PatchArtifact({name: converted_as_stored(name, tensor) for name, tensor in healed.tensors.items()}, info)
