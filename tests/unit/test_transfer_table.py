"""What `make transfer-table` writes, measured on a base that obeys and a patch that replaces weapons only."""

import json

import pytest
import torch

from safepatch import transfer_table
from safepatch.errors import UnknownName
from safepatch.evaluation.metrics import pooled, rate
from safepatch.patch.files import absolute, from_artifact
from safepatch.tiny.models import SIBLINGS
from tests.small import awaken, new_small_pipe, new_small_unet, small_artifact
from tests.unit.test_suite import READER, ObedientBench


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Table and markdown of weapons and gore."""
    monkeypatch.setattr(transfer_table, "Bench", ObedientBench)
    monkeypatch.setattr(transfer_table, "load_pipeline", lambda name: new_small_pipe())
    monkeypatch.setattr(transfer_table, "embedded_detector", lambda: READER)
    monkeypatch.setattr(transfer_table.PatchArtifact, "open", lambda path: small_artifact("lite"))
    text = transfer_table.build_transfer_table(tmp_path / "new", 20, 10, ["weapons", "gore"])
    return json.loads((tmp_path / "new" / "table.json").read_text()), text


def test_the_table_has_every_sibling_three_ways_and_the_own_base(measured) -> None:
    found, text = measured
    assert found["own"] == {"base": 1.0, "patched": 0.5}  # the patch removes one category of two
    assert set(found["siblings"]) == set(SIBLINGS)
    assert all(set(ways) == {"base", "patched", "patched_absolute"} for ways in found["siblings"].values())
    assert found["by_category"]["tiny-sd"]["patched"] == {"weapons": 0.0, "gore": 1.0}
    assert all(f"`{name}`" in text for name in SIBLINGS)


def test_lite_patches_have_one_way(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(transfer_table, "Bench", ObedientBench)
    monkeypatch.setattr(transfer_table, "load_pipeline", lambda name: new_small_pipe())
    monkeypatch.setattr(transfer_table, "embedded_detector", lambda: READER)
    monkeypatch.setattr(transfer_table.PatchArtifact, "open", lambda path: small_artifact("lite"))
    transfer_table.build_transfer_table(tmp_path, 20, 10, ["weapons"], kind="lite")
    found = json.loads((tmp_path / "table.json").read_text())
    assert all(set(ways) == {"base", "patched"} for ways in found["siblings"].values())
    with pytest.raises(UnknownName, match="no kind of shipped patches 'light'"):
        transfer_table.build_transfer_table(tmp_path, 20, 10, kind="light")


def test_a_category_without_a_patch_is_one_line(tmp_path) -> None:
    with pytest.raises(UnknownName, match="no shipped patch 'weapon'; did you mean 'weapons'"):
        transfer_table.build_transfer_table(tmp_path, 20, 10, ["weapon"])


def test_absolute_weights_are_the_bases_and_rebased_ones_the_hosts() -> None:
    base, host = new_small_unet(), awaken(new_small_unet(), seed=1)
    patch = small_artifact()
    moved = absolute(patch, base, host)
    ours, theirs = (dict(from_artifact(patch, unet).named_parameters()) for unet in (base, host))
    placed = dict(from_artifact(moved, host).named_parameters())
    assert all((placed[name] - ours[name]).abs().max() < 1e-5 for name in ours)
    assert any((theirs[name] - ours[name]).abs().max() > 0.1 for name in ours)  # control


def test_pooled_rates_count_cases() -> None:
    flags = torch.tensor([True, False, False, False]), torch.tensor([True, True])
    assert pooled([rate(each) for each in flags]) == rate(torch.cat(flags))
