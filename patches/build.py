"""Train the shipped patches and write their cards and index: `python patches/build.py [recipe ...]` (`make patches`).

A recipe is `weapons`, of configs/patches/weapons.yaml, or `lite/weapons` or `lora/weapons`, of another kind. Each patch
is what `safepatch train` gives of its recipe; the category's card adds the recipes and, when `make table` has been run,
the figures. `card:weapons` writes a card only, `picture` and `gates` the README's pictures, and `figures` keeps what
`make table` and two benchmarks measured.
"""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from safepatch.artifact.info import PatchInfo, read_info
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.config import to_yaml
from safepatch.data.prompts import Prompt, benign_prompts, lookalike_prompts, unsafe_prompts
from safepatch.demo import SHIPPED_KINDS
from safepatch.diffusion import generate, quiet
from safepatch.models.load import load_pipeline
from safepatch.reporting.plots import GateCurve, save_gate_plot
from safepatch.runtime.apply import apply
from safepatch.taxonomy import CATEGORIES
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train
from safepatch.training.validation import save_grid

HERE = Path(__file__).parent
INDEX = HERE / "index.json"
TABLES = {kind: HERE.parent / "runs" / ("table" if kind == "control" else f"table-{kind}") for kind in SHIPPED_KINDS}
COSTS = HERE.parent / "runs" / "kinds.json"  # of benchmarks/kinds.py
ATTACKS = HERE.parent / "runs" / "attack.json"  # of benchmarks/attack.py
FIGURES = HERE / "figures.json"
RECIPES = [f"{folder}{category}" for folder in ("", "lite/", "lora/") for category in CATEGORIES]
SEED = 1000  # of the picture's prompts: the evaluation's own


def build(recipe: str) -> None:
    """Train one patch, put it in its category's folder, and record its hash and training time."""
    config = load_train_config(_recipe(recipe), [])
    kind, category = config.patch.kind, config.category
    start = time.monotonic()
    trained = train(load_pipeline(config.model), config)
    minutes = round((time.monotonic() - start) / 60, 1)
    path = HERE / category / (f"{category}.safetensors" if kind == "control" else f"{category}-{kind}.safetensors")
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(trained, path)
    index = json.loads(INDEX.read_text()) if INDEX.is_file() else {}
    entries = index if kind == "control" else index.setdefault(kind, {})
    entries[category] = {
        "file": f"{category}/{path.name}",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "train_minutes": minutes,
        "cores": torch.get_num_threads(),
    }
    INDEX.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def _recipe(name: str) -> Path:
    return HERE.parent / "configs" / "patches" / f"{name}.yaml"


def write_picture() -> None:
    """`patches/picture.png`: base above, patched below; per category two unsafe prompts, a look-alike, a benign one."""
    pipe, columns = quiet(load_pipeline("tiny-sd")), []
    for name, category in CATEGORIES.items():
        prompts = [*unsafe_prompts(category, 6, SEED)[:6:5], *lookalike_prompts(category, 1, SEED)]
        prompts += benign_prompts(1, SEED + len(columns))
        texts, seeds = [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]
        base = generate(pipe, texts, seeds)
        with apply(pipe, HERE / name / f"{name}.safetensors"):
            columns.append(torch.stack((base, generate(pipe, texts, seeds))))
    path = HERE / "picture.png"
    save_grid(torch.cat(columns, dim=1), path)


def write_gates() -> None:
    """`patches/gates.png`: each lite patch's gate, step by step, on an unsafe, a look-alike and a benign prompt."""
    pipe, curves, thresholds = quiet(load_pipeline("tiny-sd")), {}, {}
    for name in json.loads(INDEX.read_text())["lite"]:
        patch, category = PatchArtifact.open(HERE / name / f"{name}-lite.safetensors"), CATEGORIES[name]
        shown = [*unsafe_prompts(category, 1, SEED), *lookalike_prompts(category, 1, SEED), *benign_prompts(1, SEED)]
        curves[name] = [GateCurve(prompt.text, _judged(pipe, patch, prompt)) for prompt in shown]
        thresholds[name] = patch.info.config["gate"][name]["threshold"]
    save_gate_plot(HERE / "gates.png", curves, thresholds)


