"""Healing: a merge, then the training run that teaches it to do what its sources do side by side."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from safepatch.artifact.info import BUNDLE
from safepatch.artifact.patch_artifact import Part, PatchArtifact
from safepatch.artifact.patch_artifact import cast as converted
from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.data.keys import digest
from safepatch.diffusion import Components, Host, open_host
from safepatch.errors import MergeError
from safepatch.merging import MergeRecipe, merge
from safepatch.merging.engine import check_target
from safepatch.objectives import Player, Rows, Turn
from safepatch.objectives.match_bundle import MatchBundle
from safepatch.patch import Patch
from safepatch.patch.files import to_artifact
from safepatch.runtime.apply import activate
from safepatch.training.config import TrainingConfig
from safepatch.training.folder import RunFolder
from safepatch.training.loop import Run
from safepatch.training.trainer import new_accelerator

CHECKS = 4  # batches that the error before and after is measured on, which no step sees
OPTIONS = TrainingConfig(batch_size=16, joint_rate=1.0, warmup=10)


def heal(
    pipe: Any,
    recipe: MergeRecipe,
    out: str | Path | None = None,
    corpora: Sequence[Corpus] = (),
    options: TrainingConfig = OPTIONS,
    data: DataConfig | None = None,
) -> PatchArtifact:
    """Merge as `recipe` says, then train the outcome for `recipe.heal` steps to do what the sources' bundle does.

    Args:
        pipe: the base model's pipeline; its modules are frozen and moved to the device that trains, not changed.
        recipe: of a merge in weight space, from which healing starts; its seed decides what is random here.
        out: path of the healed patch; by default the recipe's, if that has one. The run's log and checkpoint, from
            which it goes on after a kill, stand in a folder beside it; without a path, in one of their own under
            `runs/heal`.
        corpora: of the merged categories; by default the shipped ones of these names.
        options: how to train; steps, seed and learning rate are the recipe's.
        data: how pictures are drawn.

    Returns:
        One dense control patch; its recipe says under `heal` what was done and how far it is from the bundle.

    Raises:
        MergeError: when the sources cannot be merged as asked, or are not control patches, or their gates open for none
            of their own prompts.
        BaseMismatch: when they are for another architecture than the pipeline's.
        ConfigError: when there are no words for one of the categories.
    """
    if place := out or recipe.out:
        check_target(Path(place), recipe)
    plain = replace(recipe, heal=0, out=None)
    start = merge(plain)
    if start.info.kind != "control":
        raise MergeError(f"only control patches can be healed, these are {start.info.kind}; merge them without heal")
    corpora = corpora or [Corpus.open(name) for name in start.info.categories]
    options = replace(options, steps=recipe.heal, seed=recipe.seed, learning_rate=recipe.heal_rate)
    data = replace(data or DataConfig(), seed=recipe.seed)
    host = open_host(Components.of(pipe), data.size)
    run_is_of = {"recipe": asdict(recipe), "training": asdict(options), "data": asdict(replace(data, cache=None))}
    run_is_of |= {"model_key": host.key, "words_key": [each.key for each in corpora], "merged": start.content_hash}
    path = Path(place).with_suffix(".heal") if place else Path("runs/heal") / digest(run_is_of)[:16]
    with RunFolder.claim(path, run_is_of) as folder:
        accelerator = new_accelerator(options, folder.path)
        host.components.to(accelerator.device)
        objective = _objective(plain, start, host)
        rows, instruction = objective.prepare(host, corpora, data), objective.merged.instruction_states.float()
        run = Run("healing", objective, host, rows, instruction, options, accelerator)
        before = mean_error(run, objective.merged.patch)
        state = run.finish(_learning(objective.merged.patch), folder)
        after = mean_error(run, state.patch)
        record = {"steps": recipe.heal, "seed": recipe.seed, "error_before": round(before, 4), "error": round(after, 4)}
        healed = _packed(state.patch, host, start, record)
        if accelerator.is_main_process:
            if place:
                healed.save(place)
            folder.checkpoint.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    return healed


def _objective(plain: MergeRecipe, start: PatchArtifact, host: Host) -> MatchBundle:
    """To turn `start`, which the recipe makes, into the bundle of its sources."""
    bundle = merge(replace(plain, method=BUNDLE, dtype=None, conflicts=False))
    sources = [activate(part, host.components, dtype=torch.float32) for part in bundle.parts()]
    merged = activate(Part(1.0, start), host.components, dtype=torch.float32)
    return MatchBundle(merged, sources, bundle.content_hash)


def mean_error(run: Run, patch: nn.Module) -> float:
    """The loss of `patch` on rows that no training step draws; 0 is the bundle, 1 no patch at all."""
    player = Player("patch", patch, cast(torch.optim.Optimizer, None))
    with torch.no_grad():
        losses = [run.objective.loss(player, _check(run, patch, i)) for i in range(CHECKS)]
    return sum(values["loss"].item() for values in losses) / CHECKS


def _check(run: Run, patch: nn.Module, i: int) -> Turn:
    rows: Rows = run.rows
    batch = rows.batch(-1 - i, run.options.batch_size, run.options.seed).to(run.host.device)
    generator = torch.Generator().manual_seed(run.options.seed * 1_000_003 + (1 << 40) + i)
    return Turn(run.host, patch, run.instruction, batch, generator)


def _learning(patch: Patch) -> Patch:
    """The patch with all weights free but those of its gate, whose thresholds were found with them."""
    patch.requires_grad_(True)
    if patch.gate:
        patch.gate.requires_grad_(False)
    return patch


def _packed(patch: Patch, host: Host, start: PatchArtifact, record: dict[str, float]) -> PatchArtifact:
    """The healed patch, each tensor in the merge's dtype of it, its recipe the merge's with a record of the healing."""
    merge_recipe = cast(dict[str, Any], start.info.recipe)
    healed = to_artifact(patch, host.unet, start.info.instructions, start.info.config)
    recipe = {**merge_recipe, "heal": record}
    info = replace(healed.info, recipe=recipe, license=start.info.license, title=start.info.title)

    def converted_as_stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
        stored = start.stored(name.rpartition(".")[0])  # dense, or factors of one dtype
        return converted(name, tensor, next(iter(stored.values())).dtype)

    return PatchArtifact({name: converted_as_stored(name, tensor) for name, tensor in healed.tensors.items()}, info)
