"""The patches that are chosen: which there are, what they are for, whether they fit, and what they are together."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safepatch.artifact.info import BUNDLE, PatchInfo, read_info
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.errors import ArtifactError, ConfigError
from safepatch.hub import located
from safepatch.merging import merge
from safepatch.runtime.check import require_fit
from safepatch.runtime.parts import Scale
from safepatch.shipped import shipped
from safepatch.studio.settings import Settings

GROUPED = "lite"  # the kind whose categories stay apart when they are merged by cat


class Choice(NamedTuple):
    """A patch that the page offers.

    Attributes:
        value: what names it, a path or a reference.
        title: for people.
    """

    value: str
    title: str


class Slider(NamedTuple):
    """A strength that can be set.

    Attributes:
        categories: that have it in common.
        value: of it.
    """

    categories: tuple[str, ...]
    value: float


def offered(given: Sequence[str] = ()) -> list[Choice]:
    """Those that somebody named, then those that come with safepatch, as paths from here where they lie below."""
    try:
        ours = {_from_here(entry.path): f"{entry.category} · {entry.kind}" for entry in shipped()}
    except ArtifactError:  # neither a checkout nor a wheel with patches
        ours = {}
    named = {value: Path(value).name for value in given if value not in ours}
    return [Choice(*each) for each in (named | ours).items()]


def infos(settings: Settings) -> list[PatchInfo]:
    """What the chosen patches are, from their headers; raises `SafepatchError` for one that is none."""
    return [read_info(located(patch)) for patch in settings.patches]


def require_fits(settings: Settings, allow_pickle: bool = False) -> None:
    """Raise `BaseMismatch` for a patch that is not for the model, before any weight is read."""
    for patch in settings.patches:
        require_fit(settings.model, located(patch), allow_pickle)


def opened(settings: Settings) -> PatchArtifact:
    """The chosen patches as one, merged by the chosen method where they are several.

    Raises:
        ConfigError: when none is chosen.
        SafepatchError: as `merge`, and as `PatchArtifact.open`.
    """
    if not settings.patches:
        raise ConfigError("no patch is chosen; tick one under Patches")
    paths = [located(patch) for patch in settings.patches]
    return PatchArtifact.open(paths[0]) if len(paths) == 1 else merge(paths, method=settings.method)


def sliders(settings: Settings, known: Sequence[PatchInfo]) -> list[Slider]:
    """The strengths that can be set for these patches: of categories that were merged into one, one for all."""
    groups = dict.fromkeys(group for info in known for group in _groups(info))
    keeps_apart = settings.method == BUNDLE or (
        settings.method == "cat" and all(info.kind == GROUPED for info in known)
    )
    if len(known) > 1 and not keeps_apart:
        groups = {tuple(sorted({name for group in groups for name in group})): None}
    return [Slider(group, settings.scales.get(group[0], 1.0)) for group in groups]


def scale(sliders_: Sequence[Slider]) -> Scale:
    """What `apply` is told, by category; 1 where all are."""
    by_name: Mapping[str, float] = {name: each.value for each in sliders_ for name in each.categories}
    return by_name if any(value != 1 for value in by_name.values()) else 1.0


def _groups(info: PatchInfo) -> Iterator[tuple[str, ...]]:
    """The categories of a patch, those together that share a strength."""
    if info.is_bundle:
        for source in info.sources:
            yield from _groups(PatchInfo.from_metadata(source["metadata"]))
    elif info.recipe is None or info.kind == GROUPED:
        yield from ((name,) for name in info.categories)
    else:
        yield info.categories


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
