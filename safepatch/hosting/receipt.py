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
from safepatch.hosting.credentials import Manifest, manifest_of
from safepatch.hosting.receipt_schema import is_whole

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEYWORD = "safepatch.receipt"  # of the PNG's text chunk
SIDECAR = ".receipt.json"  # behind the image's name
PREFIX = b"safepatch receipt 1\n"
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST = 1 << 22  # bytes of a sidecar


@dataclass(frozen=True)
class Verified:
    """An image with its own receipt.

    Attributes:
        receipt: what it says.
        key: the public key it is signed with, in hex digits; None where it is not signed.
        is_vouched_for: whether that is the key that was asked for.
        credentials: what its C2PA manifest says of whose it is; None where it has none.
    """

    receipt: dict[str, Any]
    key: str | None
    is_vouched_for: bool
    credentials: str | None = None

    def lines(self) -> list[str]:
        """For people."""
        told = {"patch": None, "guard": None, **self.receipt}
        acted, steps = told["denoising"]["acted_on"], told["denoising"]["timesteps"]
        did = f"the patch acted in {len(acted)} of {len(steps)} steps" if told["patch"] else "no patch was applied"
        same = "; identical to the base's image" if told["identical_to_base"] else ""
        patch = told["patch"]["hash"] if told["patch"] else "none"
        guard = [f"guard: {told['guard']['hash']}, action {told['guard']['action']}"] if told["guard"] else []
        turned = sorted((told["denoising"].get("opened_by") or {}).items())
        opened = [f"opened for {name} by: {', '.join(keys)}" for name, keys in turned]
        signed = [f"C2PA manifest: {self.credentials}"] if self.credentials else []
        return [f"patch: {patch}", *guard, f"drawn with seed {told['seed']}: {did}{same}", *opened, *signed]


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
        path: a PNG; of one whose text was taken off, the sidecar counts, or its C2PA manifest.
        public_key: PEM file of the key it must be signed with; without it any key will do, and none.

    Raises:
        ReceiptError: when it has none, or one that is damaged, altered, of other pixels, or of another key.
    """
    expected = None if public_key is None else keys.raw(keys.public_key(public_key))
    pixels, text, manifest = _opened(path)
    signed = _parsed(path, text, manifest.sealed if manifest else None)
    receipt, key, signature = signed["receipt"], signed["key"], signed["signature"]
    if key is None and expected:
        raise ReceiptError(f"the receipt of {path} is not signed; leave out --public-key to check its pixels alone")
    if key is not None and not keys.is_signed(str(key), str(signature), _message(receipt)):
        raise ReceiptError(f"the receipt of {path} was altered after it was signed; ask for the image again")
    if expected and key != expected:
        raise ReceiptError(f"the receipt of {path} is signed with another key, {str(key)[:16]}...; check whose it is")
    if receipt.get("pixels") != pixels:
        raise ReceiptError(f"the receipt of {path} is of other pixels: one was changed, or it is another image's")
    return Verified(receipt, key, expected is not None, manifest.told if manifest else None)


def _message(receipt: dict[str, Any]) -> bytes:
    return PREFIX + canonical_json(receipt).encode()


def _opened(path: Path) -> tuple[str, str | None, Manifest | None]:
    """The hash of its pixels, the receipt in its text, and its manifest."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            text = getattr(picture, "text", {}).get(KEYWORD)
            return pixels_hash(picture), text, manifest_of(path, picture)
    except FileNotFoundError:
        raise ReceiptError(f"no image at {path}; check the path") from None
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ReceiptError(f"{path} is no PNG that can be read ({error})") from None


def _parsed(path: Path, text: str | None, manifested: str | None) -> dict[str, Any]:
    """The sealed receipt in the image, beside it or in its manifest, of which all parts are there."""
    beside = sidecar(path)
    kept = _read(beside) if beside.is_file() else None
    held = {f"the text of {path}": text, beside.name: kept, f"the C2PA manifest of {path}": manifested}
    found = {place: each for place, each in held.items() if each is not None}
    if not found:
        raise ReceiptError(f"{path} has no receipt, and there is no {beside.name}; draw with --receipt")
    try:
        signed = {place: json.loads(each) for place, each in found.items()}
        canonical_json(signed)
    except (ValueError, RecursionError):
        raise ReceiptError(f"the receipt of {path} is damaged: it is no JSON") from None
    first, *others = signed
    for other in others:
        if signed[first] != signed[other]:
            raise ReceiptError(f"{first} and {other} hold different receipts; delete the one that is not its own")
    if not is_whole(signed[first]):
        raise ReceiptError(f"the receipt of {path} is damaged, or of a newer safepatch; upgrade it")
    return signed[first]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ReceiptError(f"{path} cannot be read ({error}); delete it") from None
