"""Ed25519 keys (RFC 8032) in PEM files, with which receipts are signed; `cryptography` does the arithmetic."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safepatch.errors import ConfigError, ReceiptError
from safepatch.files import unwritable

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PUBLIC = ".pub"  # is put between a key file's name and its suffix


def keygen(path: Path) -> tuple[Path, Path]:
    """Write a new private key, which only its owner may read, and the public one beside it; returns both paths.

    Raises:
        ReceiptError: when one of the files is there already: nothing that was signed could be made again.
        ConfigError: without `cryptography`.
    """
    ed25519, serialization = _libraries()
    if not path.name:
        raise ReceiptError("no file to write the key to; name one: -o me.pem")
    public_path = path.with_name(f"{path.stem}{PUBLIC}{path.suffix}")
    for each in (path, public_path):
        if each.exists():
            raise ReceiptError(f"{each} is there already; choose another -o")
    key = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    for each, content, mode in ((path, private, 0o600), (public_path, public, 0o644)):
        try:
            each.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(each, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except OSError as error:
            raise unwritable(each, error, "choose another -o") from error
    return path, public_path


def private_key(path: Path) -> "Ed25519PrivateKey":
    """The key in a PEM file without a password; raises `ReceiptError` where there is none."""
    ed25519, serialization = _libraries()
    content = _content(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):  # the latter for one with a password
        raise ReceiptError(f"{path} holds no private key without a password; make one: safepatch keygen") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ReceiptError(f"{path} holds a key of another kind than Ed25519; make one: safepatch keygen")
    return key


def public_key(path: Path) -> "Ed25519PublicKey":
    """The public key in a PEM file; raises `ReceiptError` where there is none."""
    ed25519, serialization = _libraries()
    content = _content(path)
    try:
        key = serialization.load_pem_public_key(content)
    except ValueError:
        raise ReceiptError(f"{path} holds no public key; give the file with {PUBLIC} that keygen wrote") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ReceiptError(f"{path} holds a key of another kind than Ed25519; give the one that keygen wrote")
    return key


def raw(key: "Ed25519PublicKey") -> str:
    """A public key in 64 hex digits."""
    return key.public_bytes_raw().hex()


def sign(key: "Ed25519PrivateKey", message: bytes) -> str:
    """The signature of a message, in 128 hex digits."""
    return key.sign(message).hex()


def is_signed(key: str, signature: str, message: bytes) -> bool:
    """Whether the owner of a public key, in hex digits, has signed a message; whatever is malformed is no signature."""
    ed25519, _ = _libraries()
    from cryptography.exceptions import InvalidSignature

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), message)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReceiptError(f"no key at {path} ({error.strerror}); make one: safepatch keygen") from None


def _libraries() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError("keys need a package: pip install 'safepatch-diffusion[receipts]'") from None
    return ed25519, serialization
