"""A patch from the Hub, by way of the client's cache: what is in there needs no network."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from safepatch.artifact.container import naming, read_header
from safepatch.errors import ArtifactError
from safepatch.hub.failures import told
from safepatch.hub.reference import PATCH_FILE, Reference, is_reference


@dataclass(frozen=True)
class Fetched:
    """A patch of the Hub that is on the disk.

    Attributes:
        path: of the file in the cache.
        pinned: what names this very file from now on: its commit and its content hash.
    """

    path: Path
    pinned: Reference


def fetch(reference: Reference) -> Fetched:
    """The file that `reference` names, from the cache or the network.

    Its header is read here; that its content has the hash that the header states is checked by whoever opens it.

    Raises:
        ModelNotFound: when it is in neither.
        ArtifactError: when it is no patch, or its content hash is not the one that `reference` pins.
        SafepatchError: when the Hub refuses or fails.
    """
    with told(reference):
        found = HfApi(library_name="safepatch").hf_hub_download(reference.repo, PATCH_FILE, revision=reference.revision)
    path = Path(found)
    with naming(path):
        stated = read_header(path).stated_hash
    if reference.pin and stated != reference.pin:
        raise ArtifactError(
            f"{reference.repo}: its content hash at '{reference.revision or 'main'}' is {stated}, not the pinned "
            f"{reference.pin}; it is another patch now: look at it, then pin the new hash, or name the old commit"
        )
    return Fetched(path, Reference(reference.repo, path.parent.name, stated))


def located(patch: str | Path) -> Path:
    """Where the patch is that somebody named: a path as it stands, or a Hub id's file, see `fetch`."""
    return fetch(Reference.parse(Path(patch).as_posix())).path if is_reference(patch) else Path(patch)
