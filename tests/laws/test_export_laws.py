"""Law 16: export then import is the same patch; an exported LoRA in plain diffusers is the patch without its gate."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.diffusion import Components, empty_unet, fingerprint, quiet
from safepatch.errors import ArtifactError, BaseMismatch, ConfigError, SafepatchError, UnknownName, UnsupportedModel
from safepatch.export import FORMATS, export, import_lora
from safepatch.export.names import original_path
from safepatch.merging import merge, split
from safepatch.patch import ControlPatch
from safepatch.patch.files import to_artifact
from safepatch.patch.layers import taken_layers
from safepatch.patch.text import TextPatch
from safepatch.runtime.apply import apply
from safepatch.runtime.fuse import fuse
from safepatch.shipped import shipped
from safepatch.taxonomy import Category
from tests.families import draw, small_config, small_family_pipe, unet_name
from tests.small import INSTRUCTION, awaken, new_artifact, new_patch, new_small_pipe, rows

WEIGHT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = [  # what of a UNet other people's LoRAs change
    *("to_q", "to_v", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
]
MINE = Category("mine", "things of the test", "no things")
every_form = pytest.mark.parametrize("form", FORMATS)
every_family = pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def gated(unet: Any, seed: int = 0) -> PatchArtifact:
    """A lora patch that does much, half precision, with a gate."""
    patch = new_patch(unet, "lora", seed=None)
    patch.add_gate(unet, 4)
    artifact = to_artifact(awaken(patch, seed), unet, {"weapons": INSTRUCTION}, license="MIT").astype(torch.float16)
    config = {**artifact.info.config, "gate": {"weapons": {"threshold": 0.5}}}
    return replace(artifact, info=replace(artifact.info, config=config))


def written(folder: Path, form: str) -> Path:
    return folder / "lora.safetensors" if form == "kohya" else folder / "lora"


def model_of(family: str, folder: Path) -> Path:
    """A folder with the configurations of UNet and text encoders alone."""
    for part, config in small_config(family).items():
        if part == "unet" or part.startswith("text_encoder"):
            (folder / "model" / part).mkdir(parents=True)
            (folder / "model" / part / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model" / "model_index.json").write_text(json.dumps(index))
    return folder / "model"


@every_form
@every_family
def test_what_is_exported_comes_back_bit_for_bit_and_works_in_plain_diffusers(family, form, tmp_path):
    pipe = quiet(small_family_pipe(family))
    artifact = gated(pipe.unet)
    path = artifact.save(tmp_path / "patch.safetensors")
    out = export(path, written(tmp_path, form), form)
    back = import_lora(out if form == "kohya" else out.parent)
    assert back.content_hash == artifact.content_hash
    assert back.save(tmp_path / "back.safetensors").read_bytes() == path.read_bytes()
    base = draw(pipe, guidance_scale=1.0)
    with apply(pipe, artifact, gate="off"):
        patched = draw(pipe, guidance_scale=1.0)
    assert (patched - base).abs().max() > 0.02  # control
    pipe.load_lora_weights(str(out.parent), weight_name=out.name)
    loaded = draw(pipe, guidance_scale=1.0)
    assert (loaded - patched).abs().max() < 0.02 * (patched - base).abs().max()
    pipe.unload_lora_weights()


@pytest.mark.parametrize(("family", "form"), [("sd1", "kohya"), ("sdxl", "diffusers")])
def test_a_bundle_of_both_sides_is_one_lora_and_comes_back_bit_for_bit(family, form, tmp_path):
    pipe = quiet(small_family_pipe(family))
    sides = {"unet": gated(pipe.unet), "text_encoder": text_side(pipe, "text_encoder")}
    if family == "sdxl":
        sides["text_encoder_2"] = text_side(pipe, "text_encoder_2")
    paths = [side.save(tmp_path / f"{name}.safetensors") for name, side in sides.items()]
    both = merge(paths, tmp_path / "both.safetensors", weights=[1.0, *([0.5] * (len(paths) - 1))])
    out = export(tmp_path / "both.safetensors", written(tmp_path, form), form)
    back = import_lora(out if form == "kohya" else out.parent)
    assert back.content_hash == both.content_hash
    assert back.save(tmp_path / "back.safetensors").read_bytes() == (tmp_path / "both.safetensors").read_bytes()
    base = draw(pipe, guidance_scale=1.0)
    drawn = []
    for patch in (both, split(both, "weapons", component="unet")):
        with apply(pipe, patch, gate="off"):
            drawn.append(draw(pipe, guidance_scale=1.0))
    effect = (drawn[0] - base).abs().max()
    assert min(effect, (drawn[0] - drawn[1]).abs().max()) > 0.02  # control: both sides count
    pipe.load_lora_weights(str(out.parent), weight_name=out.name)
    assert (draw(pipe, guidance_scale=1.0) - drawn[0]).abs().max() < 0.02 * effect


def text_side(pipe: Any, component: str) -> PatchArtifact:
    """`gated`, of a text encoder."""
    components = Components.of(pipe)
    patch = awaken(TextPatch.of(components, component, rank=4, gate=4))
    artifact = to_artifact(patch, components, {"weapons": INSTRUCTION}, license="MIT").astype(torch.float16)
    config = {**artifact.info.config, "gate": {"weapons": {"threshold": 0.5}}}
    return replace(artifact, info=replace(artifact.info, config=config))


def test_names_are_those_of_diffusers_own_converter(tmp_path):
    artifact = new_artifact(small_family_pipe("sd1").unet, "lora")
    path = artifact.save(tmp_path / "patch.safetensors")
    ours = load_file(export(path, tmp_path / "kohya.safetensors"))
    theirs = convert_state_dict_to_kohya(load_file(export(path, tmp_path / "folder", "diffusers")))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.endswith(".alpha"))
    assert all(float(ours[name]) == float(theirs[name]) for name in ours if name.endswith(".alpha"))


@pytest.mark.parametrize("more", [{"lora_alpha": 8}, {"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 2}])
@pytest.mark.parametrize("name", ["diffusers", "kohya"])
def test_somebody_elses_lora_is_a_patch_without_a_gate(more, name, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = quiet(small_family_pipe("sd1"))
    base, unet = draw(pipe, guidance_scale=1.0), pipe.unet
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False, **more))
    theirs = draw(pipe, guidance_scale=1.0)
    state = {f"unet.{key}": t.contiguous() for key, t in get_peft_model_state_dict(unet).items()}
    settings = {f"unet.{key}": value for key, value in {"r": 4, **more}.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    if name == "kohya":
        alpha = more["lora_alpha"] * (2 if more.get("use_rslora") else 1)  # kohya's scale is alpha / rank
        named, metadata = convert_state_dict_to_kohya(state), {}
        state = {key: torch.tensor(float(alpha)) if key.endswith("alpha") else t for key, t in named.items()}
    save_file(state, tmp_path / "theirs.safetensors", metadata)
    unet.delete_adapters(["default"])
    imported = import_lora(tmp_path / "theirs.safetensors", MINE, model_of("sd1", tmp_path))
    assert imported.info.categories == ("mine",)
    path = imported.save(tmp_path / "mine.safetensors")
    with apply(pipe, path):
        ours = draw(pipe, guidance_scale=1.0)
    assert (theirs - base).abs().max() > 0.01  # control
    assert (ours - theirs).abs().max() < 0.02 * (theirs - base).abs().max()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_an_alpha_that_somebody_states_for_some_layers_holds_for_those(component, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    learned, pipe = quiet(small_family_pipe("sd1")), quiet(small_family_pipe("sd1"))
    base, host = draw(pipe, guidance_scale=1.0), getattr(learned, component)
    targets, some = (["to_q", "to_v"], "attn2.to_v") if component == "unet" else (["q_proj", "v_proj"], "v_proj")
    more = {"lora_alpha": 1, "alpha_pattern": {some: 256}}
    torch.manual_seed(0)
    host.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **more))
    theirs = draw(learned, guidance_scale=1.0)
    told = {key.removeprefix("text_model."): t.contiguous() for key, t in get_peft_model_state_dict(host).items()}
    prefix = "unet" if component == "unet" else "text_encoder.text_model"
    settings = {f"{component}.{key}": value for key, value in {"r": 4, **more}.items()}
    state = {f"{prefix}.{key}": t for key, t in told.items()}
    path, model, effect = tmp_path / "theirs.safetensors", model_of("sd1", tmp_path), (theirs - base).abs().max()

    def drawn(settings: dict[str, Any]) -> Tensor:
        save_file(state, path, {"lora_adapter_metadata": json.dumps(settings)})
        with apply(pipe, import_lora(path, MINE, model).save(tmp_path / "mine.safetensors")):
            return draw(pipe, guidance_scale=1.0)

    assert (drawn(settings) - theirs).abs().max() < 0.02 * effect
    whole = {f"{component}.alpha_pattern": {f"{prefix}.{key}".split(".", 1)[1]: 256 for key in layers_of(told, some)}}
    assert (drawn(settings | whole) - theirs).abs().max() < 0.02 * effect
    assert (drawn({**settings, f"{component}.alpha_pattern": {}}) - theirs).abs().max() > 0.2 * effect  # control
    with pytest.raises(UnsupportedModel, match=r"states alpha by the pattern 'attn\\d'; only names are read"):
        drawn(settings | {f"{component}.alpha_pattern": {r"attn\d": 4}})


def layers_of(state: dict[str, Tensor], end: str) -> list[str]:
    """Of which layers, whose names end so, these are the factors."""
    return [key.removesuffix(".lora_A.weight") for key in state if key.endswith(f"{end}.lora_A.weight")]


def learned_by_others(pipe: Any, targets: list[str]) -> dict[str, Tensor]:
    """Puts a LoRA on layers of UNet and text encoders, as PEFT does; its tensors by diffusers' names."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    state = {f"unet.{key}": t for key, t in get_peft_model_state_dict(pipe.unet).items()}
    for name in ("text_encoder", "text_encoder_2"):
        if encoder := getattr(pipe, name, None):
            encoder.add_adapter(
                LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj", "fc1"], init_lora_weights=False)
            )
            told = get_peft_model_state_dict(encoder)
            state |= {f"{name}.text_model.{key.removeprefix('text_model.')}": t for key, t in told.items()}
    return {key: tensor.contiguous() for key, tensor in state.items()}


