"""What the Hub's client raises, as one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import huggingface_hub.constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from safepatch.errors import ModelNotFound, SafepatchError
from safepatch.files import is_full
from safepatch.hub.reference import PATCH_FILE, Reference

LOG_IN = "log in (hf auth login), or set HF_TOKEN"
NO_REPOSITORY = f"no repository of that name, or a private one; check the name, or {LOG_IN}"
# That of the HTTP library which the client is built on: no connection, a timeout.
HttpError = cast(type[Exception], HfHubHTTPError.__mro__[1])


@contextmanager
def told(reference: Reference) -> Iterator[None]:
    """Whatever the client raises within becomes one line that begins with the patch's name.

    Raises:
        ModelNotFound: when repository, revision or file do not exist, or cannot be had offline.
        SafepatchError: when the Hub refuses, cannot be reached, or what it sent cannot be written.
    """
    try:
        yield
    except (HttpError, EntryNotFoundError, OSError, HFValidationError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else None  # so it raises what failed in its threads
        met = cause if isinstance(cause, Exception) else error
        missing = isinstance(met, EntryNotFoundError | RepositoryNotFoundError | RevisionNotFoundError)
        kind = ModelNotFound if missing else SafepatchError
        raise kind(f"{reference}: {_reason(met, reference)}") from error


def _reason(error: Exception, reference: Reference) -> str:
    for kind, text in _reasons(reference):
        if isinstance(error, kind):
            return text
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the Hub does not let you ({error.response.status_code}); {LOG_IN} with a token that may write there"
    if is_full(error):
        return f"the disk is full: {huggingface_hub.constants.HF_HUB_CACHE} takes no more; make room and try again"
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return f"the Hub did not answer as it should ({first}); try again later"


def _reasons(reference: Reference) -> list[tuple[type[Exception], str]]:
    """What each error means; of kinds that include one another the narrower one stands first."""
    once = f"fetch it once where there is a connection: safepatch pull {reference} -o FILE"
    away = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
    site = f"{huggingface_hub.constants.ENDPOINT}/{reference.repo}"
    return [
        (GatedRepoError, f"its terms have to be accepted first: {site}; then {LOG_IN}"),
        (RepositoryNotFoundError, NO_REPOSITORY),
        (RevisionNotFoundError, f"it has no revision '{reference.revision}'; see {site}/commits/main"),
        (LocalEntryNotFoundError, f"{away}, and it is not in the cache; {once}"),
        (EntryNotFoundError, f"it holds no {PATCH_FILE}, so it is no patch that `safepatch push` wrote; see {site}"),
        (OfflineModeIsEnabled, f"{away}; unset it"),
    ]
