"""How fast patches merge and how much memory that takes, against what one would otherwise do with the same files.

    python benchmarks/merge.py                          # 4 patches of SD1.5 size, 0.7 GB each
    python benchmarks/merge.py --size sdxl --patches 2  # 2.5 GB each
    python benchmarks/merge.py --quick                  # a hundredth of the values, in one process: does it run?
    python benchmarks/merge.py --json out.json          # ratios and peak memory as JSON

Every measurement is a process of its own that starts with the files in the page cache, imports its libraries, and is
timed from there; its memory is the growth of its peak resident size from that moment. Ways are run in turn `--runs`
times and the fastest run of each counts. "hashed" says whether the source files were checked against their content
hash, which only safepatch does.

Compared: (a) safetensors: load all, weighted sum, save. (b) sd-mecha, where it is installed. (c) PEFT's `ties` and
`dare_linear` on the same tensors, loaded and saved one at a time.
"""

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import reduce
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from safepatch.artifact.container import raw_bytes
from safepatch.artifact.info import PatchInfo
from safepatch.artifact.writer import write_stream
from safepatch.merging import merge

Shapes = dict[str, tuple[int, ...]]
DENSITY = 0.5
FAMILIES = {"sd15": "sd1", "sdxl": "sdxl"}


def control_shapes(family: str) -> Shapes:
    """Name -> shape of every tensor of a control patch for UNets of the family."""
    from diffusers import UNet2DConditionModel  # not in the processes that are measured
    from hosts import unet_config

    from safepatch.patch import ControlPatch

    with torch.device("meta"):
        patch = ControlPatch.from_unet(UNet2DConditionModel.from_config(unet_config(family)))
    return {f"control.{name}.delta": tuple(parameter.shape) for name, parameter in patch.named_parameters()}


def write_patches(folder: Path, shapes: Shapes, count: int) -> list[Path]:
    """`count` float16 patch files of random values, written tensor by tensor."""
    layout = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in sorted(shapes.items())}
    paths = []
    for seed in range(count):
        info = PatchInfo("control", {f"category{seed}": "no"}, {"layers": 2}, {"family": "sd"}, {"sees": "prompt"})
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(shape, generator=generator).mul_(0.01).half() for _, shape in sorted(shapes.items()))
        paths.append(folder / f"{seed}.safetensors")
        write_stream(paths[-1], info.to_metadata(), layout, map(raw_bytes, drawn))
    return paths


# Ways to merge


def ours(method: str, conflicts: bool = False) -> Callable[[list[Path], Path], object]:
    """Merging with safepatch."""
    return lambda paths, out: merge(paths, out, method, density=DENSITY, conflicts=conflicts)


def load_all(paths: list[Path], out: Path) -> None:
    """Everything into memory, add, save."""
    loaded = [load_file(path) for path in paths]

    def mean(name: str) -> Tensor:
        return reduce(torch.add, (tensors[name].float() for tensors in loaded)).div_(len(loaded)).half()

    save_file({name: mean(name) for name in loaded[0]}, out)


def with_peft(method: str) -> Callable[[list[Path], Path], None]:
    """PEFT's function on one tensor after the other."""

    def run(paths: list[Path], out: Path) -> None:
        function = getattr(load_merge_utils(), method)
        files = [safe_open(path, framework="pt") for path in paths]
        weights = torch.ones(len(paths))
        merged: dict[str, Tensor] = {}
        for name in files[0].keys():  # noqa: SIM118 - a safetensors file is not a mapping
            merged[name] = function([file.get_tensor(name).float() for file in files], weights, density=DENSITY).half()
        save_file(merged, out)

    return run


def load_merge_utils() -> Any:
    """`peft.utils.merge_utils` by its path: importing all of PEFT would count its models as memory."""
    package = find_spec("peft")
    if package is None or package.origin is None:
        sys.exit("this benchmark compares with PEFT; install safepatch[test]")
    spec = spec_from_file_location("merge_utils", Path(package.origin).parent / "utils" / "merge_utils.py")
    if spec is None or spec.loader is None:
        sys.exit("the installed PEFT has no merge_utils; install the version in constraints.txt")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_sd_mecha(paths: list[Path], out: Path) -> None:
    """sd-mecha's streamed weighted sum of the same files."""
    import sd_mecha  # pyright: ignore[reportMissingImports] - compared with where it is installed

    recipe = sd_mecha.n_average(*(sd_mecha.model(path) for path in paths))
    sd_mecha.merge(recipe, output=out)


