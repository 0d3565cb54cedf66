"""A receipt says how an image was made and what the patch did to it; it travels in the PNG and beside it.

It is a JSON object `{"receipt": ..., "key": ..., "signature": ...}`. What is signed is the canonical JSON of
`receipt` behind a fixed prefix, so that the signature can stand for nothing else.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from safepatch.artifact.container import canonical_json
from safepatch.errors import ReceiptError
from safepatch.files import write_text
from safepatch.hosting import keys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEYWORD = "safepatch.receipt"  # of the PNG's text chunk
SIDECAR = ".receipt.json"  # behind the image's name
VERSION = 1
PREFIX = b"safepatch receipt 1\n"
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST = 1 << 22  # bytes of a sidecar

# What a receipt holds, by name the type or what is in it.
NUMBER = int | float
_PROMPT = {"sha256": str}
SCHEMA: dict[str, Any] = {
    "version": int,
    "pixels": str,
    "size": [int, int],
    "prompt": _PROMPT,
    "seed": int,
    "steps": int,
    "guidance_scale": NUMBER,
    "model": {"components": dict, "dtype": str, "device": str},
    "scheduler": {"class": str, "config": str},
    "software": dict,
    "denoising": {"timesteps": list, "gates": dict, "acted_on": list},
    "identical_to_base": bool,
}
_PATCH = {"hash": str, "scale": NUMBER | dict, "thresholds": dict, "window": [NUMBER, NUMBER]}
_PATCH |= dict.fromkeys(("gate", "reads", "speed"), str)
OPTIONAL: dict[str, Any] = {"negative_prompt": _PROMPT, "patch": _PATCH}  # None where there is none


@dataclass(frozen=True)
class Verified:
    """An image with its own receipt.

    Attributes:
        receipt: what it says.
        key: the public key it is signed with, in hex digits; None where it is not signed.
        is_vouched_for: whether that is the key that was asked for.
    """

    receipt: dict[str, Any]
    key: str | None
    is_vouched_for: bool

    def lines(self) -> list[str]:
        """For people."""
        told = {"patch": None, **self.receipt}
        acted, steps = told["denoising"]["acted_on"], told["denoising"]["timesteps"]
        did = f"the patch acted in {len(acted)} of {len(steps)} steps" if told["patch"] else "no patch was applied"
        same = "; identical to the base's image" if told["identical_to_base"] else ""
        patch = told["patch"]["hash"] if told["patch"] else "none"
        return [f"patch: {patch}", f"drawn with seed {told['seed']}: {did}{same}"]


def pixels_hash(picture: Image.Image) -> str:
    """SHA-256 of an image's size and pixels."""
    head = f"{picture.mode} {picture.width} {picture.height}\n"
    return sha256(head.encode() + picture.tobytes()).hexdigest()


def is_png(path: Path) -> bool:
    """Whether a file begins as a PNG does."""
    try:
        with path.open("rb") as file:
            return file.read(len(PNG)) == PNG
    except OSError:
        return False


def sealed(receipt: dict[str, Any], key: "Ed25519PrivateKey | None") -> str:
    """The receipt with its signature, or without one, as canonical JSON."""
    signed: dict[str, Any] = {"receipt": receipt, "key": None, "signature": None}
    if key is not None:
        signed |= {"key": keys.raw(key.public_key()), "signature": keys.sign(key, _message(receipt))}
    return canonical_json(signed)


def sidecar(path: Path) -> Path:
    """Where the receipt of an image lies beside it."""
    return path.with_name(path.name + SIDECAR)


def write_sidecar(path: Path, receipt: str) -> Path:
    """Write a sealed receipt beside its image."""
    write_text(sidecar(path), receipt + "\n")
    return sidecar(path)


def verify_image(path: Path, public_key: Path | None = None) -> Verified:
    """Check that an image carries a receipt, of these very pixels, that nobody altered.

    Args:
        path: a PNG; of one whose text was taken off, the sidecar counts.
        public_key: PEM file of the key it must be signed with; without it any key will do, and none.

    Raises:
        ReceiptError: when it has none, or one that is damaged, altered, of other pixels, or of another key.
    """
    expected = None if public_key is None else keys.raw(keys.public_key(public_key))
    pixels, text = _opened(path)
    signed = _parsed(path, text)
    receipt, key, signature = signed["receipt"], signed["key"], signed["signature"]
    if key is None and expected:
        raise ReceiptError(f"the receipt of {path} is not signed; leave out --public-key to check its pixels alone")
    if key is not None and not keys.is_signed(str(key), str(signature), _message(receipt)):
        raise ReceiptError(f"the receipt of {path} was altered after it was signed; ask for the image again")
    if expected and key != expected:
        raise ReceiptError(f"the receipt of {path} is signed with another key, {str(key)[:16]}...; check whose it is")
    if receipt.get("pixels") != pixels:
        raise ReceiptError(f"the receipt of {path} is of other pixels: one was changed, or it is another image's")
    return Verified(receipt, key, expected is not None)


def _message(receipt: dict[str, Any]) -> bytes:
    return PREFIX + canonical_json(receipt).encode()


def _opened(path: Path) -> tuple[str, str | None]:
    """The hash of its pixels, and the receipt in its text."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            return pixels_hash(picture), getattr(picture, "text", {}).get(KEYWORD)
    except FileNotFoundError:
        raise ReceiptError(f"no image at {path}; check the path") from None
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ReceiptError(f"{path} is no PNG that can be read ({error})") from None


def _parsed(path: Path, text: str | None) -> dict[str, Any]:
    """The sealed receipt in the image or beside it, of which all parts are there."""
    beside = sidecar(path)
    kept = _read(beside) if beside.is_file() else None
    if text is None and kept is None:
        raise ReceiptError(f"{path} has no receipt, and there is no {beside.name}; draw with --receipt")
    try:
        found = [json.loads(each) for each in (text, kept) if each is not None]
        canonical_json(found)
    except (ValueError, RecursionError):
        raise ReceiptError(f"the receipt of {path} is damaged: it is no JSON") from None
    if found[0] != found[-1]:
        raise ReceiptError(f"{path} and {beside.name} hold different receipts; delete the one that is not its own")
    if not _is_whole(found[0]):
        raise ReceiptError(f"the receipt of {path} is damaged, or of a newer safepatch; upgrade it")
    return found[0]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ReceiptError(f"{path} cannot be read ({error}); delete it") from None


def _is_whole(signed: Any) -> bool:
    """Whether all that a receipt must have is there, of the right kinds; who signed it answers for the rest."""
    if not isinstance(signed, dict) or signed.keys() != {"receipt", "key", "signature"}:
        return False
    receipt = signed["receipt"]
    if not _fits(receipt, SCHEMA) or receipt["version"] != VERSION:
        return False
    return all(receipt.get(name) is None or _fits(receipt[name], shape) for name, shape in OPTIONAL.items())


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(_fits(value.get(name), each) for name, each in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and len(value) == len(shape) and all(map(_fits, value, shape))
    return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
