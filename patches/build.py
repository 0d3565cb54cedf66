"""Train the shipped patches and write their cards and index: `python patches/build.py [category ...]` (`make patches`).

Each patch is what `safepatch train configs/patches/<category>.yaml` gives; the card adds its recipe and, when
`make table` has been run, its figures.
"""

import hashlib
import json
import shutil
import sys
import time
from pathlib import Path

from safepatch.artifact import PatchInfo, read_info
from safepatch.config import to_yaml
from safepatch.runtime.load import load_pipeline
from safepatch.taxonomy import CATEGORIES
from safepatch.training.config import load_train_config
from safepatch.training.trainer import train

HERE = Path(__file__).parent
INDEX = HERE / "index.json"
TABLE = HERE.parent / "runs" / "table" / "table.json"


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
    INDEX.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


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
* trained in {entry["train_minutes"]} minutes on two CPU cores
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


def _figures(category: str) -> str:
    if not TABLE.is_file():
        return "Not measured yet; `make table` measures them.\n"
    table = json.loads(TABLE.read_text())
    rows = [f"| `{k}` | {v[category]:.3f} |" for k, v in table.items() if isinstance(v, dict) and _has(v, category)]
    return f"`make table`, {table['n']} images per rate:\n\n| field | value |\n|---|---|\n" + "\n".join(rows) + "\n"


def _has(value: dict, category: str) -> bool:
    return isinstance(value.get(category), float)


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(CATEGORIES)
    for name in wanted:
        if name.removeprefix("card:") == name:
            build(name)
        write_card(name.removeprefix("card:"))
