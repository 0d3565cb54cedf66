"""Whose a patch is: signed, altered, by another, by a certificate, and by the key that came first."""

import datetime
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from typer.testing import CliRunner

import safepatch
import safepatch.runtime.apply as apply_module
from safepatch.cli import app
from safepatch.errors import ConfigError, NotTrusted
from safepatch.hub import PATCH_FILE
from safepatch.signing import FIRST_USE, require_known, require_signed, sign, trust_file
from tests.fake_hub import FakeHub, serving
from tests.small import new_small_pipe, small_artifact

# huggingface_hub 2.4.0 hands httpx2 2.16.2 a large file by `data=`, which that asks to be called `content=`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and its public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def mine(tmp_path: Path) -> tuple[Path, Path]:
    return keys(tmp_path, "mine")


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, Path]:
    return keys(tmp_path, "theirs")


@pytest.fixture
def patch(tmp_path: Path) -> Path:
    return small_artifact("lora").save(tmp_path / "weapons.safetensors")


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with serving(monkeypatch, tmp_path / "cache") as fake:
        yield fake


def run(*words: object) -> str:
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False, standalone_mode=False).output


def alter(path: Path) -> None:
    """Other values and the content hash that goes with them: by itself the file is whole."""
    small_artifact("lora", seed=5).save(path)
    assert safepatch.verify(path)


def test_the_commands_sign_and_say_whose_it_is(patch: Path, mine: tuple[Path, Path]) -> None:
    assert f"signed: {patch}.sig" in run("sign", patch, "--key", mine[0])
    assert f"signed by: {mine[1]}" in run("verify", patch, "--key", mine[1])
    assert "signed by" not in run("verify", patch)  # control: without a key nothing is claimed


def test_apply_refuses_what_is_unsigned_altered_or_anothers(
    patch: Path, mine: tuple[Path, Path], theirs: tuple[Path, Path]
) -> None:
    pipe = new_small_pipe()
    with pytest.raises(NotTrusted, match="is not signed"):
        safepatch.apply(pipe, patch, trusted=[mine[1]])
    sign(patch, mine[0])
    safepatch.apply(pipe, patch, trusted=[theirs[1], mine[1]]).remove()  # control
    with pytest.raises(NotTrusted, match=r"none of the trusted keys \(theirs.pub\)"):
        safepatch.apply(pipe, patch, trusted=[theirs[1]])
    alter(patch)
    safepatch.apply(pipe, patch).remove()  # control: a content hash alone does not tell
    with pytest.raises(NotTrusted, match=r"was altered after mine.pub signed it"):
        safepatch.apply(pipe, patch, trusted=mine[1])
    assert safepatch.status(pipe) == ()


