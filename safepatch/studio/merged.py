"""The chosen patches merged, and where they conflict."""

from pathlib import Path
from typing import Any, NamedTuple

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.errors import MergeError
from safepatch.files import require_writable
from safepatch.hub import located
from safepatch.merging import merge
from safepatch.studio.settings import Settings


class Conflict(NamedTuple):
    """How two sources differ; None where one of them is zero, or nothing was compared.

    Attributes:
        first, second: their categories.
        cosine: of their corrections, -1 to 1; 0 is none in common.
        sign_conflict: share of the values that both change, with opposite signs.
        norm_ratio: size of the first over that of the second.
    """

    first: str
    second: str
    cosine: float | None
    sign_conflict: float | None
    norm_ratio: float | None


class Merged(NamedTuple):
    """What a merge came to.

    Attributes:
        method: by which.
        categories: of the merged patch.
        conflicts: of each pair of sources; none where parts that stand side by side cannot be compared.
        path: of the file that was written; None for a trial.
    """

    method: str
    categories: tuple[str, ...]
    conflicts: list[Conflict]
    path: Path | None


def merged(settings: Settings, is_kept: bool) -> Merged:
    """Merge the chosen patches, and write them where the settings say if they are to be kept.

    Raises:
        MergeError: for fewer than two patches, and where a file is there already, which the page does not replace.
        SafepatchError: as `merge`.
    """
    if len(settings.patches) < 2:
        raise MergeError("one patch has nothing to be merged with; tick two or more under Patches")
    path = _target(settings.out) if is_kept else None
    artifact = merge([located(patch) for patch in settings.patches], path, settings.method)
    return Merged(settings.method, artifact.info.categories, _conflicts(artifact), path)


def _target(text: str) -> Path:
    path = Path(text or "merged.safetensors").expanduser()
    if path.suffix != ".safetensors":
        raise MergeError(f"'{path}' is no name of a patch; end it in .safetensors")
    if path.exists():
        raise MergeError(f"{path} is there already; choose another name")
    require_writable(path)
    return path


def _conflicts(artifact: PatchArtifact) -> list[Conflict]:
    recipe: dict[str, Any] = artifact.info.recipe or {}
    titles = [", ".join(source["categories"]) for source in artifact.info.sources]
    figures = ("cosine", "sign_conflict", "norm_ratio")
    return [
        Conflict(*(titles[i] for i in pair["sources"]), *(pair["overall"].get(name) for name in figures))
        for pair in recipe.get("conflicts", ())
    ]
