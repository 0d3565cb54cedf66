"""A patch to the Hub: file, card and, where there is one, its LoRA, in one commit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from safepatch.artifact.container import read_header
from safepatch.errors import ConfigError, SafepatchError
from safepatch.hub.card import LORA_FILE
from safepatch.hub.failures import LOG_IN, told
from safepatch.hub.reference import PATCH_FILE, Reference
from safepatch.signing import public_key_of, signature_of

CARD_FILE = "README.md"
SIGNED = (signature_of(Path(PATCH_FILE)).name, public_key_of(Path(PATCH_FILE)).name)
BESIDE = (LORA_FILE, *SIGNED)  # what goes with one patch, and with no other


@dataclass(frozen=True)
class Pushed:
    """What was written: the page of the repository, and what names this very file from now on."""

    page: str
    pinned: Reference


def require_token() -> None:
    """Raise `SafepatchError` where there is no token, before there is any work."""
    if get_token() is None:
        raise SafepatchError(f"no token for the Hub; {LOG_IN} with one that may write")


def require_repo(repo: str) -> None:
    """Raise `ConfigError` unless `repo` is the name of a repository and nothing more."""
    if str(Reference(Reference.parse(repo).repo)) != repo:
        raise ConfigError(f"'{repo}' names a revision; what is pushed goes to the newest: give user/repo alone")


def push(files: Mapping[str, Path], repo: str, card: str, private: bool = False) -> Pushed:
    """Put a patch into a repository, which is made if need be, in place of the one that it holds, in one commit.

    Args:
        files: by their names there; `PATCH_FILE`, known to be intact, and what goes with it. What went with the one
            before, and is not among them, is removed.
        repo: `user/name`.
        card: text of its README.md.
        private: of a repository that is made now.

    Raises:
        ConfigError: when `repo` is no name of a repository.
        SafepatchError: when the Hub refuses or cannot be reached.
    """
    require_repo(repo)
    reference, api, stated = (
        Reference(repo),
        HfApi(library_name="safepatch"),
        read_header(files[PATCH_FILE]).stated_hash,
    )
    with told(reference):
        made = api.create_repo(repo, private=private, exist_ok=True)
        contents = {**files, CARD_FILE: card.encode()}
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        held = {file.rfilename for file in api.model_info(repo).siblings or []}
        stale = [CommitOperationDelete(name) for name in BESIDE if name in held - files.keys()]
        commit = api.create_commit(repo, [*operations, *stale], commit_message=f"Patch {stated[:14]}")
    return Pushed(str(made), Reference(repo, commit.oid, stated))


def license_of(model: str) -> str:
    """The licence that a model's card on the Hub states; empty where it states none."""
    with told(Reference.parse(model)):
        data = HfApi(library_name="safepatch").model_info(model).card_data
    stated = data.get("license") if data else None
    return stated if isinstance(stated, str) else ""
