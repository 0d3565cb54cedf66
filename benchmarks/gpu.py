"""What training and applying each kind of patch takes on a GPU, predicted against measured.

    python benchmarks/gpu.py [--json FILE] [--markdown FILE] [--families sd1 sdxl sd3] [--budget SECONDS]

Stable Diffusion 1.5, XL and 3 of real size with random weights in half precision; nothing is downloaded. Of each kind:
time and peak memory of a training step with the host's activations recomputed, and how often the CPU waits for the GPU
within one; latents drawn a second; what the patch adds to a denoising step with its gate open and closed; seconds to
load a file and to attach it. What the budget or the GPU's memory has no room for is left out and named.

Without a GPU it says so and stops; `--small` takes small models on the CPU, to see that the script works.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from real_size import INSTRUCTION, new_pipe, train
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.bank import DataConfig
from safepatch.diffusion import Components, Host, open_host
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.runtime.apply import apply
from safepatch.training.config import TrainingConfig
from safepatch.training.memory import GIB, Plan, device_bytes, predict

FAMILIES = {"sd1": "SD 1.5", "sdxl": "SDXL", "sd3": "SD3 medium"}
KINDS = ("lora", "lite", "control")
WARM, TIMED = 2, 3  # training steps; waits are counted in one more, and another ends that
BATCH = 4  # pairs of a training step, with as many preserved rows
DRAWN, STEPS = 8, 5  # latents drawn at once, and steps of denoising
ROUNDS = 2  # of inference, after one to warm up
GATE = 32
OPEN, CLOSED = 0.0, 1.0  # thresholds that every probability reaches, and none

Figures = dict[str, float | None]


@dataclass
class Bench:
    """One family on one device.

    Attributes:
        pipe: with random weights.
        host: of its parts.
        is_small: whether it is only to be seen whether all of this works.
        precision: `bf16`, `fp16`, or on a CPU `no`.
    """

    pipe: Any
    host: Host
    is_small: bool
    precision: str

    @classmethod
    def of(cls, family: str, is_small: bool) -> "Bench":
        """The family, built on the device."""
        half = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp16"
        precision, device = ("no", "cpu") if is_small else (half, "cuda")
        dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        pipe = new_pipe(family, device, dtype, is_small)
        return cls(pipe, open_host(Components.of(pipe)), is_small, precision)

    def plan(self, kind: str) -> Plan:
        """Of the training that is measured."""
        data = DataConfig(batch_size=DRAWN)
        dtype = self.host.components.compute_dtype
        return Plan(
            kind,
            batch_size=1 if self.is_small else BATCH,
            dtype=dtype,
            mixed_precision=self.precision,
            gradient_checkpointing=True,
            data=data,
        )

    def training(self, kind: str) -> Figures:
        """A training step: seconds, bytes allocated at most, predicted and measured, and waits."""
        plan = self.plan(kind)
        options = TrainingConfig(
            steps=WARM + TIMED + 2,
            batch_size=plan.batch_size,
            learning_rate=1e-4,
            joint_rate=1.0,
            mixed_precision=self.precision,
            gradient_checkpointing=True,
            log_every=1000,
            checkpoint_every=1000,
        )
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            clock = Clock(said)
            train(self.host, kind, options, clock.begins)
        self.host.components.to(self.host.device)  # training puts what it does not need on the CPU
        predicted = predict(self.host.unet.config, plan).learning
        return {"train_seconds": clock.seconds, "predicted_bytes": predicted} | clock.found

    def drawing(self) -> Figures:
        """Latents a second in `STEPS` steps under guidance, and rows of the host a second."""
        prompts, seeds = ["a knife next to a cat"] * DRAWN, list(range(DRAWN))
        reset_peak()
        seconds = timed(lambda: self.host.draw(prompts, seeds, STEPS), 1)
        predicted = predict(self.host.unet.config, self.plan("lite")).drawing
        rows = DRAWN * STEPS * 2
        return {
            "latents_per_second": DRAWN / seconds,
            "rows_per_second": rows / seconds,
            "drawing_bytes": peak(),
            "drawing_predicted_bytes": predicted,
        }

    def inference(self, kind: str) -> Figures:
        """Loading and attaching a file, and a denoising step with the patch over one without."""
        base = timed(self.denoise, ROUNDS)
        with tempfile.TemporaryDirectory() as folder:
            path, seconds = self.file(kind, Path(folder)), dict[str, float]()
            read, artifact = once(lambda: PatchArtifact.open(path))
            attach, handle = once(lambda: apply(self.pipe, artifact, gate_threshold=OPEN))
            handle.remove()
            for name, threshold in (("open", OPEN), ("closed", CLOSED)):
                with apply(self.pipe, artifact, gate_threshold=threshold):
                    seconds[name] = timed(self.denoise, ROUNDS)
        return {
            "load_seconds": read,
            "attach_seconds": attach,
            "base_seconds": base,
            "open_over_base": seconds["open"] / base,
            "closed_over_base": seconds["closed"] / base,
        }

    def file(self, kind: str, folder: Path) -> Path:
        """A gated patch's file, float16, of random weights: zeros, which a fresh one has, are refused."""
        patch = PATCH_KINDS[kind].from_unet(self.host.unet, gate=GATE)
        for weights in patch.parameters():
            torch.nn.init.normal_(weights, std=0.01)
        record = {"gate": {"weapons": {"threshold": 0.5}}}
        made = to_artifact(patch, self.host.unet, {"weapons": INSTRUCTION}, record)
        return made.astype(torch.float16).save(folder / "patch.safetensors")

    def denoise(self) -> Tensor:
        """One latent in `STEPS` steps of the pipeline, under guidance."""
        options = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "latent"}
        return self.pipe("a knife next to a cat", generator=torch.Generator().manual_seed(0), **options).images


