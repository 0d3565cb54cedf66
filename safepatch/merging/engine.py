"""Merging: check that the patches belong together, then one parameter after the other, sources in a fixed order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safepatch.artifact import PatchArtifact, PatchInfo, cast
from safepatch.errors import BaseMismatch, MergeError, SafepatchError
from safepatch.merging.methods import METHODS, SUM_WEIGHTS
from safepatch.merging.recipe import DTYPE_NAMES, DTYPES, MergeRecipe


@dataclass(frozen=True)
class _Source:
    name: str
    artifact: PatchArtifact
    weight: float
    hash: str

    @property
    def info(self) -> PatchInfo:
        return self.artifact.info


@dataclass(frozen=True)
class _Agreement:
    """A property that all sources must share."""

    what: str
    of: Callable[[PatchInfo], Any]
    error: type[SafepatchError]
    advice: str


AGREEMENTS = (
    _Agreement("kind", lambda info: info.kind, MergeError, "merge patches of one kind"),
    _Agreement("architecture", lambda info: info.fingerprint, BaseMismatch, "merge patches for one architecture"),
    _Agreement("base family", lambda info: info.base.get("family"), BaseMismatch, "merge patches of one family"),
    _Agreement("'sees'", lambda info: info.config.get("sees"), MergeError, "train them with the same config 'sees'"),
)


def merge(
    sources: Sequence[str | Path],
    out: str | Path | None = None,
    method: str = "task-arithmetic",
    weights: Sequence[float] | None = None,
) -> PatchArtifact:
    """Merge patch files into one patch of the sources' dtype, and save it when `out` is given.

    Args:
        sources: paths of the patches, in any order.
        out: path of the merged patch.
        method: a key of `METHODS`.
        weights: one per source; all 1 by default.

    Returns:
        The merged patch, whose recipe names the hashes of its sources.
    """
    given = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * len(sources)
    recipe = MergeRecipe(tuple(map(str, sources)), given, method)
    artifacts = [PatchArtifact.open(source) for source in sources]
    dtype = reduce(torch.promote_types, (artifact.dtype for artifact in artifacts))
    merged = combine(artifacts, replace(recipe, dtype=DTYPE_NAMES[dtype]))
    if out is not None:
        merged.save(out)
    return merged


def combine(artifacts: Sequence[PatchArtifact], recipe: MergeRecipe) -> PatchArtifact:
    """The patch that `recipe` makes of `artifacts`, given in the order of `recipe.sources`."""
    parts = zip(recipe.sources, artifacts, recipe.weights, strict=True)
    sources = [_Source(name, artifact, weight, artifact.content_hash) for name, artifact, weight in parts]
    sources.sort(key=lambda source: (source.hash, source.weight))  # float sums depend on their order
    _check_agreement(sources)
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name in sorted({name for source in sources for name in source.artifact.parameter_names()}):
        merged = _merge_parameter(name, sources, recipe)
        tensors |= {f"{name}.{form}": tensor for form, tensor in merged.items()}
        shapes |= {name: list(_shape(name, sources))} if "up" in merged else {}
    return PatchArtifact(tensors, _merged_info(sources, recipe, shapes))


def _merge_parameter(name: str, sources: list[_Source], recipe: MergeRecipe) -> dict[str, Tensor]:
    """Form -> tensor of parameter `name`; a source that lacks it counts as zero."""
    if recipe.is_identity:
        return sources[0].artifact.stored(name)
    weights = torch.tensor([source.weight for source in sources])
    low_rank = all("delta" not in source.artifact.stored(name) for source in sources)
    if low_rank and recipe.method in SUM_WEIGHTS:
        merged = _concatenate(name, sources, SUM_WEIGHTS[recipe.method](weights))
    else:
        merged = {"delta": METHODS[recipe.method](_stack(name, sources), weights)}
    return {form: cast(f"{name}.{form}", tensor, DTYPES[recipe.dtype]) for form, tensor in merged.items()}


def _concatenate(name: str, sources: list[_Source], weights: Tensor) -> dict[str, Tensor]:
    """Factors side by side: [w_1 up_1, w_2 up_2, ...] @ [down_1; down_2; ...] = Σ w_k up_k down_k, exactly."""
    _shape(name, sources)  # refuses unequal shapes
    pairs = zip(sources, weights, strict=True)
    factors = [(source.artifact.factors(name), weight) for source, weight in pairs if source.artifact.stored(name)]
    return {
        "down": torch.cat([factor.down.float() for factor, _ in factors]),
        "up": torch.cat([weight * factor.up.float() for factor, weight in factors], dim=1),
    }


def _stack(name: str, sources: list[_Source]) -> Tensor:
    """Dense float32 deltas of `name`, (K, *)."""
    zero = torch.zeros(_shape(name, sources))
    return torch.stack([source.artifact.delta(name) if source.artifact.stored(name) else zero for source in sources])


def _shape(name: str, sources: list[_Source]) -> tuple[int, ...]:
    shapes = {
        tuple(source.info.shapes.get(name) or source.artifact.tensors[f"{name}.delta"].shape): source.name
        for source in sources
        if source.artifact.stored(name)
    }
    if len(shapes) > 1:
        found = " and ".join(f"{list(shape)} in {source}" for shape, source in sorted(shapes.items()))
        raise MergeError(f"'{name}' is {found}; merge patches of one configuration")
    return next(iter(shapes))


def _check_agreement(sources: list[_Source]) -> None:
    first = sources[0]
    for agreement in AGREEMENTS:
        for other in sources[1:]:
            ours, theirs = agreement.of(first.info), agreement.of(other.info)
            if ours != theirs:
                ours, theirs = _difference(ours, theirs)
                raise agreement.error(
                    f"{first.name} and {other.name} differ in {agreement.what}: {ours} and {theirs}; {agreement.advice}"
                )


def _difference(ours: Any, theirs: Any) -> tuple[Any, Any]:
    """Of two tables, the entries that differ; of anything else, both."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return ours, theirs
    shared = _agreed([ours, theirs])
    first, second = ({key: side[key] for key in sorted(side.keys() - shared.keys())} for side in (ours, theirs))
    return first, second


