"""A patch in words and plain values, from its metadata alone."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safepatch.artifact.info import PatchInfo


def described(info: PatchInfo) -> dict[str, Any]:
    """What `inspect` says: a merge's sources and conflicts apart from its recipe, no lists of tensors."""
    apart = ("sources", "conflicts", "rank_errors")
    recipe = {key: value for key, value in (info.recipe or {}).items() if key not in apart}
    sources = [
        {key: value for key, value in source.items() if key not in ("metadata", "tensors")} for source in info.sources
    ]
    return {
        **{key: value for key, value in asdict(info).items() if key != "shapes"},
        "categories": list(info.categories),
        "components": list(info.components),
        "weights": weights(info),
        "recipe": recipe or None,
        "sources": sources,
        "source_hashes": [source["hash"] for source in sources],
        "conflicts": (info.recipe or {}).get("conflicts", []),
    }


def shortened(value: Any, longest: int = 8) -> Any:
    """The same for people: of lists longer than that their length, of texts longer than ten times that their begin."""
    if isinstance(value, dict):
        return {key: shortened(each, longest) for key, each in value.items()}
    if isinstance(value, list):
        return f"{len(value)} entries" if len(value) > longest else [shortened(each, longest) for each in value]
    if isinstance(value, str) and len(value) > 10 * longest:
        return f"{value[: 10 * longest]} ..."
    return value


def weights(info: PatchInfo) -> dict[str, float]:
    """Category -> its weight in the merge, of those merged with another weight than 1; see `weights_by_category`."""
    known = weights_by_category([(source["categories"], source["weight"]) for source in info.sources])
    return {name: weight for name, weight in known.items() if weight != 1}


def weights_by_category(parts: Sequence[tuple[Sequence[str], float]]) -> dict[str, float]:
    """Category -> its weight; of one that several parts are for, with weights that differ, each part's.

    Args:
        parts: of each in turn, what it is for, and its weight.
    """
    found: dict[str, set[float]] = {}
    for names, weight in parts:
        for name in names:
            found.setdefault(name, set()).add(weight)
    return {
        name if len(found[name]) == 1 else f"{name} (part {number})": weight
        for number, (names, weight) in enumerate(parts, start=1)
        for name in names
    }


def merge_lines(info: PatchInfo, path: Path) -> list[str]:
    """What to say of the merged patch that was just written to `path`."""
    recipe = info.recipe or {}
    size = path.stat().st_size / 1e6
    return [f"merged {', '.join(info.categories)} by {recipe['method']}: {path} ({size:.1f} MB)", *_measured(recipe)]


def _measured(recipe: dict[str, Any]) -> list[str]:
    """What the merge measured: a line per pair of sources, one for healing, one for the re-compression."""
    titles = [", ".join(source["categories"]) for source in recipe["sources"]]
    notes = []
    for pair in recipe.get("conflicts", ()):
        i, j = pair["sources"]
        figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in pair["overall"].items())
        notes.append(f"  {titles[i]} and {titles[j]}: {figures}")
    healed = recipe.get("heal")
    if healed:
        change = f"{healed['error_before']:.3f} -> {healed['error']:.3f}"
        notes.append(f"  healed in {healed['steps']} steps: error {change} (0 is the bundle, 1 is no patch)")
    errors = recipe.get("rank_errors")
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        notes.append(f"  rank {recipe['rank']}: relative error {mean:.4f} on average, {errors[worst]:.4f} in {worst}")
    return notes
