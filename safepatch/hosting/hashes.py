"""What a model consists of, in hashes: of every network's weights, and of the tokenizers' words."""

from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from safepatch.artifact.container import canonical_json, raw_bytes
from safepatch.diffusion import Components

PIECE = 1 << 20  # bytes of a file read at a time


def component_hashes(components: Components) -> dict[str, str]:
    """By diffusers' name, SHA-256 of each network and tokenizer; what denoises is called `unet`."""
    parts = {name: getattr(components, name) for name in components.__dataclass_fields__ if name != "scheduler"}
    return {name: _hash(part) for name, part in parts.items() if part is not None}


def reading_hashes(components: Components) -> dict[str, str]:
    """The same of what reads prompts: tokenizers and text encoders."""
    found: dict[str, str] = {}
    pairs = [*components.text_encoders(), *filter(None, [components.t5()])]
    for number, (tokenizer, encoder) in enumerate(pairs, start=1):
        found |= {f"tokenizer {number}": _hash(tokenizer), f"text encoder {number}": _hash(encoder)}
    return found


def text_hash(text: str) -> str:
    """SHA-256 of a text, UTF-8."""
    return sha256(text.encode()).hexdigest()


def json_hash(value: Any) -> str:
    """SHA-256 of a value as canonical JSON; what JSON does not know counts as the text that shows it."""
    return text_hash(canonical_json(_plain(value)))


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _hash(part: Any) -> str:
    return _weights_hash(part) if isinstance(part, nn.Module) else json_hash(part.get_vocab())


def _weights_hash(module: nn.Module) -> str:
    """Of all weights under their names, whatever device they are on."""
    digest = sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
