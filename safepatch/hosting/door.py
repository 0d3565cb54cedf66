"""A guard at the door of a server: every prompt is judged before it may wait, with an encoder that nobody else uses."""

import logging
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from safepatch.errors import PromptBlocked, PromptError, SafepatchError, lookup
from safepatch.guard.decide import ACTIONS, BLOCK, Decision, decide, refusal
from safepatch.guard.file import Guard

LOG = logging.getLogger(__name__)


class Unjudged(SafepatchError):
    """A guard could not say what it thinks of a prompt, so nothing is drawn of it."""


class Door:
    """Judges prompts, one at a time.

    Args:
        guard: bound; nothing else may read with its encoder, see `opened`.
        action: `score`, `block` or `rewrite`.
        content_hash: of the guard's file.

    Raises:
        UnknownName: for another action.
    """

    def __init__(self, guard: Guard, action: str = BLOCK, content_hash: str = "") -> None:
        lookup(dict.fromkeys(ACTIONS), action, what="action of a guard")
        self.guard, self.action, self.content_hash = guard, action, content_hash
        self._lock = threading.Lock()

    @classmethod
    def opened(cls, path: Path, action: str, pipe: Any) -> "Door":
        """With a copy of the pipeline's text encoder, if that is what the guard reads; call it before `apply`.

        Raises:
            ArtifactError: when the file is missing, damaged, altered, or no guard.
            BaseMismatch: when the guard was trained on another text encoder.
        """
        guard = Guard.open(path).bind(pipe)
        return cls(deepcopy(guard), action, guard.content_hash)

    def describe(self) -> dict[str, Any]:
        """For receipts and `/status`."""
        return {"hash": self.content_hash, "action": self.action, "categories": list(self.guard.categories)}

    async def admit(self, prompt: str) -> Decision:
        """What is done with a prompt.

        Raises:
            PromptBlocked: for one that is refused.
            PromptError: for one that is too long.
            Unjudged: when the guard fails.
        """
        decision = await run_in_threadpool(self._decided, prompt)
        if decision.drawn is None:
            raise refusal(decision, self.action)
        return decision

    def _decided(self, prompt: str) -> Decision:
        try:
            with self._lock:
                return decide(self.guard, self.action, [prompt])[0]
        except PromptError:
            raise
        except PromptBlocked as error:
            raise Unjudged(str(error)) from None
        except Exception as error:  # whatever it was, what was not judged is not drawn
            LOG.exception("the guard failed")
            raise Unjudged(f"the guard could not judge the prompt ({type(error).__name__}); no image") from error