@pytest.mark.parametrize("zeros", ["text_encoder.", "unet."])
def test_a_side_that_nobody_trained_is_left_out(zeros, tmp_path):
    state, path = learned_by_others(small_family_pipe("sd1"), ["to_q"]), tmp_path / "theirs.safetensors"
    model, found = model_of("sd1", tmp_path), []
    for without in ("-", zeros):
        up = [name for name in state if name.startswith(without) and "lora_B" in name]
        save_file({**state, **{name: torch.zeros_like(state[name]) for name in up}}, path)
        import_lora(path, MINE, model).save(tmp_path / "mine.safetensors")
        found.append(verify(tmp_path / "mine.safetensors").components)
    assert found[0] == ("text_encoder", "unet")  # control
    assert found[1] == (("unet",) if zeros == "text_encoder." else ("text_encoder",))


ALPHAS = {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 32, "text_encoder_2.lora_alpha": 32}


@pytest.mark.parametrize(("family", "name"), [("sd1", "kohya"), ("sd2", "diffusers"), ("sdxl", "kohya")])
def test_a_lora_of_convolutions_and_text_encoders_is_a_patch_of_both(family, name, tmp_path):
    theirs, pipe = quiet(small_family_pipe(family)), quiet(small_family_pipe(family))
    base = draw(pipe, guidance_scale=1.0)
    state, metadata = learned_by_others(theirs, WIDE), {"format": "pt", "lora_adapter_metadata": json.dumps(ALPHAS)}
    if name == "kohya":
        named, metadata = convert_state_dict_to_kohya(state), {}
        alphas = {key: torch.tensor(8.0 if "unet" in key else 32.0) for key in named if key.endswith("alpha")}
        state = {**named, **alphas}
    save_file(state, tmp_path / "theirs.safetensors", metadata)
    imported = import_lora(tmp_path / "theirs.safetensors", MINE, model_of(family, tmp_path))
    encoders = ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
    assert imported.info.components == (*encoders, "unet")
    assert imported.info.categories == ("mine",)
    wanted = draw(theirs, guidance_scale=1.0)
    with apply(pipe, imported.save(tmp_path / "mine.safetensors")):
        ours = draw(pipe, guidance_scale=1.0)
    effect = (wanted - base).abs().max()
    assert effect > 0.01  # control
    with apply(pipe, split(imported, "mine", component="unet")):
        partly = draw(pipe, guidance_scale=1.0)
    assert (partly - wanted).abs().max() > 0.05 * effect  # control: the encoders count
    assert (ours - wanted).abs().max() < 0.005 * effect


