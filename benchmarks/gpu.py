"""What training and applying each kind of patch takes on a GPU, predicted against measured: `python benchmarks/gpu.py`.

Stable Diffusion 1.5 and XL of real size with random weights, nothing is downloaded. Of each kind: time and peak memory
of a training step at the settings that README recommends, and how often the host waits for the GPU within one; latents
drawn a second; what the patch adds to a denoising step with its gate open and closed; seconds to load and attach it.
Minutes; parts for which the `--budget` has no time left, or the GPU no memory, are left out and named.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from safepatch.data.bank import Batch, DataConfig
from safepatch.data.category import Rewrite
from safepatch.diffusion import Components, Conditioning, UNetHost, quiet
from safepatch.models.checkpoint import CONFIGS
from safepatch.objectives import Losses, Player, SafeControlConfig, Turn
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.runtime.apply import apply
from safepatch.tiny.text import new_tokenizer
from safepatch.training.config import TrainingConfig
from safepatch.training.folder import RunFolder
from safepatch.training.memory import GIB, Plan, Prediction, predict
from safepatch.training.trainer import Run, new_accelerator

FAMILIES = {"sd1": "SD 1.5", "sdxl": "SDXL"}
INSTRUCTION = "no weapons, show harmless tools instead"
WARM, TIMED = 2, 4  # training steps; one more follows in which waits are counted
DRAWN, DENOISING = 8, 10  # latents at once, and steps
GATE = 32
SMALL = {"unet": {"block_out_channels": [32, 32, 64, 64], "sample_size": 8}, "vae": {"block_out_channels": [32] * 4}}
SMALL_TEXT = {"hidden_layers": 1, "intermediate_size": 64}


def new_pipe(family: str, device: str, dtype: torch.dtype, small: bool = False) -> Any:
    """A pipeline of the family's structure with random weights; a `small` one has few channels."""
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    if small:
        _shrink(config)
    torch.manual_seed(0)
    with torch.device(device):
        parts = {name: _new_part(name, entry, config, dtype) for name, entry in config["model_index"].items()}
    parts.pop("_class_name")
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    return quiet(getattr(diffusers, config["model_index"]["_class_name"])(**parts))


def _shrink(config: dict[str, Any]) -> None:
    for part, sizes in SMALL.items():
        config[part] |= {name: size[: len(config[part][name])] if isinstance(size, list) else size
                         for name, size in sizes.items()}  # fmt: skip
    if isinstance(config["unet"]["attention_head_dim"], list):
        config["unet"]["attention_head_dim"] = [1] * len(config["unet"]["block_out_channels"])
    for key in config.keys() & {"text_encoder", "text_encoder_2"}:
        config[key] |= {"num_hidden_layers": 2, "intermediate_size": 64}


def _new_part(name: str, entry: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    if not isinstance(entry, list) or entry[0] is None or name == "safety_checker":
        return None if isinstance(entry, list) else entry
    library, class_name = entry
    if class_name == "CLIPTokenizer":
        tokenizer = new_tokenizer()
        tokenizer.model_max_length = 77
        return tokenizer
    if library == "transformers":
        settings = transformers.CLIPTextConfig(**config[name]) if name in config else None
        return settings and getattr(transformers, class_name)(settings).to(dtype).eval()
    made = getattr(diffusers, class_name).from_config(config[name])
    return made.to(dtype).eval() if isinstance(made, torch.nn.Module) else made


class RandomRows:
    """Training rows of a host's shape that mean nothing."""

    def __init__(self, host: UNetHost) -> None:
        read = host.encode(["a knife"]).to("cpu")
        self._shape, self._read = host.latent_shape, read

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """As many pairs and preserved rows."""
        latents, texts = torch.randn(size, *self._shape), self._read.expand(size)
        return Batch(latents, texts, texts, Rewrite("column"), torch.randn(size, *self._shape), texts)


class Watched:
    """An objective that tells when its steps begin."""

    name = "safe_control"

    def __init__(self, begun: Callable[[int], None]) -> None:
        self._inner, self._begun, self._step = SafeControlConfig(), begun, 0

    def prepare(self, *_: Any) -> Any:
        """Rows are at hand."""

    def players(self, patch: Player, rows: Any) -> list[Player]:
        """The patch alone."""
        return [patch]

    def loss(self, player: Player, turn: Turn) -> Losses:
        """That of safe_control."""
        self._begun(self._step)
        self._step += 1
        return self._inner.loss(player, turn)


@dataclass
class Trained:
    """A step of training, measured.

    Attributes:
        seconds: of the clock.
        peak: bytes allocated at most; None on a CPU.
        waits: how often the host waited for the GPU in one step; None on a CPU.
    """

    seconds: float
    peak: int | None
    waits: int | None


def train(host: UNetHost, kind: str, options: TrainingConfig) -> Trained:
    """Some steps of the real loop on random rows."""
    on_gpu, starts, seen = host.device.type == "cuda", list[float](), list[warnings.WarningMessage]()

    def begun(step: int) -> None:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        starts.append(time.perf_counter())
        if on_gpu and step == WARM:
            torch.cuda.reset_peak_memory_stats()
        if step == WARM + TIMED + 1:
            seen.clear()
        if on_gpu and step >= WARM + TIMED:
            torch.cuda.set_sync_debug_mode("warn")

    counted: list[int] = []

    def noted(step: int) -> None:
        if step == WARM + TIMED + 1:
            counted.append(sum("synchroniz" in str(each.message) for each in seen))
        begun(step)

    torch.manual_seed(0)
    patch = PATCH_KINDS[kind].from_unet(host.unet)
    options = replace(options, steps=WARM + TIMED + 2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = caught
        instruction = host.encode([INSTRUCTION]).states.float()
        rows, accelerator = RandomRows(host), new_accelerator(options, Path(folder))
        run = Run(kind, Watched(noted), host, rows, instruction, options, accelerator)
        run.finish(patch, RunFolder.claim(Path(folder), {}))
    if on_gpu:
        torch.cuda.set_sync_debug_mode("default")
    seconds = (starts[WARM + TIMED] - starts[WARM]) / TIMED
    return Trained(seconds, torch.cuda.max_memory_allocated() if on_gpu else None, counted[0] if on_gpu else None)
