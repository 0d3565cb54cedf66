"""The layering of DESIGN: a module imports only from rows above its own, inside functions too.

A *unit* is a top-level module or sub-package of `safepatch`; modules inside one sub-package may import each other.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "safepatch"

ROWS = (
    ("errors", "taxonomy", "files", "progress"),
    ("config", "results"),
    ("diffusion", "artifact", "shipped", "signing"),
    ("tiny", "merging", "hub"),
    ("models", "data", "patch", "detectors"),
    ("runtime", "export"),
    ("objectives",),
    ("training", "attacks"),
    ("evaluation", "guard"),
    ("reporting",),
    ("hosting",),
    ("demo", "comparison", "resurgence", "variants", "doctor", "studio"),
    ("cli",),
    ("__main__", "__init__"),  # the first calls `cli`; the second names what is public, and loads none of it
)
ROW = {unit: number for number, row in enumerate(ROWS, start=1) for unit in row}

ONLY = {
    "reporting": {"results", "errors", "files"},
    "merging": {"errors", "taxonomy", "config", "results", "artifact"},
}
NEVER = {"evaluation": {"training", "objectives"}}
TINY_UNITS = {"models", "detectors", "demo"}  # the rest of the package knows no model by name

MODEL_LIBRARIES = {"diffusers", "transformers"}
MODEL_UNITS = {"diffusion", "tiny", "detectors", "guard"}


def unit_of(path: Path) -> str:
    """`safepatch/merging/engine.py` -> `merging`; `safepatch/cli.py` -> `cli`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> Iterator[str]:
    """Every dotted name that `source` imports, anywhere in it; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))


def problem(unit: str, name: str) -> str | None:
    """What is wrong with `unit` importing the dotted `name`, or None."""
    root, _, rest = name.partition(".")
    if not root:
        return f"{unit} imports {name} relatively"
    if root in MODEL_LIBRARIES:
        return None if unit in MODEL_UNITS else f"{unit} imports {root}; only {sorted(MODEL_UNITS)} may"
    target = rest.split(".")[0]
    target = target if target in ROW else "__init__"  # `from safepatch import apply` runs the package's own names
    if root != "safepatch" or target == unit or allowed(unit, target):
        return None
    return f"{unit} (row {ROW[unit]}) imports {target} (row {ROW[target]})"


def allowed(unit: str, target: str) -> bool:
    if target in NEVER.get(unit, ()) or target not in ONLY.get(unit, ROW):
        return False
    if target == "tiny" and unit not in TINY_UNITS:
        return False
    return ROW[target] < ROW[unit] or target == "errors"


def problems(unit: str, source: str) -> list[str]:
    return [found for name in imported(source) if (found := problem(unit, name))]


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_row():
    assert {unit_of(path) for path in MODULES} <= set(ROW)


def test_no_unit_has_two_rows_and_none_is_gone():
    assert len(ROW) == sum(map(len, ROWS))
    assert set(ROW) <= {unit_of(path) for path in MODULES}


def test_nothing_but_its_users_imports_the_embedded_model():
    """Whoever brings a model of their own runs no line of it."""
    users = {unit_of(path) for path in MODULES for name in imported(path.read_text("utf-8")) if is_tiny(name)}
    assert users - {"tiny"} <= TINY_UNITS
    assert "models" in users  # control: there is something to find


def is_tiny(name: str) -> bool:
    return name == "safepatch.tiny" or name.startswith("safepatch.tiny.")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rows_above_its_own(path):
    assert problems(unit_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("artifact", "from safepatch.merging.engine import merge"),
        ("artifact", "def late():\n    import safepatch.cli"),
        ("artifact", "import importlib\nimportlib.import_module('safepatch.cli')"),
        ("artifact", "from safepatch import apply"),
        ("artifact", "from . import errors"),
        ("artifact", "import torch, diffusers.models"),
        ("artifact", "from safepatch.tiny import loader"),
        ("errors", "from safepatch.taxonomy import Category"),
        ("evaluation", "from safepatch.tiny.world import CONCEPTS"),
        ("training", "import safepatch.tiny"),
        ("runtime", "from safepatch import tiny"),
        ("demo", "from safepatch.cli import app"),
        ("cli", "import safepatch"),
        ("cli", "from safepatch import __version__"),
        ("data", "from safepatch.models.load import load_pipeline"),
        ("data", "from safepatch.patch import Patch"),
        ("tiny", "from safepatch.data.prompts import Prompt"),
        ("shipped", "from safepatch.results import Row\nfrom safepatch.artifact.info import read_info"),
        ("detectors", "from safepatch.diffusion import generate\nfrom safepatch.data.corpus import Corpus"),
        ("taxonomy", "from safepatch.results import Row"),
        ("attacks", "from safepatch.training.trainer import train"),
        ("evaluation", "from safepatch.objectives import OBJECTIVES"),
        ("evaluation", "from safepatch import training"),
        ("reporting", "from safepatch.evaluation.metrics import asr"),
        ("merging", "from safepatch.diffusion import load"),
        ("runtime", "if True:\n    from transformers import CLIPTextModel"),
    ],
)
def test_control_a_bad_import_is_caught(unit, source):
    assert len(problems(unit, source)) == 1


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("config", "from safepatch.errors import ConfigError"),
        (
            "merging",
            "from safepatch.merging.methods import ties\nfrom safepatch.artifact.patch_artifact import PatchArtifact",
        ),
        ("evaluation", "from safepatch import attacks, runtime"),
        ("reporting", "import jinja2\nfrom safepatch.results import read"),
        ("__main__", "from safepatch.cli import main"),
        ("cli", "from safepatch.demo import run"),
        ("demo", "from safepatch.tiny.models import load_tiny"),
        ("data", "from safepatch.diffusion import UNetHost\nfrom safepatch.taxonomy import Category"),
        ("detectors", "import transformers\nfrom safepatch.tiny.models import load_classifier"),
        ("evaluation", "from safepatch.merging import merge"),
        ("__init__", "from safepatch.training.trainer import train"),
    ],
)
def test_control_a_good_import_passes(unit, source):
    assert problems(unit, source) == []
