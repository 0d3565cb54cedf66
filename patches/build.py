"""Train the shipped patches and write their index and cards: `python patches/build.py [kind/category ...]`.

Each patch is what `safepatch train configs/patches/<kind>/<category>.yaml` gives. Words choose: `lora` all of a kind,
`lora/weapons` one patch, `figures` keeps what `make table` and benchmarks measured (`--json runs/NAME.json`); no words
at all, every patch. Cards, RESULTS.md and README's tables are written again by every call; `cards` and `results` do no
more than that. `--jobs 2` trains two at a time, each with half of the cores.
`--gates` fits the gates of shipped patches anew and trains nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from threading import Lock

from pages import ATTACKED, BENCHMARKS, COMPARED, write_pages

from safepatch.artifact.info import read_info
from safepatch.reporting.tables import tree
from safepatch.results import SWEPT, Row, read_rows
from safepatch.shipped import Shipped, shipped, shipped_kinds, shipped_patches

HERE = Path(__file__).parent
INDEX, FIGURES = HERE / "index.json", HERE / "figures.json"
ROOT = HERE.parent
RECIPES = ROOT / "configs" / "patches"
COSTS = ROOT / "runs" / "kinds.json"  # of benchmarks/kinds.py


RECORDING = Lock()  # one thread at a time writes the index


def build(recipe: str, cores: int) -> None:
    """Train the patch of one recipe, `kind/category`, put it in its place and into the index."""
    kind, category = recipe.split("/")
    start, file = time.monotonic(), f"{recipe}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, "-m", "safepatch", "train", str(RECIPES / f"{recipe}.yaml"), f"output={folder}"]
        subprocess.run(train, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(cores)})
        minutes = round((time.monotonic() - start) / 60, 1)
        (HERE / kind).mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / f"{category}.safetensors", HERE / file)
    with RECORDING:
        digest = sha256((HERE / file).read_bytes()).hexdigest()
        record(Shipped(kind, category, file, digest, train_minutes=minutes, cores=cores))


def refit(recipe: str, cores: int) -> None:
    """Fit the gate of a shipped patch anew; what it corrects stays as it was trained."""
    kind, category = recipe.split("/")
    entry = shipped_patches(kind)[category]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"{category}.safetensors"
        fit = [sys.executable, "-m", "safepatch", "gate", str(entry.path), "--category", category, "-o", str(made)]
        subprocess.run(fit, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(cores)})
        shutil.copyfile(made, entry.path)
    with RECORDING:
        record(replace(entry, sha256=sha256(entry.path.read_bytes()).hexdigest()))


def record(entry: Shipped) -> None:
    """Put an entry into `patches/index.json`, in its old place if it has one."""
    entries = {(old.kind, old.category): old for old in (shipped() if INDEX.is_file() else [])}
    entries[entry.kind, entry.category] = entry
    INDEX.write_text(json.dumps([asdict(each) for each in entries.values()], indent=1) + "\n")


def write_card(kind: str) -> None:
    """`patches/<kind>/README.md`: what the patches of a kind are, how they were made, what they measured."""
    entries = shipped_patches(kind)
    info = {name: read_info(entry.path) for name, entry in entries.items()}
    lines = [
        f"| {name} | {info[name].instructions[name]} | {entry.train_minutes} on {entry.cores} | `{entry.sha256}` |"
        for name, entry in entries.items()
    ]
    (HERE / kind / "README.md").write_text(f"""# The shipped {kind} patches

Made by `python patches/build.py {kind}` for the embedded emoji model `tiny-sd` and its siblings.
Their figures show a mechanism on a toy world; they do nothing for models that draw photographs.
License: {", ".join(sorted({each.license for each in info.values()}))}.

```python
with safepatch.apply(safepatch.load_pipeline("tiny-sd"), "patches/{next(iter(entries.values())).file}"):
    ...
```

The settings of each are in its file (`safepatch inspect`), and come from `configs/patches/{kind}/<category>.yaml`.

| category | instruction | minutes of training, on CPU cores | sha256 |
|---|---|---|---|
{chr(10).join(lines)}

{_figures(kind, list(entries))}""")


def _figures(kind: str, categories: list[str]) -> str:
    figures = json.loads(FIGURES.read_text()).get(kind) if FIGURES.is_file() else None
    command = f"make table KIND={kind}"
    if figures is None or "measures" not in figures:
        return f"Not measured yet; `{command}` measures them.\n"
    rows = "\n".join(_lines(figures["measures"], categories))
    head = f"| measure | model | patch | {' | '.join(categories)} |\n|{'---|' * (len(categories) + 3)}"
    return f"`{command}`, {figures['n']} images per rate, {figures['steps']} steps:\n\n{head}\n{rows}\n"


def _lines(measures: dict, categories: list[str]) -> Iterator[str]:
    """A line of every measure, model and patch."""
    for measure, models in measures.items():
        for model, patches in models.items():
            for patch, values in patches.items():
                cells = [f"{values[name]:.3f}" if name in values else "" for name in categories]
                yield f"| {measure} | `{model}` | {patch} | {' | '.join(cells)} |"


def keep_figures() -> None:
    """`patches/figures.json`: what the matrices and benchmarks measured, for the cards and RESULTS.md."""
    kept = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    for kind in shipped_kinds():
        for name, run in ((kind, "table"), (f"merge-{kind}", "merge-table"), (f"transfer-{kind}", "transfer-table")):
            if (rows := ROOT / "runs" / f"{run}-{kind}" / "rows.jsonl").is_file():
                kept[name] = compact(read_rows(rows))
    for name in (*ATTACKED, *COMPARED):
        if (rows := ROOT / "runs" / name / "rows.jsonl").is_file():
            kept[name] = compact(read_rows(rows))
    if COSTS.is_file():
        kept["costs"] = json.loads(COSTS.read_text())["kinds"]
    for name in BENCHMARKS:
        if (written := ROOT / "runs" / f"{name}.json").is_file():
            kept[name] = json.loads(written.read_text())
    FIGURES.write_text(json.dumps(kept, indent=1) + "\n")


def compact(rows: list[Row]) -> dict:
    """Rows of one matrix as figures.json keeps them, without sweeps: by measure, model, patch and category."""
    first, rows = rows[0], [row for row in rows if row.metric != SWEPT]
    n = max(row.n for row in rows if row.metric != "silent_miss")  # that counts images, whatever the attack's budget
    about = {"n": n, "steps": first.steps, "guidance_scale": first.guidance_scale}
    return {**about, "seed": first.seed, "measures": tree(rows)}


def chosen(words: list[str]) -> list[str]:
    """The recipes, `kind/category`, that `words` choose: all when there are no words."""
    recipes = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.glob("*/*.yaml"))
    known = {*recipes, *(recipe.split("/")[0] for recipe in recipes), "cards", "figures", "results"}
    if unknown := [word for word in words if word not in known]:
        sys.exit(f"no recipe {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return [recipe for recipe in recipes if not words or recipe in words or recipe.split("/")[0] in words]


def main(words: list[str], jobs: int, gates: bool) -> None:
    """Do what `words` say."""
    recipes = chosen(words)
    cores = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda recipe: (refit if gates else build)(recipe, cores), recipes))
    if "figures" in words:
        keep_figures()
    for kind in shipped_kinds():
        write_card(kind)
    write_pages()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="what to make")
    parser.add_argument("--jobs", type=int, default=1, help="patches trained at the same time")
    parser.add_argument("--gates", action="store_true", help="fit their gates anew, train nothing")
    options = parser.parse_args()
    main(options.words, options.jobs, options.gates)
