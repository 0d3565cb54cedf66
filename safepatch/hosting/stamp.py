"""An image is drawn and written with its receipt."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safepatch.artifact.container import read_header
from safepatch.diffusion import as_picture, generate, save_image
from safepatch.hosting import keys
from safepatch.hosting.making import Asked, model_record, patch_record, receipt_of
from safepatch.hosting.receipt import KEYWORD, sealed, write_sidecar
from safepatch.hosting.recording import recording
from safepatch.runtime.handle import Handle

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True)
class Stamp:
    """How receipts are made.

    Attributes:
        key: they are signed with; None for none.
        with_prompt: whether prompts themselves stand in them, or only their hashes.
    """

    key: "Ed25519PrivateKey | None" = None
    with_prompt: bool = False

    @classmethod
    def of(cls, key: Path | None, with_prompt: bool = False) -> "Stamp":
        """With the key in a PEM file; raises `ReceiptError` where there is none in it."""
        return cls(None if key is None else keys.private_key(key), with_prompt)

    def draw(self, pipe: Any, handle: Handle | None, patch: Path | None, asked: Asked, out: Path) -> list[str]:
        """Draw one image and write it with its receipt; returns what was done, for people.

        Args:
            pipe: the pipeline.
            handle: of the patch that is on it; None without one.
            patch: its file.
            asked: what to draw.
            out: where to.
        """
        model = model_record(pipe)
        about = patch_record(handle, read_header(patch).stated_hash) if patch else None
        negatives = [asked.negative_prompt] if asked.negative_prompt else None
        with recording(handle) as drawn:
            image = generate(pipe, [asked.prompt], [asked.seed], asked.steps, asked.guidance_scale, negatives)[0]
        receipt = receipt_of(as_picture(image), asked, drawn[0], about, model, self.with_prompt)
        text = sealed(receipt, self.key)
        save_image(image, out, {KEYWORD: text})
        beside = write_sidecar(out, text)
        how = "signed" if self.key else "not signed: anybody could have written it; give --key to sign"
        return [f"image: {out}", f"receipt: {beside} ({how})"]
