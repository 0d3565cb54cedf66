"""A receipt in a C2PA manifest, which other programs show as content credentials; `c2pa-python` writes and reads it.

The manifest holds the sealed receipt as a text, in an assertion of our own label (C2PA 2.2, 6.2.1: names of entities),
beside the standard one that says the picture was made by a model. It is signed with the receipt's Ed25519 key and a
certificate for that key. Whether anybody should believe the certificate is not for us to say: no list is asked.
"""

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from safepatch.errors import ConfigError, ReceiptError
from safepatch.hosting import keys

LABEL = "org.safepatch.receipt"
FIELD = "sealed"  # of the assertion: a text, for what is a list of numbers in JSON comes back as bytes
CHUNK = b"caBX"  # PNG's, of a manifest
PNG = "image/png"
UNTRUSTED = "signingCredential.untrusted"  # on no list: so are all, for none is asked
GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# Nothing is fetched for a manifest, and no small picture stands in it.
SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}


@dataclass(frozen=True)
class Credential:
    """What a manifest is signed with.

    Attributes:
        key: Ed25519, PKCS 8, PEM.
        chain: its certificate, and those that vouch for it, PEM.
    """

    key: bytes
    chain: bytes

    @classmethod
    def of(cls, key: Path, chain: Path) -> "Credential":
        """From files.

        Raises:
            ConfigError: without `c2pa-python`.
            ReceiptError: for a file without a certificate, or one for another key.
        """
        _c2pa()
        owner = keys.raw(keys.private_key(key).public_key())
        try:
            content = chain.read_bytes()
            held = _owner(content)
        except (OSError, ValueError) as error:
            raise ReceiptError(
                f"{chain} holds no certificate ({error}); give a PEM file, the key's own first"
            ) from None
        if held != owner:
            raise ReceiptError(f"the first certificate in {chain} is for another key than {key}; give that key's own")
        return cls(key.read_bytes(), content)

    def sign(self, png: bytes, sealed: str) -> bytes:
        """A PNG file with a manifest that holds its sealed receipt.

        Raises:
            ReceiptError: for a certificate that C2PA does not allow.
        """
        c2pa, out = _c2pa(), BytesIO()
        made = {"actions": [{"action": "c2pa.created", "digitalSourceType": GENERATED}]}
        assertions = [{"label": "c2pa.actions", "data": made}, {"label": LABEL, "data": {FIELD: sealed}}]
        by = [{"name": "safepatch", "version": version("safepatch-diffusion")}]
        manifest = {"claim_generator_info": by, "format": PNG, "assertions": assertions}
        try:
            signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo("ed25519", self.chain, self.key, None))
            with c2pa.Context.from_dict(SETTINGS) as context, c2pa.Builder(manifest, context) as builder:
                builder.sign(signer, PNG, BytesIO(png), out)
        except c2pa.C2paError as error:
            raise ReceiptError(f"no C2PA manifest can be signed ({error}); see to --certificate") from None
        return out.getvalue()


@dataclass(frozen=True)
class Manifest:
    """What the manifest of an image says of it.

    Attributes:
        sealed: the receipt in it; None where there is none, or it was not read.
        told: whose it is, for people.
    """

    sealed: str | None
    told: str


def manifest_of(path: Path, picture: Image.Image) -> Manifest | None:
    """The manifest in a PNG; None where there is none.

    Args:
        path: of it.
        picture: opened from it.

    Raises:
        ReceiptError: for one that does not fit the file.
    """
    if not any(chunk[0] == CHUNK for chunk in getattr(picture, "private_chunks", ())):
        return None
    if find_spec("c2pa") is None:
        return Manifest(None, "there, and not read; pip install 'safepatch-diffusion[c2pa]'")
    c2pa = _c2pa()
    try:
        with (
            c2pa.Context.from_dict(SETTINGS) as context,
            path.open("rb") as file,
            c2pa.Reader(PNG, file, context=context) as reader,
        ):
            state, found = reader.get_validation_state(), reader.get_active_manifest()
            results = reader.get_validation_results()
    except c2pa.C2paError as error:
        raise ReceiptError(f"the C2PA manifest of {path} cannot be read ({error})") from None
    if state not in ("Valid", "Trusted") or not found:
        raise ReceiptError(f"the C2PA manifest of {path} does not fit it{_why(results)}: one of them was changed")
    signed = found.get("signature_info", {})
    by = f"'{signed.get('common_name') or 'nobody named'}' ({signed.get('issuer') or 'no issuer'})"
    return Manifest(_sealed(found), f"signed by {by}; whether to believe that certificate is yours to know")


def _sealed(manifest: dict[str, Any]) -> str | None:
    for assertion in manifest.get("assertions", ()):
        if assertion.get("label") == LABEL and isinstance(assertion.get("data"), dict):
            return str(assertion["data"].get(FIELD))
    return None


def _why(results: dict[str, Any] | None) -> str:
    failures = (results or {}).get("activeManifest", {}).get("failure", [])
    codes = ", ".join(sorted({str(failure.get("code")) for failure in failures} - {UNTRUSTED}))
    return f" ({codes})" if codes else ""


def _owner(chain: bytes) -> str:
    """The public key of the first certificate, in hex digits; raises `ValueError` where it is not Ed25519."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.x509 import load_pem_x509_certificates

    key = load_pem_x509_certificates(chain)[0].public_key()
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("it is for a key of another kind than Ed25519")
    return keys.raw(key)


def _c2pa() -> Any:
    try:
        import c2pa
    except ImportError:
        raise ConfigError("content credentials need a package: pip install 'safepatch-diffusion[c2pa]'") from None
    return c2pa
