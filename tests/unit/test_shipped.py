"""The index of shipped patches: one entry per kind and category, each with its recipe and its file."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from safepatch import shipped as module
from safepatch.artifact.info import read_info
from safepatch.errors import ArtifactError, UnknownName
from safepatch.models.load import load_unet
from safepatch.patch.drift import ENCODER, sketch
from safepatch.shipped import Shipped, shipped, shipped_kinds, shipped_patch, shipped_patches

RECIPES = Path(__file__).parents[2] / "configs" / "patches"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "PATCHES", tmp_path)
    return tmp_path


def write_index(folder: Path, *entries: tuple[str, str]) -> None:
    index = [
        {
            "kind": kind,
            "category": category,
            "file": f"{kind}/{category}.safetensors",
            "sha256": "0" * 64,
            "train_minutes": 1.5,
            "cores": 1,
        }
        for kind, category in entries
    ]
    (folder / "index.json").write_text(json.dumps(index))


def test_every_shipped_patch_has_a_recipe_and_every_recipe_a_patch() -> None:
    recipes = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert recipes == {f"{entry.kind}/{entry.category}" for entry in shipped()}
    assert len(recipes) == len(shipped())


@pytest.mark.parametrize("entry", shipped(), ids=lambda entry: entry.file)
def test_a_shipped_file_lies_under_its_kind_and_is_the_one_in_the_index(entry: Shipped) -> None:
    assert entry.file == f"{entry.kind}/{entry.category}.safetensors"
    assert sha256(shipped_patch(entry.category, entry.kind).read_bytes()).hexdigest() == entry.sha256


def test_a_shipped_patch_says_of_the_embedded_model_what_is_measured_today() -> None:
    """The random signs are part of what files keep, however they are drawn."""
    unet, base = load_unet("tiny-sd"), read_info(shipped_patch("weapons", "lora")).base[ENCODER]
    assert sketch(unet) == base
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight.add_(0.01)
    assert sketch(unet) != base  # control


def test_no_kind_is_special_and_the_order_is_the_indexs(folder: Path) -> None:
    write_index(folder, ("lora", "b"), ("control", "b"), ("lora", "a"))
    assert shipped_kinds() == ("lora", "control")
    assert list(shipped_patches("lora")) == ["b", "a"]
    assert list(shipped_patches("control")) == ["b"]


def test_what_is_not_shipped_is_told_in_one_line(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="no index of shipped patches at"):
        shipped_patches("lora")
    write_index(folder, ("lora", "weapons"))
    with pytest.raises(UnknownName, match="no kind of shipped patches 'lore'; did you mean 'lora'"):
        shipped_patches("lore")
    with pytest.raises(UnknownName, match="no shipped lora patch 'weapon'; did you mean 'weapons'"):
        shipped_patch("weapon", "lora")
    with pytest.raises(ArtifactError, match=r"train it: configs/patches/lora/weapons\.yaml"):
        shipped_patch("weapons", "lora")