def test_what_was_checked_is_what_is_applied(
    patch: Path, mine: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody puts another patch in its place as soon as the signature was found good."""
    sign(patch, mine[0])
    signed, other = safepatch.PatchArtifact.open(patch), small_artifact("lora", seed=1)
    checked = apply_module.require_trusted

    def swapped(path: Path, *args: object) -> None:
        checked(path, *args)
        other.save(patch)

    monkeypatch.setattr(apply_module, "require_trusted", swapped)
    assert apply_module._opened(patch, [mine[1]]).content_hash == signed.content_hash
    assert safepatch.PatchArtifact.open(patch).content_hash == other.content_hash != signed.content_hash  # control


def test_a_signature_holds_whatever_the_file_is_called_and_for_no_other_file(
    patch: Path, mine: tuple[Path, Path], tmp_path: Path
) -> None:
    signature = sign(patch, mine[0])
    renamed = tmp_path / "other.safetensors"
    shutil.copy(patch, renamed)
    shutil.copy(signature, f"{renamed}.sig")
    assert require_signed(renamed, [mine[1]]) == mine[1]
    alter(renamed)
    with pytest.raises(NotTrusted):
        require_signed(renamed, [mine[1]])


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"dsseEnvelope": {"signatures": []}}', "\x00" * 50])
def test_a_damaged_signature_is_one_line(patch: Path, mine: tuple[Path, Path], text: str) -> None:
    sign(patch, mine[0]).write_text(text)
    with pytest.raises(NotTrusted, match="none of the trusted keys") as caught:
        require_signed(patch, [mine[1]])
    assert "\n" not in str(caught.value)


def test_no_trusted_key_trusts_nothing(patch: Path, mine: tuple[Path, Path]) -> None:
    sign(patch, mine[0])
    with pytest.raises(NotTrusted):
        safepatch.apply(new_small_pipe(), patch, trusted=[])


def test_an_opened_patch_has_no_signature(mine: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="give apply"):
        safepatch.apply(new_small_pipe(), small_artifact("lora"), trusted=[mine[1]])


def test_bad_keys_are_one_line(patch: Path, mine: tuple[Path, Path], tmp_path: Path) -> None:
    for key in (mine[1], tmp_path / "none.key", patch):
        with pytest.raises(ConfigError, match="cannot sign"):
            sign(patch, key)
    sign(patch, mine[0])
    for key in (tmp_path / "none.pub", patch):
        with pytest.raises(ConfigError, match="cannot read the key"):
            require_signed(patch, [key])


def test_a_missing_extra_is_named(patch: Path, mine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ConfigError, match=r"pip install 'safepatch-diffusion.signing.'"):
        sign(patch, mine[0])


def test_the_first_key_is_kept_and_no_other_one_taken(
    patch: Path, mine: tuple[Path, Path], theirs: tuple[Path, Path]
) -> None:
    with pytest.raises(NotTrusted, match="no public key"):
        require_known(patch, "me/weapons")
    sign(patch, mine[0])
    require_known(patch, "me/weapons")
    assert json.loads(trust_file().read_text()) == {"me/weapons": mine[1].read_text()}
    require_known(patch, "me/weapons")  # control
    sign(patch, theirs[0])
    with pytest.raises(NotTrusted, match=r"the-first-key\.pub"):
        require_known(patch, "me/weapons")
    require_known(patch, "them/weapons")  # control: of another source it is the first
    trust_file().write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        require_known(patch, "me/weapons")


def test_signatures_go_to_the_hub_and_come_back(
    hub: FakeHub, patch: Path, mine: tuple[Path, Path], theirs: tuple[Path, Path], tmp_path: Path
) -> None:
    pipe = new_small_pipe()
    sign(patch, mine[0])
    run("push", patch, "me/weapons")
    assert {f"{PATCH_FILE}.sig", f"{PATCH_FILE}.pub"} < {*hub.repos["me/weapons"][-1]}
    safepatch.apply(pipe, "me/weapons", trusted=[mine[1]]).remove()
    safepatch.apply(pipe, "me/weapons", trusted=FIRST_USE).remove()
    run("pull", "me/weapons", "-o", tmp_path / "pulled.safetensors")
    assert require_signed(tmp_path / "pulled.safetensors", [mine[1]]) == mine[1]
    sign(patch, theirs[0])
    run("push", patch, "me/weapons")
    for trusted in ([mine[1]], FIRST_USE):
        with pytest.raises(NotTrusted):
            safepatch.apply(pipe, "me/weapons", trusted=trusted)
    unsigned = small_artifact("lora", seed=5).save(tmp_path / "unsigned.safetensors")
    run("push", unsigned, "me/weapons")
    assert f"{PATCH_FILE}.sig" not in hub.repos["me/weapons"][-1]
    with pytest.raises(NotTrusted, match="me/weapons is not signed"):
        safepatch.apply(pipe, "me/weapons", trusted=[mine[1]])


def test_a_certificate_of_a_trusted_root_will_do(patch: Path, tmp_path: Path) -> None:
    root, other = ca(tmp_path, "root"), ca(tmp_path, "other")
    key, certificate = leaf(tmp_path, root)
    sign(patch, key, certificate)
    assert require_signed(patch, [root[1]]) == root[1]
    with pytest.raises(NotTrusted):
        require_signed(patch, [other[1]])


def ca(folder: Path, name: str) -> tuple[Path, Path]:
    private, _ = keys(folder, name)
    certificate = folder / f"{name}.crt"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate.write_bytes(issued(private, subject, private, subject, is_ca=True))
    return private, certificate


def leaf(folder: Path, root: tuple[Path, Path]) -> tuple[Path, Path]:
    private, _ = keys(folder, "leaf")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "maker")])
    issuer = x509.load_pem_x509_certificate(root[1].read_bytes()).subject
    certificate = folder / "leaf.crt"
    certificate.write_bytes(issued(private, subject, root[0], issuer, is_ca=False))
    return private, certificate


def issued(key: Path, subject: x509.Name, by: Path, issuer: x509.Name, is_ca: bool) -> bytes:
    def private(path: Path) -> ec.EllipticCurvePrivateKey:
        loaded = serialization.load_pem_private_key(path.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        return loaded

    now, usages = (
        datetime.datetime.now(datetime.UTC),
        dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
        ),
    )
    usage = x509.KeyUsage(
        digital_signature=not is_ca, key_cert_sign=is_ca, crl_sign=is_ca, decipher_only=False, **usages
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(private(key).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
    )
    if not is_ca:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
    return builder.sign(private(by), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
