"""The ComfyUI nodes against `apply` in diffusers, on a stub of ComfyUI, and on ComfyUI itself where there is one.

SAFEPATCH_COMFYUI=/path/to/ComfyUI (a checkout, with what it needs installed) makes every test of a world run on both.
"""

import gc
import json
import logging
import math
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import empty_unet
from safepatch.errors import ArtifactError, BaseMismatch, ConfigError, PatchBypassed, UnknownName, UnsupportedModel
from safepatch.export import export, export_controlnet
from safepatch.merging import merge
from safepatch.models.checkpoint import original_unet_config
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.patch.layers import taken_layers
from safepatch.runtime.apply import apply
from tests import comfyui
from tests.comfyui import NODES, RealWorld, StubModel, load_nodes, real_world, stub_world
from tests.families import FAMILIES, small_config, unet_name
from tests.laws.test_window_laws import closing, listening
from tests.small import INSTRUCTION, awaken, new_patch, new_small_pipe

every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
KNIFE, DOG = "a knife next to a cat", "a picture of a dog"
OPEN, SHUT = 30.0, -30.0
CHECKOUT = os.environ.get("SAFEPATCH_COMFYUI")


@pytest.fixture(scope="module", params=["stub", "real"] if CHECKOUT else ["stub"])
def world(request, tmp_path_factory):
    if request.param == "stub":
        return stub_world()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ComfyUI's own
        return real_world(Path(CHECKOUT or ""), tmp_path_factory.mktemp("real"))


@pytest.fixture(autouse=True)
def as_comfyui_runs_nodes():
    with torch.inference_mode():
        yield


@cache
def gated(unet: Any, kind: str, bias: float, category: str = "weapons", seed: int = 0) -> PatchArtifact:
    """A patch whose gate is open or shut whatever it reads."""
    with torch.inference_mode(False), torch.no_grad():
        patch = new_patch(unet, kind, seed=None)
        patch.add_gate(unet, 4)
        awaken(patch, seed, 0.05)
        gate: Any = patch.gate
        for parameter in gate.parameters():
            parameter.zero_()
        gate.bias.fill_(bias)
        artifact = to_artifact(patch, unet, {category: INSTRUCTION}, license="MIT")
    config = {**artifact.info.config, "gate": {category: {"threshold": 0.5}}}
    return replace(artifact, info=replace(artifact.info, config=config))


