# The library annotates its models too loosely to check against; to pyright everything in it is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
