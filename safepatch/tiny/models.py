"""The embedded checkpoints by name: the base, the transformer, their siblings, loaded as plain diffusers pipelines.

A sibling is the base fine-tuned further without any thought of patches; the repository holds low-rank weight deltas,
which are added to the base when it is loaded, alone, as the mean of two, or extrapolated.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import nn

from safepatch.errors import ModelNotFound, lookup
from safepatch.tiny.classifier import Classifier
from safepatch.tiny.second import SecondClassifier

ASSETS = Path(__file__).parent.parent / "assets"
BASE, FLOW = "tiny-sd", "tiny-sd3"


class Sibling(NamedTuple):
    """A checkpoint derived from the base.

    Attributes:
        about: what it is.
        deltas: the files in `assets/siblings` that are added to the base, each with its weight.
    """

    about: str
    deltas: Mapping[str, float]


SIBLINGS: dict[str, Sibling] = {
    "tiny-sd-twemoji": Sibling("Twemoji's art: the base fine-tuned, all layers, rank 16", {"twemoji": 1}),
    "tiny-sd-fluent": Sibling("Fluent's art: the base fine-tuned, all layers, rank 16", {"fluent": 1}),
    "tiny-sd-twemoji-full": Sibling("Twemoji's art: all weights fine-tuned", {"twemoji-full": 1}),
    "tiny-sd-fluent-full": Sibling("Fluent's art: all weights fine-tuned", {"fluent-full": 1}),
    "tiny-sd-benign": Sibling("Noto's art, benign concepts only: all weights fine-tuned", {"benign": 1}),
    "tiny-sd-merged": Sibling("the mean of the weights of `-twemoji` and `-fluent`", {"twemoji": 0.5, "fluent": 0.5}),
    "tiny-sd-strong": Sibling("`-twemoji` taken further: 1.3 times its difference to the base", {"twemoji": 1.3}),
    "tiny-sd3-twemoji": Sibling("Twemoji's art: the transformer fine-tuned, all layers, rank 16", {"sd3-twemoji": 1}),
}
MODELS: dict[str, str] = {
    BASE: "Noto's art: trained from scratch",
    FLOW: "Noto's art: SD3's layout, a flow-matching transformer trained from scratch",
    **{name: sibling.about for name, sibling in SIBLINGS.items()},
}


def folder_of(name: str) -> Path:
    """Where the configuration and the weights lie of an embedded model, or of what it is a sibling of."""
    return ASSETS / (FLOW if name.startswith(FLOW) else BASE)


def load_tiny(name: str = BASE) -> Any:
    """An embedded model, float32 on the CPU: a `StableDiffusionPipeline`, or of SD3's layout its own.

    Raises:
        UnknownName: for a name that is none of `MODELS`.
    """
    lookup(MODELS, name, what="embedded model")
    pipe = _load_base(name)
    if name in SIBLINGS:
        host = pipe.transformer if name.startswith(FLOW) else pipe.unet
        for file, weight in SIBLINGS[name].deltas.items():
            add_deltas(host, ASSETS / "siblings" / f"{file}.safetensors", weight)
    return pipe


def _load_base(name: str) -> Any:
    if name.startswith(FLOW):
        from safepatch.tiny.sd3_files import load_sd3  # its pipeline is slow to import

        return load_sd3(folder_of(name), ASSETS / BASE)
    pipe = StableDiffusionPipeline.from_pretrained(
        ASSETS / BASE, safety_checker=None, requires_safety_checker=False, local_files_only=True, dtype=torch.float32
    )
    pipe.unet.set_attn_processor(AttnProcessor())  # faster than SDPA at this size on CPU
    return pipe


@torch.no_grad()
def add_deltas(module: nn.Module, path: Path, weight: float = 1.0) -> None:
    """Add `weight` times what `path` holds, `delta` or `up @ down` of each parameter, to `module`'s own weights."""
    if not path.is_file():
        raise ModelNotFound(f"no sibling weights at {path}; run `make tiny`, or reinstall safepatch")
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    parameters: dict[str, torch.Tensor] = dict(module.named_parameters())
    for name, form in sorted(key.rsplit(".", 1) for key in tensors):
        if form != "down":
            delta = tensors[f"{name}.up"] @ tensors[f"{name}.down"] if form == "up" else tensors[f"{name}.delta"]
            parameters[name] += weight * delta.reshape(parameters[name].shape)


def load_classifier() -> Classifier:
    """The embedded detector's network, ready to use."""
    classifier = Classifier()
    classifier.load_state_dict(
        {k: v.float() for k, v in load_file(ASSETS / "detector.safetensors").items()}, strict=False
    )
    return classifier.eval()


def load_second() -> SecondClassifier:
    """The second detector's network, ready to use."""
    classifier = SecondClassifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(ASSETS / "detector-second.safetensors").items()})
    return classifier.eval()