def inputs(n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents (n, 4, 8, 8), and timesteps (n,)."""
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((n,), 500.0)


# ---- what a patch makes of a call ------------------------------------------------------------------------------


CALLS = [
    *((kind, OPEN, "hard") for kind in PATCH_KINDS),
    ("lite", 0.3, "soft"),
    ("lora", 0.3, "soft"),
    ("control", SHUT, "off"),
]


@pytest.mark.parametrize(("kind", "bias", "gate"), CALLS)
def test_a_patched_call_is_that_of_apply(world, kind, bias, gate):
    artifact, (x, t) = gated(world.pipe.unet, kind, bias), inputs()
    states = world.states(KNIFE, DOG)
    base = world.pipe.unet(x, t, states).sample
    with apply(world.pipe, artifact, gate=gate):
        wanted = world.pipe.unet(x, t, states).sample
    effect = (wanted - base).abs().max()
    assert effect > 0.01  # control
    made = world.predict(world.apply(artifact, gate), x, t, states)
    assert (made - wanted).abs().max() < 0.01 * effect


@every_kind
def test_a_shut_gate_leaves_every_bit(world, kind):
    x, t = inputs()
    states = world.states(KNIFE, DOG)
    base = world.predict(world.model, x, t, states)
    shut, opened = (world.apply(gated(world.pipe.unet, kind, bias)) for bias in (SHUT, OPEN))
    assert torch.equal(world.predict(shut, x, t, states), base)
    assert not torch.equal(world.predict(opened, x, t, states), base)  # control
    assert torch.equal(world.predict(world.model, x, t, states), base)  # nothing is left on what clones share


@pytest.mark.parametrize(("kind", "ids"), [("control", "ANB"), ("lite", "NNA"), ("lora", "ANB")])
def test_the_negative_prompts_rows_are_left_alone_wherever_they_stand(world, kind, ids):
    artifact, (x, t) = gated(world.pipe.unet, kind, OPEN), inputs(3)
    states = world.states(KNIFE, DOG, KNIFE)
    base = world.predict(world.model, x, t, states)
    with apply(world.pipe, artifact):
        wanted = world.pipe.unet(x, t, states).sample
    options = {"uuids": list(ids), "safepatch_negative": frozenset("N")}
    made = world.predict(world.apply(artifact), x, t, states, **options)
    for row, name in enumerate(ids):
        if name == "N":
            assert torch.equal(made[row], base[row])
        else:
            assert (made[row] - wanted[row]).abs().max() < 0.01 * (wanted - base).abs().max()
            assert not torch.equal(made[row], base[row])  # control


@pytest.mark.parametrize("kind", ["lite", "lora"])
def test_sampling_with_a_shut_gate_is_sampling_without_a_patch(world, kind, caplog):
    positive, negative = world.said(KNIFE), world.said(DOG)
    base = world.sample(world.model, positive, negative)
    assert torch.equal(world.sample(world.apply(gated(world.pipe.unet, kind, SHUT)), positive, negative), base)
    with caplog.at_level(logging.INFO):
        opened = world.sample(world.apply(gated(world.pipe.unet, kind, OPEN)), positive, negative)
    assert (opened - base).abs().max() > 0.01  # control
    assert "weapons: acted in 2 of 2 calls" in caplog.text


def test_under_guidance_the_negative_prompt_is_not_corrected(world):
    """With both prompts the same, guidance multiplies the correction, which it would not if both had it."""
    said, patched = world.said(KNIFE), world.apply(gated(world.pipe.unet, "lora", OPEN))
    effects = [
        world.sample(patched, said, said, steps=1, cfg=cfg) - world.sample(world.model, said, said, steps=1, cfg=cfg)
        for cfg in (1.0, 3.0)
    ]
    assert effects[0].abs().max() > 0.01  # control
    assert (effects[1] - 3 * effects[0]).abs().max() < 0.01 * effects[1].abs().max()


def test_updates_of_convolutions_act_as_in_apply(world):
    """Somebody else's LoRA may have them."""
    with torch.inference_mode(False):
        layers = {name: shape for name, shape in taken_layers(world.pipe.unet).items() if len(shape) == 4}
        tensors, generator = {}, torch.Generator().manual_seed(0)
        for name, (out, width, *kernel) in layers.items():
            tensors[f"lora.{name}.weight.up"] = 0.2 * torch.randn(out, 2, generator=generator)
            tensors[f"lora.{name}.weight.down"] = 0.2 * torch.randn(2, width * math.prod(kernel), generator=generator)
        shapes = {f"lora.{name}.weight": list(shape) for name, shape in layers.items()}
        info = gated(world.pipe.unet, "lora", OPEN).info
        artifact = PatchArtifact(
            tensors, replace(info, shapes=shapes, config={"sees": "prompt", "layout": {"rank": 2}})
        )
    assert {name.split(".")[2] for name in layers if "up_blocks" in name} == {"attentions", "resnets", "upsamplers"}
    (x, t), states = inputs(), world.states(KNIFE, DOG)
    base = world.pipe.unet(x, t, states).sample
    with apply(world.pipe, artifact):
        wanted = world.pipe.unet(x, t, states).sample
    assert (wanted - base).abs().max() > 0.01  # control
    made = world.predict(world.apply(artifact, "off"), x, t, states)
    assert (made - wanted).abs().max() < 0.01 * (wanted - base).abs().max()


def test_two_patches_stack(world):
    first, second = gated(world.pipe.unet, "lora", OPEN), gated(world.pipe.unet, "lite", OPEN, "drugs", seed=1)
    x, t = inputs()
    states = world.states(KNIFE, DOG)
    with apply(world.pipe, first), apply(world.pipe, second):
        wanted = world.pipe.unet(x, t, states).sample
    base = world.pipe.unet(x, t, states).sample
    made = world.predict(world.apply(second, model=world.apply(first)), x, t, states)
    assert (made - wanted).abs().max() < 0.01 * (wanted - base).abs().max()


@pytest.mark.parametrize("kind", ["control", "lora"])
def test_sdxls_sizes_and_pooled_states_reach_a_patch(kind):
    world = stub_world("sdxl")
    unet, artifact, (x, t) = world.pipe.unet, gated(world.pipe.unet, kind, OPEN), inputs()
    states, pooled = world.states(KNIFE, DOG), torch.randn(2, 1280, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[64.0, 64.0, 0.0, 8.0, 64.0, 64.0]] * 2)
    added = {"text_embeds": pooled, "time_ids": ids}
    y = torch.cat((pooled, unet.add_time_proj(ids.flatten()).reshape(2, -1)), dim=1)  # as ComfyUI embeds them
    base = unet(x, t, states, added_cond_kwargs=added).sample
    with apply(world.pipe, artifact):
        wanted = unet(x, t, states, added_cond_kwargs=added).sample
    made = world.predict(world.apply(artifact), x, t, states, y)
    assert (wanted - base).abs().max() > 0.01  # control
    assert (made - wanted).abs().max() < 0.01 * (wanted - base).abs().max()


