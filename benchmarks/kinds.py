"""What each kind of patch costs per denoising step, at three structures: `python benchmarks/kinds.py [--json FILE]`.

FLOPs are counted on meta tensors, so the large structures need no memory; times are medians of ratios to the base's own
step beside it, in one run, on random weights. Every row is corrected (no guidance): under guidance the patch runs on
half of the rows. Stable Diffusion 1's structure is timed on 32 x 32 latents (8 GB of memory, minutes), SDXL's with
`--time sd15 sdxl`; the ratios in the JSON file are of the largest structure that was timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from hosts import Pipe, unet_config
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from safepatch.patch import PATCH_KINDS, Features, LoraPatch, Patch
from safepatch.patch.host import answered
from safepatch.patch.lora import updated
from safepatch.runtime.handle import Handle
from safepatch.runtime.parts import ActivePart
from safepatch.tiny.unet import new_unet

RANK, GATE, TOKENS, MERGED = 64, 32, 77, 5
STRUCTURES = {"sd15": "sd1", "sdxl": "sdxl"}  # name in the figures: family
VARIANTS: dict[str, dict[str, Any]] = {
    "lite": {"kind": "lite", "rank": RANK},
    "five lite merged": {"kind": "lite", "rank": RANK, "groups": MERGED},
    "control": {"kind": "control"},
    "lora": {"kind": "lora"},
    "gated lite, benign": {"kind": "lite", "rank": RANK, "gate": GATE},
    "gated control, benign": {"kind": "control", "gate": GATE},
    "gated lora, benign": {"kind": "lora", "gate": GATE},
}


def new_host(structure: str, device: str) -> Any:
    """A UNet with random weights, frozen."""
    family = STRUCTURES.get(structure)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(unet_config(family)) if family else new_unet()
    return unet.eval().requires_grad_(False)


def new_inputs(unet: Any, rows: int, side: int, device: str) -> tuple[tuple, dict[str, Any]]:
    """Arguments of one UNet call."""
    width = unet.config.cross_attention_dim
    inputs = (torch.zeros(rows, 4, side, side), torch.full((rows,), 500), torch.zeros(rows, TOKENS, width))
    added = {"text_embeds": torch.zeros(rows, 1280), "time_ids": torch.zeros(rows, 6)}
    added = {name: value.to(device) for name, value in added.items()} if unet.config.addition_embed_type else None
    return tuple(value.to(device) for value in inputs), {"added_cond_kwargs": added}


def new_patch(unet: Any, kind: str, **layout: Any) -> Patch:
    """A fresh patch, frozen."""
    return PATCH_KINDS[kind].from_unet(unet, **layout).eval().requires_grad_(False)


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def count(structure: str) -> dict[str, float]:
    """FLOPs of each variant over the base's, and sizes in MB as float16."""
    unet = new_host(structure, "meta")
    inputs, extra = new_inputs(unet, 1, unet.config.sample_size, "meta")
    shown: list[Features] = []
    with torch.no_grad(), answered(unet, shown.append):
        unet(*inputs, **extra)
    base, found = flops(lambda: unet(*inputs, **extra)), {}
    for name, options in VARIANTS.items():
        patch = new_patch(unet, **options).to("meta")
        if isinstance(patch, LoraPatch) and not patch.gate:
            with updated(unet, patch):
                found[name] = flops(lambda: unet(*inputs, **extra)) / base
            continue
        states = torch.zeros(1, TOKENS * patch.groups, unet.config.cross_attention_dim, device="meta")
        if patch.gate is None:
            added = extra["added_cond_kwargs"]
            work = lambda p=patch, s=states, a=added: p(*inputs, s, a, shown[0])  # noqa: E731
        else:
            work = lambda p=patch: p.gate(shown[0].mid, inputs[1], inputs[2])  # type: ignore[misc] # noqa: E731
        found[name] = 1 + flops(work) / base
    sizes = {kind: new_patch(unet, kind, gate=GATE) for kind in PATCH_KINDS}
    megabytes = {f"{kind}, MB": sum(p.numel() for p in patch.parameters()) * 2 / 1e6 for kind, patch in sizes.items()}
    return {**found, **megabytes}


def measure(structure: str, rows: int, side: int, rounds: int) -> dict[str, float]:
    """Step time of each variant over that of the base right before it, medians over rounds."""
    unet = new_host(structure, "cpu")
    inputs, extra = new_inputs(unet, rows, side, "cpu")
    pipe, ratios = Pipe(unet, guided=False), {name: [] for name in VARIANTS}
    patches = {name: new_patch(unet, **options) for name, options in VARIANTS.items()}

    def step() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            unet(*inputs, **extra)
        return time.perf_counter() - start

    step()
    for _ in tqdm(range(rounds), desc=structure):
        for name, patch in patches.items():
            states = torch.zeros(1, TOKENS * patch.groups, unet.config.cross_attention_dim)
            closed = torch.ones(patch.groups) * 2  # a threshold that no probability reaches
            base = step()
            with Handle(pipe, [ActivePart(patch, states, thresholds=closed)], fail_closed=False):
                ratios[name].append(step() / base)
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    """Count, time, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--time", nargs="*", default=["sd15"], choices=list(STRUCTURES), help="large structures to time"
    )
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    counted = {name: count(name) for name in ("embedded", *STRUCTURES)}
    timed = {"embedded": measure("embedded", 8, 16, options.rounds)}
    timed |= {name: measure(name, 1, 32, max(3, options.rounds // 5)) for name in options.time}
    print("| structure | lite, MB | " + " | ".join(VARIANTS) + " |\n|" + "---|" * (len(VARIANTS) + 2))
    for name, figures in counted.items():
        cells = [f"{figures[v]:.4f}" for v in VARIANTS]
        print(f"| {name}, FLOPs | {figures['lite, MB']:.1f} | " + " | ".join(cells) + " |")
    for name, figures in timed.items():
        print(f"| {name}, time | | " + " | ".join(f"{figures[v]:.3f}" for v in VARIANTS) + " |")
    largest = timed[[name for name in ("embedded", *STRUCTURES) if name in timed][-1]]
    if options.json:
        written = {
            "lite_vs_base": largest["lite"],
            "control_vs_base": largest["control"],
            "gated_benign_vs_base": largest["gated control, benign"],
            "lite_mb_sd15": counted["sd15"]["lite, MB"],
            "lite_flops_share_sd15": counted["sd15"]["lite"] - 1,
            "lite_flops_share_sdxl": counted["sdxl"]["lite"] - 1,
            "kinds": {
                kind: {
                    "mb_sd15": f"{counted['sd15'][f'{kind}, MB']:.1f}",
                    **{f"flops_{name}": f"+{counted[name][kind] - 1:.1%}" for name in STRUCTURES},
                }
                for kind in ("control", "lite", "lora")
            },
            "flops": counted,
            "time": timed,
        }
        options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
