"""Puts the shipped lora patches, and an index of them, into a wheel; everything else is in pyproject.toml."""

import json
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPatches(build_py):
    """Also copies patches into `safepatch/assets/patches`; an editable install uses the checkout's own."""

    def run(self) -> None:
        """Build as usual, then add the patches."""
        super().run()
        if not self.editable_mode:
            _copy_patches(Path("patches"), Path(self.build_lib) / "safepatch" / "assets" / "patches")


def _copy_patches(source: Path, target: Path) -> None:
    entries = [entry for entry in json.loads((source / "index.json").read_text()) if entry["kind"] == "lora"]
    for entry in entries:
        (target / entry["file"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / entry["file"], target / entry["file"])
    (target / "index.json").write_text(json.dumps(entries, indent=1) + "\n")


setup(cmdclass={"build_py": BuildWithPatches})
