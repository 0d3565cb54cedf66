"""The embedded transformer's folder: what it shares with the base stays in the base's folder and is joined on loading.

`load_tiny("tiny-sd3").save_pretrained(FOLDER)` writes a whole folder that plain diffusers reads.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from safepatch.errors import ModelNotFound
from safepatch.tiny.sd3 import Texts, assemble_sd3
from safepatch.tiny.sd3_text import with_projection

SHARED = ("vae", "text_encoder", "tokenizer", "tokenizer_2")  # bit for bit the base's


def shared_parts(base: Path) -> dict[str, Any]:
    """The parts that are the base's, under SD3's names, float32; and None for the T5 that is not there."""
    local: dict[str, Any] = {"local_files_only": True}
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", **local)
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32, **local)
    return {
        "vae": AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32, shift_factor=0.0, **local),
        "text_encoder": with_projection(encoder),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder_3": None,
        "tokenizer_3": None,
    }


def load_sd3(folder: Path, base: Path) -> StableDiffusion3Pipeline:
    """The pipeline in `folder`, float32 on the CPU, with the parts that it shares with `base`.

    Raises:
        ModelNotFound: when the folder is not there.
    """
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(f"no embedded model at {folder}; run `make tiny`, or reinstall safepatch")
    options: dict[str, Any] = {"local_files_only": True, "dtype": torch.float32}
    return StableDiffusion3Pipeline.from_pretrained(folder, **shared_parts(base), **options)


def save_sd3(transformer: SD3Transformer2DModel, second: CLIPTextModelWithProjection, base: Path, folder: Path) -> None:
    """Write what the pipeline does not share with `base`, float16."""
    parts = shared_parts(base)
    texts = Texts(parts["tokenizer"], parts["text_encoder"], second)
    assemble_sd3(transformer, parts["vae"], texts).to(torch.float16).save_pretrained(folder)
    for name in SHARED:
        shutil.rmtree(folder / name)
