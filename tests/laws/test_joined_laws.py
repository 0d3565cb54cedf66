"""Law 16 for transformers: kohya's form joins layers of SD3 and Flux, and they come apart as they were.

Oracles are diffusers' own converter and loader; of SD3's joined layers diffusers knows nothing, and must say so.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.errors import ArtifactError, BaseMismatch
from safepatch.export import export, import_lora
from safepatch.patch import LoraPatch
from safepatch.patch.files import to_artifact
from safepatch.runtime.apply import apply
from safepatch.taxonomy import Category
from tests.families import draw, small_transformer_pipe
from tests.small import INSTRUCTION, awaken

MINE = Category("mine", "things of the test", "no things")


@cache
def pipe_of(name: str) -> Any:
    return small_transformer_pipe(name)


def ungated(name: str, pattern: str = "", rank: int = 2) -> PatchArtifact:
    """A lora patch of the layers that match, which changes images."""
    host = pipe_of(name).transformer
    patch = LoraPatch.from_unet(host, rank=rank)
    patch.keep_layers(pattern)
    return to_artifact(awaken(patch, size=0.1), host, {"weapons": INSTRUCTION})


def model_folder(name: str, folder: Path) -> Path:
    """The configuration of what denoises, and no more."""
    config = pipe_of(name).transformer.config
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(dict(config)))
    index = {
        "_class_name": type(pipe_of(name)).__name__,
        "transformer": ["diffusers", type(pipe_of(name).transformer).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("pattern", ["", r"to_q|proj_mlp", r"ff\."])
@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux"])
def test_kohyas_form_joins_layers_and_comes_back_bit_for_bit(name, pattern, tmp_path):
    artifact = ungated(name, pattern).astype(torch.float16)
    path = export(artifact.save(tmp_path / "patch.safetensors"), tmp_path / "kohya.safetensors")
    assert import_lora(path).content_hash == artifact.content_hash
    theirs = import_lora(path, MINE, model_folder(name, tmp_path / "model"))  # as if somebody else's
    assert theirs.parameter_names() == artifact.parameter_names()
    for parameter in artifact.parameter_names():
        torch.testing.assert_close(theirs.delta(parameter), artifact.delta(parameter))


def test_diffusers_loads_fluxs_double_blocks_from_kohyas_form(tmp_path):
    pipe, plain = small_transformer_pipe("flux"), ungated("flux", r"^transformer_blocks")
    base, guided = draw(pipe, guidance_scale=1.0), {"guidance_scale": 1.0}
    with apply(pipe, plain):
        made = draw(pipe, **guided)
    path = export(plain.save(tmp_path / "plain.safetensors"), tmp_path / "kohya.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    torch.testing.assert_close(draw(pipe, **guided), made, rtol=1e-3, atol=1e-4)
    assert (made - base).abs().max() > 1e-3  # control


def test_diffusers_own_converter_takes_fluxs_single_blocks_apart_again(tmp_path):
    """It knows them at Flux's real width alone, of which two factors are small."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"attn.to_q": (3072, 3072), "attn.to_v": (3072, 3072), "proj_mlp": (12288, 3072), "proj_out": (3072, 15360)}
    shapes = {f"lora.single_transformer_blocks.7.{layer}.weight": list(size) for layer, size in sizes.items()}
    tensors = {}
    for number, (name, (out, width)) in enumerate(shapes.items(), start=1):
        rank = 1 + number % 2
        tensors[f"{name}.up"] = torch.randn(out, rank, generator=generator)
        tensors[f"{name}.down"] = torch.randn(rank, width, generator=generator)
    small = ungated("flux").info
    real = {**small.fingerprint, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19}
    artifact = PatchArtifact(tensors, replace(small, fingerprint=real, shapes=shapes))
    path = export(artifact.save(tmp_path / "patch.safetensors"), tmp_path / "kohya.safetensors")
    assert import_lora(path).content_hash == artifact.content_hash
    found = _convert_kohya_flux_lora_to_diffusers(load_file(path))
    assert not [name for name in found if "single_transformer_blocks.7." not in name]
    for name in shapes:
        stem = f"transformer.{name.removeprefix('lora.').removesuffix('.weight')}"
        delta = found[f"{stem}.lora_B.weight"] @ found[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(delta, artifact.delta(name))
    idle = "transformer.single_transformer_blocks.7.attn.to_k"
    assert not (found[f"{idle}.lora_B.weight"] @ found[f"{idle}.lora_A.weight"]).any()


def test_diffusers_refuses_sd3_in_kohyas_form_which_it_would_load_nothing_of(tmp_path):
    pipe = small_transformer_pipe("sd3")
    path = export(ungated("sd3").save(tmp_path / "patch.safetensors"), tmp_path / "kohya.safetensors")
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    tensors = load_file(path)
    del tensors["safepatch"]
    base = draw(pipe)
    pipe.load_lora_weights(tensors)  # control
    assert torch.equal(draw(pipe), base)


def test_somebody_elses_joined_layers_are_taken_apart(tmp_path):
    """Their `up` is one block, so that every layer has all of `down`; no update is made of zeros."""
    width, generator = 32, torch.Generator().manual_seed(0)
    up, down = torch.randn(3 * width, 2, generator=generator), torch.randn(2, width, generator=generator)
    up[width : 2 * width] = 0
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    model = model_folder("flux", tmp_path / "model")
    artifact = import_lora(tmp_path / "theirs.safetensors", MINE, model)
    layers = [f"lora.transformer_blocks.0.attn.to_{name}.weight" for name in "qv"]
    assert artifact.parameter_names() == tuple(layers)
    for layer, rows in zip(layers, (up[:width], up[2 * width :]), strict=True):
        torch.testing.assert_close(artifact.delta(layer), 0.5 * rows @ down)
    tensors[f"{stem}.lora_up.weight"] = up[1:].contiguous()
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(BaseMismatch, match="has another size in this model"):
        import_lora(tmp_path / "short.safetensors", MINE, model)


@pytest.mark.parametrize(
    "ranks", ["3", "[]", '{"transformer_blocks.0.attn.to_q": 1}', '{"transformer_blocks.0.attn.to_q": "2"}']
)
def test_forged_ranks_of_joined_layers_are_one_line(ranks, tmp_path):
    path = export(ungated("flux").save(tmp_path / "patch.safetensors"), tmp_path / "kohya.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["safepatch.exported"])
    for told in (record["ranks"], json.loads(ranks)):
        forged = {**metadata, "safepatch.exported": json.dumps({**record, "ranks": told})}
        save_file(load_file(path), tmp_path / "forged.safetensors", forged)
        if told is record["ranks"]:
            import_lora(tmp_path / "forged.safetensors")  # control
            continue
        with pytest.raises(ArtifactError, match="is damaged") as caught:
            import_lora(tmp_path / "forged.safetensors")
        assert "\n" not in str(caught.value)
