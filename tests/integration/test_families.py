"""Every family: a patch on a UNet of its exact structure, and its single file in the original layout, offline."""

import json
import socket
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file

from safepatch.artifact.info import PatchInfo
from safepatch.diffusion import Components, encode_prompts, fingerprint, quiet
from safepatch.errors import BaseMismatch, ConfigError, ModelNotFound, UnsupportedModel
from safepatch.models.checkpoint import CONFIGS, open_checkpoint
from safepatch.models.load import ModelConfig, load_pipeline, load_unet
from safepatch.patch.drift import drift, sketch
from safepatch.patch.files import check_fits, to_artifact
from safepatch.runtime.apply import apply
from safepatch.runtime.check import check
from tests.families import (
    FAMILIES,
    draw,
    original_layout,
    small_config,
    small_family_pipe,
    tokenizer_folder,
    write_original,
)
from tests.small import INSTRUCTION, awaken, new_artifact, new_patch

# diffusers 0.42.1's Euler schedulers turn tensors into arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


class Original:
    """A random pipeline of one family and its single file."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family = family
        self.pipe = small_family_pipe(family)
        self.path = write_original(self.pipe, family, folder / f"{family}.safetensors")
        self.tokenizer = tokenizer_folder(folder / "tokenizer")
        patch = awaken(new_patch(self.pipe.unet, seed=None), size=0.02)
        self.artifact = to_artifact(patch, self.pipe.unet, {"weapons": INSTRUCTION})


@pytest.fixture(scope="module", params=FAMILIES)
def original(request, tmp_path_factory) -> Original:
    return Original(request.param, tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory) -> Original:
    return Original("sd1", tmp_path_factory.mktemp("sd1"))


# ---- a patch on every family ---------------------------------------------------------------------------------


def test_a_patch_acts_on_every_family_and_leaves_no_trace(original):
    pipe = original.pipe
    base = draw(pipe)
    with apply(pipe, original.artifact) as handle:
        awake = draw(pipe)
        handle.scale = 0
        off = draw(pipe)
    assert awake.isfinite().all()
    assert not torch.equal(awake, base)
    assert torch.equal(off, base)
    assert torch.equal(draw(pipe), base)
    assert handle.stats.acted_calls == handle.stats.patched_calls == handle.stats.unet_calls / 2 > 0


def test_instructions_are_encoded_as_the_pipeline_encodes_prompts(original):
    texts = ["a knife next to a cat"]
    ours = encode_prompts(Components.of(original.pipe), texts)
    theirs = original.pipe.encode_prompt(
        texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    assert torch.equal(ours, theirs)
    assert ours.shape[-1] == original.pipe.unet.config["cross_attention_dim"]


def test_a_patch_of_one_family_is_refused_on_another(original, sd1):
    if original.family.startswith("sd1"):
        pytest.skip("SD1 and its inpainting variant share patches")
    with pytest.raises(BaseMismatch, match="this patch is for sd1 UNets") as caught:
        apply(original.pipe, sd1.artifact)
    assert "\n" not in str(caught.value)


def test_a_text_to_image_patch_fits_the_inpainting_variant(sd1):
    pipe = small_family_pipe("sd1-inpaint")
    base = draw(pipe)
    with apply(pipe, sd1.artifact):
        assert not torch.equal(draw(pipe), base)
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "SanaPipeline"])
def test_a_pipeline_of_another_kind_is_not_supported_yet(name, small_pipe, tmp_path):
    artifact = new_artifact(small_pipe.unet)
    parts = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
    kind = getattr(diffusers, name)
    built = kind(**{part: None for part in parts if part in kind._get_signature_keys(kind)[0]})
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "transformer": ["diffusers", "X"]}))
    for use in (lambda: apply(built, artifact), lambda: load_pipeline(tmp_path)):
        with pytest.raises(UnsupportedModel, match=f"not supported yet: {name}; use"):
            use()


# ---- single files --------------------------------------------------------------------------------------------


def settings(pipe: Any, part: str) -> dict[str, Any]:
    return {key: value for key, value in getattr(pipe, part).config.items() if not key.startswith("_")}


def test_an_original_file_loads_offline_with_every_bit(original, closed_sockets):
    pipe = quiet(load_pipeline(original.path, tokenizer=original.tokenizer))
    assert type(pipe) is type(original.pipe)
    assert all(settings(pipe, part) == settings(original.pipe, part) for part in ("unet", "vae", "scheduler"))
    torch.testing.assert_close(draw(pipe), draw(original.pipe), rtol=0, atol=1e-4)
    there, back = original_layout(original.pipe, original.family), original_layout(pipe, original.family)
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)
    assert closed_sockets == []
    with pytest.raises(OSError, match="closed for the test"):  # control: an attempt would have been seen
        socket.create_connection(("huggingface.co", 443), timeout=1)
    assert closed_sockets


def test_a_patch_acts_on_a_loaded_file(sd1):
    pipe = quiet(load_pipeline(sd1.path, tokenizer=sd1.tokenizer))
    base = draw(pipe)
    with apply(pipe, sd1.artifact):
        assert not torch.equal(draw(pipe), base)
    assert torch.equal(draw(pipe), base)


def test_a_saved_pipeline_loads_again_as_its_own_class(original, tmp_path):
    if original.family not in ("sd1-inpaint", "sdxl"):
        pytest.skip("two classes other than StableDiffusionPipeline are enough")
    original.pipe.save_pretrained(tmp_path)
    pipe = load_pipeline(tmp_path)
    assert type(pipe) is type(original.pipe)
    torch.testing.assert_close(draw(quiet(pipe)), draw(original.pipe), rtol=0, atol=1e-4)


def test_a_pickle_is_opened_on_demand_only(sd1, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": original_layout(sd1.pipe, "sd1"), "epoch": 3}, path)
    with pytest.raises(UnsupportedModel, match="--allow-pickle"):
        load_pipeline(path, tokenizer=sd1.tokenizer)
    pipe = load_pipeline(path, tokenizer=sd1.tokenizer, allow_pickle=True)
    assert pipe.unet.state_dict().keys() == sd1.pipe.unet.state_dict().keys()
    assert all(torch.equal(pipe.unet.get_parameter(name), own) for name, own in sd1.pipe.unet.named_parameters())


def test_a_pickle_that_holds_code_is_refused_also_then(tmp_path):
    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {}, "callback": Code()}, tmp_path / "model.ckpt")
    with pytest.raises(UnsupportedModel, match="more than weights"):
        load_pipeline(tmp_path / "model.ckpt", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_without_a_tokenizer_the_error_says_how_to_give_one(sd1, tmp_path, monkeypatch):
    monkeypatch.setattr("safepatch.models.load.CLIP", str(tmp_path / "empty"))  # wherever this machine's cache is
    with pytest.raises(ModelNotFound, match="name CLIP's folder \\(--tokenizer") as caught:
        load_pipeline(sd1.path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_words_than_the_model_is_refused(sd1, tmp_path):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(sd1.tokenizer)
    tokenizer.add_tokens(["extraneous"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="has 1210 tokens"):
        load_pipeline(sd1.path, tokenizer=tmp_path)


def test_what_a_file_states_about_its_prediction_wins_over_the_family(sd1, tmp_path):
    shapes = {
        name: torch.zeros(tensor.shape, dtype=torch.uint8) for name, tensor in original_layout(sd1.pipe, "sd1").items()
    }
    path = tmp_path / "v.safetensors"

    def found(metadata: dict[str, str], given: str | None = None) -> str:
        save_file(shapes, path, metadata)
        return open_checkpoint(path, prediction_type=given).config["scheduler"]["prediction_type"]

    assert found({}) == "epsilon"  # control
    assert found({"modelspec.prediction_type": "v"}) == "v_prediction"
    assert found({"modelspec.prediction_type": "v"}, given="epsilon") == "epsilon"
    with pytest.raises(ConfigError, match="choose epsilon or v_prediction"):
        open_checkpoint(path, prediction_type="v")


@pytest.mark.parametrize("held", [23, 24])
def test_of_sd2s_text_encoder_23_layers_are_read_whether_a_file_holds_more(held, tmp_path):
    tensors, first = original_layout(small_family_pipe("sd2"), "sd2"), "transformer.resblocks.0."
    shapes = {name: torch.zeros(tensor.shape, dtype=torch.uint8) for name, tensor in tensors.items()}
    for name in [name for name in shapes if first in name]:
        shapes |= {name.replace(first, f"transformer.resblocks.{i}."): shapes[name].clone() for i in range(held)}
    save_file(shapes, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path / "model.safetensors").config["text_encoder"]["num_hidden_layers"] == 23


def test_a_schedule_that_ends_in_noise_alone_is_told_by_its_mark(tmp_path):
    """As SDXL files with v-prediction have it: empty tensors of these names."""
    tensors, marks = original_layout(small_family_pipe("sdxl"), "sdxl"), {"v_pred": torch.zeros(0)}
    path, says = tmp_path / "model.safetensors", "rescale_betas_zero_snr"
    save_file(tensors | marks, path)
    assert not open_checkpoint(path).config["scheduler"].get(says)  # control
    save_file(tensors | marks | {"ztsnr": torch.zeros(0)}, path)
    scheduler = load_pipeline(path, tokenizer=tokenizer_folder(tmp_path / "tokenizer")).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    scheduler.set_timesteps(4)
    assert int(scheduler.timesteps[0]) == 999
    assert not open_checkpoint(path, prediction_type="epsilon").config["scheduler"].get(says)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers 0.42.1 gives it
def test_a_hub_id_with_weights_in_half_precision_alone_is_loaded(small_pipe, tmp_path, monkeypatch):
    commit = "c0ffee" * 6 + "c0ff"
    repository = tmp_path / "models--me--model"
    small_pipe.save_pretrained(repository / "snapshots" / commit, variant="fp16")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="no file named"):
        diffusers.DiffusionPipeline.from_pretrained("me/model")  # control
    for unet in (load_pipeline("me/model").unet, load_unet("me/model")):
        assert all(torch.equal(unet.get_parameter(name), own) for name, own in small_pipe.unet.named_parameters())
    with pytest.raises(ModelNotFound, match="no model 'me/other' here"):
        load_pipeline("me/other")


UNET, CLIP = "model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model."
STRANGERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "SD3": ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1,)}, "looks like sd3 but has no tensor"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "looks like flux but has no tensor"),
    "LoRA": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (1,)}, "not supported yet: a LoRA"),
    "component": ({"down_blocks.0.resnets.0.conv1.weight": (1,)}, "holds a UNet alone"),
    "unprefixed": ({"input_blocks.0.0.weight": (4, 4, 3, 3)}, "holds a UNet alone"),
    "no VAE": ({UNET: (4, 4, 3, 3), f"{CLIP}final_layer_norm.bias": (4,)}, "holds no VAE; use the whole checkpoint"),
    "stranger": ({"layer.weight": (1,)}, "not supported yet: an unknown kind of model"),
    "no text encoder": ({UNET: (4, 4, 3, 3)}, "holds no VAE and no text encoder"),
    "half a file": (
        {UNET: (4, 4, 3, 3), "cond_stage_model.model.ln_final.bias": (4,), "first_stage_model.conv": (1,)},
        "looks like sd2 but has no",
    ),
}


@pytest.mark.parametrize("stranger", sorted(STRANGERS))
def test_a_file_of_another_kind_is_named_from_its_header(stranger, tmp_path):
    shapes, says = STRANGERS[stranger]
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedModel, match=says) as caught:
        load_pipeline(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_a_patch_is_no_model(small_pipe, tmp_path):
    path = new_artifact(small_pipe.unet).save(tmp_path / "patch.safetensors")
    with pytest.raises(UnsupportedModel, match="is a safety patch, not a model"):
        load_pipeline(path)


@pytest.mark.parametrize("channels", [5, 8])
def test_depth_and_instruction_models_are_not_supported_yet(sd1, tmp_path, channels):
    tensors = original_layout(sd1.pipe, "sd1")
    save_file({**tensors, UNET: torch.zeros(32, channels, 3, 3)}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedModel, match=f"a UNet with {channels} input channels"):
        load_pipeline(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        ("model.diffusion_model.out.2.weight", "lacks weights of its UNet or VAE"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "lacks 1 weights of CLIPTextModel"),
    ],
)
def test_a_file_that_lacks_weights_is_refused(sd1, tmp_path, absent, says):
    tensors = original_layout(sd1.pipe, "sd1")
    del tensors[absent]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedModel, match=says):
        load_pipeline(tmp_path / "x.safetensors", tokenizer=sd1.tokenizer)


def test_damaged_and_missing_files_are_one_line(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no header here")
    with pytest.raises(UnsupportedModel, match="damaged or not a safetensors file"):
        load_pipeline(tmp_path / "x.safetensors")
    with pytest.raises(ModelNotFound, match="no file at"):
        load_pipeline(tmp_path / "nowhere.safetensors")


# Published sizes of the models that the shipped configurations describe.
PARAMETERS = {
    ("sd1", "unet"): 859_520_964,
    ("sd1", "vae"): 83_653_863,
    ("sd1", "text_encoder"): 123_060_480,
    ("sd2", "unet"): 865_910_724,
    ("sd2", "text_encoder"): 340_387_840,
    ("sdxl", "unet"): 2_567_463_684,
    ("sdxl", "text_encoder_2"): 694_659_840,
}


@pytest.mark.parametrize(("family", "part"), PARAMETERS)
def test_a_shipped_configuration_has_the_published_number_of_parameters(family, part):
    config = json.loads((CONFIGS / f"{family}.json").read_text())
    library, class_name = config["model_index"][part]
    kind = getattr(diffusers if library == "diffusers" else transformers, class_name)
    with torch.device("meta"):
        made = kind.from_config(config[part]) if library == "diffusers" else kind(kind.config_class(**config[part]))
    assert sum(weights.numel() for weights in made.parameters()) == PARAMETERS[family, part]


# ---- check ---------------------------------------------------------------------------------------------------


def test_check_measures_how_far_a_checkpoint_is_from_the_patchs_base(sd1, tmp_path):
    patch = sd1.artifact.save(tmp_path / "patch.safetensors")
    fit = check(sd1.path, patch)
    assert (fit.family, fit.drift) == ("sd1", 0.0)
    tuned = small_family_pipe("sd1")
    with torch.no_grad():
        for weights in tuned.unet.down_blocks.parameters():
            weights.mul_(1.1)
    assert 0.05 < check(write_original(tuned, "sd1", tmp_path / "tuned.safetensors"), patch).drift < 0.2


def test_check_refuses_before_any_weight_is_read(original, sd1, tmp_path, monkeypatch):
    if original.family.startswith("sd1"):
        pytest.skip("SD1 and its inpainting variant share patches")
    monkeypatch.setattr("safepatch.runtime.check.unet_files", lambda *_: pytest.fail("weights were read"))
    patch = sd1.artifact.save(tmp_path / "patch.safetensors")
    with pytest.raises(BaseMismatch, match="this patch is for sd1 UNets"):
        check(original.path, patch)
    with pytest.raises(pytest.fail.Exception):  # control: a patch that fits gets that far
        check(sd1.path, patch)


@torch.no_grad()
def test_a_sketch_tells_the_distance_of_weights(sd1):
    host = small_family_pipe("sd1").unet
    before = sketch(host)
    for weights in (*host.down_blocks.parameters(), *host.up_blocks.parameters()):
        weights.add_(0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(weights.numel())))
    own = dict(sd1.pipe.unet.named_parameters())
    encoder = [n for n, _ in host.named_parameters() if not n.startswith(("up_blocks", "conv_norm_out", "conv_out"))]
    square = sum(float((host.get_parameter(n) - own[n]).square().sum()) for n in encoder)
    true = (square / sum(float(own[n].square().sum()) for n in encoder)) ** 0.5
    assert before == sketch(sd1.pipe.unet)  # control
    assert drift(sketch(host), before) == pytest.approx(true, rel=0.3)  # three standard errors


def test_a_unet_that_projects_its_text_states_is_another_architecture():
    """Kolors has SDXL's sizes; an adapter writes into the same field and changes nothing."""
    sdxl = small_config("sdxl")["unet"]
    kolors, adapted = ({**sdxl, "encoder_hid_dim_type": kind} for kind in ("text_proj", "ip_image_proj"))
    base = {"family": "sdxl"}
    info, other = (PatchInfo("lora", {"weapons": "x"}, fingerprint(made), base) for made in (sdxl, kolors))
    check_fits(info, sdxl)  # controls
    check_fits(info, adapted)
    check_fits(other, kolors)
    for patch, host in ((info, kolors), (other, sdxl)):
        with pytest.raises(BaseMismatch, match=r"encoder_hid_dim_type .*; train one for this model"):
            check_fits(patch, host)


def test_a_file_whose_tokenizer_is_nowhere_is_told_before_any_weight_is_read(sd1, tmp_path):
    ModelConfig(str(sd1.path), str(sd1.tokenizer)).require_whole()  # control
    ModelConfig("tiny-sd").require_whole()
    with pytest.raises(ModelNotFound, match=r"a single file holds no tokenizer, and .* is not in the Hub cache"):
        ModelConfig(str(sd1.path)).require_whole()
    with pytest.raises(ModelNotFound, match=r"holds no tokenizer, and there is none at .*; name CLIP's folder"):
        ModelConfig(str(sd1.path), str(tmp_path)).require_whole()
