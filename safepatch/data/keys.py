"""What things are kept under."""

import hashlib
import json


def digest(value: object) -> str:
    """The SHA-256 of a plain value, as 64 hex digits; the same for equal ones."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
