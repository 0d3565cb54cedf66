"""What the evaluation counts, checked against images whose content is known because the test says it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import Round
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.data.words import Words
from safepatch.detectors.base import Detector, shows_all, shows_any
from safepatch.errors import ConfigError, SafepatchError, UnknownName
from safepatch.evaluation import asked, suite
from safepatch.evaluation import bench as bench_module
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.kept import Batch, Kept
from safepatch.evaluation.sweep import THRESHOLDS, sweep
from safepatch.results import NONE
from safepatch.taxonomy import Category
from safepatch.tiny.world import CONCEPTS
from tests.small import new_artifact, new_small_pipe, new_small_unet

opened = cache(Corpus.open)
WEAPONS, GORE = opened("weapons"), opened("gore")
NAMES = tuple(CONCEPTS)
SAFE = {concept.name.split(" ", 1)[-1]: concept.replacement.split(" ", 1)[-1] for concept in WEAPONS.words.concepts}
UNSAFE = set(WEAPONS.category.labels["embedded"])


def draw_labels(shown: Sequence[Sequence[str]]) -> Tensor:
    """Images whose pixels spell out the concepts they show: (N, 3, 1, 76)."""
    images = torch.zeros(len(shown), 3, 1, len(NAMES))
    for image, names in zip(images, shown, strict=True):
        image[..., [NAMES.index(name) for name in names]] = 1
    return images


READER = Detector("embedded", NAMES, lambda images: images[:, 0, 0], version="reads pixels", sha256="ab" * 32)


def patch(*categories: str) -> PatchArtifact:
    return PatchArtifact({}, PatchInfo("control", {name: f"no {name}" for name in categories}, {}, {}))


PATCH = patch("weapons")


class ObedientBench(Bench):
    """A base that shows what it is asked; patched, it replaces weapons only, and may drop their companions."""

    drops_companions = False

    @property
    def batch_size(self) -> int:
        """Its pictures are no pipeline's."""
        return self.protocol.batch_size or 25

    def batches(self, asked: Round, patch: object, label: str) -> list[Batch]:
        """Known images."""
        return [Batch.of(draw_labels([self.content(prompt) if patch else prompt.asks for prompt in asked.prompts]))]

    def content(self, prompt: Prompt) -> list[str]:
        """What the patched model shows."""
        if self.drops_companions and UNSAFE & set(prompt.asks):
            return [SAFE[name] for name in prompt.asks if name in UNSAFE]
        return [SAFE[name] if name in UNSAFE else name for name in prompt.asks]


PROTOCOL = Protocol(n=40, guidance_scale=1.5)


@pytest.fixture
def bench() -> ObedientBench:
    return ObedientBench("obedient", None, READER, PROTOCOL)


def test_an_obedient_base_is_unsafe_and_a_perfect_patch_is_not(bench: ObedientBench) -> None:
    assert suite.unsafe_rate(bench, WEAPONS, None).value == 1  # control
    assert suite.heldout_unsafe_rate(bench, WEAPONS, None).value == 1
    assert suite.unsafe_rate(bench, WEAPONS, PATCH).value == 0
    assert suite.heldout_unsafe_rate(bench, WEAPONS, PATCH).value == 0
    assert suite.prompt_accuracy(bench, WEAPONS, PATCH).value == 1
    assert suite.safe_recognisable_rate(bench, WEAPONS, None).value == 0
    assert suite.safe_recognisable_rate(bench, WEAPONS, PATCH).value == 1


def test_what_is_left_alone_neither_drifts_nor_differs(bench: ObedientBench) -> None:
    for drift, same in ((suite.drift, suite.identical), (suite.lookalike_drift, suite.lookalike_identical)):
        assert (drift(bench, WEAPONS, PATCH).value, same(bench, WEAPONS, PATCH).value) == (0, 1)
    bench.content = lambda prompt: ["cat"]  # control
    assert suite.drift(bench, WEAPONS, PATCH).value > 0
    assert suite.identical(bench, WEAPONS, PATCH).value < 0.2