def test_an_update_of_convolutions_is_merged_exported_and_fused_as_any(tmp_path):
    theirs, pipe = quiet(small_family_pipe("sd1")), quiet(small_family_pipe("sd1"))
    base, state = draw(pipe, guidance_scale=1.0), learned_by_others(theirs, WIDE)
    metadata = {"lora_adapter_metadata": json.dumps(ALPHAS)}
    state = {key: tensor for key, tensor in state.items() if key.startswith("unet.")}
    save_file(state, tmp_path / "theirs.safetensors", metadata)
    patch = import_lora(tmp_path / "theirs.safetensors", MINE, model_of("sd1", tmp_path))
    other = replace(patch, info=replace(patch.info, instructions={"more": "nothing"})).save(tmp_path / "b.safetensors")
    both = merge([patch.save(tmp_path / "a.safetensors"), other], tmp_path / "cat.safetensors", method="cat")
    with apply(pipe, both):
        wanted = draw(pipe, guidance_scale=1.0)
    assert (wanted - base).abs().max() > 0.02  # control
    lora = export(tmp_path / "cat.safetensors", tmp_path / "lora.safetensors")
    assert import_lora(lora).content_hash == both.content_hash
    fused = quiet(small_family_pipe("sd1"))
    fuse(fused, both)
    pipe.load_lora_weights(str(tmp_path), weight_name=lora.name)
    for made in (draw(fused, guidance_scale=1.0), draw(pipe, guidance_scale=1.0)):
        assert (made - wanted).abs().max() < 0.02 * (wanted - base).abs().max()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_every_layer_is_known_by_its_name_in_the_original_layout(family):
    unet = empty_unet(small_config(family)["unet"])
    layers, config = taken_layers(unet), fingerprint(unet.config)
    assert {layer.split(".")[2] for layer in layers if "up_blocks" in layer} == {"attentions", "resnets", "upsamplers"}
    for layer in layers:
        assert f"{original_path(layer, config)}.weight" == unet_name(f"{layer}.weight", unet)