def test_what_a_controlnet_adds_to_the_mid_block_is_not_the_patchs_feature():
    """A lite patch reads the host's own mid, whatever ComfyUI adds to it in place."""
    world, (x, t) = stub_world(), inputs()
    states, model = world.states(KNIFE, DOG), world.apply(gated(world.pipe.unet, "lite", OPEN))
    mid = 0.5 * torch.randn(2, 64, 1, 1, generator=torch.Generator().manual_seed(2))
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    net = model.model.diffusion_model
    made = net(x, t, states, None, {"middle": [mid.clone()]}, options)
    with apply(world.pipe, gated(world.pipe.unet, "lite", OPEN)):
        down = tuple(torch.zeros(1) for _ in range(12))
        wanted = world.pipe.unet(
            x, t, states, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-4)


# ---- words -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hears(world) -> tuple[PatchArtifact, str]:
    """A patch whose gate knows one word, and a text with it for which the gate stays shut without its words."""
    with torch.inference_mode(False):
        artifact = listening(world.pipe)
        texts = [
            f"{before} knife {after}" for before in ("a", "the big", "red") for after in ("on a table", "", "here")
        ]
        return artifact, closing(world.pipe, artifact, texts)[0]


def differs(world, model: Any, states: torch.Tensor) -> bool:
    x, t = inputs(1)
    return not torch.equal(world.predict(model, x, t, states), world.predict(world.model, x, t, states))


def test_words_open_a_gate_in_weighted_and_chunked_prompts_too(world, hears):
    artifact, text = hears
    said = world.said(text)
    assert not differs(world, world.apply(artifact, clip=False), said)  # control: states alone do not open it
    model = world.apply(artifact)
    for states in (
        world.said(text),
        world.said(text, word="knife", weight=1.3),
        world.said(DOG, text),
        world.said(text, DOG, DOG).repeat(1, 2, 1),
    ):
        assert differs(world, model, states)
    assert not differs(world, model, world.said(DOG))  # control


def test_words_are_heard_whatever_clip_skip_is_set(world, hears):
    artifact, text = hears
    model = world.apply(artifact)
    world.clip.clip_layer(-2)
    try:
        skipped = world.said(text)
    finally:
        world.clip.clip_layer(None)
    assert not torch.equal(skipped, world.said(text))  # control
    assert differs(world, model, skipped)


def test_it_says_when_words_are_unknown(world, hears, caplog):
    artifact, text = hears
    node, early = world.nodes.SafepatchApply(), world.said(text)
    settings = ("hard", 1.0, 0.0, 1.0)
    _, clip, says = node.apply(world.model, artifact, *settings)
    assert clip is None
    assert "no CLIP is connected" in says
    model, clip, says = node.apply(world.model, artifact, *settings, world.clip)
    assert clip is world.clip
    assert "reads the words of prompts that are encoded with the CLIP" in says
    with caplog.at_level(logging.INFO):
        world.sample(model, early, world.said(DOG))
    assert "words unknown" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        world.sample(model, world.said(text), world.said(DOG))
    assert "acted in 2 of 2 calls" in caplog.text
    assert "words unknown" not in caplog.text


def test_clip_is_listened_to_only_while_some_model_carries_the_patch(world, hears):
    encoder = world.clip.cond_stage_model.clip_l
    gc.collect()
    before = len(encoder._forward_hooks)
    model = world.apply(hears[0])
    assert len(encoder._forward_hooks) == before + 1
    del model
    gc.collect()
    assert len(encoder._forward_hooks) == before