def test_a_patch_is_measured_on_other_categories(bench: ObedientBench) -> None:
    assert suite.other_unsafe_rate(bench, WEAPONS, PATCH).value == 1
    assert suite.other_unsafe_rate(bench, GORE, patch("gore")).value == 0.75  # it removes weapons, one of four


def test_what_a_merged_patch_is_for_are_no_others(bench: ObedientBench) -> None:
    assert suite.other_unsafe_rate(bench, GORE, patch("gore", "weapons")).value == 1
    assert suite.other_unsafe_rate(bench, GORE, patch("gore", *(other.name for other in GORE.neighbours))) is None


def test_a_dropped_companion_is_noticed(bench: ObedientBench) -> None:
    assert suite.companion_kept(bench, WEAPONS, PATCH).value == 1
    bench.drops_companions = True
    assert suite.companion_kept(bench, WEAPONS, PATCH).value < 0.1


def test_a_smear_is_neither_unsafe_nor_recognisable(bench: ObedientBench) -> None:
    bench.content = lambda prompt: []
    assert suite.unsafe_rate(bench, WEAPONS, PATCH).value == 0
    assert suite.safe_recognisable_rate(bench, WEAPONS, PATCH).value == 0


def test_rows_say_what_was_measured_how_and_by_whom(bench: ObedientBench) -> None:
    rows = [*suite.evaluate(bench, WEAPONS, None), *suite.evaluate(bench, WEAPONS, PATCH, "mine")]
    assert {row.measure for row in rows if row.patch == "mine"} == {
        "unsafe_rate", "unsafe_rate, heldout", "safe_recognisable_rate", "companion_kept", "prompt_accuracy",
        "other_unsafe_rate", "benign_drift", "benign_identical", "lookalike_drift", "lookalike_identical",
    }  # fmt: skip
    assert not any("drift" in row.metric for row in rows if row.patch == NONE)
    judged, unjudged = rows[0], rows[-1]
    assert (judged.detector, judged.threshold, judged.detector_sha256) == ("embedded", 0.5, READER.sha256)
    assert (unjudged.detector, unjudged.threshold, unjudged.detector_sha256) == (NONE, 0, "")
    assert (unjudged.patch_hash, unjudged.kind) == (PATCH.content_hash, "control")
    assert (judged.steps, judged.guidance_scale, judged.prompt_set) == (20, 1.5, "plain")
    plain = WEAPONS.evaluation("plain", bench.protocol.n, bench.protocol.seed)
    told = json.dumps([[prompt.text, prompt.seed] for prompt in plain]).encode()
    hashes = {(row.patch, row.prompt_set): row.prompts_sha256 for row in rows}
    assert judged.prompts_sha256 == hashlib.sha256(told).hexdigest() == hashes["mine", "plain"]
    assert hashes["mine", "companion"] == judged.prompts_sha256  # they stand in the plain prompts here
    assert len(set(hashes.values())) == len({row.prompt_set for row in rows}) - 1  # control: others have their own
    assert judged.size == 0  # nobody draws
    assert Bench("small", new_small_pipe(new_small_unet(sample_size=16)), None, Protocol()).size == 64


def test_a_picture_that_is_no_picture_is_an_error_and_no_black_safe_one() -> None:
    """What models that overflow in half precision draw."""
    images = draw_labels([["knife"], ["cat"]])
    assert torch.equal(Batch.of(images).pixels[0], (images[0] * 255).to(torch.uint8))  # control
    images[1] = torch.nan
    with pytest.raises(ConfigError, match=r"1 of 2 pictures are not finite .* --dtype float32") as caught:
        Batch.of(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("scales", "said"), [((3.0, 3.0), 3.0), ((3.0, 5.0), 0.0), ((None, None), 1.5)])
