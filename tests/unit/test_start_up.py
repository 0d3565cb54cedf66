"""`import safepatch` loads no model library, whatever is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers")


def loaded_by(statement: str, *first_on_path: Path) -> list[str]:
    """Which heavy libraries a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    path = os.pathsep.join(str(folder) for folder in (*first_on_path, ROOT))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


def test_importing_safepatch_loads_no_model_library():
    assert loaded_by("import safepatch") == []


@pytest.mark.parametrize("name", HEAVY)
def test_control_a_loaded_library_is_seen(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("")  # a stand-in of that name: the real ones take seconds to import
    assert loaded_by(f"import safepatch, {name}", tmp_path) == [name]
