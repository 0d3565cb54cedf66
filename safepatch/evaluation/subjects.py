"""The patches that a matrix names: which file a category is measured with, made where it is a merge."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from safepatch.artifact.container import HASH_KEY, read_header
from safepatch.artifact.info import read_info
from safepatch.errors import ConfigError, MergeError
from safepatch.evaluation.matrix import Matrix, MergeEntry, PatchEntry
from safepatch.merging import MergeRecipe, merge
from safepatch.results import NONE
from safepatch.shipped import shipped_patch, shipped_patches

Healer = Callable[[str, MergeRecipe, Path], object]  # model, recipe and file to write


@dataclass(frozen=True)
class Subject:
    """What is put on a model.

    Attributes:
        name: in rows and tables; `none` is the base.
        files: category -> the file it is measured with; a category that is not there is not measured.
        absolute: as in `PatchEntry`.
    """

    name: str
    files: Mapping[str, Path | None]
    absolute: str | None = None

    def identity(self, category: str) -> str:
        """What tells one patch from another of the same name: the hash that its file states."""
        path = self.files[category]
        if path is None:
            return ""
        stated = read_header(path).metadata.get(HASH_KEY, "")
        return f"{stated} as on {self.absolute}" if self.absolute else stated


def subjects(matrix: Matrix, categories: Sequence[str], heal: Healer | None = None) -> list[Subject]:
    """The base and the matrix's patches; merges are written into the matrix's folder.

    Args:
        matrix: what to measure.
        categories: names of what is measured.
        heal: makes a healed merge; needed where the matrix has one.
    """
    made = [Subject(NONE, dict.fromkeys(categories))]
    for entry in matrix.patches:
        make = partial(_merged, entry.name, matrix=matrix, heal=heal)
        made.append(Subject(entry.name, _files(entry, categories, make), entry.absolute))
    return made


def _files(
    entry: PatchEntry, categories: Sequence[str], make: Callable[[MergeEntry, Sequence[str]], Path]
) -> dict[str, Path | None]:
    if entry.shipped:
        known = shipped_patches(entry.shipped)
        files = {name: shipped_patch(name, entry.shipped) for name in categories if name in known}
    elif entry.paths:
        files = _own_files(entry.paths, categories)
    else:
        path = make(entry.merge, categories) if entry.merge else Path(str(entry.path))
        read_info(path)  # a file that is no patch is told at once
        files = dict.fromkeys(categories, path)
    if not files:
        raise ConfigError(f"patch '{entry.name}' is for none of {', '.join(categories)}; name its categories")
    return dict(files)


def _own_files(paths: Sequence[str], categories: Sequence[str]) -> dict[str, Path]:
    """Category -> the first of `paths` that is for it."""
    files: dict[str, Path] = {}
    for path in map(Path, paths):
        for name in read_info(path).categories:
            if name in categories:
                files.setdefault(name, path)
    return files


def _merged(name: str, entry: MergeEntry, categories: Sequence[str], matrix: Matrix, heal: Healer | None) -> Path:
    """The merge's file, written unless an equal recipe of equal sources was."""
    sources = entry.sources or _shipped_sources(entry, categories)
    recipe = entry.recipe(sources)
    hashes = [read_header(Path(source)).metadata.get(HASH_KEY) for source in sources]
    digest = hashlib.sha256(json.dumps([asdict(entry), hashes], sort_keys=True).encode()).hexdigest()[:8]
    path = Path(matrix.out) / "patches" / f"{name.replace('/', '-')}-{digest}.safetensors"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    if not recipe.heal:
        merge(recipe, path)
    elif heal is None:
        raise MergeError(f"'{name}' is a healed merge, and nothing here can heal; use `safepatch evaluate`")
    else:
        heal(matrix.models[0], recipe, path)
    return path


def _shipped_sources(entry: MergeEntry, categories: Sequence[str]) -> list[str]:
    if not entry.shipped:
        raise ConfigError("a merge needs sources, or shipped: KIND")
    known = shipped_patches(entry.shipped)
    return [str(shipped_patch(name, entry.shipped)) for name in categories if name in known]
