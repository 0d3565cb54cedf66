"""Train the shipped patches and write their cards and index: `python patches/build.py [category ...]` (`make patches`).

Each patch is what `safepatch train configs/patches/<category>.yaml` gives; the card adds its recipe and, when
`make table` has been run, its figures. `card:weapons` writes a card only, `picture` the README's picture, and
`figures` keeps what `make table` measured.
"""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

import torch

from safepatch.artifact import PatchInfo, read_info
from safepatch.config import to_yaml
from safepatch.data.prompts import benign_prompts, lookalike_prompts, unsafe_prompts
from safepatch.diffusion import generate, quiet
from safepatch.runtime.apply import apply
from safepatch.runtime.load import load_pipeline
from safepatch.taxonomy import CATEGORIES
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train
from safepatch.training.validation import save_grid

HERE = Path(__file__).parent
INDEX = HERE / "index.json"
TABLE = HERE.parent / "runs" / "table"
FIGURES = HERE / "figures.json"
SEED = 1000  # of the picture's prompts: the evaluation's own


def build(category: str) -> None:
    """Train one patch, put it in its folder, and record its hash and training time."""
    config = load_train_config(HERE.parent / "configs" / "patches" / f"{category}.yaml", [])
    start = time.monotonic()
    trained = train(load_pipeline(config.model), config)
    minutes = round((time.monotonic() - start) / 60, 1)
    path = HERE / category / trained.name
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(trained, path)
    index = json.loads(INDEX.read_text()) if INDEX.is_file() else {}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    index[category] = {"file": f"{category}/{path.name}", "sha256": digest, "train_minutes": minutes}
    index[category]["cores"] = torch.get_num_threads()
    INDEX.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


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


def write_card(category: str) -> None:
    """`patches/<category>/README.md`: what it is, how it was made, what it measured."""
    entry = json.loads(INDEX.read_text())[category]
    info = read_info(HERE / entry["file"])
    config = to_yaml(load_train_config(HERE.parent / "configs" / "patches" / f"{category}.yaml", []))
    (HERE / category / "README.md").write_text(_card(category, entry, info, config))


def _card(category: str, entry: dict, info: PatchInfo, config: str) -> str:
    definition = CATEGORIES[category].definition
    return f"""# {info.title}

A `{info.kind}` patch for the embedded emoji model `tiny-sd` and its siblings: {definition}.
It reads the safety instruction "{info.instructions[category]}".
Its figures show a mechanism on a toy world; it does nothing for models that draw photographs.

* file: `{Path(entry["file"]).name}`, sha256 `{entry["sha256"]}`
* trained in {entry["train_minutes"]} minutes on {entry["cores"]} CPU core(s)
* license: {info.license}

```python
with safepatch.apply(safepatch.load_pipeline("tiny-sd"), "patches/{entry["file"]}"):
    ...
```

## Figures
{_figures(category)}
## Recipe
`safepatch train configs/patches/{category}.yaml`

```yaml
{config}```
"""


def keep_figures() -> None:
    """`patches/figures.json`: what `make table` measured, for the cards and the README."""
    figures = {name: json.loads((TABLE / f"{name}.json").read_text()) for name in ("table", "controls")}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


def _figures(category: str) -> str:
    if not FIGURES.is_file():
        return "Not measured yet; `make table` measures them.\n"
    figures = json.loads(FIGURES.read_text())
    rows = "\n".join(row for values in figures.values() for row in _rows(values, category))
    return f"`make table`, {figures['controls']['n']} images per rate:\n\n| field | value |\n|---|---|\n{rows}\n"


def _rows(values: dict, category: str, of: str = "") -> list[str]:
    """Lines of the fields, however deep, that have a value for `category`."""
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    rows = [f"| `{key}`{of} | {value[category]:.3f} |" for key, value in tables.items() if _has(value, category)]
    return rows + [row for key, value in tables.items() for row in _rows(value, category, f" (`{key}`)")]


def _has(value: dict, category: str) -> bool:
    return isinstance(value.get(category), float)


if __name__ == "__main__":
    for word in sys.argv[1:] or [*CATEGORIES, "picture"]:
        if word in ("picture", "figures"):
            {"picture": write_picture, "figures": keep_figures}[word]()
            continue
        if not word.startswith("card:"):
            build(word)
        write_card(word.removeprefix("card:"))
