"""The scripts in benchmarks/ import, and kinds.py's counts say what they should; their figures are no test's matter."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

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