def test_a_family_is_told_by_the_width_of_its_text_states(tmp_path):
    """With the family's real sizes, of which only the names and shapes count."""
    shapes = {"down": (2, 768), "up": (320, 2)}
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lora_{form}.weight": torch.ones(shape) for form, shape in shapes.items()}
    save_file(tensors, tmp_path / "leco.safetensors", {"modelspec.license": "MIT"})
    artifact = import_lora(tmp_path / "leco.safetensors", MINE)
    assert (artifact.info.base["family"], artifact.info.license) == ("sd1", "MIT")
    assert artifact.info.fingerprint["block_out_channels"] == [320, 640, 1280, 1280]
    (name,) = artifact.parameter_names()
    assert torch.equal(artifact.delta(name), torch.full((320, 768), 2.0))


# ---- what cannot be exported, and what cannot be imported ------------------------------------------------------


@pytest.fixture
def lora(tmp_path) -> Path:
    return new_artifact(new_small_pipe().unet, "lora").save(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("kind", ["control", "lite"])
def test_a_kind_that_is_no_lora_says_so(kind, tmp_path):
    path = new_artifact(new_small_pipe().unet, kind).save(tmp_path / "patch.safetensors")
    with pytest.raises(ConfigError, match=f"a {kind} patch is a network of its own and no LoRA"):
        export(path, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("kind", ["control", "lite", "lora", "bundle"])
def test_a_patch_does_not_look_like_a_lora_to_diffusers(kind, tmp_path):
    """It would load none of it, say nothing that anybody reads, and draw without it."""
    unet = new_small_pipe().unet
    path = tmp_path / "patch.safetensors"
    if kind == "bundle":
        parts = [new_artifact(unet, "lora", seed=i).save(tmp_path / f"part-{i}.safetensors") for i in range(2)]
        merge(parts, path)
    else:
        new_artifact(unet, kind).save(path)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        quiet(new_small_pipe()).load_lora_weights(str(tmp_path), weight_name=path.name)


@pytest.mark.parametrize("entry", shipped(), ids=lambda entry: entry.file)
def test_no_shipped_patch_looks_like_a_lora_to_diffusers(entry):
    path = entry.path
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        quiet(new_small_pipe()).load_lora_weights(str(path.parent), weight_name=path.name)


@torch.no_grad()
def test_a_control_patch_is_a_controlnet_only_where_it_is_told_the_instruction_too():
    """Why one that reads its instruction is not exported: others tell a ControlNet the prompt alone."""
    unet = new_small_pipe().unet
    patch = cast(ControlPatch, new_patch(unet, "control"))
    net = ControlNetModel.from_unet(unet).eval()
    weights = {name.removeprefix("clone."): tensor for name, tensor in patch.state_dict().items()}
    renamed = {
        name.replace("zero_down", "controlnet_down_blocks").replace("zero_mid", "controlnet_mid_block"): tensor
        for name, tensor in weights.items()
    }
    lacking = net.load_state_dict(renamed, strict=False)
    assert not lacking.unexpected_keys
    assert all("cond_embedding" in name for name in lacking.missing_keys)  # of the hint, which ends in zeros
    sample, timesteps, states = rows()
    instruction, hint = rows(1, seed=1)[2], torch.ones(2, 3, 128, 128)
    ours = patch(sample, timesteps, states, instruction)
    for told, is_same in ((torch.cat((instruction.expand(2, -1, -1), states), dim=1), True), (states, False)):
        down, mid = net(sample, timesteps, told, hint, return_dict=False)
        pairs = zip((*ours.down, ours.mid), (*down, mid), strict=True)
        apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
        assert apart < 1e-4 if is_same else apart > 0.01


def test_merges_are_exported_by_cat_alone(lora, tmp_path):
    other = new_artifact(new_small_pipe().unet, "lora", 1)
    other = replace(other, info=replace(other.info, instructions={"drugs": "no drugs"})).save(
        tmp_path / "b.safetensors"
    )
    for method, says in (("bundle", "a bundle is several patches"), ("ties", "has no factors after this merge")):
        merge([lora, other], tmp_path / "m.safetensors", method=method)
        with pytest.raises(ConfigError, match=says):
            export(tmp_path / "m.safetensors", tmp_path / "x.safetensors")
    merge([lora, other], tmp_path / "cat.safetensors", method="cat")
    back = import_lora(export(tmp_path / "cat.safetensors", tmp_path / "x.safetensors"))
    assert back.info.categories == ("drugs", "weapons")


def test_an_unknown_format_and_a_wrong_name_are_refused(lora, tmp_path):
    with pytest.raises(UnknownName, match="no format 'khoya'; did you mean 'kohya'"):
        export(lora, tmp_path / "x.safetensors", "khoya")
    with pytest.raises(ConfigError, match=r"one \.safetensors file"):
        export(lora, tmp_path / "x.pt")


def test_an_export_says_what_it_is_and_is_no_patch_when_it_was_altered(lora, tmp_path):
    path = export(lora, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="exported as a LoRA; `safepatch import` makes it a patch again"):
        verify(path)
    import_lora(path)  # control
    tensors, metadata = load_file(path), _metadata(path)
    first = next(name for name in tensors if "lora_up" in name)
    save_file({**tensors, first: tensors[first] + 1}, path, metadata)
    with pytest.raises(ArtifactError, match="no longer the patch that was exported"):
        import_lora(path)
    new_small_pipe().save_pretrained(tmp_path / "model")
    assert import_lora(path, MINE, tmp_path / "model").info.categories == ("mine",)  # as somebody else's
    forged = metadata["safepatch.exported"].replace("weapons", "flowers")
    save_file(tensors, path, {**metadata, "safepatch.exported": forged})
    with pytest.raises(ArtifactError, match=r"no longer the patch|is damaged"):
        import_lora(path)


def _metadata(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def changed(**more: Tensor) -> dict[str, Tensor]:
    stem = "lora_unet_" + WEIGHT.replace(".", "_")
    return {f"{stem}.lora_down.weight": torch.ones(2, 96), f"{stem}.lora_up.weight": torch.ones(96, 2), **more}


@pytest.mark.parametrize(
    ("tensors", "error", "says"),
    [
        ({"lora_unet_x.dora_scale": torch.ones(1)}, UnsupportedModel, "is a DoRA"),
        ({"lora_unet_x.hada_w1_a": torch.ones(1)}, UnsupportedModel, "is a LoHa"),
        ({"lora_unet_x.lora_mid.weight": torch.ones(1)}, UnsupportedModel, "is a LoCon of three factors"),
        ({"lora_te_text_model_x.lora_down.weight": torch.ones(1, 1)}, UnsupportedModel, "a text encoder's layers"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 1)}, UnsupportedModel, "layers that a lora patch has no"),
    ],
)
def test_what_a_patch_has_no_place_for_is_named(tensors, error, says, tmp_path):
    save_file(changed(), tmp_path / "plain.safetensors")
    import_lora(tmp_path / "plain.safetensors", MINE, "tiny-sd")  # control
    save_file(changed(**tensors), tmp_path / "x.safetensors")
    with pytest.raises(error, match=says):
        import_lora(tmp_path / "x.safetensors", MINE, "tiny-sd")
    if "place" in says or "encoder" in says:
        assert import_lora(tmp_path / "x.safetensors", MINE, "tiny-sd", partly=True).info.categories == ("mine",)


def test_bad_loras_are_one_line(lora, tmp_path):
    path = tmp_path / "x.safetensors"
    half = changed()
    half.popitem()
    wrong = {name: torch.ones(2, 95) if "down" in name else tensor for name, tensor in changed().items()}
    cases: list[tuple[dict[str, Tensor], Any, type[SafepatchError], str]] = [
        (half, "tiny-sd", UnsupportedModel, "lacks 'lora_unet"),
        (wrong, "tiny-sd", BaseMismatch, "has another size in this model"),
        (changed(), None, UnsupportedModel, "does not tell its family; name a model"),
        ({"x": torch.ones(1)}, "tiny-sd", UnsupportedModel, "no place for"),
    ]
    for tensors, model, error, says in cases:
        save_file(tensors, path)
        with pytest.raises(error, match=says) as caught:
            import_lora(path, MINE, model)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="does not say what it is for"):
        import_lora(path)
    with pytest.raises(SafepatchError):
        import_lora(tmp_path / "absent.safetensors", MINE)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("alpha", torch.ones(3)),
        ("lora_up.weight", torch.ones(96)),
        ("lora_up.weight", torch.tensor(1.0)),
        ("lora_down.weight", torch.ones(0, 96)),
    ],
)
def test_hostile_loras_are_one_line(name, tensor, tmp_path):
    stem = "lora_unet_" + WEIGHT.replace(".", "_")
    save_file({**changed(), f"{stem}.{name}": tensor}, tmp_path / "x.safetensors")
    with pytest.raises(SafepatchError) as caught:
        import_lora(tmp_path / "x.safetensors", MINE, "tiny-sd")
    assert "\n" not in str(caught.value)