WAYS: dict[str, tuple[Callable[[list[Path], Path], object], bool]] = {
    "linear": (ours("linear"), True),
    "linear, with the conflict report": (ours("linear", conflicts=True), True),
    "linear: load all, add, save (a)": (load_all, False),
    "linear: sd-mecha (b)": (with_sd_mecha, False),
    "ties": (ours("ties"), True),
    "ties: PEFT (c)": (with_peft("ties"), False),
    "dare": (ours("dare"), True),
    "dare: PEFT (c)": (with_peft("dare_linear"), False),
}
RATIOS = {
    "linear_vs_loadall": ("linear: load all, add, save (a)", "linear"),
    "linear_vs_sd_mecha": ("linear: sd-mecha (b)", "linear"),
    "ties_vs_peft": ("ties: PEFT (c)", "ties"),
    "dare_vs_peft": ("dare: PEFT (c)", "dare"),
}


# Measuring


def run_one(way: str, paths: list[Path], out: Path) -> dict[str, float]:
    """Seconds and peak extra MB of one merge in this process."""
    function, _ = WAYS[way]
    before = peak_mb()
    start = time.perf_counter()
    function(paths, out)
    return {"seconds": time.perf_counter() - start, "peak_extra_mb": peak_mb() - before}


def run_apart(way: str, paths: list[Path], out: Path) -> dict[str, float]:
    """`run_one` in a process of its own."""
    command = [sys.executable, __file__, "--one", way, "--out", str(out), *map(str, paths)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """The largest resident size of this process so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(ways: list[str], paths: list[Path], out: Path, runs: int, apart: bool) -> dict[str, dict[str, float]]:
    """For every way its fastest time and largest memory of `runs`, the ways in turn, `apart` in fresh processes."""
    measured: dict[str, dict[str, float]] = {}
    for _ in range(runs):
        for way in ways:
            new = run_apart(way, paths, out) if apart else run_one(way, paths, out)
            old = measured.setdefault(way, new)
            seconds, peak = min(old["seconds"], new["seconds"]), max(old["peak_extra_mb"], new["peak_extra_mb"])
            measured[way] = {"seconds": seconds, "peak_extra_mb": peak}
            out.unlink()
    return measured


def main(arguments: argparse.Namespace) -> None:
    """Write the patches, measure, print the table."""
    shapes = control_shapes(FAMILIES[arguments.size])
    scale = 0.1 if arguments.quick else arguments.scale  # of both sides of a matrix
    shapes = {name: _scaled(shape, scale) for name, shape in shapes.items()}
    size = 2 * sum(map(math.prod, shapes.values()))
    ways = [way for way in WAYS if way != "linear: sd-mecha (b)" or find_spec("sd_mecha")]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        needed, free = (arguments.patches + 2) * size, shutil.disk_usage(folder).free
        if needed > free:
            sys.exit(f"{needed / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free; give --folder")
        paths = write_patches(Path(folder), shapes, arguments.patches)
        measured = measure(ways, paths, Path(folder) / "merged.safetensors", arguments.runs, not arguments.quick)
    if arguments.quick:
        print("a quick run: its figures mean nothing")
    moved = (arguments.patches + 1) * size / 1e9
    print(
        f"{arguments.patches} x {size / 1e6:.0f} MB float16, {len(shapes)} tensors, {torch.get_num_threads()} threads"
    )
    print(f"{'way':<36}{'seconds':>9}{'GB/s':>7}{'extra MB':>10}  hashed")
    for way, values in measured.items():
        seconds, extra = values["seconds"], values["peak_extra_mb"]
        print(f"{way:<36}{seconds:>9.2f}{moved / seconds:>7.2f}{extra:>10.0f}  {'yes' if WAYS[way][1] else 'no'}")
    ratios = {name: measured[a]["seconds"] / measured[b]["seconds"] for name, (a, b) in RATIOS.items() if a in measured}
    for name in RATIOS:
        print(f"{name:<20} {ratios[name]:.2f}" if name in ratios else f"{name:<20} not measured: it is not installed")
    if arguments.json:
        peak = {name: max(v["peak_extra_mb"] for w, v in measured.items() if w == name) for name in ("linear", "ties")}
        record = {**{name: ratios.get(name) for name in RATIOS}, "peak_extra_mb": max(peak.values()), "ways": measured}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")


def _scaled(shape: tuple[int, ...], scale: float) -> tuple[int, ...]:
    return tuple(side if side < 16 else max(1, round(side * scale)) for side in shape)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(FAMILIES), default="sd15")
    parser.add_argument("--patches", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of every side of a matrix")
    parser.add_argument("--quick", action="store_true", help="scale 0.1 and one process: a trial, not a measurement")
    parser.add_argument("--folder", help="where the files are put; by default the system's temporary folder")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(run_one(given.one, given.paths, given.out)))
    else:
        main(given)
