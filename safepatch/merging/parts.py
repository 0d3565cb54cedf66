"""Take a category's patch back out of a file whose merge was exact, bit for bit."""

from pathlib import Path
from typing import Any

from torch import Tensor

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.errors import ArtifactError, MergeError, SafepatchError, nearest
from safepatch.merging.groups import cut_out, is_grouped, places
from safepatch.merging.recipe import DTYPES


def split(
    merged: str | Path | PatchArtifact, category: str, out: str | Path | None = None, component: str = ""
) -> PatchArtifact:
    """The patch for `category` as it was before the merge, and written to `out` when that is given.

    Args:
        merged: a patch merged by `cat` or `bundle`, or its path.
        category: which part; parts inside merged parts are found too.
        out: path of the part.
        component: of a part, e.g. `text_encoder`, where two sides of a model have one each for the category.

    Raises:
        MergeError: when no part, or no single part, is for that category, or when it cannot be had back bit for bit.
    """
    artifact = merged if isinstance(merged, PatchArtifact) else PatchArtifact.open(merged)
    part = _find(artifact, category, component)
    if out is not None:
        part.save(out)
    return part


def _find(artifact: PatchArtifact, category: str, component: str) -> PatchArtifact:
    index = _index(artifact.info, category, component)
    part = _restored(artifact, index)
    is_one = part.info.categories == (category,) and (not component or part.info.components == (component,))
    return part if part.info.recipe is None or is_one else _find(part, category, component)


def _index(info: PatchInfo, category: str, component: str) -> int:
    """Which source of the merge is for `category`."""
    method, sources = (info.recipe or {}).get("method"), info.sources
    if not all("metadata" in source for source in sources) or not sources:
        how = f"merged by {method}, which mixes its parts" if method else "one patch"
        raise MergeError(f"'{info.title}' is {how}; only merges by cat or bundle can be split")
    sides = [PatchInfo.from_metadata(source["metadata"]).components for source in sources]
    found = [index for index, source in enumerate(sources) if category in source["categories"]]
    if component:
        found = [index for index in found if component in sides[index]]
    if not found:
        of = f" of a {component}" if component else ""
        raise MergeError(f"no part for '{category}'{of}{nearest(category, info.categories)}")
    if len(found) > 1:
        changed = sorted({name for index in found for name in sides[index]})
        advice = f"; name its component: {' or '.join(changed)}" if len(changed) > 1 and not component else ""
        raise MergeError(f"{len(found)} parts are for '{category}'; which one is meant cannot be told{advice}")
    return found[0]


def _restored(artifact: PatchArtifact, index: int) -> PatchArtifact:
    source = artifact.info.sources[index]
    try:
        part = artifact.part(index) if artifact.info.is_bundle else _cut_out(artifact, index)
    except SafepatchError:
        raise
    except (LookupError, RuntimeError, ValueError, ZeroDivisionError) as error:  # the recipe tells of other tensors
        raise ArtifactError("damaged: its recipe does not describe its tensors; merge it again") from error
    if part.content_hash != source["hash"]:
        raise MergeError(
            f"the part for {', '.join(source['categories'])} cannot be had back bit for bit: its weight "
            f"{source['weight']} was rounded into it; merge with bundle, or cat with weights 1 or dtype float32"
        )
    return part


def _cut_out(artifact: PatchArtifact, index: int) -> PatchArtifact:
    """The columns and rows that source `index` has in factors side by side."""
    rank, source = (artifact.info.recipe or {})["rank"], artifact.info.sources[index]
    if rank:
        raise MergeError(f"its sum was re-compressed to rank {rank}, which mixes the parts; use rank 0")
    if is_grouped(artifact.info):
        return _cut_out_groups(artifact, index)
    tensors = {}
    for name, (dtype, shape) in source["tensors"].items():
        parameter, _, form = name.rpartition(".")
        values = _values(artifact, parameter, form, index)
        if values is None:
            raise MergeError(f"'{parameter}' is dense in the sources, so its sum cannot be split; merge with bundle")
        tensors[name] = values.to(DTYPES[dtype]).reshape(shape)
    return PatchArtifact(tensors, PatchInfo.from_metadata(source["metadata"]))


def _cut_out_groups(artifact: PatchArtifact, index: int) -> PatchArtifact:
    """The groups of source `index` of lite patches side by side."""
    sources = artifact.info.sources
    infos = [PatchInfo.from_metadata(source["metadata"]) for source in sources]
    groups, weight = places(infos, index), sources[index]["weight"]
    tensors = {}
    for name, (dtype, shape) in sources[index]["tensors"].items():
        parameter = name.rpartition(".")[0]
        tensors[name] = cut_out(artifact.tensors[name], parameter, shape, groups, weight).to(DTYPES[dtype])
    return PatchArtifact(tensors, infos[index])


def _values(artifact: PatchArtifact, parameter: str, form: str, index: int) -> Tensor | None:
    """The tensor of source `index`, its weight taken out again; None when it was summed with another."""
    sources = artifact.info.sources
    weight = sources[index]["weight"]
    if parameter not in artifact.info.shapes:
        alone = sum(_rank(source["tensors"], parameter) > 0 for source in sources) == 1
        return artifact.tensors[f"{parameter}.{form}"].float() / weight if alone else None
    ranks = [_rank(source["tensors"], parameter) for source in sources]
    columns = slice(sum(ranks[:index]), sum(ranks[: index + 1]))
    factors = artifact.factors(parameter)
    return factors.down[columns].float() if form == "down" else factors.up[:, columns].float() / weight


def _rank(tensors: dict[str, Any], parameter: str) -> int:
    """How many columns a source has in a parameter's factors: a vector has one, a missing parameter none."""
    if f"{parameter}.down" in tensors:
        return tensors[f"{parameter}.down"][1][0]
    return int(f"{parameter}.delta" in tensors)