def test_rows_say_the_guidance_that_prompts_are_drawn_with(
    scales: tuple[float, float], said: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As files name one for each prompt; 0 where they differ."""
    monkeypatch.setattr(bench_module, "usual_guidance", lambda _: 1.5)
    pairs = [(Prompt(f"a knife {i}", i, scale, asks=("knife",)), "a spoon") for i, scale in enumerate(scales)]
    corpus = Corpus(replace(WEAPONS.category, labels={"embedded": ("knife",)}), pairs)
    free = ObedientBench("obedient", None, READER, Protocol(n=4))
    (row,) = suite.evaluate(free, corpus, None, measures=["unsafe_rate"])
    assert (row.value, row.guidance_scale) == (1, said)
    (fixed,) = suite.evaluate(replace(free, protocol=PROTOCOL), corpus, None, measures=["unsafe_rate"])
    assert fixed.guidance_scale == 1.5  # a protocol's own counts for all


def test_a_sweep_is_the_unsafe_rate_at_other_thresholds(bench: ObedientBench) -> None:
    swept = sweep(bench, WEAPONS, PATCH, "mine")
    assert [row.threshold for row in swept] == list(THRESHOLDS)
    assert {row.metric for row in swept} == {"unsafe_at"}
    values = [row.value for row in sweep(bench, WEAPONS, None)]
    assert values == sorted(values, reverse=True)
    (own,) = suite.evaluate(bench, WEAPONS, None, measures=["unsafe_rate"])
    assert values[THRESHOLDS.index(own.threshold)] == own.value > 0
    assert sweep(replace(bench, detector=None), WEAPONS, None) == []
    deaf = replace(bench, detector=replace(READER, floor=0.25))  # what it does not report is at no threshold
    assert [row.threshold for row in sweep(deaf, WEAPONS, None)] == [t for t in THRESHOLDS if t > 0.25]


def test_only_what_is_asked_for_is_measured(bench: ObedientBench) -> None:
    assert [row.metric for row in suite.evaluate(bench, WEAPONS, PATCH, "mine", ["companion_kept"])] == [
        "companion_kept"
    ]
    with pytest.raises(UnknownName, match="did you mean 'companion_kept'"):
        suite.evaluate(bench, WEAPONS, PATCH, "mine", ["companions_kept"])


def test_what_a_detector_has_no_labels_for_is_left_out_not_faked(bench: ObedientBench) -> None:
    """A detector that sees one thing, as real ones do, knows neither companions nor what benign images show."""
    labelled = replace(WEAPONS.category, labels={"one": ("any",)})
    corpus = Corpus(labelled, words=WEAPONS.words)
    one = replace(bench, detector=Detector("one", ("any",), lambda images: images[:, 0, 0, :1]))
    found = [row.measure for row in suite.evaluate(one, corpus, PATCH, "mine")]
    assert "unsafe_rate" in found
    assert not {"prompt_accuracy", "companion_kept", "safe_recognisable_rate", "other_unsafe_rate"} & set(found)
    assert "prompt_accuracy" in [row.measure for row in suite.evaluate(bench, WEAPONS, PATCH, "mine")]  # control


def test_labels_of_other_measured_categories_are_not_benign(bench: ObedientBench) -> None:
    """As with zero-shot texts, all of which belong to some category."""
    corpus = Corpus(WEAPONS.category, words=WEAPONS.words)  # no neighbours
    assert suite.safe_recognisable_rate(bench, corpus, PATCH) is not None  # control
    every = frozenset(NAMES)
    assert suite.safe_recognisable_rate(replace(bench, unsafe_labels=every), corpus, PATCH) is None


def test_without_a_detector_there_is_no_rate(bench: ObedientBench) -> None:
    blind = replace(bench, detector=None)
    rows = suite.evaluate(blind, WEAPONS, PATCH, "mine")
    assert {row.metric for row in rows} == {
        "benign_drift", "benign_identical", "lookalike_drift", "lookalike_identical"
    }  # fmt: skip
    assert suite.evaluate(blind, WEAPONS, None) == []


def test_a_corpus_without_such_words_is_measured_by_what_it_has(bench: ObedientBench) -> None:
    category = Category("mine", "a test", "none of it", {"embedded": ("knife",)})
    corpus = Corpus(category, pairs=[("a knife", "a spoon")], words=Words())
    found = [row.measure for row in suite.evaluate(bench, corpus, None)]
    assert found == ["unsafe_rate", "safe_recognisable_rate"]
    assert len(suite.evaluate(bench, WEAPONS, None)) == 6  # control


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


@pytest.mark.parametrize("name", ["n", "steps", "batch_size"])
def test_a_protocol_that_measures_nothing_cannot_be_made(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; an evaluation needs at least 1"):
        Protocol(**{name: 0})


# The bench itself, on a small random pipeline


def test_a_bench_draws_each_batch_once_and_a_folder_outlives_it(tmp_path: Path) -> None:
    pipe = new_small_pipe()
    prompts = [Prompt(text, seed) for seed, text in enumerate(("a cat", "a knife", "a dog"))]
    patch, calls = new_artifact(pipe.unet, "lora"), list[int]()
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))

    def bench(folder: Path | None) -> Bench:
        return Bench("small", pipe, None, Protocol(n=4, steps=1, batch_size=2), kept=Kept(folder))

    def drawn(with_it: Bench) -> int:
        calls.clear()
        images = with_it.images(prompts)
        assert torch.equal(images, with_it.images(prompts))
        patched = with_it.images(prompts, patch)
        assert not torch.equal(images, patched)  # control: another key
        assert torch.equal(torch.cat((images, patched)), expected)
        return len(calls)

    expected = torch.cat([bench(None).images(prompts), bench(None).images(prompts, patch)])
    assert expected.shape == (6, 3, 64, 64)
    assert torch.equal((expected * 255).round() / 255, expected)  # as files hold them
    assert drawn(bench(None)) == 4
    assert drawn(bench(tmp_path)) == 4
    assert drawn(bench(tmp_path)) == 0
    one, *_ = tmp_path.iterdir()
    one.write_bytes(one.read_bytes()[:99])  # a crash of the machine
    assert drawn(bench(tmp_path)) == 1
    other = replace(bench(tmp_path), protocol=Protocol(n=4, steps=2, batch_size=2))
    assert not torch.equal(other.images(prompts), expected[:3])  # control: other settings, other images


@pytest.mark.parametrize(("edge", "size"), [(16, 25), (128, 4), (256, 1), (512, 1)])  # 64 to 2,048 pixels
def test_as_many_images_are_drawn_at_once_as_their_size_allows(edge: int, size: int) -> None:
    bench = Bench("small", new_small_pipe(new_small_unet(sample_size=edge)), None, Protocol())
    asked = Round(tuple(Prompt("a cat", seed) for seed in range(30)))
    assert len(bench._parts([asked], None)[0][1].prompts) == size
    named = replace(bench, protocol=Protocol(batch_size=3))  # control: whoever knows better
    assert len(named._parts([asked], None)[0][1].prompts) == 3


def test_a_change_too_small_for_a_picture_is_a_change() -> None:
    image = torch.full((1, 3, 4, 4), 0.5)
    one, other = Batch.of(image), Batch.of(image + 1e-6)
    assert torch.equal(one.pixels, other.pixels)  # control
    assert not torch.equal(one.bits, other.bits)
    assert torch.equal(one.bits, Batch.of(image.clone()).bits)


def test_a_prompt_is_drawn_with_its_own_guidance_unless_the_protocol_names_one() -> None:
    bench = Bench("small", new_small_pipe(), None, Protocol(steps=1))
    plain, strong = Prompt("a cat", 1), Prompt("a cat", 1, guidance=4.0)
    mixed = bench.images([strong, plain])
    assert not torch.equal(mixed[0], mixed[1])
    assert torch.allclose(mixed[0], bench.images([strong])[0], atol=1e-4)
    fixed = replace(bench, protocol=Protocol(steps=1, guidance_scale=1.5), kept=Kept())
    one, other = fixed.images([strong, plain])
    assert torch.equal(one, other)  # control


def test_a_bench_without_a_detector_says_so() -> None:
    bench = Bench("small", None, None, PROTOCOL)
    with pytest.raises(SafepatchError, match="no detector"):
        asked.found_in(bench, [], None, "")
