"""`safepatch fuse` and `safepatch check` at Stable Diffusion 1.5's real size: seconds and peak memory of the command.

    python benchmarks/fuse.py [--rounds 3] [--folder DIR] [--json FILE] [--markdown FILE]

A folder with a random UNet, as float16 and as float32, and a random lora patch of rank 16; each command in a process of
its own, the least of some rounds. What importing alone takes stands beside. Writing goes to the disk of `--folder`
(/dev/shm has none); everything is removed at the end. Takes minutes and 11 GB.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import empty_unet, family, fingerprint
from safepatch.models.checkpoint import CONFIGS
from safepatch.patch import LoraPatch
from safepatch.patch.drift import ENCODER, sketch

RANK = 16
WATCHED = """
import atexit, re, sys
from pathlib import Path
atexit.register(lambda: print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
from safepatch.cli import main
main() if sys.argv[1:] else __import__("safepatch.runtime.fuse")
"""
DTYPES = {"float16": torch.float16, "float32": torch.float32}
SMALL = {"block_out_channels": [32, 32, 64, 64]}


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def random(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Small numbers that repeat."""
    size = torch.Size(shape).numel()
    noise = 0.02 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(size))
    return noise.to(dtype).repeat(-(-size // len(noise)))[:size].reshape(shape).contiguous()


def write_model(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Path:
    """A pipeline's folder of which the UNet alone is there."""
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}')
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    weights = {name: random(weight.shape, dtype) for name, weight in empty_unet(config).named_parameters()}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def write_patch(path: Path, config: dict[str, Any]) -> Path:
    """A lora patch of random factors for every layer."""
    unet = empty_unet(config)
    shapes = {name: weight.shape for name, weight in unet.named_parameters()}
    tensors = {}
    for layer in LoraPatch.from_unet(unet, rank=RANK).layers:
        out, width = shapes[f"{layer}.weight"][:2]
        tensors[f"lora.{layer}.weight.up"] = random((out, RANK), torch.float16)
        tensors[f"lora.{layer}.weight.down"] = random((RANK, width), torch.float16)
    full = {name.removesuffix(".up"): [*shapes[name[5:-3]]] for name in tensors if name.endswith(".up")}
    base = {"family": family(config), ENCODER: sketch(unet, lambda name: random(shapes[name], torch.float16))}
    info = PatchInfo("lora", {"weapons": "no weapons"}, fingerprint(config), base, {"sees": "prompt"}, shapes=full)
    return PatchArtifact(tensors, info).save(path)


def cost(words: Sequence[object]) -> Cost:
    """Run the command line (on Linux), or only import what it needs; raises `SystemExit` when it fails."""
    start, busy = time.perf_counter(), _busy()
    done = subprocess.run([sys.executable, "-c", WATCHED, *map(str, words)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} ended with {done.returncode}")
    return Cost(time.perf_counter() - start, _busy() - busy, int(done.stdout.split()[-1]) * 1024)


def _busy() -> float:
    """CPU seconds of all processes that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def least(words: Sequence[object], rounds: int, made: Path | None = None) -> Cost:
    """The least of some rounds, each figure by itself; what a round `made` is removed."""
    found = []
    for _ in range(rounds):
        found.append(cost(words))
        if made:
            shutil.rmtree(made)
    return Cost(*map(min, zip(*found, strict=True)))


def measure(place: Path, config: dict[str, Any], rounds: int) -> dict[str, Cost]:
    """Every command's cost by what it does."""
    patch, out = write_patch(place / "patch.safetensors", config), place / "out"
    found = {"importing alone": least([], rounds)}
    for name, dtype in DTYPES.items():
        model = write_model(place / name, config, dtype)
        found[f"check, {name}"] = least(["check", patch, "--model", model], rounds)
        words = ["fuse", "--patch", patch, "--model", model, "-o", out]
        found[f"fuse, {name}"] = least(words, rounds, made=out)
        shutil.rmtree(model)
    return found


def table_of(found: dict[str, Cost]) -> str:
    """As markdown."""
    base = found["importing alone"]
    lines = [
        "| command | seconds | CPU seconds | beyond importing | peak, MB | beyond importing |",
        "|---|---|---|---|---|---|",
    ]
    for name, (seconds, busy, peak) in found.items():
        more = (f"{busy - base.cpu_seconds:.1f}", f"{(peak - base.peak_bytes) / 1e6:.0f}")
        lines.append(f"| {name} | {seconds:.1f} | {busy:.1f} | {more[0]} | {peak / 1e6:.0f} | {more[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Make, measure, print, write, remove."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of which the least counts")
    parser.add_argument("--folder", type=Path, help="where to write; by default where temporary files go")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--small", action="store_true", help="a small UNet: whether the script works, not what it says")
    options = parser.parse_args()
    config = json.loads((CONFIGS / "sd1.json").read_text())["unet"] | (SMALL if options.small else {})
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), config, options.rounds)
    table = table_of(found)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n")
    if options.json:
        figures = {name: each._asdict() for name, each in found.items()}
        options.json.write_text(json.dumps({"small": options.small, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
