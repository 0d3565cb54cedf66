"""SD3's and Flux's single files in their makers' layout: loaded offline, whatever they hold, patched, or refused."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from safepatch.diffusion import empty_unet, quiet
from safepatch.errors import BaseMismatch, ConfigError, ModelNotFound, SafepatchError, UnsupportedModel
from safepatch.models.flow_file import CONFIGS
from safepatch.models.flow_layout import places
from safepatch.models.load import ModelConfig, load_pipeline
from safepatch.patch import LoraPatch
from safepatch.patch.files import to_artifact
from safepatch.runtime.apply import apply
from safepatch.runtime.check import check
from safepatch.runtime.fuse import fuse, fuse_model
from tests.families import draw
from tests.flow_files import (
    CLIP_G,
    CLIP_L,
    PREFIX,
    T5,
    new_clip,
    new_t5,
    prefixed,
    small_flow_pipe,
    text_layout,
    transformer_layout,
    vae_layout,
    write_flow_file,
)
from tests.small import INSTRUCTION, awaken

NAMES = ("sd3", "sd3.5", "flux")


@dataclass(frozen=True)
class Published:
    """A pipeline, its transformer (and of SD3 its VAE) in one file, and all of it in a folder."""

    name: str
    pipe: Any
    path: Path
    folder: Path

    @property
    def tensors(self) -> dict[str, Tensor]:
        made = transformer_layout(self.pipe.transformer)
        if self.name == "flux":
            return made  # as Flux's own file has it: no prefix, nothing else
        return prefixed(PREFIX, made) | prefixed("first_stage_model.", vae_layout(self.pipe))


@pytest.fixture(scope="module", params=NAMES)
def published(request, tmp_path_factory) -> Published:
    return publish(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Published:
    return publish("flux", tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> Published:
    return publish("sd3.5", tmp_path_factory.mktemp("alone"))


def publish(name: str, where: Path) -> Published:
    made = Published(name, small_flow_pipe(name), where / "model.safetensors", where / "folder")
    made.pipe.save_pretrained(made.folder)
    write_flow_file(made.path, made.tensors)
    return made


def same(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_file_loads_offline_with_every_bit(published, closed_sockets):
    pipe, wanted = quiet(load_pipeline(published.path, tokenizer=published.folder)), published.pipe
    assert type(pipe) is type(wanted)
    assert all(same(getattr(pipe, part), getattr(wanted, part)) for part in ("transformer", "vae", "text_encoder_2"))
    ours, theirs = (settings(each.transformer) for each in (pipe, wanted))
    assert ours == theirs
    pipe.vae, pipe.scheduler = wanted.vae, wanted.scheduler  # that of the small pipeline is scaled otherwise
    torch.testing.assert_close(draw(pipe), draw(wanted), rtol=1e-4, atol=1e-4)
    assert closed_sockets == []


def settings(transformer: Any) -> dict[str, Any]:
    """All of its configuration that makes a difference."""
    config = {key: value for key, value in transformer.config.items() if key[0] != "_" and key != "sample_size"}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    return plain | {"out_channels": transformer.out_channels}


def test_our_names_are_those_that_diffusers_finds(published):
    """Another program's table; Flux's knows one width, so of that only names and shapes are compared."""
    transformer = published.pipe.transformer
    if published.name != "flux":
        theirs = convert_sd3_transformer_checkpoint_to_diffusers(transformer_layout(transformer))
        ours = transformer.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
        return
    config = json.loads((CONFIGS / "flux.json").read_text())["transformer"] | {"num_layers": 2, "num_single_layers": 1}
    with torch.device("meta"):
        wide = diffusers.FluxTransformer2DModel.from_config(config)
    original = transformer_layout(wide)
    found = places(wide.state_dict(), config)
    assert {place.name for place in found.values()} == original.keys()
    taken = {name: place.take(original[place.name]).shape for name, place in found.items()}
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert taken == {name: tensor.shape for name, tensor in theirs.items()}


def test_a_file_of_fp8_is_what_its_bits_stand_for(published, tmp_path):
    dtype = torch.float8_e4m3fn
    path = write_flow_file(tmp_path / "small.safetensors", published.tensors, dtype)
    pipe = load_pipeline(path, tokenizer=published.folder, dtype=torch.bfloat16)
    for name, weight in published.pipe.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], weight.to(dtype).to(torch.bfloat16))
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


def test_text_encoders_in_the_file_are_read_from_it(tmp_path, sd3):
    clip_l, clip_g = new_clip(64, True), new_clip(128, True)
    with torch.no_grad():
        clip_l.text_projection.weight.copy_(torch.eye(64))
    tensors = sd3.tensors | prefixed(CLIP_G, text_layout(clip_g))
    own = {name: each for name, each in text_layout(clip_l).items() if name != "text_projection.weight"}
    path = write_flow_file(tmp_path / "clips.safetensors", tensors | prefixed(CLIP_L, own))
    words = tmp_path / "words"
    sd3.pipe.tokenizer.save_pretrained(words)
    pipe = load_pipeline(path, tokenizer=words)
    assert same(pipe.text_encoder, clip_l)
    assert same(pipe.text_encoder_2, clip_g)
    assert pipe.text_encoder_3 is None
    assert pipe.tokenizer_3 is None
    assert pipe.tokenizer_2.pad_token == "!"
    asked = pipe.tokenizer(["a knife"], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(pipe.text_encoder(asked).text_embeds, clip_l(asked).text_embeds)


def test_a_whole_file_of_flux_needs_tokenizers_alone(tmp_path, flux):
    clip, t5 = new_clip(64, False), new_t5(48)
    tensors = prefixed(PREFIX, flux.tensors) | prefixed("vae.", vae_layout(flux.pipe))
    tensors |= prefixed(CLIP_L, text_layout(clip)) | prefixed(T5, text_layout(t5))
    path, words = write_flow_file(tmp_path / "whole.safetensors", tensors), tmp_path / "words"
    for name in ("tokenizer", "tokenizer_2"):
        getattr(flux.pipe, name).save_pretrained(words / name)
    pipe = load_pipeline(path, tokenizer=words)
    assert same(pipe.text_encoder, clip)
    assert same(pipe.text_encoder_2, t5)
    assert same(pipe.vae, flux.pipe.vae)
    asked = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        assert torch.equal(pipe.text_encoder_2(asked)[0], t5(asked)[0])
    half = load_pipeline(path, tokenizer=words, dtype=torch.float16).text_encoder_2
    overflowing = {
        weight.dtype for name, weight in half.named_parameters() if ".wo." in name
    }  # kept as transformers does
    assert (overflowing, half.shared.weight.dtype) == ({torch.float32}, torch.float16)


def test_schnell_is_told_from_dev(tmp_path, flux):
    schnell = small_flow_pipe("schnell")
    path = write_flow_file(tmp_path / "schnell.safetensors", transformer_layout(schnell.transformer))
    loaded, dev = (load_pipeline(each, tokenizer=flux.folder) for each in (path, flux.path))
    shifts = [(each.scheduler.config.shift, each.scheduler.config.use_dynamic_shifting) for each in (loaded, dev)]
    assert shifts == [(1.0, False), (3.0, True)]
    with pytest.raises(BaseMismatch, match=r"\(guidance_embeds False\), the model is flux \(guidance_embeds True\)"):
        apply(dev, patch_of(loaded))


def patch_of(pipe: Any) -> Any:
    patch = awaken(LoraPatch.from_unet(pipe.transformer, rank=4), size=0.1)
    return to_artifact(patch, pipe.transformer, {"weapons": INSTRUCTION})


def test_a_patch_of_the_folder_fits_the_file_and_changes_it(published, tmp_path):
    artifact = patch_of(published.pipe)
    path = artifact.save(tmp_path / "weapons.safetensors")
    fit = check(published.path, path)
    assert fit.family == ("flux" if published.name == "flux" else "sd3")
    assert fit.drift == pytest.approx(0, abs=1e-6)
    pipe = quiet(load_pipeline(published.path, tokenizer=published.folder))
    base = draw(pipe)
    with apply(pipe, path):
        assert not torch.equal(draw(pipe), base)
    assert torch.equal(draw(pipe), base)


def test_check_measures_how_far_a_file_is_from_a_patchs_base(flux, tmp_path):
    path, other = patch_of(flux.pipe).save(tmp_path / "a.safetensors"), small_flow_pipe("flux")
    with torch.no_grad():
        for weight in other.transformer.parameters():
            weight.mul_(1.1)
    tuned = write_flow_file(tmp_path / "tuned.safetensors", transformer_layout(other.transformer))
    assert 0.05 < (check(tuned, path).drift or 0) < 0.2


# ---- fused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_file_is_the_fused_pipeline_in_the_files_layout(dtype, published, tmp_path):
    path, told = patch_of(published.pipe).save(tmp_path / "a.safetensors"), list[str]()
    model = write_flow_file(tmp_path / "model.safetensors", published.tensors, dtype)
    out = fuse_model(model, path, tmp_path / "fused.safetensors", scale=0.5, tell=told.append)
    made, wanted, base = (load_pipeline(each, tokenizer=published.folder, dtype=dtype) for each in (out, model, model))
    fuse(wanted, path, scale=0.5)
    assert same(made.transformer, wanted.transformer)
    assert not same(made.transformer, base.transformer)  # control
    with safe_open(out, "pt") as new, safe_open(model, "pt") as old:
        assert list(new.keys()) == list(old.keys())
        assert all(new.get_tensor(name).dtype == dtype for name in new.keys())  # noqa: SIM118 it is no dict
        changed = {name for name in old.keys() if not torch.equal(new.get_tensor(name), old.get_tensor(name))}  # noqa: SIM118
    assert changed
    assert all(re.search(r"(qkv|attn2?\.proj|mlp|linear[12])[^a-z]", name) for name in changed)
    with pytest.raises(SafepatchError, match="was fused into this model already"):
        fuse_model(out, path, tmp_path / "again.safetensors")


def test_what_is_taken_out_of_a_tensor_and_put_back_is_that_tensor(published):
    tensors = transformer_layout(published.pipe.transformer)
    found = places(published.pipe.transformer.state_dict(), published.pipe.transformer.config)
    for place in found.values():
        stored = tensors[place.name]
        weight = place.take(stored)
        assert weight.shape == place.shape(stored.shape)
        assert torch.equal(place.put(stored, weight), stored)
        doubled = place.put(stored, 2 * weight)
        assert torch.equal(place.take(doubled), 2 * weight)
        assert int((doubled != stored).sum()) == int((weight != 0).sum())  # and nothing beside it


# ---- one line, and nothing lost ----------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_without_text_encoders_says_what_is_missing_and_how_to_give_it(published, monkeypatch, tmp_path):
    monkeypatch.setattr("safepatch.models.flow_pipeline.CLIP", str(tmp_path / "empty"))  # wherever the cache is
    for use in (lambda: load_pipeline(published.path), lambda: ModelConfig(str(published.path)).require_whole()):
        with pytest.raises(ModelNotFound, match=r"--tokenizer FOLDER") as caught:
            use()
        said = one_line(caught)
        assert "no text encoder (text_encoder), no text encoder (text_encoder_2)" in said
        assert "no tokenizer (tokenizer), no tokenizer (tokenizer_2)" in said
        assert ("no VAE (vae)" in said) == (published.name == "flux")
        assert "text_encoder_3" not in said  # T5 may be missing
    ModelConfig(str(published.path), tokenizer=str(published.folder)).require_whole()  # control


def test_a_folder_that_lacks_a_part_is_named(flux, tmp_path):
    flux.pipe.tokenizer.save_pretrained(tmp_path / "words" / "tokenizer")
    with pytest.raises(ModelNotFound, match=r"and .*words has none; name a diffusers folder of flux") as caught:
        load_pipeline(flux.path, tokenizer=tmp_path / "words")
    assert "no tokenizer (tokenizer)," not in one_line(caught)


def test_a_t5_without_its_tokenizer_is_not_dropped_in_silence(sd3, tmp_path):
    tensors = sd3.tensors | prefixed(T5, text_layout(new_t5(96)))
    folder = tmp_path / "parts"
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        getattr(sd3.pipe, name).save_pretrained(folder / name)
    assert load_pipeline(sd3.path, tokenizer=folder).text_encoder_3 is None  # control: without one it may be missing
    path = write_flow_file(tmp_path / "t5.safetensors", tensors)
    with pytest.raises(ModelNotFound, match=r"holds no tokenizer \(tokenizer_3\)"):
        load_pipeline(path, tokenizer=folder)


QUANTISED = {
    "nf4": {"double_blocks.0.img_attn.qkv.weight.absmax": torch.zeros(3)},
    "int8": {"double_blocks.0.img_attn.qkv.SCB": torch.zeros(3)},
    "scaled fp8": {"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(1)},
    "integers": {"double_blocks.1.img_attn.qkv.weight": torch.zeros(3, dtype=torch.uint8)},
}


@pytest.mark.parametrize("how", QUANTISED)
def test_quantised_weights_are_refused_in_one_line(how, flux, tmp_path):
    save_file(flux.tensors | QUANTISED[how], tmp_path / "q.safetensors")
    with pytest.raises(UnsupportedModel, match=r"not supported yet: quantised weights .*plain fp8") as caught:
        load_pipeline(tmp_path / "q.safetensors", tokenizer=flux.folder)
    one_line(caught)


def test_a_gguf_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "flux.gguf").write_bytes(b"GGUF....")
    with pytest.raises(UnsupportedModel, match=r"a format that is not read; convert it to \.safetensors") as caught:
        load_pipeline(tmp_path / "flux.gguf")
    one_line(caught)


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        ("img_in.weight", "looks like flux but has no tensor 'img_in.weight'"),
        ("double_blocks.2.txt_mlp.0.bias", "lacks 'double_blocks.2.txt_mlp.0.bias' of its transformer"),
    ],
)
def test_half_a_file_is_refused(absent, says, flux, tmp_path):
    kept = {name: tensor for name, tensor in flux.tensors.items() if name != absent}
    path = write_flow_file(tmp_path / "half.safetensors", kept)
    with pytest.raises(UnsupportedModel, match=says) as caught:
        load_pipeline(path, tokenizer=flux.folder)
    one_line(caught)


def test_tensors_of_other_shapes_are_refused(flux, tmp_path):
    cases = {"img_in.weight": "its tensors have other shapes", "txt_in.bias": "size mismatch for context_embedder"}
    for name, says in cases.items():
        path = write_flow_file(tmp_path / "other.safetensors", flux.tensors | {name: torch.zeros(3)})
        with pytest.raises(UnsupportedModel, match=says) as caught:
            load_pipeline(path, tokenizer=flux.folder)
        one_line(caught)


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(flux, tmp_path):
    clip = new_clip(64, False)
    path = write_flow_file(tmp_path / "a.safetensors", flux.tensors | prefixed(CLIP_L, text_layout(clip)))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(flux.folder / "tokenizer")
    tokenizer.add_tokens(["extraneous"])
    folder = tmp_path / "parts"
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(flux.folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(UnsupportedModel, match="has 1210 tokens"):
        load_pipeline(path, tokenizer=folder)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fusing_into_a_file_of_few_bits_is_refused_before_anything_is_written(stored, flux, tmp_path):
    patch = patch_of(flux.pipe).save(tmp_path / "a.safetensors")
    model = write_flow_file(tmp_path / "model.safetensors", flux.tensors, stored)
    with pytest.raises(ConfigError, match=r"is stored as F8_E.M. and cannot take a patch") as caught:
        fuse_model(model, patch, tmp_path / "fused.safetensors")
    one_line(caught)
    assert not (tmp_path / "fused.safetensors").exists()


def test_another_familys_patch_is_not_fused(flux, sd3, tmp_path):
    patch = patch_of(sd3.pipe).save(tmp_path / "a.safetensors")
    with pytest.raises(BaseMismatch, match="this patch is for sd3 transformers") as caught:
        fuse_model(flux.path, patch, tmp_path / "fused.safetensors")
    one_line(caught)
    assert not (tmp_path / "fused.safetensors").exists()


# Sizes of the published models that the shipped configurations describe.
PARAMETERS = {("flux", "transformer"): 11_901_408_320, ("flux", "vae"): 83_819_683, ("sd3", "vae"): 83_819_683}


@pytest.mark.parametrize(("family", "part"), PARAMETERS)
def test_a_shipped_configuration_has_the_published_number_of_parameters(family, part):
    config = json.loads((CONFIGS / f"{family}.json").read_text())[part]
    with torch.device("meta"):
        made = diffusers.AutoencoderKL.from_config(config) if part == "vae" else empty_unet(config)
    assert sum(weight.numel() for weight in made.parameters()) == PARAMETERS[family, part]
