"""Lora patches: low-rank updates of the host's own layers, applied beside them or fused into their weights."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import safepatch
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import Components, Conditioning, noise_pred, quiet
from safepatch.errors import BaseMismatch, ConfigError, ModelNotFound, PatchBypassed, SafepatchError
from safepatch.merging import merge
from safepatch.models.load import load_pipeline
from safepatch.patch import LoraPatch
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.host import patched_prediction
from safepatch.patch.lora import updated_weights
from safepatch.patch.text import TextPatch
from safepatch.runtime.apply import apply, attach
from safepatch.runtime.fuse import NOTE, Update, fuse, fuse_model
from tests.families import (
    draw,
    original_layout,
    small_family_pipe,
    small_transformer_pipe,
    tokenizer_folder,
    write_original,
)
from tests.small import (
    INSTRUCTION,
    awaken,
    images,
    new_artifact,
    new_patch,
    new_small_host,
    new_small_pipe,
    new_small_unet,
    rows,
    small_artifact,
)

# diffusers 0.42.1's Euler schedulers turn tensors into arrays in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def awake(host: Any, seed: int = 0, rank: int = 4, category: str = "weapons") -> PatchArtifact:
    patch = awaken(LoraPatch.from_unet(host, rank=rank), seed, size=0.05)
    return to_artifact(patch, host, {category: INSTRUCTION})


def layer_deltas(artifact: PatchArtifact, scale: float) -> dict[str, Tensor]:
    update = Update.of(artifact, scale)
    return {name: update.delta(name) for name in update.names}


@torch.no_grad()
def predicted(unet: Any, *inputs: Tensor) -> Tensor:
    return noise_pred(unet, *inputs)


# ---- beside the layers ------------------------------------------------------------------------------------------


def test_a_fresh_patch_changes_no_bit(small_pipe):
    base = images(small_pipe)
    with apply(small_pipe, new_artifact(small_pipe.unet, "lora", seed=None)) as handle:
        assert torch.equal(images(small_pipe), base)
    assert handle.stats.patched_calls == handle.stats.unet_calls > 0
    with apply(small_pipe, small_artifact("lora")):
        assert not torch.equal(images(small_pipe), base)  # control


def test_it_changes_what_the_layers_weights_would(small_pipe):
    artifact, inputs = small_artifact("lora"), rows()
    base = predicted(small_pipe.unet, *inputs)
    with apply(small_pipe, artifact, scale=0.5):
        patched = predicted(small_pipe.unet, *inputs)
    fused = copy.deepcopy(small_pipe.unet)
    weights = dict(fused.named_parameters())
    with torch.no_grad():
        for name, delta in layer_deltas(artifact, 0.5).items():
            weights[name] += delta
    torch.testing.assert_close(patched, predicted(fused, *inputs), atol=1e-5, rtol=1e-4)
    assert (patched - base).abs().max() > 0.01  # control


def test_under_guidance_the_negative_rows_are_the_bases(small_pipe):
    seen: list[Tensor] = []
    small_pipe.unet.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    for patched in (False, True):
        if patched:
            apply(small_pipe, small_artifact("lora"))
        images(small_pipe, negative="a knife")
    base, with_patch = seen
    assert torch.equal(base[:2], with_patch[:2])
    assert not torch.equal(base[2:], with_patch[2:])


def test_it_acts_within_its_window_only(small_pipe):
    sample, _, states = rows()
    with apply(small_pipe, small_artifact("lora"), start=0.2, end=0.5) as handle:
        for timestep, acts in ((900, False), (700, True), (300, False)):
            inside = predicted(small_pipe.unet, sample, torch.tensor(timestep), states)
            handle.scale = 0
            outside = predicted(small_pipe.unet, sample, torch.tensor(timestep), states)
            handle.scale = 1
            assert torch.equal(inside, outside) is not acts


def test_two_patches_add_up_in_any_order(small_pipe):
    inputs, first, second = rows(), awake(small_pipe.unet, 1), awake(small_pipe.unet, 2)
    made = []
    for pair in ((first, second), (second, first)):
        handles = [apply(small_pipe, each) for each in pair]
        made.append(predicted(small_pipe.unet, *inputs))
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(*made, atol=1e-5, rtol=1e-4)
    assert torch.equal(predicted(small_pipe.unet, *inputs), predicted(new_small_pipe().unet, *inputs))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_it_acts_on_every_family(name):
    pipe = (small_transformer_pipe if name in ("sd3", "flux") else small_family_pipe)(name)
    base = draw(pipe)
    with apply(pipe, awake(Components.of(pipe).unet)):
        assert not torch.equal(draw(pipe), base)
    assert torch.equal(draw(pipe), base)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_host_that_carries_a_lora_is_updated_beside_it(small_pipe):
    from peft import LoraConfig

    artifact, inputs = small_artifact("lora"), rows()
    for name in ("one", "two"):
        small_pipe.unet.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name=name
        )
    small_pipe.unet.set_adapters(["one", "two"])
    base = predicted(small_pipe.unet, *inputs)
    assert not torch.equal(base, predicted(new_small_pipe().unet, *inputs))  # control: the user's adapters act
    with apply(small_pipe, artifact):
        patched = predicted(small_pipe.unet, *inputs)
    again = to_artifact(LoraPatch.from_unet(small_pipe.unet, rank=4), small_pipe.unet, {"weapons": INSTRUCTION})
    assert again.parameter_names() == artifact.parameter_names()
    fuse(small_pipe, artifact)
    torch.testing.assert_close(patched, predicted(small_pipe.unet, *inputs), atol=1e-5, rtol=1e-4)
    assert (patched - base).abs().max() > 0.01  # control


def test_after_a_call_the_hooks_rest(small_pipe):
    inputs = rows()
    base = predicted(small_pipe.unet, *inputs)
    with apply(small_pipe, small_artifact("lora"), fail_closed=False) as handle:
        predicted(small_pipe.unet, *inputs)
        handle.scale = 0
        with torch.no_grad():
            assert torch.equal(small_pipe.unet.forward(*inputs).sample, base)


def test_a_lost_hook_on_a_layer_is_noticed(small_pipe):
    with apply(small_pipe, small_artifact("lora")):
        layer = small_pipe.unet.get_submodule(LoraPatch.from_unet(small_pipe.unet).layers[0])
        layer._forward_hooks.clear()
        with pytest.raises(PatchBypassed, match="hooks inside it are lost"):
            images(small_pipe)


def test_a_layer_that_runs_on_parts_of_the_batch_is_updated_in_all_of_them(small_pipe):
    for module in small_pipe.unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, 0)
    base = images(small_pipe)
    layers = [layer for layer in small_artifact("lora").parameter_names() if ".ff." in layer]
    tensors = {name: t for name, t in small_artifact("lora").tensors.items() if name.rpartition(".")[0] in layers}
    shapes = {name: shape for name, shape in small_artifact("lora").info.shapes.items() if name in layers}
    only = PatchArtifact(tensors, replace(small_artifact("lora").info, shapes=shapes))
    with apply(small_pipe, only):
        chunked = images(small_pipe)
    fuse(small_pipe, only)
    torch.testing.assert_close(chunked, images(small_pipe), atol=1e-4, rtol=1e-3)
    assert (chunked - base).abs().max() > 0.01  # control


def test_blocks_that_sd3_skips_are_not_missed():
    pipe = small_transformer_pipe("sd3")
    guided = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_start": 0.0}
    base = draw(pipe, **guided)
    assert not torch.equal(draw(pipe), base)  # control
    with apply(pipe, awake(pipe.transformer)):
        assert not torch.equal(draw(pipe, **guided), base)


def test_a_copied_pipeline_has_hooks_of_its_own(small_pipe):
    with apply(small_pipe, small_artifact("lora")):
        patched = images(small_pipe)
        copied = copy.deepcopy(small_pipe)
    assert torch.equal(images(copied), patched)
    assert not torch.equal(images(small_pipe), patched)


# ---- training and files -----------------------------------------------------------------------------------------


def test_training_reaches_every_factor():
    host, (sample, timesteps, states) = new_small_host(), rows()
    patch = LoraPatch.from_unet(host.unet, rank=4)
    inputs = sample, timesteps, Conditioning(states)
    instruction = torch.zeros(1, 3, 192)
    assert torch.equal(patched_prediction(host, patch, *inputs, instruction), host.predict(*inputs))
    for update in patch.updates:
        torch.nn.init.normal_(update.up, std=0.1)
    patched_prediction(host, patch, *inputs, instruction).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in patch.parameters())
    assert not any(layer._forward_hooks for layer in host.unet.modules())


def test_a_file_keeps_the_factors_and_gives_the_same_module(tmp_path):
    unet = new_small_unet()
    patch = new_patch(unet, "lora")
    artifact = to_artifact(patch, unet, {"weapons": INSTRUCTION})
    again = from_artifact(PatchArtifact.open(artifact.save(tmp_path / "w.safetensors")), unet)
    ours, theirs = (dict(zip(each.layers, each.updates, strict=True)) for each in (patch, again))
    assert ours.keys() == theirs.keys()
    for layer, update in ours.items():
        assert torch.equal(update.up, theirs[layer].up)
        assert torch.equal(update.down, theirs[layer].down)
    assert {name.rpartition(".")[2] for name in artifact.tensors} == {"up", "down"}


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "bundle"])
def test_merged_patches_act_as_their_deltas_say(small_pipe, tmp_path, method):
    paths = [awake(small_pipe.unet, i, rank=2 + i).save(tmp_path / f"{i}.safetensors") for i in range(2)]
    merged = merge(paths, tmp_path / "merged.safetensors", method)
    base, inputs = copy.deepcopy(small_pipe.unet), rows()
    with apply(small_pipe, merged):
        patched = predicted(small_pipe.unet, *inputs)
    weights = dict(base.named_parameters())
    with torch.no_grad():
        for name, delta in layer_deltas(merged, 1.0).items():
            weights[name] += delta
    torch.testing.assert_close(patched, predicted(base, *inputs), atol=1e-5, rtol=1e-4)
    assert not torch.equal(patched, predicted(small_pipe.unet, *inputs))  # control
    if method in ("cat", "bundle"):
        single = [layer_deltas(PatchArtifact.open(path), 1.0) for path in paths]
        for name, delta in layer_deltas(merged, 1.0).items():
            torch.testing.assert_close(delta, sum(deltas[name] for deltas in single))


def test_a_layer_that_the_host_lacks_is_named(small_pipe):
    artifact = small_artifact("lora")
    tensors = {name.replace("attn2.to_q", "attn3.to_q"): tensor for name, tensor in artifact.tensors.items()}
    shapes = {name.replace("attn2.to_q", "attn3.to_q"): shape for name, shape in artifact.info.shapes.items()}
    other = PatchArtifact(tensors, replace(artifact.info, shapes=shapes))
    with pytest.raises(BaseMismatch, match=r"attn3\.to_q', which this model lacks"):
        apply(small_pipe, other)


def test_a_weight_of_as_many_values_in_another_shape_is_refused(small_pipe):
    pipe, artifact = small_pipe, small_artifact("lora")
    name = next(n for n in updated_weights(artifact) if len({*pipe.unet.get_parameter(n).shape}) > 1)
    fuse(new_small_pipe(), artifact)  # control
    owner, _, last = name.rpartition(".")
    layer = pipe.unet.get_submodule(owner)
    setattr(layer, last, torch.nn.Parameter(getattr(layer, last).data.T.contiguous()))
    with pytest.raises(BaseMismatch, match="another size in this model"):
        fuse(pipe, artifact)


@pytest.mark.parametrize(
    ("layout", "message"),
    [({"rank": 0}, "rank of at least 1"), ({"gate": -1}, "width of at least 1"), ({"depth": 2}, "no 'depth', only a")],
)
def test_layouts_it_cannot_have_are_refused(layout, message):
    with pytest.raises(ConfigError, match=message):
        LoraPatch.from_unet(new_small_unet(), **layout)


def test_a_gate_in_front_of_it_reads_no_features(small_pipe):
    patch = new_patch(small_pipe.unet, "lora", seed=None)
    patch.add_gate(small_pipe.unet, 4)
    with attach(small_pipe, awaken(patch), [INSTRUCTION]) as handle:
        assert not small_pipe.unet.up_blocks[0]._forward_pre_hooks
        images(small_pipe)
    assert handle.stats.gated_rows == 2


# ---- fused --------------------------------------------------------------------------------------------------------


def test_fused_is_applied_where_every_row_carries_the_prompt(small_pipe):
    artifact = small_artifact("lora")
    base = images(small_pipe, guidance_scale=1.0)
    with apply(small_pipe, artifact):
        applied = images(small_pipe, guidance_scale=1.0)
    fuse(small_pipe, artifact)
    torch.testing.assert_close(images(small_pipe, guidance_scale=1.0), applied, atol=1e-4, rtol=1e-3)
    assert (applied - base).abs().max() > 0.01  # control
    assert safepatch.status(small_pipe) == ()


def test_a_gate_stays_behind_when_its_patch_is_fused(small_pipe):
    patch = LoraPatch.from_unet(small_pipe.unet, rank=4)
    patch.add_gate(small_pipe.unet, 4)
    gated = to_artifact(awaken(patch, size=0.05), small_pipe.unet, {"weapons": INSTRUCTION})
    config = {**gated.info.config, "gate": {"weapons": {"threshold": 1.0}}}
    gated = replace(gated, info=replace(gated.info, config=config))
    with apply(small_pipe, gated, gate="off"):
        ungated = images(small_pipe, guidance_scale=1.0)
    with apply(small_pipe, gated):
        assert not torch.allclose(images(small_pipe, guidance_scale=1.0), ungated, atol=0.01)  # control: it is closed
    fuse(small_pipe, gated)
    torch.testing.assert_close(images(small_pipe, guidance_scale=1.0), ungated, atol=1e-4, rtol=1e-3)


def test_a_fused_folder_loads_in_plain_diffusers(small_pipe, tmp_path):
    pipe = small_pipe.to(dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "model")
    path = small_artifact("lora").save(tmp_path / "w.safetensors")
    out = fuse_model(tmp_path / "model", path, tmp_path / "new" / "safe", scale=0.5)
    loaded = quiet(diffusers.StableDiffusionPipeline.from_pretrained(out, dtype=torch.float16))
    fuse(pipe, small_artifact("lora"), scale=0.5)
    for ours, theirs in zip(pipe.unet.parameters(), loaded.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    (note,) = json.loads((out / f"{NOTE}.json").read_text())
    assert note["categories"] == ["weapons"]
    assert note["hash"] == PatchArtifact.open(path).content_hash
    names = [f.relative_to(tmp_path / "model") for f in sorted((tmp_path / "model").rglob("*")) if f.is_file()]
    changed = [n for n in names if (tmp_path / "model" / n).read_bytes() != (out / n).read_bytes()]
    assert [str(name) for name in changed] == ["unet/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("name", ["sd1", "sd1-inpaint", "sd2", "sdxl", "sdxl-refiner"])
def test_a_fused_single_file_keeps_its_layout(name, tmp_path):
    pipe = small_family_pipe(name)
    model = write_original(pipe, name, tmp_path / "model.safetensors", {"modelspec.title": "theirs"})
    path = awake(pipe.unet).save(tmp_path / "w.safetensors")
    out = fuse_model(model, path, tmp_path / "safe.safetensors")
    loaded = quiet(load_pipeline(out, tokenizer=tokenizer_folder(tmp_path / "tokenizer")))
    before = {key: weight.clone() for key, weight in pipe.unet.named_parameters()}
    fuse(pipe, path)
    for key, weight in loaded.unet.named_parameters():
        assert torch.equal(weight, dict(pipe.unet.named_parameters())[key])
    assert any(not torch.equal(weight, before[key]) for key, weight in loaded.unet.named_parameters())  # control
    with safe_open(out, "pt") as new, safe_open(model, "pt") as old:
        assert list(new.keys()) == list(old.keys())
        assert new.metadata()["modelspec.title"] == "theirs"
        assert [note["scale"] for note in json.loads(new.metadata()[NOTE])] == [1.0]


def test_every_variant_and_shard_of_a_folder_is_fused(small_pipe, tmp_path):
    small_pipe.save_pretrained(tmp_path / "model")
    small_pipe.save_pretrained(tmp_path / "model", variant="fp16")
    small_pipe.unet.save_pretrained(tmp_path / "model" / "unet", variant="cut", max_shard_size="500KB")
    torch.save(small_pipe.unet.state_dict(), tmp_path / "model" / "unet" / "diffusion_pytorch_model.bin")
    path = small_artifact("lora").save(tmp_path / "w.safetensors")
    out = fuse_model(tmp_path / "model", path, tmp_path / "safe")
    fuse(small_pipe, path)
    assert len(list((out / "unet").glob("*cut-*.safetensors"))) > 1
    assert not list((out / "unet").glob("*.bin"))
    for variant in (None, "fp16", "cut"):
        loaded = diffusers.UNet2DConditionModel.from_pretrained(out, subfolder="unet", variant=variant)
        pairs = zip(small_pipe.unet.parameters(), loaded.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs), variant


def with_thresholds(artifact: PatchArtifact) -> PatchArtifact:
    """The artifact with the record that a fitted gate has."""
    gates = {name: {"threshold": 0.5} for name in artifact.info.categories}
    return replace(artifact, info=replace(artifact.info, config={**artifact.info.config, "gate": gates}))


def test_a_bundles_digest_tells_weights_apart_and_not_gates(small_pipe, tmp_path):
    plain = [awake(small_pipe.unet, i) for i in range(3)]
    plain = [replace(a, info=replace(a.info, instructions={name: name})) for a, name in zip(plain, "abc", strict=True)]

    def digest(patches: list[PatchArtifact], weights: tuple[float, ...]) -> str:
        paths = [patch.save(tmp_path / f"{i}.safetensors") for i, patch in enumerate(patches)]
        return Update.of(merge(paths, method="bundle", weights=weights), 1.0).digest

    def gated(artifact: PatchArtifact, seed: int) -> PatchArtifact:
        patch = from_artifact(artifact, small_pipe.unet)
        patch.add_gate(small_pipe.unet, 4)
        patch.gate.bias.data += seed
        return with_thresholds(to_artifact(patch, small_pipe.unet, artifact.info.instructions))

    bare = digest(plain, (1, 1, 1))
    for seed in range(4):  # gates change the order of the parts in the file
        assert digest([gated(patch, seed + i) for i, patch in enumerate(plain)], (1, 1, 1)) == bare
    assert digest(plain, (1, 1, 0.5)) != bare
    assert digest(plain[:2], (1, 1)) != bare  # control


def test_what_was_fused_is_remembered_and_not_fused_twice(small_pipe, tmp_path):
    small_pipe.save_pretrained(tmp_path / "model")
    first, second = (awake(small_pipe.unet, i).save(tmp_path / f"{i}.safetensors") for i in range(2))
    once = fuse_model(tmp_path / "model", first, tmp_path / "once")
    with pytest.raises(SafepatchError, match="was fused into this model already"):
        fuse_model(once, first, tmp_path / "again")
    artifact = PatchArtifact.open(first)
    patch = from_artifact(artifact, small_pipe.unet)
    patch.add_gate(small_pipe.unet, 4)
    gated = with_thresholds(to_artifact(patch, small_pipe.unet, artifact.info.instructions))
    gated = gated.save(tmp_path / "gated.safetensors")
    assert PatchArtifact.open(gated).content_hash != artifact.content_hash  # control
    with pytest.raises(SafepatchError, match="was fused into this model already"):  # a gate changes nothing here
        fuse_model(once, gated, tmp_path / "again")
    note = once / f"{NOTE}.json"
    older = [{key: value for key, value in each.items() if key != "weights"} for each in json.loads(note.read_text())]
    note.write_text(json.dumps(older))
    with pytest.raises(SafepatchError, match="was fused into this model already"):
        fuse_model(once, first, tmp_path / "again")
    both = fuse_model(once, second, tmp_path / "both")
    assert len(json.loads((both / f"{NOTE}.json").read_text())) == 2
    assert not (tmp_path / "again").exists()


def test_an_averaged_unet_in_a_single_file_is_left_out(tmp_path):
    pipe = small_family_pipe("sd1")
    tensors = original_layout(pipe, "sd1")
    averaged = {f"model_ema.{name.replace('.', '')}": tensor.clone() for name, tensor in list(tensors.items())[:3]}
    save_file({**tensors, **averaged}, tmp_path / "model.safetensors")
    path = awake(pipe.unet).save(tmp_path / "w.safetensors")
    with safe_open(fuse_model(tmp_path / "model.safetensors", path, tmp_path / "out.safetensors"), "pt") as file:
        assert set(file.keys()) == set(tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_cannot_take_it_are_refused_and_none_is_written(small_pipe, dtype):
    weight = small_pipe.unet.get_submodule(LoraPatch.from_unet(small_pipe.unet).layers[-1]).weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(dtype)
    before = [each.clone() for each in small_pipe.unet.parameters()]
    with pytest.raises(ConfigError, match="cannot take a patch"):
        fuse(small_pipe, small_artifact("lora"))
    assert all(torch.equal(a, b) for a, b in zip(before, small_pipe.unet.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["control", "lora"])
def test_fused_projections_are_refused(small_pipe, kind):
    small_pipe.unet.fuse_qkv_projections()
    for use in (apply, fuse) if kind == "lora" else (apply,):
        with pytest.raises(ConfigError, match=r"unfuse_qkv_projections\(\) first"):
            use(small_pipe, small_artifact(kind))
    small_pipe.unet.unfuse_qkv_projections()
    apply(small_pipe, small_artifact(kind)).remove()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_weights_that_lie_on_disk_are_refused(small_pipe, tmp_path, component):
    """What is written into placeholders is gone when the weights are read again."""
    artifact = small_artifact("lora") if component == "unet" else text_artifact(small_pipe)
    host = getattr(small_pipe, component)
    options = {"offload_type": "leaf_level", "onload_device": torch.device("cpu")}
    base = images(small_pipe)
    apply_group_offloading(host, **options, offload_to_disk_path=str(tmp_path))
    assert torch.equal(images(small_pipe), base)
    with pytest.raises(ConfigError, match=f"the {type(host).__name__} are offloaded to disk.*fuse before offloading"):
        fuse(small_pipe, artifact)
    in_memory = new_small_pipe()
    fuse(in_memory, artifact)
    assert not torch.equal(images(in_memory), base)  # control


def text_artifact(pipe) -> PatchArtifact:
    components = Components.of(pipe)
    patch = awaken(TextPatch.of(components, "text_encoder", rank=4))
    return to_artifact(patch, components, {"weapons": INSTRUCTION})


def test_an_embedded_sibling_can_be_fused(tmp_path):
    pipe = load_pipeline("tiny-sd-twemoji")
    path = awake(pipe.unet).save(tmp_path / "w.safetensors")
    loaded = load_pipeline(fuse_model("tiny-sd-twemoji", path, tmp_path / "safe"))
    fuse(pipe, path)
    pairs = zip(pipe.unet.parameters(), loaded.unet.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_what_cannot_be_fused_says_why_and_nothing_is_written(small_pipe, tmp_path):
    small_pipe.save_pretrained(tmp_path / "model")
    lora = small_artifact("lora").save(tmp_path / "lora.safetensors")
    control = small_artifact("control").save(tmp_path / "control.safetensors")
    other = awake(small_family_pipe("sd1").unet).save(tmp_path / "sd1.safetensors")
    model, new, old = tmp_path / "model", tmp_path / "new", tmp_path / "old"
    old.mkdir()
    before = sorted(tmp_path.rglob("*"))
    for use, error, message in (
        (lambda: fuse_model(model, control, new), ConfigError, "a control patch is a network of its own"),
        (lambda: fuse_model(model, other, new), BaseMismatch, "this patch is for sd1"),
        (lambda: fuse_model(model, lora, old), SafepatchError, "exists already"),
        (lambda: fuse_model(model, lora, new, scale=-1.0), ConfigError, "scale must be 0 or more"),
        (lambda: fuse_model(model, lora, new, scale=float("nan")), ConfigError, "scale must be 0 or more"),
        (lambda: fuse_model(tmp_path / "nowhere", lora, new), ModelNotFound, "nowhere"),
        (lambda: fuse(small_pipe, control), ConfigError, "use apply"),
    ):
        with pytest.raises(error, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_single_file_is_never_overwritten_by_itself(tmp_path):
    pipe = small_family_pipe("sd1")
    model = write_original(pipe, "sd1", tmp_path / "model.safetensors")
    path, bytes_before = awake(pipe.unet).save(tmp_path / "w.safetensors"), model.read_bytes()
    for out in (model, tmp_path / "folder"):
        with pytest.raises(SafepatchError, match="another"):
            fuse_model(model, path, out)
    assert model.read_bytes() == bytes_before


def test_a_folder_without_safetensors_is_refused(small_pipe, tmp_path):
    small_pipe.save_pretrained(tmp_path / "model", safe_serialization=False)
    path = small_artifact("lora").save(tmp_path / "w.safetensors")
    with pytest.raises(SafepatchError, match="save the model as safetensors first"):
        fuse_model(tmp_path / "model", path, tmp_path / "new")
    assert not Path(tmp_path / "new").exists()
