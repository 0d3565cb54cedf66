"""An image is drawn again as its receipt says, and its pixels are compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import as_picture, generate
from safepatch.errors import ReceiptError
from safepatch.hosting.hashes import text_hash
from safepatch.hosting.making import model_record
from safepatch.hosting.receipt import Verified
from safepatch.runtime.apply import apply

_OPTIONS = ("scale", "gate", "reads", "speed")  # of a patch, under these names in a receipt and in `apply`


def replay(
    path: Path,
    verified: Verified,
    pipe: Any,
    patch: Path | None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
) -> list[str]:
    """Draw an image again with the same model and patch; returns what is proven by that, for people.

    Args:
        path: the image.
        verified: its receipt.
        pipe: a pipeline of the model.
        patch: the patch; None where none was applied.
        prompt, negative_prompt: where the receipt holds only their hashes.

    Raises:
        ReceiptError: when model, patch or prompts are others than the receipt's, or the pixels differ.
    """
    told = verified.receipt
    artifact = None if patch is None else PatchArtifact.open(patch)
    _require_same_patch(told["patch"], artifact)
    here = model_record(pipe)
    _require_same_model(told, here)
    texts = [_text(told, "prompt", prompt), _text(told, "negative_prompt", negative_prompt)]
    if artifact is None:
        again = _drawn(pipe, told, texts)
    else:
        start, end = told["patch"]["window"]
        options: dict[str, Any] = {name: told["patch"][name] for name in _OPTIONS} | _threshold(told["patch"])
        with apply(pipe, artifact, start=start, end=end, **options):
            again = _drawn(pipe, told, texts)
    _require_same_pixels(path, again, told, here)
    if not (told["identical_to_base"] and artifact):
        return ["replayed: the same pixels"]
    _require_same_pixels(path, _drawn(pipe, told, texts), told, here, " without the patch")
    return ["replayed: the same pixels, with the patch and without it"]


def _threshold(patch: Mapping[str, Any]) -> dict[str, Any]:
    """One for all gates, if that was given: what stands in the file otherwise counts."""
    values = set(patch["thresholds"].values())
    return {"gate_threshold": values.pop()} if len(values) == 1 else {}


def _drawn(pipe: Any, told: Mapping[str, Any], texts: list[str]) -> Image.Image:
    width, height = told["size"]
    prompt, negative = texts
    images = generate(
        pipe,
        [prompt],
        [told["seed"]],
        told["steps"],
        told["guidance_scale"],
        [negative] if negative else None,
        height=height,
        width=width,
    )
    return as_picture(images[0])


def _text(told: Mapping[str, Any], name: str, given: str | None) -> str:
    kept = told.get(name)
    if kept is None:
        return ""
    text = kept.get("text") if given is None else given
    if text is None:
        raise ReceiptError(
            f"the receipt holds only the hash of its {name.replace('_', ' ')}; give --{name.replace('_', '-')}"
        )
    if text_hash(text) != kept["sha256"]:
        raise ReceiptError(f"the receipt is of another {name.replace('_', ' ')}; give the one the image was drawn of")
    return text


def _require_same_patch(told: Mapping[str, Any] | None, artifact: PatchArtifact | None) -> None:
    if told is None and artifact is not None:
        raise ReceiptError("the image was drawn without a patch; leave out --patch")
    if told is not None and artifact is None:
        raise ReceiptError(f"the image was drawn with the patch {told['hash'][:18]}...; give it with --patch")
    if told is not None and artifact is not None and artifact.content_hash != told["hash"]:
        raise ReceiptError(f"the image was drawn with another patch, {told['hash'][:18]}...; give that one")


def _require_same_model(told: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    theirs, ours = told["model"]["components"], here["model"]["components"]
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise ReceiptError(f"the image was drawn with another {name} than this model's; give its own --model")
    if told["scheduler"] != here["scheduler"]:
        raise ReceiptError(
            f"the image was drawn with another scheduler or settings of it, {told['scheduler']['class']}"
        )


def _require_same_pixels(
    path: Path, again: Image.Image, told: Mapping[str, Any], here: Mapping[str, Any], how: str = ""
) -> None:
    with Image.open(path) as opened:
        before = np.asarray(opened.convert("RGB"), dtype=int)
    apart = np.abs(before - np.asarray(again, dtype=int))
    if not apart.any():
        return
    then = told["software"]
    changed = [
        f"{name} {then.get(name)} then, {now} now" for name, now in here["software"].items() if then.get(name) != now
    ]
    count, most = int(apart.any(-1).sum()), apart.max()
    raise ReceiptError(
        f"drawn again{how}, {count} of {apart[..., 0].size} pixels of {path} differ, by at most {most} of 255"
        + "".join(f"; {each}" for each in changed)
    )
