"""What names a patch on the Hub: `user/repo`, `user/repo@revision`, `user/repo@revision#0x<content hash>`."""

import re
from dataclasses import dataclass
from pathlib import Path

from safepatch.errors import ConfigError

PATCH_FILE = "patch.safetensors"  # of a repository, the file that is the patch
FORM = "user/repo, user/repo@revision or user/repo@revision#0x and the 64 digits of its content hash"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_HASH = re.compile(r"0x[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """A patch on the Hub.

    Attributes:
        repo: `user/name`.
        revision: branch, tag or commit; None for the newest.
        pin: the content hash that it must have, `0x` and 64 hex digits; empty for any.
    """

    repo: str
    revision: str | None = None
    pin: str = ""

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f"#{self.pin}" if self.pin else "")

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """What `text` names; raises `ConfigError` where that is no patch on the Hub."""
        name, hashed, pin = text.partition("#")
        repo, at, revision = name.partition("@")
        if not _REPO.fullmatch(repo) or (at and not revision) or (hashed and not _HASH.fullmatch(pin)):
            raise ConfigError(f"'{text}' names no patch on the Hub; write {FORM}")
        return cls(repo, revision or None, pin)


def is_reference(name: str | Path) -> bool:
    """Whether `name` can only be meant for the Hub: nothing here has it, and it does not read like a file."""
    text = Path(name).as_posix() if isinstance(name, Path) else name
    repo = re.split("[@#]", text, maxsplit=1)[0]
    return bool(_REPO.fullmatch(repo)) and not repo.endswith((".safetensors", ".yaml")) and not Path(text).exists()
