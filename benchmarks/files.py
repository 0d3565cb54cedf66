"""What opening and merging patch files cost beside reading them: hashes, checks and all.

    python benchmarks/files.py                     # SD1.5's size: control patches of 0.7 GB each
    python benchmarks/files.py --runs 9 --json out.json
    python benchmarks/files.py --quick             # a hundredth of the values: does it run?

Every measurement is a process of its own that imports its libraries before the clock starts, with the files in the page
cache. Ways are run in turn, and the fastest run of each counts; CPU time is told too, for machines that do other work
meanwhile. `open` reads a file, hashes it, checks every value and that it can act; `merge` is the four-way mean by
`linear`, which hashes four files as it reads them and one as it writes it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from merge import _scaled, control_shapes, load_all, ours, write_patches

from safepatch.artifact.patch_artifact import PatchArtifact

Way = Callable[[list[Path], Path], object]
GOALS = {"open / read": 1.3, "load all / merge": 2.5}
WAYS: dict[str, Way] = {
    "read": lambda paths, _: paths[0].read_bytes(),
    "open": lambda paths, _: PatchArtifact.open(paths[0]),
    "merge of 4: load all, add, save": load_all,
    "merge of 4": ours("linear"),
}


def run_one(way: str, paths: list[Path], out: Path) -> tuple[float, float]:
    """Seconds by the wall's clock and of CPU time, of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    kept = WAYS[way](paths, out)
    took = time.perf_counter() - wall, time.process_time() - cpu
    del kept
    return took


def run_apart(way: str, paths: list[Path], out: Path) -> tuple[float, float]:
    """`run_one` in a process of its own."""
    command = [sys.executable, __file__, "--one", way, "--out", str(out), *map(str, paths)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu


def measure(runs: int, paths: list[Path], out: Path) -> dict[str, tuple[float, float]]:
    """The smallest seconds of each way, the ways in turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(runs):
        for name in WAYS:
            found[name].append(run_apart(name, paths, out))
            out.unlink(missing_ok=True)  # nobody's time is taken by removing what another wrote
    return {name: (min(wall for wall, _ in took), min(cpu for _, cpu in took)) for name, took in found.items()}


def main() -> None:
    """Write the files, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small files: a trial, not a measurement")
    parser.add_argument("--folder", help="where the files are put; by default the system's temporary folder")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.paths, options.out)))
        return
    shapes = control_shapes("sd1")
    if options.quick:
        shapes = {name: _scaled(shape, 0.1) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if shutil.disk_usage(name).free < 5e9 and not options.quick:
            sys.exit(f"5 GB are needed in {name}; give --folder")
        paths = write_patches(Path(name), shapes, 4)
        found = measure(options.runs, paths, Path(name) / "merged.safetensors")
        size = paths[0].stat().st_size
    ratios = {
        "open / read": found["open"][0] / found["read"][0],
        "load all / merge": found["merge of 4: load all, add, save"][0] / found["merge of 4"][0],
    }
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    print(f"{size / 1e6:.0f} MB float16, {torch.get_num_threads()} threads, {cores} cores, load average {load:.1f}\n")
    print("| way | seconds | CPU seconds |\n| --- | ---: | ---: |")
    for way, (wall, cpu) in found.items():
        print(f"| {way} | {wall:.2f} | {cpu:.2f} |")
    print("\n| ratio | found | goal |\n| --- | ---: | ---: |")
    for ratio, value in ratios.items():
        print(f"| {ratio} | {value:.2f} | {GOALS[ratio]} |")
    if options.json:
        record = {"bytes": size, "cores": cores, "load": load, "seconds": found, "ratios": ratios}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
