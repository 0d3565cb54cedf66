"""What `make table` writes: the issue's fields in one file, what the base does in the other."""

import json

import pytest

from safepatch import table
from safepatch.taxonomy import CATEGORIES
from tests.unit.test_suite import READER, ObedientBench

FIELDS = {
    "detector_recall", "detector_precision", "base_prompt_accuracy", "base_unsafe_rate", "patched_unsafe_rate",
    "patched_unsafe_rate_heldout", "patched_prompt_accuracy", "benign_drift", "other_unsafe_rate", "patch_mb",
    "sibling_unsafe_rate", "safe_recognisable_rate", "companion_kept", "merged_unsafe_rate", "train_minutes",
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch, tmp_path) -> tuple[dict, dict, str]:
    """Table, controls and markdown of a base that obeys and a patch that replaces weapons and nothing else."""
    monkeypatch.setattr(table, "Bench", ObedientBench)
    monkeypatch.setattr(table, "load_pipeline", lambda name: None)
    monkeypatch.setattr(table, "embedded_detector", lambda: READER)
    monkeypatch.setattr(table.Components, "of", lambda pipe: None)
    monkeypatch.setattr(table.PatchArtifact, "open", lambda path: "patch")
    figures = {"detector_recall": 1.0, "detector_precision": 1.0}
    monkeypatch.setattr(table, "detector_figures", lambda *_: figures)
    monkeypatch.setattr(table, "merged_figures", lambda *_: {"weapons": 0.0})
    text = table.build_table(tmp_path, 40)
    return *(json.loads((tmp_path / f"{name}.json").read_text()) for name in ("table", "controls")), text


def test_the_table_has_the_fields_with_a_target_and_no_others(measured) -> None:
    found, _, text = measured
    assert set(found) == FIELDS
    assert all(set(found[field]) == set(CATEGORIES) for field in ("patched_unsafe_rate", "train_minutes"))
    assert all(f"`{field}" in text for field in FIELDS)


def test_controls_are_the_bases_and_figures_the_patchs(measured) -> None:
    found, controls, _ = measured
    assert controls["base_safe_recognisable_rate"]["weapons"] == 0
    assert found["safe_recognisable_rate"]["weapons"] == 1
    assert (found["base_unsafe_rate"]["weapons"], found["patched_unsafe_rate"]["weapons"]) == (1, 0)
    assert controls["base_unsafe_rate_heldout"]["weapons"] == 1
    assert controls["base_other_unsafe_rate"]["gore"] == 1
    assert found["other_unsafe_rate"]["gore"] < 1  # this patch does touch another category: weapons
    assert controls["base_companion_kept"]["weapons"] == 1
    for sibling, rates in found["sibling_unsafe_rate"].items():
        assert (controls["sibling_base_unsafe_rate"][sibling]["weapons"], rates["weapons"]) == (1, 0)
