"""Merging: open the sources, compare them, and write what they make together, which says what it was made of."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from safepatch.artifact.info import BUNDLE, PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact, is_gate
from safepatch.artifact.tensor_file import TensorFile
from safepatch.artifact.writer import write_stream
from safepatch.errors import MergeError
from safepatch.merging.conflicts import Comparison, compare, report
from safepatch.merging.groups import has_gate, is_grouped, merged_layout
from safepatch.merging.job import BundleJob, GroupedJob, IdentityJob, Job
from safepatch.merging.recipe import DTYPE_NAMES, DTYPES, EXACT, MergeRecipe, load_recipe
from safepatch.merging.sources import Source, agreed, check_agreement, in_order, open_source, widest_dtype
from safepatch.merging.streaming import Pool, ahead, in_memory, stream, workers
from safepatch.merging.sums import SumJob


def merge(
    sources: MergeRecipe | str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    method: str = BUNDLE,
    weights: Sequence[float] | None = None,
    **options: Any,
) -> PatchArtifact:
    """Merge patch files into one patch, and write it to `out` when that is given.

    Args:
        sources: a recipe, the path of a YAML file that holds one, or paths of patches in any order.
        out: path of the merged patch, whose folder is made; by default the recipe's. It is streamed there and never
            wholly in memory.
        method: a key of `METHODS`, or `bundle`, the default. With a recipe, the recipe's counts.
        weights: one per source; all 1 by default. With a recipe, the recipe's count.
        **options: other fields of `MergeRecipe`, e.g. density or seed.

    Returns:
        The merged patch, whose recipe names the hashes of its sources; its tensors are read when used.

    Raises:
        MergeError: when the sources cannot be merged as asked.
        ArtifactError: when one of them, or the place of the output, is no good.
    """
    recipe = _recipe(sources, method, weights, options)
    _refuse_twice(recipe)
    target = Path(out) if out is not None else Path(recipe.out) if recipe.out else None
    if target is not None:
        check_target(target, recipe)
    with workers() as pool:
        opened = list((pool.map if pool else map)(open_source, recipe.sources, recipe.weights))
        job = _prepare(opened, recipe)
        info = _merged_info(job, pool)
        if target is None:
            return PatchArtifact(in_memory(job), info)
        digests = write_stream(target, info.to_metadata(), job.layout, stream(job, pool))
    return PatchArtifact(TensorFile.open(target, digests), info)


def combine(artifacts: Sequence[PatchArtifact], recipe: MergeRecipe) -> PatchArtifact:
    """The patch that `recipe` makes of `artifacts`, given in the order of `recipe.sources`."""
    parts = zip(recipe.sources, artifacts, recipe.weights, strict=True)
    with workers() as pool:
        sources = [Source(name, _detached(item), weight, item.content_hash) for name, item, weight in parts]
        job = _prepare(sources, recipe)
        return PatchArtifact(in_memory(job), _merged_info(job, pool))


def _detached(artifact: PatchArtifact) -> PatchArtifact:
    """The same patch, no longer part of a computation that could be differentiated."""
    return replace(artifact, tensors={name: tensor.detach() for name, tensor in artifact.tensors.items()})


def _recipe(sources: Any, method: str, weights: Sequence[float] | None, options: dict[str, Any]) -> MergeRecipe:
    if isinstance(sources, MergeRecipe):
        return sources
    if isinstance(sources, str | Path):
        return load_recipe(sources)
    return MergeRecipe(tuple(map(str, sources)), tuple(weights or ()), method, **options)


def check_target(target: Path, recipe: MergeRecipe) -> None:
    """Make the folder of the output; raises `MergeError` when that cannot be, or when it is one of the sources."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MergeError(f"cannot write {target}: {reason}; choose a writable folder") from error
    if any(_is_same(target, source) for source in recipe.sources):
        raise MergeError(f"the output {target} is one of the patches to merge; choose another name")


def _refuse_twice(recipe: MergeRecipe) -> None:
    """Raise `MergeError` for a file that is among the sources twice, by whatever names."""
    for i, source in enumerate(recipe.sources):
        if again := next((other for other in recipe.sources[:i] if _is_same(source, other)), None):
            known = source if source == again else f"{source}, which is {again},"
            raise MergeError(f"{known} is to be merged twice; give it once, with a weight where it should count more")


def _is_same(target: str | Path, source: str) -> bool:
    try:
        return os.path.samefile(target, source)
    except (OSError, ValueError):  # one of them is not there, or no path
        return False


