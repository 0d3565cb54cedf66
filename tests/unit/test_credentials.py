"""A receipt in a C2PA manifest: others can read it, a changed file breaks it, and a certificate is its key's own."""

import json
import sys
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from safepatch.errors import ConfigError, ReceiptError
from safepatch.hosting import credentials, keys
from safepatch.hosting.credentials import FIELD, LABEL, Credential
from safepatch.hosting.making import Asked
from safepatch.hosting.receipt import KEYWORD, sidecar, verify_image
from safepatch.hosting.stamp import Stamp
from tests.small import new_small_pipe
from tests.unit.test_receipts import altered

pytestmark = [
    pytest.mark.skipif(find_spec("c2pa") is None, reason="needs the extra c2pa: pip install c2pa-python"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


def certificate(subject: str, key: Ed25519PrivateKey, by: Ed25519PrivateKey, issuer: str = "a root") -> bytes:
    """PEM of one for a key, as C2PA asks for it; of a root, if it is by itself."""
    is_root, now = key is by, datetime.now(UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    usage |= {"decipher_only": False, "digital_signature": not is_root, "key_cert_sign": is_root, "crl_sign": is_root}
    made = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
    )
    if not is_root:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return made.sign(by, None).public_bytes(Encoding.PEM)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "a studio"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


@pytest.fixture(scope="module")
def signed(tmp_path_factory) -> Path:
    """A folder with a key, its certificates, and an image with a receipt in a manifest, and one without a manifest."""
    folder = tmp_path_factory.mktemp("signed")
    keys.keygen(folder / "key.pem")
    root = Ed25519PrivateKey.generate()
    own = keys.private_key(folder / "key.pem")
    (folder / "root.pem").write_bytes(certificate("a root", root, root))
    (folder / "chain.pem").write_bytes(certificate("a host", own, root) + (folder / "root.pem").read_bytes())
    pipe = new_small_pipe()
    for name, chain in (("image", folder / "chain.pem"), ("plain", None)):
        stamp = Stamp.of(folder / "key.pem", certificate=chain)
        stamp.draw(pipe, None, Asked.of(pipe, "a dog", 7, 1, 4.0, None), folder / f"{name}.png")
    return folder


def test_the_receipt_stands_in_the_manifest_as_in_the_text_and_beside(signed):
    import c2pa

    with (signed / "image.png").open("rb") as file, c2pa.Reader("image/png", file) as reader:
        manifest = reader.get_active_manifest()
    assert manifest is not None
    (ours,) = [each for each in manifest["assertions"] if each["label"] == LABEL]
    with Image.open(signed / "image.png") as picture:
        text = picture.text[KEYWORD]  # type: ignore[attr-defined]
    assert ours["data"][FIELD] == text == sidecar(signed / "image.png").read_text().strip()
    created = json.dumps(manifest["assertions"])
    assert "c2pa.created" in created
    assert "trainedAlgorithmicMedia" in created


def test_verifying_reads_the_manifest_too(signed, tmp_path):
    verified = verify_image(signed / "image.png", signed / "key.pub.pem")
    assert verified.is_vouched_for
    assert "C2PA manifest: signed by 'a host' (a studio)" in verified.lines()[-1]
    plain = verify_image(signed / "plain.png", signed / "key.pub.pem")
    assert (plain.receipt, plain.credentials) == (verified.receipt, None)  # control: what it says is the same


def test_where_text_and_sidecar_are_gone_the_manifest_serves(signed, tmp_path, monkeypatch):
    alone = tmp_path / "alone.png"
    alone.write_bytes((signed / "image.png").read_bytes())
    monkeypatch.setattr("safepatch.hosting.receipt.KEYWORD", "another keyword")
    assert verify_image(alone, signed / "key.pub.pem").is_vouched_for
    (tmp_path / "plain.png").write_bytes((signed / "plain.png").read_bytes())
    with pytest.raises(ReceiptError, match="has no receipt"):  # control: nothing else was read
        verify_image(tmp_path / "plain.png")


def test_a_file_that_was_changed_does_not_fit_its_manifest(signed, tmp_path):
    data = bytearray((signed / "image.png").read_bytes())
    start = data.index(b"iTXt" + KEYWORD.encode()) - 4
    data[start + 48] ^= 1  # within the text
    data[start:] = _recounted(bytes(data[start:]))
    (tmp_path / "changed.png").write_bytes(data)
    with pytest.raises(ReceiptError, match=r"does not fit it \(assertion\.dataHash\.mismatch\)"):
        verify_image(tmp_path / "changed.png")


def _recounted(chunks: bytes) -> bytes:
    """With the right check sum of the first chunk, so that only its hash tells."""
    end = 8 + int.from_bytes(chunks[:4])
    return chunks[:end] + crc32(chunks[4:end]).to_bytes(4) + chunks[end + 4 :]


def test_anothers_receipt_beside_a_manifest_is_noticed(signed, tmp_path):
    other = tmp_path / "image.png"
    other.write_bytes((signed / "image.png").read_bytes())
    sealed = json.loads(sidecar(signed / "image.png").read_text())
    sealed["receipt"]["seed"] = 8
    sidecar(other).write_text(json.dumps(sealed))
    with pytest.raises(ReceiptError, match="hold different receipts"):
        verify_image(other)
    bare = altered(signed / "image.png", tmp_path / "bare.png")  # saved anew: the manifest is gone, the text is not
    assert verify_image(bare, signed / "key.pub.pem").credentials is None


def test_a_certificate_is_of_its_key_and_of_a_kind_that_is_allowed(signed, tmp_path):
    keys.keygen(tmp_path / "other.pem")
    with pytest.raises(ReceiptError, match="is for another key than"):
        Credential.of(tmp_path / "other.pem", signed / "chain.pem")
    for wrong in (signed / "key.pem", signed / "image.png", tmp_path / "nowhere.pem"):
        with pytest.raises(ReceiptError, match="holds no certificate"):
            Credential.of(signed / "key.pem", wrong)
    with pytest.raises(ConfigError, match="give the key too"):
        Stamp.of(None, certificate=signed / "chain.pem")
    own = keys.private_key(signed / "key.pem")
    (tmp_path / "self.pem").write_bytes(certificate("a root", own, own))
    with pytest.raises(ReceiptError, match=r"no C2PA manifest can be signed .*self-signed"):
        Credential.of(signed / "key.pem", tmp_path / "self.pem").sign((signed / "plain.png").read_bytes(), "{}")


def test_without_the_package_a_manifest_is_named_and_the_text_serves(signed, monkeypatch):
    monkeypatch.setattr(credentials, "find_spec", lambda _: None)
    verified = verify_image(signed / "image.png", signed / "key.pub.pem")
    assert verified.is_vouched_for
    assert "pip install 'safepatch-diffusion[c2pa]'" in verified.lines()[-1]
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(ConfigError, match=r"pip install 'safepatch-diffusion\[c2pa\]'"):
        Stamp.of(signed / "key.pem", certificate=signed / "chain.pem")
