"""Two training steps of lora and lite patches at Stable Diffusion 1.5's real size, on the CPU, with peak memory.

    python benchmarks/real_size.py [--json FILE] [--markdown FILE]

Random weights, float32, pictures of 256 pixels, one pair and one preserved row a step; the real training loop, each
kind in a process of its own. Takes minutes and about 8 GiB. What `safepatch train --dry-run` would say of the same run
stands beside; it counts what a GPU would allocate.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from safepatch.data.bank import Batch, DataConfig
from safepatch.data.category import Rewrite
from safepatch.diffusion import Components, Host, UNetHost, quiet
from safepatch.models.checkpoint import CONFIGS
from safepatch.objectives import Player, SafeControlConfig, Turn
from safepatch.objectives.base import Losses
from safepatch.patch import PATCH_KINDS
from safepatch.tiny.text import new_tokenizer
from safepatch.training.config import TrainingConfig
from safepatch.training.folder import RunFolder
from safepatch.training.memory import GIB, Plan, predict
from safepatch.training.trainer import Run, new_accelerator

INSTRUCTION = "no weapons, show harmless tools instead"
KINDS = ("lora", "lite")
LEFT_OUT = ("safety_checker", "text_encoder_3", "tokenizer_3")
SIZE, EDGE = 256, 32  # of pictures in pixels, and of their latents
SMALL = {"unet": {"block_out_channels": [32, 32, 64, 64], "sample_size": 16}, "vae": {"block_out_channels": [32] * 4}}
SMALL["transformer"] = {"num_layers": 4, "num_attention_heads": 4, "caption_projection_dim": 256, "sample_size": 16}
SMALL_TEXT = {"num_hidden_layers": 2, "intermediate_size": 64}


def new_pipe(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32, small: bool = False) -> Any:
    """A pipeline of the family's structure with random weights, without T5; a `small` one has few channels."""
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
    if unet := config.get("unet"):
        levels = len(unet["block_out_channels"])
        unet |= SMALL["unet"] | {"block_out_channels": SMALL["unet"]["block_out_channels"][:levels]}
        if isinstance(unet["attention_head_dim"], list):
            unet["attention_head_dim"] = [1] * levels
    else:
        config["transformer"] |= SMALL["transformer"]
    config["vae"] |= SMALL["vae"]
    for key in config.keys() & {"text_encoder", "text_encoder_2"}:
        config[key] |= SMALL_TEXT


def _new_part(name: str, entry: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    if not isinstance(entry, list):
        return entry
    library, class_name = entry
    if library is None or name in LEFT_OUT:
        return None
    if class_name == "CLIPTokenizer":
        tokenizer = new_tokenizer()
        tokenizer.model_max_length = config["text_encoder"]["max_position_embeddings"]
        return tokenizer
    if library == "transformers":
        settings = transformers.CLIPTextConfig(**config[name])
        made = getattr(transformers, class_name)(settings)
    else:
        made = getattr(diffusers, class_name).from_config(config[name])
    if not isinstance(made, torch.nn.Module):
        return made
    return made.eval() if dtype is torch.float32 else made.to(dtype).eval()


class RandomRows:
    """Training rows of a host's shapes that mean nothing."""

    def __init__(self, host: Host) -> None:
        self._shape, self._read = host.latent_shape, host.encode(["a knife"]).to("cpu")

    def batch(self, step: int, size: int, seed: int) -> Batch:
        """As many pairs, and as many rows to preserve."""
        latents, kept = torch.randn(2, size, *self._shape)
        texts = self._read.expand(size)
        return Batch(latents, texts, texts, Rewrite("column"), kept, texts)


class Watched:
    """safe_control, telling whoever asks when the loss of each step is about to be computed."""

    name = "safe_control"

    def __init__(self, begins: Callable[[int], None]) -> None:
        self._inner, self._begins, self._step = SafeControlConfig(), begins, 0

    def prepare(self, host: Host, corpus: Any, data: DataConfig) -> Any:
        """Nothing: rows are at hand."""

    def players(self, patch: Player, rows: Any) -> list[Player]:
        """The patch alone."""
        return [patch]

    def loss(self, player: Player, turn: Turn) -> Losses:
        """Its own."""
        self._begins(self._step)
        self._step += 1
        return self._inner.loss(player, turn)


def train(host: Host, kind: str, options: TrainingConfig, begins: Callable[[int], None]) -> None:
    """The real training loop on random rows; `begins` is called with the number of each step."""
    patch = PATCH_KINDS[kind].from_unet(host.unet)
    instruction, rows = host.encode([INSTRUCTION]).states.float(), RandomRows(host)
    with tempfile.TemporaryDirectory() as folder:
        out, accelerator = RunFolder(Path(folder)), new_accelerator(options, Path(folder))
        Run(kind, Watched(begins), host, rows, instruction, options, accelerator).finish(patch, out)


def measure(kind: str, small: bool, queue: Any) -> None:
    """Two steps; puts seconds of the second, and peak memory before them and after, into `queue`."""
    host = UNetHost(Components.of(new_pipe("sd1", small=small)), None if small else SIZE)
    wall, busy, before = list[float](), list[float](), peak()

    def note(_: int) -> None:
        wall.append(time.perf_counter())
        busy.append(time.process_time())

    train(host, kind, options_of(), note)
    note(2)
    seconds = {"step_seconds": wall[2] - wall[1], "step_cpu_seconds": busy[2] - busy[1]}
    queue.put({**seconds, "model_bytes": before, "peak_bytes": peak()})


def options_of() -> TrainingConfig:
    """Two steps of one pair."""
    return TrainingConfig(steps=2, batch_size=1, learning_rate=1e-4, joint_rate=1.0, checkpoint_every=1000)


def peak() -> int:
    """Largest resident size of this process so far, in bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def predicted(kind: str) -> int:
    """Bytes that a GPU would have to allocate for the same steps."""
    config = json.loads((CONFIGS / "sd1.json").read_text())["unet"] | {"sample_size": EDGE}
    return predict(config, Plan(kind, batch_size=1, steps=2)).learning


def table_of(figures: dict[str, dict[str, float]]) -> str:
    """As markdown."""
    head = ("kind", "seconds a step", "CPU seconds", "model, GiB", "peak, GiB", "predicted for a GPU, GiB")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind, found in figures.items():
        cells = [f"{found[name]:.1f}" for name in ("step_seconds", "step_cpu_seconds")]
        cells += [f"{found.get(name, 0) / GIB:.2f}" for name in ("model_bytes", "peak_bytes", "predicted_bytes")]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure each kind in a process of its own, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    parser.add_argument("--small", action="store_true", help="small models: whether the script works, not what it says")
    options = parser.parse_args()
    figures, context = {}, multiprocessing.get_context("spawn")
    for kind in KINDS:
        queue = context.SimpleQueue()
        process = context.Process(target=measure, args=(kind, options.small, queue))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"training {kind} ended with {process.exitcode}; is there enough memory?")
        figures[kind] = {**queue.get(), **({} if options.small else {"predicted_bytes": predicted(kind)})}
        print(f"{kind}: {figures[kind]}", flush=True)
    table = table_of(figures)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n")
    if options.json:
        options.json.write_text(json.dumps({"small": options.small, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