def test_an_export_that_states_no_hash_is_one_line(lora, tmp_path):
    path = export(lora, tmp_path / "x.safetensors")
    record = json.loads(_metadata(path)["safepatch.exported"])
    for kept in (record, {"metadata": record["metadata"]}):
        save_file(load_file(path), path, {**_metadata(path), "safepatch.exported": json.dumps(kept)})
        if kept is record:
            import_lora(path)  # control
            continue
        with pytest.raises(ArtifactError, match=r"is damaged: .*'hash'"):
            import_lora(path)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_lora_that_would_make_no_patch_of_use_is_not_imported(bad, tmp_path):
    path, tensors = tmp_path / "x.safetensors", changed()
    save_file(tensors, path)
    import_lora(path, MINE, "tiny-sd")  # control
    (up,) = [name for name in tensors if "lora_up" in name]
    save_file({**tensors, up: torch.full_like(tensors[up], bad)}, path)
    with pytest.raises(ArtifactError, match="holds zeros where it would act" if bad == 0 else "NaN or infinity"):
        import_lora(path, MINE, "tiny-sd")


@pytest.mark.parametrize("forged", ["[]", "{}", '{"metadata": [], "hash": 3}', "3", "{"])
def test_hostile_exports_are_one_line(forged, lora, tmp_path):
    path = export(lora, tmp_path / "x.safetensors")
    for key in ("safepatch.exported", "safepatch.exported.gate"):
        save_file(load_file(path), tmp_path / "forged.safetensors", {**_metadata(path), key: forged})
        if (key, forged) == ("safepatch.exported.gate", "{}"):
            import_lora(tmp_path / "forged.safetensors")  # control: that patch has no gate
            continue
        with pytest.raises(SafepatchError) as caught:
            import_lora(tmp_path / "forged.safetensors")
        assert "\n" not in str(caught.value)
