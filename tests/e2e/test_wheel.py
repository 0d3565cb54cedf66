"""The wheel as somebody without a checkout has it: built, installed elsewhere, and run from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "safepatch", "patches")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def run(*words: object, cwd: Path, **environment: object) -> str:
    """Standard output of `python words`, with no network to fall back on."""
    offline = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    variables = os.environ | offline | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=variables, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no earlier build's files get in and none are left behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, source / name)
    run("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", out, cwd=source)
    shutil.rmtree(source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "-q", "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_is_called_safepatch_diffusion_and_holds_what_its_index_names(wheel: Path) -> None:
    assert wheel.name.startswith("safepatch_diffusion-")
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("safepatch/assets/") for name in archive.namelist()}
        index = json.loads(archive.read("safepatch/assets/patches/index.json"))
    assert {entry["kind"] for entry in index} == {"lora"}
    assert len(index) == 5
    assert {f"patches/{entry['file']}" for entry in index} < names
    assets = ROOT / "safepatch" / "assets"
    assert {path.relative_to(assets).as_posix() for path in assets.rglob("*") if path.is_file()} < names
    assert not any(name.startswith(("tests", "patches/build")) for name in names)


def test_the_installed_package_and_its_patches_are_not_the_checkouts(installed: Path, tmp_path: Path) -> None:
    ask = "import safepatch.shipped as s; print(s.__file__, s.shipped_patch('weapons', 'lora'), *s.shipped_kinds())"
    module, patch, *kinds = run("-c", ask, cwd=tmp_path, PYTHONPATH=installed).split()
    assert Path(module).is_relative_to(installed)
    assert Path(patch).is_relative_to(installed)
    assert kinds == ["lora"]
    from_checkout = run("-c", ask, cwd=tmp_path, PYTHONPATH=ROOT).split()  # control: the same question, another answer
    assert Path(from_checkout[1]).is_relative_to(ROOT)


def test_it_inspects_and_draws_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    patch = installed / "safepatch/assets/patches/lora/weapons.safetensors"
    assert "weapons" in run("-m", "safepatch", "inspect", patch, cwd=tmp_path, PYTHONPATH=installed)
    draw = ("-m", "safepatch", "generate", "--prompt", "a knife on a blue background", "--steps", 4)
    run(*draw, "-o", "base.png", cwd=tmp_path, PYTHONPATH=installed)
    run(*draw, "--patch", patch, "-o", "patched.png", cwd=tmp_path, PYTHONPATH=installed)
    base, patched = ((tmp_path / f"{name}.png").read_bytes() for name in ("base", "patched"))
    assert base.startswith(b"\x89PNG")
    assert base != patched


# As the command, but for a gate that learns from fewer captions: that is most of what a demo of two steps does.
DEMO = """import safepatch.training.gates as gates
from safepatch.cli import app
gates.CAPTIONS, gates.UNSEEN, gates.STEPS = 64, 32, 10
app()"""


def test_the_demo_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    run("-c", DEMO, "demo", "--steps", 2, "--n", 2, "-o", "report", cwd=tmp_path, PYTHONPATH=installed)
    assert (tmp_path / "report/index.html").is_file()
