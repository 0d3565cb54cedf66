"""The examples run as they stand."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


NEEDS = {"ray_serve.py": "ray"}  # by example, the package of an extra
# Ray ends itself where its own parts take longer to start than this, as they do on a busy machine.
PATIENT = {"RAY_raylet_start_wait_time_s": "600", "RAY_agent_register_timeout_ms": "600000"}


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example_runs(example: str) -> None:
    if example in NEEDS and find_spec(NEEDS[example]) is None:
        pytest.skip(f"needs the extra {NEEDS[example]}")
    environment = {**os.environ, **PATIENT, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, f"examples/{example}"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_examples_are_short_and_end_in_an_assertion() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 40
        assert lines[-1].startswith("assert")
