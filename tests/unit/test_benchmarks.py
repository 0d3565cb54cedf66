"""The scripts in benchmarks/ import, and kinds.py's counts say what they should; their figures are no test's matter."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.errors import ArtifactError
from safepatch.patch import PATCH_KINDS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def imported(name: str) -> ModuleType:
    spec = spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_can_be_imported(name: str) -> None:
    assert imported(name).__doc__


def test_a_closed_gate_costs_next_to_nothing_and_a_lite_patch_little() -> None:
    found = imported("kinds").count("embedded")
    assert 1.2 < found["control"] < 2  # control
    assert 1 < found["lite"] < min(found["control"], found["five lite merged"])
    for kind in ("lite", "control", "lora"):
        assert 1 < found[f"gated {kind}, benign"] < 1.01


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_the_patches_that_are_timed_on_a_gpu_are_ones_that_load(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = imported("gpu").Bench.of(family, is_small=True)
    for kind in PATCH_KINDS:
        assert PatchArtifact.open(bench.file(kind, tmp_path)).info.kind == kind
    monkeypatch.setattr("torch.nn.init.normal_", lambda weights, std: weights)
    with pytest.raises(ArtifactError, match="changes nothing"):  # control: as they begin
        PatchArtifact.open(bench.file("lora", tmp_path))


def test_what_times_a_step_takes_every_one(tmp_path: Path) -> None:
    """Patches hang on just enough of a pipeline there, and what is enough may change."""
    runtime = imported("runtime")
    unet = runtime.new_unet("sd1", 0.1)
    with torch.no_grad():
        assert all(runtime.clocked(step) > 0 for step in runtime.new_steps(unet, 8).values())
        assert runtime.measure_loading(unet, tmp_path, 1)["load_float16"] > 0
    assert set(imported("kinds").measure("embedded", 1, 16, 1)) == set(imported("kinds").VARIANTS)