def _judged(pipe: Any, patch: PatchArtifact, prompt: Prompt) -> list[float]:
    """The gate's probability at every step of one image."""
    seen: list[float] = []
    with apply(pipe, patch) as handle:
        handle.on_gate = lambda _, probabilities: seen.append(float(probabilities[0, 0]))
        generate(pipe, [prompt.text], [prompt.seed])
    return seen


def write_card(category: str) -> None:
    """`patches/<category>/README.md`: what its patches are, how they were made, what they measured."""
    index = json.loads(INDEX.read_text())
    entries = {"control": index, **{kind: index[kind] for kind in TABLES if kind in index}}
    sections = [_section(category, kind, of[category]) for kind, of in entries.items() if category in of]
    info = read_info(HERE / index[category]["file"])
    (HERE / category / "README.md").write_text(_card(category, info, sections))


def _card(category: str, info: PatchInfo, sections: list[str]) -> str:
    return f"""# safepatch {category}

Patches for the embedded emoji model `tiny-sd` and its siblings: {CATEGORIES[category].definition}.
They read the safety instruction "{info.instructions[category]}".
Their figures show a mechanism on a toy world; they do nothing for models that draw photographs.
License: {info.license}.

{"".join(sections)}"""


def _section(category: str, kind: str, entry: dict) -> str:
    recipe = category if kind == "control" else f"{kind}/{category}"
    return f"""## {kind}

* file: `{Path(entry["file"]).name}`, sha256 `{entry["sha256"]}`
* its recipe trains in {entry["train_minutes"]} minutes on {entry["cores"]} CPU core(s)

```python
with safepatch.apply(safepatch.load_pipeline("tiny-sd"), "patches/{entry["file"]}"):
    ...
```

{_figures(category, kind)}
`safepatch train configs/patches/{recipe}.yaml`

```yaml
{to_yaml(load_train_config(_recipe(recipe), []))}```

"""


def keep_figures() -> None:
    """`patches/figures.json`: what `make table`, kinds.py and attack.py measured, for the cards and the README."""
    kept = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    for kind, folder in TABLES.items():
        if (folder / "table.json").is_file():
            kept[kind] = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("table", "controls")}
    if COSTS.is_file():
        kept["costs"] = json.loads(COSTS.read_text())["kinds"]
    if ATTACKS.is_file():
        kept["attack"] = json.loads(ATTACKS.read_text())
    FIGURES.write_text(json.dumps(kept, indent=1) + "\n")


def _figures(category: str, kind: str) -> str:
    figures = json.loads(FIGURES.read_text()).get(kind) if FIGURES.is_file() else None
    if figures is None:
        return "Not measured yet; `make table` measures them.\n"
    rows = "\n".join(row for values in figures.values() for row in _rows(values, category))
    command = "make table" if kind == "control" else f"make table KIND={kind}"
    return f"`{command}`, {figures['controls']['n']} images per rate:\n\n| field | value |\n|---|---|\n{rows}\n"


def _rows(values: dict, category: str, of: str = "") -> list[str]:
    """Lines of the fields, however deep, that have a value for `category`."""
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    rows = [f"| `{key}`{of} | {value[category]:.3f} |" for key, value in tables.items() if _has(value, category)]
    return rows + [row for key, value in tables.items() for row in _rows(value, category, f" (`{key}`)")]


def _has(value: dict, category: str) -> bool:
    return isinstance(value.get(category), float)


if __name__ == "__main__":
    for word in sys.argv[1:] or [*RECIPES, "picture", "gates"]:
        if word in ("picture", "figures", "gates"):
            {"picture": write_picture, "figures": keep_figures, "gates": write_gates}[word]()
            continue
        if not word.startswith("card:"):
            build(word)
        write_card(word.removeprefix("card:").rpartition("/")[2])
