"""What the evaluation counts, checked against images whose content is known because the test says it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from safepatch.data.prompts import Prompt
from safepatch.detectors.base import Detector, shows_all, shows_any
from safepatch.errors import SafepatchError
from safepatch.evaluation import suite
from safepatch.evaluation.suite import Bench, Protocol
from safepatch.taxonomy import CATEGORIES
from safepatch.tiny.world import CONCEPTS

WEAPONS = CATEGORIES["weapons"]
NAMES = tuple(CONCEPTS)
SAFE = {concept.name: concept.replacement for category in CATEGORIES.values() for concept in category.concepts}


def draw_labels(shown: Sequence[Sequence[str]]) -> Tensor:
    """Images whose pixels spell out the concepts they show: (N, 3, 1, 76)."""
    images = torch.zeros(len(shown), 3, 1, len(NAMES))
    for image, names in zip(images, shown, strict=True):
        image[..., [NAMES.index(name) for name in names]] = 1
    return images


READER = Detector("reader", NAMES, lambda images: images[:, 0, 0])


class ObedientBench(Bench):
    """A base that shows what it is asked; patched, it replaces weapons only, and may drop their companions."""

    drops_companions = False

    def images(self, prompts: Sequence[Prompt], patch: object = None, label: str = "") -> Tensor:
        """Known images."""
        return draw_labels([self.content(prompt) if patch else prompt.concepts for prompt in prompts])

    def content(self, prompt: Prompt) -> list[str]:
        """What the patched model shows."""
        weapons = {concept.name for concept in WEAPONS.concepts}
        if self.drops_companions and weapons & set(prompt.concepts):
            return [SAFE[name] for name in prompt.concepts if name in weapons]
        return [SAFE[name] if name in weapons else name for name in prompt.concepts]


@pytest.fixture
def bench() -> ObedientBench:
    return ObedientBench("obedient", None, READER, Protocol(n=40))


def test_an_obedient_base_is_unsafe_and_a_perfect_patch_is_not(bench: ObedientBench) -> None:
    assert suite.unsafe_rate(bench, WEAPONS, None).value == 1  # control
    assert suite.unsafe_rate(bench, WEAPONS, "patch").value == 0
    assert suite.unsafe_rate(bench, WEAPONS, "patch", heldout=True).value == 0
    assert suite.prompt_accuracy(bench, "patch").value == 1
    assert suite.drift(bench, "patch").value == 0
    assert suite.safe_recognisable_rate(bench, WEAPONS, None).value == 0
    assert suite.safe_recognisable_rate(bench, WEAPONS, "patch").value == 1


def test_a_patch_is_measured_on_other_categories(bench: ObedientBench) -> None:
    assert suite.other_unsafe_rate(bench, WEAPONS, "patch").value == 1
    assert suite.other_unsafe_rate(bench, CATEGORIES["gore"], "patch").value == 0.75  # it removes weapons, one of four


def test_a_dropped_companion_is_noticed(bench: ObedientBench) -> None:
    assert suite.companion_kept(bench, WEAPONS, "patch").value == 1
    bench.drops_companions = True
    assert suite.companion_kept(bench, WEAPONS, "patch").value < 0.1


def test_a_smear_is_neither_unsafe_nor_recognisable(bench: ObedientBench) -> None:
    bench.content = lambda prompt: []
    assert suite.unsafe_rate(bench, WEAPONS, "patch").value == 0
    assert suite.safe_recognisable_rate(bench, WEAPONS, "patch").value == 0


def test_rows_name_base_and_patch_and_cover_every_metric(bench: ObedientBench) -> None:
    rows = suite.evaluate(bench, WEAPONS, "patch", "weapons")
    assert {row.patch for row in rows} == {"none", "weapons"}
    assert {row.metric for row in rows} >= {"unsafe_rate", "companion_kept", "prompt_accuracy", "benign_drift"}


def test_shows_any_and_all() -> None:
    found = [frozenset({"cat", "dog"}), frozenset({"cat"}), frozenset()]
    assert shows_any(found, ["dog", "owl"]).tolist() == [True, False, False]
    assert shows_all(found, [["cat"], ["cat", "dog"], []]).tolist() == [True, False, True]


def test_detector_is_invariant_to_batch_split_and_order() -> None:
    shown = [["cat"], ["dog", "knife"], [], ["owl"]] * 40  # more than one chunk
    images = draw_labels(shown)
    together = READER.find(images)
    assert together == [frozenset(names) for names in shown]
    assert [READER.find(image[None])[0] for image in images] == together
    assert READER.find(images.flip(0)) == together[::-1]


def test_too_few_prompts_for_a_companion_are_one_line() -> None:
    few, enough = (ObedientBench("obedient", None, READER, Protocol(n=n)) for n in (2, 10))
    with pytest.raises(SafepatchError, match="measure 10 or more") as caught:
        suite.companion_kept(few, WEAPONS, None)
    assert "\n" not in str(caught.value)
    suite.companion_kept(enough, WEAPONS, None)  # control
