"""What a patch costs per denoising step, against the bare UNet and against diffusers' own ControlNet.

    python benchmarks/runtime.py                       # SD1.5's structure, random weights, 16 x 16 latents
    python benchmarks/runtime.py --family sdxl --width 0.5
    python benchmarks/runtime.py --json out.json       # ratios as JSON

A step is what a pipeline under guidance does: one call of the UNet with two rows, the negative prompt's and the
prompt's, and before it, for a ControlNet, one call of that. Nobody says here which row is the prompt's, so a patch
corrects both, as in a loop of one's own; in a pipeline's it runs on the prompt's only. A ControlNet pipeline runs its
ControlNet on both rows, or with `guess_mode` on the prompt's only; both are measured. All ways are taken in turn in one
process on one thread, and a ratio is the median over the rounds of the two times of one round.
Times are the process's own CPU time, so that a busy machine counts less; torch counts the floating-point operations.

Loading is opening a float16 file of that patch (its hash checked) and rebasing it onto the UNet, in float16 as it is
served and in float32, against reading the file once from start to end. Both begin with a file that is not in the page
cache; these are seconds of the clock, with torch's usual threads.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from hosts import Pipe, unet_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.patch import ControlPatch, LitePatch, Patch
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.runtime.handle import Handle
from safepatch.runtime.parts import ActivePart

TOKENS = 77
PATCHES = 3
GROUPS = 32  # of every group norm; channels are a multiple of it
CHUNK = 2**24  # bytes per read


def new_unet(family: str, width: float) -> UNet2DConditionModel:
    """A UNet of the family's structure with random float32 weights, its channels about `width` times as many."""
    config = unet_config(family)
    config["block_out_channels"] = [round(width * n / GROUPS) * GROUPS for n in config["block_out_channels"]]
    return filled(lambda: UNet2DConditionModel.from_config(config))


@torch.no_grad()
def filled(build: Callable[[], Any]) -> Any:
    """The module that `build` makes, without its own slow initialization: small random weights."""
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.uniform_(-0.02, 0.02)
    return module


class Inputs:
    """One step's inputs: two rows of equal latents, text states, and SDXL's extra conditions where there are any."""

    def __init__(self, unet: UNet2DConditionModel, side: int) -> None:
        self.sample = torch.randn(1, 4, side, side).repeat(2, 1, 1, 1)
        self.states = torch.randn(2, TOKENS, unet.config["cross_attention_dim"])
        self.hint = torch.rand(2, 3, 8 * side, 8 * side)
        self.added = None
        if unet.config["addition_embed_type"]:
            times = 6 * unet.config["addition_time_embed_dim"]
            width = unet.config["projection_class_embeddings_input_dim"] - times
            self.added = {"text_embeds": torch.randn(2, width), "time_ids": torch.ones(2, 6)}

    def run(self, unet: Any, **residuals: Any) -> Tensor:
        """The UNet's prediction."""
        options = {"added_cond_kwargs": self.added, "return_dict": False, **residuals}
        return unet(self.sample, 500, encoder_hidden_states=self.states, **options)[0]

    def control(self, unet: Any, net: Any, rows: slice) -> Tensor:
        """The UNet's prediction with a ControlNet that was run on `rows`; in guess mode the other row gets zeros."""
        added = {key: value[rows] for key, value in self.added.items()} if self.added else None
        inputs = (self.sample[rows], 500, self.states[rows], self.hint[rows])
        guess = rows.start == 1
        down, mid = net(*inputs, guess_mode=guess, added_cond_kwargs=added, return_dict=False)
        if guess:  # as StableDiffusionControlNetPipeline does
            down = [torch.cat((torch.zeros_like(each), each)) for each in down]
            mid = torch.cat((torch.zeros_like(mid), mid))
        return self.run(unet, down_block_additional_residuals=down, mid_block_additional_residual=mid)


class Step(NamedTuple):
    """One way to take a step.

    Attributes:
        run: takes it.
        attach: what must be attached meanwhile; not part of the time.
        extra_mb: weights beside the UNet's.
    """

    run: Callable[[], object]
    attach: Callable[[], AbstractContextManager] = nullcontext
    extra_mb: float = 0.0


def new_steps(unet: UNet2DConditionModel, side: int) -> dict[str, Step]:
    """The ways to take a step, by name."""
    pipe, inputs = Pipe(unet, guided=True), Inputs(unet, side)
    control, lite = ControlPatch.from_unet(unet), LitePatch.from_unet(unet)
    lites = LitePatch.from_unet(unet, groups=PATCHES)
    net = filled(lambda: ControlNetModel.from_unet(unet, load_weights_from_unet=False))

    def controlled(rows: slice) -> Step:
        return Step(lambda: inputs.control(unet, net, rows), extra_mb=megabytes(net))

    def patched(patches: list[Patch], scale: float = 1.0, instructions: int = 1) -> Step:
        states = torch.randn(1, instructions * TOKENS, unet.config["cross_attention_dim"])
        parts = [ActivePart(patch.eval().requires_grad_(False), states) for patch in patches]
        size = sum(map(megabytes, patches))
        return Step(lambda: inputs.run(unet), lambda: Handle(pipe, parts, scale, fail_closed=False), size)

    return {
        "base": Step(lambda: inputs.run(unet)),
        "ControlNet, both rows": controlled(slice(0, 2)),
        "ControlNet, guess mode": controlled(slice(1, 2)),
        "control patch": patched([control]),
        "control patch, scale 0": patched([control], scale=0.0),
        "control, 3 merged into one": patched([control], instructions=PATCHES),
        "control, 3 separate": patched([control] * PATCHES),
        "lite patch": patched([lite]),
        "lite, 3 merged into one": patched([lites], instructions=PATCHES),
    }


