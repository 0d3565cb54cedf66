"""A patch from the Hub, by way of the client's cache: what is in there needs no network."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from safepatch.artifact.container import naming, read_header
from safepatch.errors import ArtifactError
from safepatch.hub.failures import told
from safepatch.hub.reference import PATCH_FILE, Reference, is_reference
from safepatch.signing import public_key_of, signature_of


@dataclass(frozen=True)
class Fetched:
    """A patch of the Hub that is on the disk.

    Attributes:
        path: of the file in the cache.
        pinned: what names this very file from now on: its commit and its content hash.
    """

    path: Path
    pinned: Reference


def fetch(reference: Reference, signed: bool = False) -> Fetched:
    """The file that `reference` names, from the cache or the network.

    Its header is read here; that its content has the hash that the header states is checked by whoever opens it.

    Args:
        reference: what to fetch.
        signed: fetch signature and public key too, where there are any; they lie beside the file.

    Raises:
        ModelNotFound: when it is in neither.
        ArtifactError: when it is no patch, or its content hash is not the one that `reference` pins.
        SafepatchError: when the Hub refuses or fails.
    """
    api = HfApi(library_name="safepatch")
    with told(reference):
        path = Path(api.hf_hub_download(reference.repo, PATCH_FILE, revision=reference.revision))
        for beside in (signature_of(path), public_key_of(path)) if signed else ():
            with suppress(EntryNotFoundError):  # whoever asks for a signature says that there is none
                api.hf_hub_download(reference.repo, beside.name, revision=path.parent.name)
    with naming(path):
        stated = read_header(path).stated_hash
    if reference.pin and stated != reference.pin:
        raise ArtifactError(
            f"{reference.repo}: its content hash at '{reference.revision or 'main'}' is {stated}, not the pinned "
            f"{reference.pin}; it is another patch now: look at it, then pin the new hash, or name the old commit"
        )
    return Fetched(path, Reference(reference.repo, path.parent.name, stated))


def located(patch: str | Path, signed: bool = False) -> Path:
    """Where the patch is that somebody named: a path as it stands, or a Hub id's file, see `fetch`."""
    return fetch(Reference.parse(Path(patch).as_posix()), signed).path if is_reference(patch) else Path(patch)


def source_of(patch: str | Path) -> str:
    """Where a patch comes from, whatever its revision: the repository, or its absolute path."""
    return Reference.parse(Path(patch).as_posix()).repo if is_reference(patch) else str(Path(patch).absolute())
