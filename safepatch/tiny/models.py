"""The embedded checkpoints by name: the base and its siblings, loaded as plain diffusers pipelines.

A sibling is the base fine-tuned on another vendor's art without any thought of patches; the repository holds its
low-rank weight deltas, which are added to the base when it is loaded.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import nn

from safepatch.errors import ModelNotFound, lookup
from safepatch.tiny.classifier import Classifier

ASSETS = Path(__file__).parent.parent / "assets"
BASE = "tiny-sd"
SIBLINGS: dict[str, str] = {"tiny-sd-twemoji": "twemoji", "tiny-sd-fluent": "fluent"}
MODELS: dict[str, str] = {BASE: "noto", **SIBLINGS}


def load_tiny(name: str = BASE) -> StableDiffusionPipeline:
    """The embedded base model or one of its siblings, float32 on the CPU."""
    lookup(MODELS, name, what="embedded model")
    pipe = StableDiffusionPipeline.from_pretrained(
        ASSETS / BASE, safety_checker=None, requires_safety_checker=False, local_files_only=True, dtype=torch.float32
    )
    pipe.unet.set_attn_processor(AttnProcessor())  # faster than SDPA at this size on CPU
    if name in SIBLINGS:
        add_low_rank(pipe.unet, ASSETS / "siblings" / f"{SIBLINGS[name]}.safetensors")
    return pipe


@torch.no_grad()
def add_low_rank(module: nn.Module, path: Path) -> None:
    """Add `up @ down` of each parameter in `path` to `module`'s own weights."""
    if not path.is_file():
        raise ModelNotFound(f"no sibling weights at {path}; run `make tiny`, or reinstall safepatch")
    tensors = load_file(path)
    parameters: dict[str, torch.Tensor] = dict(module.named_parameters())
    for name in sorted(key.removesuffix(".up") for key in tensors if key.endswith(".up")):
        delta = tensors[f"{name}.up"].float() @ tensors[f"{name}.down"].float()
        parameters[name] += delta.reshape(parameters[name].shape)


def load_classifier() -> Classifier:
    """The embedded detector's network, ready to use."""
    classifier = Classifier()
    classifier.load_state_dict(
        {k: v.float() for k, v in load_file(ASSETS / "detector.safetensors").items()}, strict=False
    )
    return classifier.eval()