def megabytes(module: nn.Module) -> float:
    """Of the module's weights."""
    return sum(parameter.nbytes for parameter in module.parameters()) / 1e6


def clocked(step: Step) -> float:
    """CPU seconds of one step."""
    with step.attach():
        start = time.process_time()
        step.run()
        return time.process_time() - start


def counted(step: Step) -> float:
    """Floating-point operations of one step, in units of 10^9."""
    with step.attach(), FlopCounterMode(display=False) as counter:
        step.run()
    return counter.get_total_flops() / 1e9


def measure_loading(unet: Any, folder: Path, rounds: int) -> dict[str, float]:
    """Seconds of reading a patch's file and of loading it, and the peak of memory that loading adds, in MB."""
    patch = ControlPatch.from_unet(unet)
    for weights in patch.parameters():
        nn.init.normal_(weights, std=0.01)  # zeros, which a fresh one has, are refused
    path = to_artifact(patch, unet, {"weapons": "no weapons"}).astype(torch.float16)
    path = path.save(folder / "patch.safetensors")
    figures = {"file_mb": path.stat().st_size / 1e6}
    for dtype in (torch.float32, torch.float16):
        host, name = unet.to(dtype), str(dtype).removeprefix("torch.")
        times: dict[str, list[float]] = {"read": [], f"load_{name}": []}
        grown = 0.0
        for _ in range(rounds):
            times["read"].append(clocked_cold(path, partial(read, path))[0])
            before = reset_peak_mb()
            seconds, patch = clocked_cold(path, partial(load, path, host, dtype))
            times[f"load_{name}"].append(seconds)
            grown = max(grown, peak_mb() - before)
            figures[f"patch_mb_{name}"] = megabytes(patch)
            del patch
        figures |= {key: statistics.median(values) for key, values in times.items()}
        figures |= {f"peak_mb_{name}": grown, f"load_vs_read_{name}": figures[f"load_{name}"] / figures["read"]}
    return figures


def load(path: Path, unet: Any, dtype: torch.dtype) -> Patch:
    """The patch of a file, on `unet`."""
    return from_artifact(PatchArtifact.open(path), unet, dtype)


def clocked_cold(path: Path, job: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the clock that `job` takes while `path` is not in the page cache, and what it returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    made = job()
    return time.perf_counter() - start, made


def read(path: Path) -> None:
    """Read a file once, from start to end, into one buffer."""
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def reset_peak_mb() -> float:
    """Make the peak resident size start over from here; returns the resident size."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def peak_mb() -> float:
    """The largest resident size since the last reset, mapped files included (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@torch.no_grad()
def main(options: argparse.Namespace) -> None:
    """Build, measure in turn, print."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    unet = new_unet(options.family, options.width)
    ways = new_steps(unet, options.latents)
    flops = {name: counted(step) for name, step in ways.items()}  # the warm-up too
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, step in ways.items():
            times[name].append(clocked(step))

    def ratio(way: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[way], times[other], strict=True))

    print(f"{options.family}, {megabytes(unet) / 4:.0f} M parameters, width {options.width}, float32, "
          f"{options.latents} x {options.latents} latents, {options.rounds} rounds")  # fmt: skip
    print("| step | CPU seconds | x base | GFLOP | x base | extra MB |\n|---|---|---|---|---|---|")
    for name, values in times.items():
        cells = [f"{statistics.median(values):.2f}", f"{ratio(name, 'base'):.3f}", f"{flops[name]:.0f}"]
        print(
            f"| {name} | {' | '.join(cells)} | {flops[name] / flops['base']:.3f} | {ways[name].extra_mb:.0f} |",
            flush=True,
        )
    sizes = {name: step.extra_mb for name, step in ways.items()}
    del ways, step  # their weights: memory for what follows
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        loading = measure_loading(unet, Path(folder), 3)
    print("loading: " + ", ".join(f"{name} {value:.2f}" for name, value in loading.items()))
    ratios = {
        "patched_vs_controlnet": ratio("control patch", "ControlNet, both rows"),
        "patched_vs_controlnet_guess_mode": ratio("control patch", "ControlNet, guess mode"),
        "merged_vs_single": ratio("control, 3 merged into one", "control patch"),
        "separate_vs_single": ratio("control, 3 separate", "control patch"),
        "off_vs_base": ratio("control patch, scale 0", "base"),
        "lite_vs_base": ratio("lite patch", "base"),
        "load_vs_read": loading["load_vs_read_float16"],
    }
    for name, value in ratios.items():
        print(f"{name:<34}{value:.3f}")
    if options.json:
        record = {**ratios, "seconds": times, "gflop": flops, "extra_mb": sizes, "loading": loading, **vars(options)}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd1", "sd2", "sdxl"), default="sd1")
    parser.add_argument("--width", type=float, default=1.0, help="of the channels; 1 is the real size")
    parser.add_argument("--latents", type=int, default=16, help="height and width of the latents; 64 is 512 pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the patch file is put; by default the system's temporary folder")
    parser.add_argument("--json", help="where to write the figures")
    main(parser.parse_args())
