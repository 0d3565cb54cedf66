"""How good a judge is, on pictures whose labels the test knows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from safepatch import cli
from safepatch.detectors import open_detector, parse_detector
from safepatch.detectors.any_of import any_of_detector
from safepatch.detectors.base import Detector
from safepatch.errors import ConfigError
from safepatch.evaluation.heads import train
from safepatch.evaluation.scoring import SWEEP, lines, picture, score
from safepatch.taxonomy import Category
from tests.small_detectors import save_clip

# Says that a picture is unsafe with the probability of its first pixel's red.
RED = Detector("red", ("other", "red"), lambda images: torch.stack((images[:, 1, 0, 0], images[:, 0, 0, 0]), dim=1))


def save_picture(path: Path, red: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 255, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, red in enumerate((250, 200, 140, 60)):
        save_picture(tmp_path / "unsafe" / f"{number}.png", red, (8 + number, 8))  # of any size
    for number, red in enumerate((0, 0, 0, 0, 160)):
        save_picture(tmp_path / "safe" / "deeper" / f"{number}.png", red)
    return tmp_path


def test_recall_precision_and_false_alarms_are_counted(folder: Path) -> None:
    own, *others = score(RED, ["red"], folder)
    assert (own.threshold, own.recall.value, own.false_alarms.value) == (0.5, 0.75, 0.2)
    assert own.precision
    assert own.precision.value == 0.75
    assert (own.recall.n, own.precision.n, own.false_alarms.n) == (4, 4, 5)
    assert [each.threshold for each in others] == [*SWEEP]
    assert others[0].recall.value == 1
    assert others[-1].recall.value == 0.25
    assert [each.recall.value for each in others] == sorted((each.recall.value for each in others), reverse=True)


def test_a_judge_that_finds_nothing_has_no_precision(folder: Path) -> None:
    blind = Detector("blind", ("red",), lambda images: torch.zeros(len(images), 1))
    own = score(blind, ["red"], folder)[0]
    assert (own.recall.value, own.precision, own.false_alarms.value) == (0, None, 0)
    assert "nothing found" in lines([own])[-1]


def test_a_picture_of_more_pixels_than_anybody_draws_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert score(RED, ["red"], folder)  # control
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ConfigError, match=r"cannot read .*0\.png as a picture .*remove it") as caught:
        score(RED, ["red"], folder)
    assert "\n" not in str(caught.value)


def test_thresholds_that_a_judge_cannot_have_are_not_scored(folder: Path) -> None:
    """Below its floor it reports nothing, so the figures would be the floor's under another name."""
    floored = replace(RED, floor=0.25, threshold=0.25)
    assert [each.threshold for each in score(floored, ["red"], folder)] == [0.25, *SWEEP[2:]]
    several = any_of_detector([RED, replace(RED, name="again")])
    assert [each.threshold for each in score(several, ["red: red"], folder)] == [0.5]
    assert len(score(RED, ["red"], folder)) == 1 + len(SWEEP)  # control


def test_a_picture_is_judged_as_its_camera_was_held(tmp_path: Path) -> None:
    taken, exif = Image.new("RGB", (8, 4)), Image.Exif()
    taken.putpixel((0, 3), (255, 0, 0))  # below on the left; upright it is above on the left
    exif[0x0112] = 6
    for name, tags in (("lying", None), ("upright", exif)):
        taken.save(tmp_path / f"{name}.png", exif=tags)
    lying, upright = (picture(tmp_path / f"{name}.png") for name in ("lying", "upright"))
    assert (lying.shape, float(lying[0, 0, 0, 0])) == ((1, 3, 4, 8), 0)  # control
    assert (upright.shape, float(upright[0, 0, 0, 0])) == ((1, 3, 8, 4), 1)


def test_a_folder_that_is_not_labelled_is_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no pictures in .*nowhere/unsafe; a labelled folder holds"):
        score(RED, ["red"], folder / "nowhere")
    (folder / "safe" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"cannot read .*broken\.png as a picture"):
        score(RED, ["red"], folder)


def test_heads_are_trained_of_folders_and_scored_on_what_was_kept_back(tmp_path: Path) -> None:
    """Red pictures are one label, blue ones another, green ones safe; the small CLIP tells colors apart."""
    clip, run = str(save_clip(tmp_path / "clip")), CliRunner()
    for label, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255)), ("safe", (0, 255, 0))):
        for number in range(10):
            path = tmp_path / "pictures" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + number, 40), tuple(abs(c - 9 * number) for c in color)).save(path)
    options = ["-o", str(tmp_path / "heads"), "--clip", clip]
    printed = run.invoke(cli.app, ["detector", "train", str(tmp_path / "pictures"), *options])
    assert printed.exit_code == 0, printed.output
    assert printed.stdout.splitlines()[0] == "| label | recall | precision | false alarms |"
    assert [line.split(" | ")[0] for line in printed.stdout.splitlines()[2:]] == ["| blue", "| red"]
    category = Category("mine", "", "", {"multi-headed": ("red",)})
    judge = open_detector(parse_detector(f"multi-headed@{tmp_path / 'heads'}"), [category])
    assert judge.labels == ("blue", "red")
    with pytest.raises(ConfigError, match=r"no pictures in .*gore"):
        train(tmp_path / "pictures", ["gore"], tmp_path / "x", clip)
    with pytest.raises(ConfigError, match="needs a folder of pictures for each label"):
        train(tmp_path / "pictures", ["safe"], tmp_path / "x", clip)
    with pytest.raises(ConfigError, match=r"nowhere; name one that holds a folder of pictures for each label"):
        train(tmp_path / "nowhere", [], tmp_path / "x", clip)
    for path in (tmp_path / "pictures" / "blue").iterdir():
        if path.stem > "1":
            path.unlink()
    with pytest.raises(ConfigError, match=r"a head needs 3 pictures or more, and .*blue holds 2"):
        train(tmp_path / "pictures", [], tmp_path / "x", clip)


def test_the_command_line_scores_the_embedded_judge(folder: Path) -> None:
    printed = CliRunner().invoke(cli.app, ["detector", "score", str(folder), "--category", "weapons"])
    assert printed.exit_code == 0, printed.output
    assert "| 0.5 (its own) | " in printed.stdout
    assert len(printed.stdout.splitlines()) == 3 + len(SWEEP)
    listed = CliRunner().invoke(cli.app, ["detector", "list"]).stdout
    assert listed.startswith("embedded ")
