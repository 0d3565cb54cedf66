"""Pictures for the report: the same prompts without and with each patch, and which of them are to be blurred."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import Round
from safepatch.data.corpus import Corpus
from safepatch.detectors.base import Detector, shows_any
from safepatch.diffusion import save_image
from safepatch.evaluation.bench import Bench
from safepatch.files import write_text
from safepatch.results import NONE

SETS: dict[str, str] = {
    "plain": "{definition}.",
    "lookalike": "Harmless things that resemble {name}; they should look the same.",
    "benign": "Harmless things; they must look the same.",
}
UNJUDGED = " No detector made for such pictures judged them, so all are blurred."


class Pictures(NamedTuple):
    """One kept picture's place: whose it is, of what, and a digest of how it is drawn.

    The digest is in the file's name, so that pictures drawn otherwise never take the place of those that a report has.
    """

    model: str
    patch: str
    category: str
    settings: str


def save_pictures(
    bench: Bench,
    corpus: Corpus,
    patch: PatchArtifact | None,
    of: Pictures,
    count: int,
    out: Path,
    judges: Sequence[Detector] = (),
) -> list[dict[str, Any]]:
    """Write up to `count` pictures of each set into `out/images` and say what they are.

    Args:
        bench: what draws them.
        corpus: the category's words.
        patch: what is measured, or None.
        of: what to call them.
        count: of each set.
        out: folder of the run.
        judges: detectors made for such pictures; without any, every picture of an unsafe prompt counts as unsafe.
    """
    if not count:
        return []
    kept, protocol = [], bench.protocol
    whole = -(-count // bench.batch_size) * bench.batch_size  # batches as they were drawn
    asked = {name: corpus.evaluation(name, protocol.n, protocol.seed)[:whole] for name in SETS}
    asked = {name: prompts for name, prompts in asked.items() if prompts}
    bench.share([Round(tuple(prompts)) for prompts in asked.values()], patch, "pictures")
    for name, prompts in asked.items():
        images = bench.images(prompts, patch, f"{name}, pictures")[:count]
        unsafe = flags(images, corpus, judges) if judges else [name == "plain"] * len(images)
        for i, image in enumerate(images):
            file = "-".join((slug(of.model), slug(of.patch), slug(of.category), name, of.settings, f"{i}.png"))
            save_image(image, out / "images" / file)
            kept.append({**of._asdict(), "set": name, "prompt": prompts[i].text, "file": file, "unsafe": unsafe[i]})
            kept[-1]["judged"] = bool(judges)
    return kept


def write_gallery(out: Path, corpora: dict[str, Corpus], kept: Sequence[dict[str, Any]]) -> None:
    """Write `out/images.json`, the report's sections: a row per prompt, a column per patch, the base first."""
    sections: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for picture in kept:
        sections.setdefault((picture["category"], picture["set"], picture["model"]), []).append(picture)
    many = len({picture["model"] for picture in kept}) > 1
    records = [_section(*key, pictures, corpora[key[0]], many) for key, pictures in sections.items()]
    write_text(out / "images.json", json.dumps(records, indent=1) + "\n")


def _section(
    category: str, name: str, model: str, pictures: Sequence[dict[str, Any]], corpus: Corpus, many: bool
) -> dict[str, Any]:
    by_patch: dict[str, list[dict[str, Any]]] = {}
    for picture in pictures:
        by_patch.setdefault(picture["patch"], []).append(picture)
    rows = [
        {"prompt": row[0]["prompt"], "images": [p["file"] for p in row], "unsafe": [p["unsafe"] for p in row]}
        for row in zip(*by_patch.values(), strict=True)
    ]
    unjudged = UNJUDGED if name == "plain" and not all(picture["judged"] for picture in pictures) else ""
    return {
        "title": ", ".join([category, *([] if name == "plain" else [name]), *([model] if many else [])]),
        "note": SETS[name].format(name=category, definition=corpus.category.definition.rstrip(".")) + unjudged,
        "unsafe": name == "plain",
        "category": category,
        "columns": ["base" if patch == NONE else patch for patch in by_patch],
        "rows": rows,
    }


def flags(images: Tensor, corpus: Corpus, judges: Sequence[Detector]) -> list[bool]:
    """Whether some judge sees the category, or one of its neighbours, in each image."""
    flags = torch.zeros(len(images), dtype=torch.bool)
    for judge in judges:
        labels = [label for each in (corpus, *corpus.neighbours) for label in judge.labels_of(each.category)]
        flags |= shows_any(judge.find(images), labels)
    return flags.tolist()


def slug(name: str) -> str:
    """A name that may be part of a file's."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)[-60:]
