"""Whose a patch is: signatures beside files, by OpenSSF's model-signing (the extra `signing`), with keys of one's own.

A content hash says that a file is whole; whoever alters the file writes a new one. A signature says that the holder of
a private key made it. `FILE.sig` is a Sigstore bundle over the file's SHA-256; `FILE.pub`, the public key, lies beside
it for whoever trusts on first use. Nothing here asks the network.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safepatch.errors import ConfigError, NotTrusted
from safepatch.files import write_text

FIRST_USE = "first-use"
FIRST_KEY = "the-first-key.pub"
CERTIFICATE = b"BEGIN CERTIFICATE"
ALTERED = "Signature mismatch"  # how the library begins when the signature is right, and for another content


def signature_of(path: Path) -> Path:
    """Where the signature of a file lies."""
    return path.with_name(f"{path.name}.sig")


def public_key_of(path: Path) -> Path:
    """Where the public key of whoever signed a file lies; of a certificate there is none."""
    return path.with_name(f"{path.name}.pub")


def signed_by(path: Path) -> list[Path]:
    """What lies beside a file of signature and public key."""
    return [beside for beside in (signature_of(path), public_key_of(path)) if beside.is_file()]


def sign(path: Path, key: Path, certificate: Path | None = None, chain: Iterable[Path] = ()) -> Path:
    """Sign a file; returns the path of the signature.

    Args:
        path: of the file.
        key: private key, PEM, of an elliptic curve (P-256, P-384, P-521), without a password.
        certificate: of that key, where it is to be told by a certificate.
        chain: certificates between that one and a root.

    Raises:
        ConfigError: when the extra is missing, or key or certificate cannot be used.
    """
    config, out = _library("signing").Config(), signature_of(path)
    try:
        if certificate:
            public_key_of(path).unlink(missing_ok=True)
            config.use_certificate_signer(
                private_key=key, signing_certificate=certificate, certificate_chain=list(chain) or [certificate]
            )
        else:
            config.use_elliptic_key_signer(private_key=key)
            write_text(public_key_of(path), _public_half(key))
        config.set_hashing_config(_hashing()).sign(path.resolve(), out)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot sign {path} with {key} ({_first(error)}); give a private EC key as PEM") from error
    return out


def require_signed(path: Path, keys: Iterable[str | Path], name: str = "") -> Path:
    """The one of `keys` that signed the file as it is now.

    Args:
        path: of the file; its signature lies beside it.
        keys: public keys, or certificates of roots, PEM.
        name: of the file, for messages.

    Raises:
        NotTrusted: when it is not signed, by none of them, or was altered since.
        ConfigError: when the extra or a key's file is missing.
    """
    name, keys, signature = name or str(path), [Path(key) for key in keys], signature_of(path)
    if not signature.is_file():
        raise NotTrusted(f"{name} is not signed, no {signature.name} lies beside it; have its maker sign it")
    for key in keys:
        config = _library("verifying").Config().set_hashing_config(_hashing())
        _use(config, key)
        try:
            config.verify(path.resolve(), signature)
        except Exception as error:  # a signature is anybody's text, and the library raises what its parsers raise
            if ALTERED in str(error):
                raise NotTrusted(f"{name} was altered after {key.name} signed it; fetch it again") from error
        else:
            return key
    named = ", ".join(key.name for key in keys)
    raise NotTrusted(f"{name} is signed by none of the trusted keys ({named}); do not use it, or trust its maker's")


@contextmanager
def held_copy(path: Path) -> Iterator[Path]:
    """A copy of a file, with its signature and key, that only this user can write to: what is checked there is used."""
    with tempfile.TemporaryDirectory(prefix="safepatch-") as folder:
        for each in (path, *signed_by(path)):
            shutil.copyfile(each, Path(folder) / each.name)
        yield Path(folder) / path.name


def require_trusted(path: Path, trusted: str | Path | Sequence[str | Path], source: str) -> None:
    """Raise unless a file is signed by who is trusted; see `require_signed` and, of `FIRST_USE`, `require_known`."""
    if trusted == FIRST_USE:
        require_known(path, source)
    else:
        require_signed(path, [trusted] if isinstance(trusted, str | Path) else trusted, source)


def require_known(path: Path, source: str) -> None:
    """Trust on first use: take the key that comes with `source` the first time, and no other one ever after.

    Args:
        path: of the file; signature and public key lie beside it.
        source: where it came from, `user/repo` or a path.

    Raises:
        NotTrusted: as `require_signed`, and when it is signed with another key than the first time.
    """
    known = _known()
    given = public_key_of(path)
    if source in known:
        with tempfile.TemporaryDirectory() as folder:
            held = Path(folder) / FIRST_KEY
            held.write_text(known[source])
            require_signed(path, [held], f"{source} (first keys: {trust_file()})")
        return
    if not given.is_file():
        raise NotTrusted(f"{source}: no public key {given.name} lies beside it, so there is none to begin with")
    require_signed(path, [given], source)
    write_text(trust_file(), json.dumps({**known, source: given.read_text()}, indent=1, sort_keys=True) + "\n")


def trust_file() -> Path:
    """Where first keys are kept, by source: a table that may be read and edited."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "safepatch" / "trusted.json"


def _known() -> dict[str, str]:
    if not trust_file().is_file():
        return {}
    try:
        return dict(json.loads(trust_file().read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{trust_file()} is damaged ({_first(error)}); mend it, or delete it to begin anew"
        ) from error


def _use(config: Any, key: Path) -> None:
    try:
        if CERTIFICATE in key.read_bytes():
            config.use_certificate_verifier(certificate_chain=[key])
        else:
            config.use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"cannot read the key {key} ({_first(error)}); give a public EC key or a root, PEM"
        ) from error


def _hashing() -> Any:
    """Of the file's bytes alone: neither its name nor what lies beside it counts."""
    return _library("hashing").Config().use_file_serialization(hashing_algorithm="sha256")


def _public_half(key: Path) -> str:
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(key.read_bytes(), None)
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return private.public_key().public_bytes(*form).decode()


def _library(name: str) -> Any:
    try:
        if name == "signing":
            from model_signing import signing as part
        elif name == "verifying":
            from model_signing import verifying as part
        else:
            from model_signing import hashing as part
    except ImportError as error:
        raise ConfigError("signatures need an extra: pip install 'safepatch-diffusion[signing]'") from error
    return part


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
