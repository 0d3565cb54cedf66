"""`doctor` fits a screen, and what it says of memory is what `train --dry-run` says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from safepatch import doctor
from safepatch.models.checkpoint import CONFIGS
from safepatch.training.memory import GIB, predict

ROOT = Path(__file__).parents[2]


def test_it_fits_a_screen_and_names_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEPATCH_CACHE", str(tmp_path))
    (tmp_path / "shard").write_bytes(b"0" * (doctor.GIB // 100))
    lines = list(doctor.examined())
    assert len(lines) <= 24
    text = "\n".join(lines)
    assert f"latents: {tmp_path}, 0.01 GiB" in text
    for said in ("torch ", "cpu, ", "extras ", "sdxl, bf16, checkpointing: 12.7 GiB"):
        assert said in text


def test_a_small_machine_is_told_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "device_bytes", lambda: 8 * GIB)
    fits = {line.split(":")[0].strip(): line.endswith(", fits") for line in doctor._fits()}
    assert fits["sd1, bf16, checkpointing"]
    assert not fits["sdxl, bf16, checkpointing"]


@pytest.mark.slow
def test_its_figures_are_those_of_the_prediction() -> None:
    config = json.loads((CONFIGS / "sd1.json").read_text())["unet"]
    needed = predict(config, doctor.SPARING).needed / GIB
    assert round(needed, 1) == doctor.NEEDED["sd1", "bf16, checkpointing"]


@pytest.mark.e2e
def test_a_shell_is_offered_the_verbs() -> None:
    asked = {"_SAFEPATCH_COMPLETE": "complete_bash", "COMP_WORDS": "safepatch ve", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['safepatch']; from safepatch.cli import main; main()"],
        env={**os.environ, **asked, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["verify"]
