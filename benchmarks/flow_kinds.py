"""What each kind of patch adds to a step of SD3.5 and Flux at their real sizes: `python benchmarks/flow_kinds.py`.

Counted on meta tensors at 1024 x 1024 pixels, all rows corrected (no guidance); megabytes as float16, with a text gate.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from safepatch.diffusion import FLUX_EDGE
from safepatch.models.flow_file import CONFIGS
from safepatch.patch import PATCH_KINDS
from safepatch.patch.host import patched_prediction
from safepatch.training.estimate import inputs, meta_host, told

GATE, INSTRUCTION = 32, 154  # channels of a gate; text states of an instruction
_SD35 = {"qk_norm": "rms_norm"}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "SD3 medium": ("sd3", {}),
    "SD3.5 medium": ("sd3", {**_SD35, "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384}),
    "SD3.5 large": ("sd3", {**_SD35, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}),
    "Flux dev": ("flux", {}),
}


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def count(family: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Operations added, as a share of the base's, and megabytes, by kind."""
    config = json.loads((CONFIGS / f"{family}.json").read_text(encoding="utf-8"))["transformer"] | sizes
    host = meta_host(config, FLUX_EDGE, torch.float32)
    rows, found = inputs(host, 1, told(config)[0]), dict[str, float]()
    base = flops(lambda: host.predict(*rows))
    instruction = torch.zeros(1, INSTRUCTION, config["joint_attention_dim"], device="meta")
    for kind in PATCH_KINDS:
        patch = PATCH_KINDS[kind].from_unet(host.unet, empty=True).to("meta")
        found[kind] = flops(lambda p=patch: patched_prediction(host, p, *rows, instruction)) / base - 1
        patch.add_gate(host.unet, GATE)
        found[f"{kind}, MB"] = sum(parameter.numel() for parameter in patch.parameters()) * 2 / 1e6
    return found


def main() -> None:
    """Count and print."""
    print("| size | " + " | ".join(f"{kind}, FLOPs | MB" for kind in PATCH_KINDS) + " |\n|" + "---|" * 7)
    for name, (family, sizes) in SIZES.items():
        found = count(family, sizes)
        cells = [f"+{found[kind]:.2%} | {found[f'{kind}, MB']:.0f}" for kind in PATCH_KINDS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
