"""Small random weights of the detectors that bring none: seconds to build, milliseconds to run."""

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from safepatch.detectors.clip import clip_pixels
from safepatch.detectors.multi_headed import Eye, Head, save_heads
from safepatch.detectors.q16 import save_prompts
from safepatch.tiny.text import new_tokenizer

SIZE = 32
HEADS = ("violent", "sexual")
NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def new_pictures(n: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """`n` different pictures in [0, 1], (n, 3, height, width): blocks of random colors with some noise."""
    generator = torch.Generator().manual_seed(seed)
    blocks = nn.functional.interpolate(torch.rand(n, 3, 3, 3, generator=generator), (height, width))
    return (blocks + 0.1 * torch.randn(n, 3, height, width, generator=generator)).clamp(0, 1)


def save_clip(folder: Path, vocabulary: int = 0) -> Path:
    """A `CLIPModel` and its tokenizer in `folder`; the model knows as many tokens as that, or `vocabulary`."""
    tokenizer = new_tokenizer()
    shuffled(CLIPModel(_config(vocabulary or len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_heads_on_clip(folder: Path) -> Path:
    """Heads with random weights, for two labels, beside the small CLIP that they read."""
    clip = save_clip(folder / "clip")
    eye = Eye.open(clip)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = {name: shuffled(Head(eye.width).eval(), 0.05 + place / 50) for place, name in enumerate(HEADS)}
    save_heads(heads, eye, clip, folder)
    return folder


def save_q16(folder: Path) -> Path:
    """Two random prompts beside the small CLIP that they are for."""
    clip = save_clip(folder / "clip")
    width = Eye.open(clip).width
    save_prompts(torch.randn(2, width, generator=torch.Generator().manual_seed(0)), folder, clip)
    return folder


def save_any_of(folder: Path) -> str:
    """What names the small checker and the small CLIP together, each at a threshold of its own."""
    checker, clip = save_safety_checker(folder / "a+b"), save_clip(folder / "clip")
    return f"safety-checker:0.4@{checker}+clip:0.2@{clip}"


def save_onnx(folder: Path) -> Path:
    """A file that `stand_in` answers for."""
    path = folder / "some.onnx"
    path.write_bytes(b"any bytes")
    return path


def stand_in(path: Path) -> Any:
    """Instead of `onnx.open_session`: a network of the layout that the input asks for, with known random answers."""
    weights = torch.randn(22, 3 * 16, generator=torch.Generator().manual_seed(0))

    def network(values: Any) -> Any:
        read = torch.from_numpy(values)
        if read.shape[-1] == 3:  # open_nsfw
            level = torch.sigmoid(read.mean() / 20)
            return torch.stack((1 - level, level))[None].numpy()
        seen = nn.functional.adaptive_avg_pool2d(read, 4).flatten(1)  # NudeNet: three boxes side by side
        boxes = torch.tensor([[60.0, 160, 260], [160, 160, 160], [50, 50, 50], [50, 50, 50]])
        scores = torch.sigmoid((weights @ seen.T)[4:] + torch.arange(3) - 1)
        return torch.cat((boxes, scores))[None].numpy()

    return network


def save_safety_checker(folder: Path) -> Path:
    """A checker in `folder` whose thresholds lie among the cosines of `new_pictures`, so that verdicts differ."""
    new_safety_checker().save_pretrained(folder)
    return folder


@torch.no_grad()
def new_safety_checker() -> StableDiffusionSafetyChecker:
    checker = shuffled(StableDiffusionSafetyChecker(_config(100))).eval()
    pixels = clip_pixels(new_pictures(64), SIZE)
    for name, quantile in (("concept_embeds", 0.96), ("special_care_embeds", 0.8)):
        getattr(checker, f"{name}_weights").copy_(cosines(checker, pixels, name).quantile(quantile, dim=0))
    return checker


@torch.no_grad()
def cosines(checker: StableDiffusionSafetyChecker, pixels: Tensor, name: str) -> Tensor:
    """Of pictures, (B, 3, SIZE, SIZE), with the checker's embeddings called `name`, (B, embeddings)."""
    embeds = checker.visual_projection(checker.vision_model(pixels).pooler_output)
    return nn.functional.normalize(embeds) @ nn.functional.normalize(getattr(checker, name)).T


@torch.no_grad()
def shuffled(module: nn.Module, size: float = 0.25) -> Any:
    """The module with the same random weights each time, wider than usual: else all pictures look the same to it."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 or name.endswith("class_embedding"):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return module


def _config(vocabulary: int) -> CLIPConfig:
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # as `new_tokenizer` has them
    text = {"vocab_size": vocabulary, "max_position_embeddings": 24, "projection_dim": 16, **ends, **NARROW}
    vision = {"image_size": SIZE, "patch_size": 8, "projection_dim": 16, **NARROW}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
