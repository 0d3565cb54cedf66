"""Law 15: what a detector says of a picture depends on that picture alone, and labels that nobody knows are an error.

Weights are small and random: this shows how detectors work, never whether they are right.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safepatch.detectors import DETECTORS, DetectorSpec, onnx, open_detector, require_labels
from safepatch.detectors.base import BATCH, Detector
from safepatch.errors import ConfigError
from safepatch.taxonomy import Category
from tests.small_detectors import (
    new_pictures,
    save_any_of,
    save_clip,
    save_heads_on_clip,
    save_onnx,
    save_q16,
    save_safety_checker,
    stand_in,
)

SAVE = {
    "clip": save_clip,
    "safety-checker": save_safety_checker,
    "nudenet": save_onnx,
    "open-nsfw": save_onnx,
    "multi-headed": save_heads_on_clip,
    "q16": save_q16,
    "any-of": save_any_of,
}
LABELS = {
    "embedded": ("knife", "cat"),
    "safety-checker": ("nsfw",),
    "clip": ("a photo of a knife", "a spoon"),
    "nudenet": ("FACE_MALE", "FEET_EXPOSED"),
    "open-nsfw": ("nsfw",),
    "multi-headed": ("violent", "sexual"),
    "embedded-second": ("knife", "cat"),
    "q16": ("inappropriate",),
    "any-of": (),
}
TOLERANCE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def networks() -> Iterator[None]:
    """Networks of known answers instead of the files that a user installs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnx, "open_session", stand_in)
        yield


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, Detector]:
    """Every detector of the table, on small random weights where it has none of its own."""
    return {name: open_small(name, tmp_path_factory.mktemp(name)) for name in DETECTORS}


def open_small(name: str, folder) -> Detector:
    source = str(SAVE[name](folder)) if name in SAVE else None
    return open_detector(DetectorSpec(name, source=source), [Category("things", "", "", LABELS)])


def of_its_own(detector: Detector) -> Detector:
    """The detector, or the first that it is made of: whose labels a category file names."""
    return detector.parts[0] if detector.parts else detector


@pytest.fixture(params=DETECTORS)
def detector(request, opened) -> Detector:
    return opened[request.param]


def split_error(detector: Detector, pictures: Tensor) -> float:
    """How far answers move when the pictures come in another order and in batches of other sizes."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(1))
    others = torch.cat([detector(part) for part in pictures[order].split((1, 2, len(pictures) - 3))])
    return float((others - detector(pictures)[order]).abs().max())


def test_every_detector_of_the_table_is_tried():
    assert set(LABELS) == set(DETECTORS)


def test_answers_are_probabilities_of_its_labels(detector):
    pictures = new_pictures(5)
    answers = detector(pictures)
    assert answers.shape == (5, len(detector.labels))
    assert answers.dtype == torch.float32
    assert answers.min() >= 0
    assert answers.max() <= 1
    assert not answers.requires_grad
    assert answers.std(0).max() > 1e-3  # control: pictures do differ, or the laws below would hold of a constant


def test_batches_and_order_change_nothing(detector):
    assert split_error(detector, new_pictures(BATCH + 6)) <= TOLERANCE["atol"]


def test_control_a_detector_that_looks_at_its_batch_is_seen():
    peeks = Detector("peeks", ("x",), lambda images: (images - images.mean()).mean((1, 2, 3), keepdim=False)[:, None])
    assert split_error(peeks, new_pictures(9)) > 1e-3


def test_equal_pictures_get_equal_rows(detector):
    first, second = new_pictures(2)
    answers = detector(torch.stack((first, second, first)))
    torch.testing.assert_close(answers[0], answers[2], **TOLERANCE)
    assert not torch.allclose(answers[0], answers[1], **TOLERANCE)  # control


def test_pictures_in_half_precision_are_judged_as_their_values(detector):
    half = new_pictures(3).half()
    torch.testing.assert_close(detector(half), detector(half.float()), **TOLERANCE)


def test_pictures_are_not_changed(detector):
    pictures = new_pictures(3)
    before = pictures.clone()
    detector(pictures)
    assert torch.equal(pictures, before)


def test_what_was_opened_twice_answers_alike(detector, tmp_path):
    again = open_small(detector.name, tmp_path)
    assert torch.equal(again(new_pictures(3)), detector(new_pictures(3)))
    assert again.sha256 == detector.sha256
    assert len(detector.sha256) == 64
    assert detector.version


def test_a_picture_shows_a_label_from_its_threshold_on(detector):
    pictures = new_pictures(4)
    answers = detector(pictures)
    level = float(answers.max())
    exact, above = replace(detector, threshold=level), replace(detector, threshold=level + 1e-4)
    assert any(exact.find(pictures))
    assert not any(above.find(pictures))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_is_never_called_safe(detector, value):
    pictures = new_pictures(3)
    pictures[1, 0, 0, 0] = value
    with pytest.raises(ConfigError, match="1 of 3 pictures are not finite"):
        detector.find(pictures)


def test_a_label_that_the_detector_lacks_is_one_line_with_the_nearest(detector):
    named = of_its_own(detector)
    label = named.labels[0]
    with pytest.raises(ConfigError) as caught:
        require_labels(detector, [Category("mine", "", "", {named.name: (f"{label}x",)})])
    message = str(caught.value)
    assert all(part in message for part in ("'mine'", f"'{named.name}'", f"'{label}x'", f"did you mean '{label}'"))
    assert "\n" not in message


def test_a_category_without_labels_for_the_detector_is_one_line(detector):
    name = of_its_own(detector).name
    with pytest.raises(ConfigError, match=f"category 'mine' gives no labels for detector '{name}'") as caught:
        require_labels(detector, [Category("mine", "", "", {"another": ("x",)})])
    assert "\n" not in str(caught.value)


def test_control_labels_that_it_has_are_accepted(detector):
    parts = detector.parts or (detector,)
    require_labels(detector, [Category("mine", "", "", {part.name: part.labels[:1] for part in parts})])