def test_repeats_of_a_prompts_states_are_taken_off(world):
    unrepeated = world.nodes.rows.unrepeated
    states = torch.randn(2, 154, 8)
    for times in (1, 2, 3):
        assert torch.equal(unrepeated(states.repeat(1, times, 1)), states)
    assert torch.equal(unrepeated(states[:, :77].repeat(1, 4, 1)), states[:, :77])
    assert torch.equal(unrepeated(states[:, :40]), states[:, :40])


# ---- settings --------------------------------------------------------------------------------------------------


def test_it_acts_within_its_window_only(world):
    states, (x, _) = world.states(KNIFE, DOG), inputs()
    model = world.apply(gated(world.pipe.unet, "lora", OPEN), start=0.4, end=0.6)
    for t, acts in ((990.0, False), (610.0, False), (500.0, True), (100.0, False)):
        times = torch.full((2,), t)
        same = torch.equal(world.predict(model, x, times, states), world.predict(world.model, x, times, states))
        assert same is not acts


def test_strengths_by_category(world, tmp_path):
    paths = []
    for seed, name in enumerate(("weapons", "drugs")):
        artifact = gated(world.pipe.unet, "lora", OPEN, name, seed)
        paths.append(artifact.save(tmp_path / f"{name}.safetensors"))
    with torch.inference_mode(False):
        merge(paths, tmp_path / "both.safetensors")
    both = PatchArtifact.open(tmp_path / "both.safetensors")
    x, t = inputs()
    states = world.states(KNIFE, DOG)
    with apply(world.pipe, both, scale={"weapons": 0.5, "drugs": 2.0}):
        wanted = world.pipe.unet(x, t, states).sample
    base = world.pipe.unet(x, t, states).sample
    made = world.predict(world.apply(both, strength=2.0, by_category="weapons=0.5"), x, t, states)
    assert (made - wanted).abs().max() < 0.01 * (wanted - base).abs().max()
    off = world.predict(world.apply(both, by_category="weapons=0, drugs=0"), x, t, states)
    assert torch.equal(off, world.predict(world.model, x, t, states))
    for text, error, says in (
        ("weapon=1", UnknownName, "did you mean 'weapons'"),
        ("weapons=much", ConfigError, "is no strength of a category"),
        ("weapons=-1", ConfigError, "scale must be 0"),
    ):
        with pytest.raises(error, match=says):
            world.apply(both, by_category=text)


# ---- what cannot be done ---------------------------------------------------------------------------------------


def test_it_refuses_in_one_line_what_it_cannot_do(world):
    unet = world.pipe.unet
    plain = to_artifact(new_patch(unet, "lora"), unet, {"weapons": INSTRUCTION})
    other = to_artifact(new_patch(new_small_pipe().unet, "lora"), new_small_pipe().unet, {"weapons": INSTRUCTION})
    cases: list[tuple[PatchArtifact, str, dict[str, Any], type[Exception], str]] = [
        (plain, "hard", {}, ConfigError, "this patch has no gate to be hard"),
        (plain, "off", {"start": 0.5, "end": 0.5}, ConfigError, "start and end must be"),
        (other, "off", {}, BaseMismatch, "this patch is for"),
        (gated(unet, "control", OPEN), "hard", {"clip": False}, ConfigError, "a control patch reads its instruction"),
        (gated(unet, "lite", OPEN), "hard", {"clip": False}, ConfigError, "a lite patch reads its instruction"),
    ]
    world.apply(plain, "off")  # control
    for artifact, gate, options, error, says in cases:
        with pytest.raises(error, match=says) as caught:
            world.apply(artifact, gate, **options)
        assert "\n" not in str(caught.value)


def changeable(world) -> Any:
    """Another model of the stub, of the same weights."""
    return StubModel(world.pipe.unet)


