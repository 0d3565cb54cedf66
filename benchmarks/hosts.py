"""What the benchmarks hang patches on: UNets of real structures with random weights, and just enough of a pipeline."""

import json
from typing import Any

from diffusers import DDIMScheduler
from torch import nn

from safepatch.models.checkpoint import CONFIGS


class Pipe:
    """As much of a pipeline as a handle looks at; `guided` if a batch begins with the negative prompt's rows."""

    def __init__(self, unet: Any, guided: bool) -> None:
        self.unet, self.scheduler, self.do_classifier_free_guidance = unet, DDIMScheduler(), guided
        self.vae = self.text_encoder = self.tokenizer = nn.Identity()  # never run
        self.vae.decoder = nn.Identity()


def unet_config(family: str) -> dict[str, Any]:
    """The UNet's configuration of `sd1`, `sd2` or `sdxl`."""
    return json.loads((CONFIGS / f"{family}.json").read_text())["unet"]
