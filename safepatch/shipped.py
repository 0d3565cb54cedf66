"""The patches that come with safepatch: all kinds in a checkout's `patches/`, the lora ones in an installed wheel."""

import json
from dataclasses import dataclass
from pathlib import Path

from safepatch.errors import ArtifactError, lookup

_INSTALLED = Path(__file__).parent / "assets" / "patches"  # setup.py puts it into wheels; a checkout has none
PATCHES = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "patches"


@dataclass(frozen=True)
class Shipped:
    """One entry of `patches/index.json`.

    Attributes:
        kind: of the patch: control, lite or lora.
        category: what it is for.
        file: its path in the folder of the index.
        sha256: of the file.
        train_minutes: what its recipe took to train.
        cores: how many CPU cores it took that on.
    """

    kind: str
    category: str
    file: str
    sha256: str
    train_minutes: float
    cores: int

    @property
    def path(self) -> Path:
        """Where the file is."""
        return PATCHES / self.file


def shipped_patches(kind: str) -> dict[str, Shipped]:
    """Category -> entry of every shipped patch of a kind, in the order of the index.

    Raises:
        UnknownName: for a kind of which none is shipped.
        ArtifactError: when there are no shipped patches at all.
    """
    lookup(dict.fromkeys(shipped_kinds()), kind, what="kind of shipped patches")
    return {entry.category: entry for entry in shipped() if entry.kind == kind}


def shipped_patch(category: str, kind: str) -> Path:
    """The file of the shipped patch of `category`.

    Raises:
        UnknownName: when none of that kind, or for that category, is shipped.
        ArtifactError: when the index names a file that is not there.
    """
    entry = lookup(shipped_patches(kind), category, what=f"shipped {kind} patch")
    if not entry.path.is_file():
        raise ArtifactError(f"no shipped patch at {entry.path}; train it: configs/patches/{kind}/{category}.yaml")
    return entry.path


def shipped_kinds() -> tuple[str, ...]:
    """The kinds of which a patch is shipped."""
    return tuple(dict.fromkeys(entry.kind for entry in shipped()))


def shipped() -> list[Shipped]:
    """Every entry of the index; raises `ArtifactError` when there is none."""
    index = PATCHES / "index.json"
    if not index.is_file():
        raise ArtifactError(f"no index of shipped patches at {index}; run from a checkout or install a wheel")
    return [Shipped(**entry) for entry in json.loads(index.read_text())]