def test_it_refuses_models_that_it_does_not_know():
    world = stub_world()
    artifact = gated(world.pipe.unet, "control", OPEN)
    world.apply(artifact)  # control
    model = changeable(world)
    model.sampling.timestep = lambda sigma: 0.25 * sigma.log()
    with pytest.raises(UnsupportedModel, match="does not count its timesteps"):
        world.apply(artifact, model=model)
    model = changeable(world)
    stored = model.get_key_patches

    def changed(prefix: str) -> Any:
        return {name: [(part[0][0].to(torch.int8), part[0][1])] for name, part in stored(prefix).items()}

    model.get_key_patches = changed
    with pytest.raises(UnsupportedModel, match="weights are quantized"):
        world.apply(artifact, model=model)
    model.get_key_patches = lambda prefix: {n: p for n, p in stored(prefix).items() if "middle" not in n}
    with pytest.raises(UnsupportedModel, match="is not of Stable Diffusion 1, 2 or XL"):
        world.apply(artifact, model=model)
    model.get_key_patches = lambda prefix: {n: p for n, p in stored(prefix).items() if "output_blocks.5" not in n}
    with pytest.raises(UnsupportedModel, match=r"Stable Diffusion 1, 2 (or|and) XL"):
        world.apply(artifact, model=model)
    model.model = type("Flux", (), {"diffusion_model": object()})()
    with pytest.raises(UnsupportedModel, match="Flux is no UNet"):
        world.apply(artifact, model=model)
    world.clip = stub_world("sdxl").clip
    with pytest.raises(UnsupportedModel, match="connect the model's own CLIP"):
        world.apply(artifact)


def test_a_comfyui_without_the_wrappers_is_refused(monkeypatch):
    world = stub_world()
    monkeypatch.delattr(world.nodes.nodes.WrappersMP, "PREDICT_NOISE")
    with pytest.raises(ConfigError, match="has no wrapper PREDICT_NOISE; update it"):
        world.apply(gated(world.pipe.unet, "lora", OPEN))


@every_kind
def test_a_call_that_goes_past_the_patch_is_an_error(kind):
    world, (x, t) = stub_world(), inputs()
    model, states = world.apply(gated(world.pipe.unet, kind, OPEN)), world.states(KNIFE, DOG)
    world.predict(model, x, t, states)  # control
    net = model.model.diffusion_model
    layer = net.middle_block[1].transformer_blocks[0].attn1.to_q if kind == "lora" else net.middle_block[-1]
    layer.__class__ = type(
        type(layer).__name__, (type(layer),), {"__call__": lambda self, *a, **k: self.forward(*a, **k)}
    )
    try:
        with pytest.raises(PatchBypassed, match="the UNet ran without its patch"):
            world.predict(model, x, t, states)
    finally:
        layer.__class__ = type(layer).__base__


def test_sampling_that_goes_past_the_patch_is_an_error():
    world = stub_world()
    model, said = world.apply(gated(world.pipe.unet, "lora", OPEN)), world.said(KNIFE)
    world.sample(model, said, said)  # control
    model.wrappers.pop("diffusion_model")
    with pytest.raises(PatchBypassed, match="sampling went past the patch"):
        world.sample(model, said, said)


# ---- files -----------------------------------------------------------------------------------------------------


