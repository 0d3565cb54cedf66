"""What opening and merging patch files cost beside reading them: hashes, checks and all.

    python benchmarks/files.py                     # SD1.5's size: control patches of 0.7 GB each
    python benchmarks/files.py --runs 9 --json out.json
    python benchmarks/files.py --quick             # a hundredth of the values: does it run?

Ways are run in turn in one process, files in the page cache, and the fastest run of each counts; CPU time is told too,
for machines that do other work meanwhile. `open` reads a file, hashes it, checks every value and that it can act;
`merge` is the four-way mean by `linear`, which hashes four files as it reads them and one as it writes it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from merge import _scaled, control_shapes, load_all, ours, write_patches
from safetensors.torch import load_file

from safepatch.artifact.patch_artifact import PatchArtifact

Way = Callable[[], object]
GOALS = {"open / read": 1.3, "load all / merge": 2.5}


def ways(paths: list[Path], out: Path) -> dict[str, Way]:
    """What is timed, by name."""
    merge = ours("linear")
    return {
        "read": paths[0].read_bytes,
        "safetensors' load_file, all values touched": lambda: [t.sum() for t in load_file(paths[0]).values()],
        "open": lambda: PatchArtifact.open(paths[0]),
        "merge of 4: load all, add, save": lambda: load_all(paths, out),
        "merge of 4": lambda: merge(paths, out),
    }


def timed(way: Way) -> tuple[float, float]:
    """Seconds by the wall's clock and of CPU time, of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    kept = way()
    took = time.perf_counter() - wall, time.process_time() - cpu
    del kept
    return took


def measure(runs: int, table: dict[str, Way]) -> dict[str, tuple[float, float]]:
    """The smallest seconds of each way, the ways in turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in table}
    for _ in range(runs):
        for name, way in table.items():
            found[name].append(timed(way))
    return {name: (min(wall for wall, _ in took), min(cpu for _, cpu in took)) for name, took in found.items()}


def main() -> None:
    """Write the files, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small files: a trial, not a measurement")
    parser.add_argument("--folder", help="where the files are put; by default the system's temporary folder")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    shapes = control_shapes("sd1")
    if options.quick:
        shapes = {name: _scaled(shape, 0.1) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if shutil.disk_usage(name).free < 5e9 and not options.quick:
            sys.exit(f"5 GB are needed in {name}; give --folder")
        paths = write_patches(Path(name), shapes, 4)
        found = measure(options.runs, ways(paths, Path(name) / "merged.safetensors"))
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