def _agreed(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all tables hold with one value."""
    return {
        key: value for key, value in tables[0].items() if all(key in table and table[key] == value for table in tables)
    }


def _merged_info(sources: list[_Source], recipe: MergeRecipe, shapes: dict[str, list[int]]) -> PatchInfo:
    """Settings that the sources share are kept; training and evaluation belonged to the sources, so they are not."""
    return PatchInfo(
        kind=sources[0].info.kind,
        instructions=_united_instructions(sources),
        fingerprint=sources[0].info.fingerprint,
        base=_agreed([source.info.base for source in sources]),
        config=_agreed([source.info.config for source in sources]),
        recipe={"method": recipe.method, "dtype": recipe.dtype, "sources": [_record(source) for source in sources]},
        shapes=shapes,
        license=" AND ".join(sorted({source.info.license for source in sources} - {""})),
    )


def _record(source: _Source) -> dict[str, Any]:
    """What the merged file keeps of a source: no path, so that the bytes depend on content alone."""
    info = source.info
    return {
        "hash": source.hash,
        "weight": source.weight,
        "title": info.title,
        "categories": info.categories,
        "recipe": info.recipe,
    }


def _united_instructions(sources: list[_Source]) -> dict[str, str]:
    united: dict[str, tuple[str, str]] = {}
    for source in sources:
        for category, instruction in source.info.instructions.items():
            other, agreed = united.setdefault(category, (source.name, instruction))
            if agreed != instruction:
                raise MergeError(
                    f"{other} and {source.name} instruct '{category}' differently: '{agreed}' and '{instruction}'; "
                    "merge patches that share a category's instruction"
                )
    return {category: instruction for category, (_, instruction) in united.items()}