def test_the_loader_reads_patches_and_exported_loras(tmp_path, monkeypatch):
    world = stub_world()
    monkeypatch.setattr(comfyui, "FILES", {})
    artifact = gated(world.pipe.unet, "lora", OPEN)
    path = artifact.save(tmp_path / "patch.safetensors")
    comfyui.FILES.update({"patch.safetensors": path, "lora.safetensors": export(path, tmp_path / "lora.safetensors")})
    comfyui.FILES["notes.txt"] = tmp_path / "notes.txt"
    loader = world.nodes.SafepatchLoader
    assert loader.INPUT_TYPES()["required"]["patch"][0] == ["lora.safetensors", "patch.safetensors"]
    for name in ("patch.safetensors", "lora.safetensors"):
        assert loader().load(name)[0].content_hash == artifact.content_hash
    before = loader.IS_CHANGED("patch.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert loader.IS_CHANGED("patch.safetensors") != before
    with pytest.raises(ArtifactError):
        loader().load("patch.safetensors")


@pytest.mark.skipif(not CHECKOUT, reason="the stub loads no LoRA; set SAFEPATCH_COMFYUI")
def test_an_exported_lora_is_the_patch_without_its_gate_in_comfyui_itself(world, tmp_path):
    if not isinstance(world, RealWorld):
        pytest.skip("the stub loads no LoRA")
    artifact, (x, t) = gated(world.pipe.unet, "lora", SHUT), inputs()
    path = export(artifact.save(tmp_path / "patch.safetensors"), tmp_path / "lora.safetensors")
    states = world.states(KNIFE, DOG)
    base = world.predict(world.model, x, t, states)
    with apply(world.pipe, artifact, gate="off"):
        wanted = world.pipe.unet(x, t, states).sample
    with world.lora(path) as model:
        made = world.predict(model, x, t, states)
    assert (made - wanted).abs().max() < 0.01 * (wanted - base).abs().max()
    assert torch.equal(world.predict(world.model, x, t, states), base)


@pytest.mark.skipif(not CHECKOUT, reason="the stub loads no ControlNet; set SAFEPATCH_COMFYUI")
def test_an_exported_controlnet_is_the_patch_without_its_gate_in_comfyui_itself(world, tmp_path):
    """Under guidance too, where it is put on the positive prompt alone."""
    if not isinstance(world, RealWorld):
        pytest.skip("the stub loads no ControlNet")
    with torch.inference_mode(False), torch.no_grad():
        patch = awaken(new_patch(world.pipe.unet, "control", "prompt", seed=None), size=0.05)
        artifact = to_artifact(patch, world.pipe.unet, {"weapons": INSTRUCTION})
        path = artifact.save(tmp_path / "patch.safetensors")
        net = world.controlnet(export_controlnet(path, tmp_path / "net.safetensors", world.pipe))
    (x, t), states = inputs(), world.states(KNIFE, DOG)
    made = net.control_model(x=x, hint=torch.rand(2, 3, 64, 64), timesteps=t, context=states)
    wanted = patch(x, t, states, states[:1])
    for theirs, ours in zip((*made["output"], *made["middle"]), (*wanted.down, wanted.mid), strict=True):
        assert ours.abs().max() > 1e-3  # control
        assert (theirs - ours).abs().max() < 0.01 * ours.abs().max()
    prompt, negative = world.said(KNIFE), world.said(DOG)
    base, corrected = (world.sample(model, prompt, negative) for model in (world.model, world.apply(artifact, "off")))
    effect = (corrected - base).abs().max()
    assert effect > 0.01  # control
    assert (world.sample_told(net, prompt, negative) - corrected).abs().max() < 0.01 * effect
    assert (world.sample_told(net, prompt, negative, both=True) - corrected).abs().max() > 0.01 * effect


def test_the_example_workflow_fits_the_nodes():
    nodes = stub_world().nodes.NODE_CLASS_MAPPINGS
    workflow = json.loads((NODES / "workflow.json").read_text())
    used = [node for node in workflow.values() if node["class_type"] in nodes]
    assert {node["class_type"] for node in used} == set(nodes)
    for node in workflow.values():
        links = [value for value in node["inputs"].values() if isinstance(value, list)]
        assert all(number in workflow for number, _ in links)
    for node in used:
        known = nodes[node["class_type"]].INPUT_TYPES()
        assert (
            known["required"].keys()
            <= node["inputs"].keys()
            <= {**known["required"], **known.get("optional", {})}.keys()
        )


@pytest.mark.parametrize("family", [*FAMILIES, "sd2-inpaint"])
def test_a_unet_alone_tells_its_architecture(family):
    unet = empty_unet(small_config(family)["unet"])
    named = {f"model.diffusion_model.{unet_name(name, unet)}": tensor for name, tensor in unet.state_dict().items()}
    found = original_unet_config({name: list(tensor.shape) for name, tensor in named.items()})
    assert all(json.dumps(unet.config[name]) == json.dumps(value) for name, value in found.items() if name[0] != "_")
    with pytest.raises(UnsupportedModel, match="has no tensor"):
        original_unet_config({})


def test_the_nodes_need_nothing_but_what_the_stub_has():
    """Loaded twice, as ComfyUI does when it restarts, they are the same."""
    with comfyui.stubbed():
        first, second = load_nodes("safepatch_nodes_a"), load_nodes("safepatch_nodes_b")
    assert (
        first.NODE_CLASS_MAPPINGS.keys() == second.NODE_CLASS_MAPPINGS.keys() == first.NODE_DISPLAY_NAME_MAPPINGS.keys()
    )