class Clock:
    """Tells from the moments at which training steps begin what a step takes.

    Args:
        said: where warnings are recorded.
    """

    def __init__(self, said: list[warnings.WarningMessage]) -> None:
        self.found: Figures = {"train_bytes": None, "waits": None}
        self._said, self._starts = said, list[float]()

    @property
    def seconds(self) -> float:
        """Of a step, those that warm up left out."""
        return (self._starts[WARM + TIMED] - self._starts[WARM]) / TIMED

    def begins(self, step: int) -> None:
        """Of the training loop's step `step` the loss is about to be computed."""
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
            if step == WARM + TIMED + 1:
                self.found["waits"] = sum("synchroniz" in str(each.message) for each in self._said)
            torch.cuda.synchronize()
            if step == WARM:
                torch.cuda.reset_peak_memory_stats()
            if step == WARM + TIMED:
                self.found["train_bytes"] = peak()
                self._said.clear()
                torch.cuda.set_sync_debug_mode("warn")
        self._starts.append(time.perf_counter())


def reset_peak() -> None:
    """Let the peak of allocated memory start over."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> int | None:
    """Bytes allocated at most since then; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def once(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, all of the GPU's part of it, and what it makes."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    made = work()
    wait()
    return time.perf_counter() - start, made


def timed(work: Callable[[], Any], rounds: int) -> float:
    """Least seconds of some rounds, after one to warm up."""
    work()
    return min(once(work)[0] for _ in range(rounds))


def measure(family: str, is_small: bool, ends: float) -> dict[str, Any]:
    """All figures of a family: of drawing, and by kind; what was left out under `left_out`."""
    bench, left_out = Bench.of(family, is_small), list[str]()
    figures: dict[str, Any] = {"drawing": bench.drawing(), "kinds": {}, "left_out": left_out}
    for kind in KINDS:
        found: Figures = {}
        needed = predict(bench.host.unet.config, bench.plan(kind)).needed
        jobs = {"training": lambda k=kind: bench.training(k), "inference": lambda k=kind: bench.inference(k)}
        for name, job in jobs.items():
            if time.monotonic() > ends:
                left_out.append(f"{kind}, {name}: no time left")
            elif name == "training" and needed > (device_bytes() or needed):
                left_out.append(f"{kind}, {name}: needs {needed / GIB:.1f} GiB")
            else:
                found |= job()
                reset_peak()
        figures["kinds"][kind] = found
    return figures


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures as markdown."""
    head = ["model", "kind", "step, s", "peak, GiB", "predicted, GiB", "waits", "load, s", "attach, s"]
    head += ["gate open", "gate closed"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for family, found in results.items():
        for kind, figures in found["kinds"].items():
            get = figures.get
            cells = [shown(get("train_seconds")), shown(get("train_bytes"), GIB), shown(get("predicted_bytes"), GIB)]
            cells += [shown(get("waits"), digits=0), shown(get("load_seconds")), shown(get("attach_seconds"))]
            cells += [f"x {shown(get(f'{name}_over_base'), digits=3)}" for name in ("open", "closed")]
            lines.append(f"| {FAMILIES[family]} | {kind} | {' | '.join(cells)} |")
    for family, found in results.items():
        drawing = found["drawing"]
        sizes = [shown(drawing[name], GIB) for name in ("drawing_bytes", "drawing_predicted_bytes")]
        lines += [
            "",
            f"{FAMILIES[family]}: {drawing['latents_per_second']:.2f} latents a second in {STEPS} steps under guidance "
            f"({drawing['rows_per_second']:.1f} rows), {sizes[0]} GiB, predicted {sizes[1]}.",
            *(f"Left out: {what}." for what in found["left_out"]),
        ]
    return "\n".join(lines)


def shown(value: float | None, unit: float = 1, digits: int = 2) -> str:
    """A figure in `unit`s, or a dash where there is none."""
    return "-" if value is None else f"{value / unit:.{digits}f}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--budget", type=float, default=440, help="seconds after which no further part is begun")
    parser.add_argument("--small", action="store_true", help="small random models on the CPU")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    options = parser.parse_args()
    if options.small:
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    elif not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --small tries the script with small models on the CPU")
    ends = time.monotonic() + options.budget
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, small models"
    results = {family: measure(family, options.small, ends) for family in options.families}
    text = f"{device}, torch {torch.__version__}\n\n{table(results)}"
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        options.json.write_text(json.dumps({"device": device, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