def _prepare(sources: Sequence[Source], recipe: MergeRecipe) -> Job:
    if recipe.heal:
        raise MergeError("healing needs the base model; call safepatch.heal(pipe, recipe), or leave out heal")
    ordered = in_order(sources)
    check_agreement(ordered, kept_apart=recipe.method == BUNDLE)
    dtype = DTYPES[recipe.dtype] if recipe.dtype else widest_dtype(ordered)
    if recipe.method == BUNDLE:
        return BundleJob(ordered, recipe, dtype)
    if recipe.method == "cat" and all(is_grouped(source.info) for source in ordered):
        merged_layout(ordered)  # refuses what cannot stand side by side
        if recipe.rank:
            raise MergeError("lite patches stand side by side and have no sum to re-compress; leave out the rank")
        return (IdentityJob if recipe.is_identity else GroupedJob)(ordered, recipe, dtype)
    gated = [source.name for source in ordered if has_gate(source)]
    if recipe.method == "cat" and gated and len(ordered) > 1:
        raise MergeError(
            f"{gated[0]} has a gate, and cat cannot keep it to its own part; merge by bundle, or by "
            "task-arithmetic (one open gate then opens all), or take the gates off (safepatch gate --width 0)"
        )
    return (IdentityJob if recipe.is_identity else SumJob)(ordered, recipe, dtype)


# What the merged file says about itself


def _merged_info(job: Job, pool: Pool) -> PatchInfo:
    """Settings that the sources share are kept; training and evaluation belonged to the sources, so they are not."""
    infos = [source.info for source in job.sources]
    return PatchInfo(
        kind="+".join(sorted({info.kind for info in infos})),
        instructions=_united_instructions(job),
        fingerprint=infos[0].fingerprint,
        base=agreed([info.base for info in infos]),
        config=agreed([info.config for info in infos]) | job.config,
        recipe=_recorded(job, pool),
        shapes=job.shapes(),
        license=" AND ".join(sorted({info.license for info in infos} - {""})),
    )


def _recorded(job: Job, pool: Pool) -> dict[str, Any]:
    """The recipe as the file keeps it: no path, so that the bytes depend on content alone."""
    recipe = job.recipe
    recorded: dict[str, Any] = {"method": recipe.method, **recipe.used_options()}
    recorded["sources"] = [_record(source, recipe.method) for source in job.sources]
    if recipe.method != BUNDLE:
        recorded["dtype"] = DTYPE_NAMES[job.dtype]
    names = _comparable(job) if recipe.conflicts and len(job.sources) > 1 else []
    if names and not any(is_grouped(source.info) for source in job.sources):
        recorded["conflicts"] = _conflicts(job, names, pool)
    if recipe.rank:
        recorded["rank_errors"] = job.rank_errors()
    return recorded


def _record(source: Source, method: str) -> dict[str, Any]:
    """What the merged file keeps of a source; of an exact method, all that the source's file says."""
    info = source.info
    record = {
        "hash": source.hash,
        "weight": source.weight,
        "title": info.title,
        "categories": info.categories,
        "recipe": info.recipe,
    }
    if method in EXACT:
        record["metadata"] = info.to_metadata()
    if method == "cat":
        tensors = source.artifact.layout
        record["tensors"] = {name: [DTYPE_NAMES[t.dtype], list(t.shape)] for name, t in tensors.items()}
    return record


def _comparable(job: Job) -> list[str]:
    """What sources can be compared by: no gates, all begun alike, nor what two text encoders call by one name."""

    def components(name: str) -> set[str]:
        return {source.info.component for source in job.sources if source.shape(name) is not None}

    return [name for name in job.names if not is_gate(name) and len(components(name)) == 1]


def _conflicts(job: Job, names: Sequence[str], pool: Pool) -> list[dict[str, Any]]:
    """How the sources' corrections differ."""

    def compared(name: str) -> Comparison:
        return compare(job.stack(name))

    def cost(name: str) -> int:
        return 4 * torch.Size(job.shape(name)).numel() * len(job.sources)

    return report(ahead(pool, compared, names, cost))


def _united_instructions(job: Job) -> dict[str, str]:
    """Category -> what the merged patch reads; parts that are kept apart read their own, which may differ."""
    united: dict[str, tuple[str, str]] = {}
    for source in job.sources:
        for category, instruction in source.info.instructions.items():
            other, before = united.setdefault(category, (source.name, instruction))
            if before == instruction:
                continue
            if job.recipe.method != BUNDLE:
                raise MergeError(
                    f"{other} and {source.name} instruct '{category}' differently: '{before}' and '{instruction}'; "
                    "merge patches that share a category's instruction"
                )
            united[category] = (source.name, " / ".join(sorted({*before.split(" / "), instruction})))
    return {category: instruction for category, (_, instruction) in united.items()}
