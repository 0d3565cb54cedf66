"""Images get their receipts: one that is drawn into a file, and those of a server."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from safepatch.diffusion import as_picture, generate
from safepatch.errors import ConfigError
from safepatch.files import replacing, unwritable
from safepatch.guard.decide import Decision
from safepatch.hosting import keys
from safepatch.hosting.credentials import Credential
from safepatch.hosting.making import Asked, guard_record, model_record, patch_record, receipt_of
from safepatch.hosting.receipt import KEYWORD, sealed, write_sidecar
from safepatch.hosting.recording import recording
from safepatch.hosting.worker import Answer, Job
from safepatch.runtime.handle import Handle

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True)
class Stamp:
    """How receipts are made.

    Attributes:
        key: they are signed with; None for none.
        with_prompt: whether prompts themselves stand in them, or only their hashes.
        credential: with which they stand in a C2PA manifest as well; None for none.
    """

    key: "Ed25519PrivateKey | None" = None
    with_prompt: bool = False
    credential: Credential | None = None

    @classmethod
    def of(cls, key: Path | None, with_prompt: bool = False, certificate: Path | None = None) -> "Stamp":
        """With the key in a PEM file, and a certificate for it.

        Raises:
            ReceiptError: where there is none in a file, or the certificate is for another key.
            ConfigError: for a certificate without a key, or without the package that writes manifests.
        """
        if certificate is not None and key is None:
            raise ConfigError("a certificate is for a key; give the key too")
        credential = Credential.of(key, certificate) if key and certificate else None
        return cls(None if key is None else keys.private_key(key), with_prompt, credential)

    def sealed(self, picture: Image.Image, receipt: dict[str, Any]) -> tuple[bytes, str]:
        """A PNG of a picture with its receipt, and the receipt as it stands in it."""
        text = sealed(receipt, self.key)
        data = png(picture, text)
        return (self.credential.sign(data, text) if self.credential else data), text

    def draw(
        self,
        pipe: Any,
        handle: Handle | None,
        asked: Asked,
        out: Path,
        guard: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Draw one image and write it with its receipt; returns what was done, for people.

        Args:
            pipe: the pipeline.
            handle: of the patch that is on it, from a file; None without one.
            asked: what to draw.
            out: where to.
            guard: of `guard_record`; None without one.
        """
        model = model_record(pipe)
        about = patch_record(handle)
        negatives = [asked.negative_prompt] if asked.negative_prompt else None
        with recording(handle) as drawn:
            image = generate(pipe, [asked.prompt], [asked.seed], asked.steps, asked.guidance_scale, negatives)[0]
        receipt = receipt_of(as_picture(image), asked, drawn[0], about, model, self.with_prompt, guard)
        data, text = self.sealed(as_picture(image), receipt)
        _write(out, data)
        beside = write_sidecar(out, text)
        how = "signed" if self.key else "not signed: anybody could have written it; give --key to sign"
        return [f"image: {out}", f"receipt: {beside} ({how})"]


class Receipts:
    """Those of a server's images.

    Args:
        stamp: how they are made.
        pipe: the pipeline, as it will draw.
        handle: of the patch that is on it.
        guard: of `Door.describe`; None without one.
    """

    def __init__(self, stamp: Stamp, pipe: Any, handle: Handle, guard: Mapping[str, Any] | None = None) -> None:
        self._stamp, self._handle, self._guard = stamp, handle, guard
        self._model = model_record(pipe)

    def put_into(self, picture: Image.Image, job: Job, answer: Answer, decision: Decision | None = None) -> bytes:
        """A PNG of an image with its receipt."""
        shape = job.shape
        asked = Asked(job.prompt, job.negative_prompt, job.seed, shape.steps, shape.guidance_scale)
        receipt = receipt_of(
            picture,
            asked,
            answer.drawn,
            patch_record(self._handle, answer.scale),
            self._model,
            self._stamp.with_prompt,
            self._judged(decision),
        )
        return self._stamp.sealed(picture, receipt)[0]

    def _judged(self, decision: Decision | None) -> dict[str, Any] | None:
        if self._guard is None or decision is None:
            return None
        return guard_record(self._guard["hash"], self._guard["action"], decision)


def png(picture: Image.Image, receipt: str | None = None) -> bytes:
    """A picture as a PNG file, with a sealed receipt in its text."""
    chunks = PngInfo()
    if receipt is not None:
        chunks.add_itxt(KEYWORD, receipt)
    with BytesIO() as buffer:
        picture.save(buffer, "PNG", pnginfo=chunks)
        return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise unwritable(path, error, "choose another -o") from error
