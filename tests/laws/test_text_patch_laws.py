"""Patches of text encoders: the UNet is given what a patched twin makes of the words; the encoder is never touched."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import safepatch
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, generate, generate_from_states
from safepatch.diffusion.conditioning import Conditioning
from safepatch.errors import ArtifactError, BaseMismatch, ConfigError, MergeError, PatchBypassed, UnknownWords
from safepatch.export.lora_in import import_lora
from safepatch.export.lora_out import export
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.text import TextPatch
from safepatch.runtime.apply import attach
from safepatch.tiny.text import MAX_TOKENS
from safepatch.training import gates
from tests.families import draw, small_family_pipe, small_transformer_pipe, tokenizer_folder, write_original
from tests.small import (
    INSTRUCTION,
    PROMPTS,
    SEEDS,
    awaken,
    images,
    new_artifact,
    new_small_pipe,
    small_artifact,
    spied,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def new_text_artifact(pipe: Any, component: str = "text_encoder", category: str = "weapons", seed: int = 0) -> Any:
    components = Components.of(pipe)
    patch = awaken(TextPatch.of(components, component, rank=4), seed)
    return to_artifact(patch, components, {category: INSTRUCTION})


def gated(pipe: Any, bias: float) -> TextPatch:
    """A patch whose gate is open, or shut, for whatever it reads."""
    patch = awaken(TextPatch.of(Components.of(pipe), "text_encoder", rank=4, gate=4))
    assert patch.gate is not None
    patch.gate.weigh.fill_(-30.0)
    patch.gate.bias.fill_(bias)
    return patch


@pytest.fixture
def pipe() -> Any:
    return new_small_pipe()


@pytest.mark.parametrize(("family", "component"), [("sd1", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_it_acts_and_leaves_nothing_behind(family: str, component: str):
    pipe = small_family_pipe(family)
    artifact, encoder = new_text_artifact(pipe, component), getattr(pipe, component)
    before, state = draw(pipe), copy.deepcopy(encoder.state_dict())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in encoder.modules())
    with safepatch.apply(pipe, artifact) as handle:
        assert not torch.equal(draw(pipe), before)
        assert handle.is_active
        assert handle.stats.acted_calls
        handle.scale = 0
        assert torch.equal(draw(pipe), before)
    assert torch.equal(draw(pipe), before)
    assert all(torch.equal(state[name], weights) for name, weights in encoder.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in encoder.modules()) == hooks


@pytest.mark.parametrize(
    ("family", "component", "scale"),
    [("sd1", "text_encoder", 0.5), ("sdxl", "text_encoder", 1.0), ("sdxl", "text_encoder_2", 1.0)],
)
def test_without_guidance_it_is_the_encoder_with_the_patch_in_its_weights(family: str, component: str, scale: float):
    """A second oracle, pooled states included; at every scale."""
    pipe = small_family_pipe(family)
    artifact, fused = new_text_artifact(pipe, component), small_family_pipe(family)
    safepatch.fuse(fused, artifact, scale)
    before, wanted = draw(pipe, guidance_scale=1.0), draw(fused, guidance_scale=1.0)
    with safepatch.apply(pipe, artifact, scale):
        assert torch.allclose(draw(pipe, guidance_scale=1.0), wanted, atol=1e-4)
    assert (before - wanted).abs().max() > 1e-2  # control


def test_the_negative_prompt_is_read_by_the_frozen_encoder(pipe: Any):
    artifact, negative = new_text_artifact(pipe), PROMPTS[0]
    with spied(pipe.unet) as base:
        images(pipe, negative=negative)
    with safepatch.apply(pipe, artifact), spied(pipe.unet) as patched:
        images(pipe, negative=negative)
    safepatch.fuse(pipe, artifact)
    with spied(pipe.unet) as fused:
        images(pipe, negative=negative)
    states = [calls[0]["encoder_hidden_states"] for calls in (base, patched, fused)]
    assert torch.equal(states[0][:2], states[1][:2])
    assert not torch.equal(states[0][2:], states[1][2:])
    assert not torch.equal(states[0][:2], states[2][:2])  # control: in the weights it changes that too


def test_a_shut_gate_keeps_every_bit_and_an_open_one_none(pipe: Any):
    before = images(pipe)
    with attach(pipe, gated(pipe, bias=-9.0), [INSTRUCTION]) as handle:
        assert torch.equal(images(pipe), before)
        assert handle.stats.gated_rows == 2
        assert not handle.stats.acted_rows
    with attach(pipe, gated(pipe, bias=9.0), [INSTRUCTION]):
        assert not torch.equal(images(pipe), before)


def test_gates_judge_what_the_frozen_encoder_reads(pipe: Any):
    """Of the patch itself, and of others that are attached behind it."""
    judged: list[Tensor] = []

    def judge() -> Tensor:
        with attach(pipe, awaken(gated(pipe, bias=0.0), seed=3), [INSTRUCTION]) as handle, spied(pipe.unet) as calls:
            handle.on_gate = lambda _, probabilities: judged.append(probabilities)
            images(pipe)
        return calls[0]["encoder_hidden_states"]

    alone = judge()
    with safepatch.apply(pipe, new_text_artifact(pipe)):
        behind = judge()
    assert torch.equal(judged[0], judged[-1])
    assert not torch.equal(alone, behind)  # control: what the UNet is given is another


def test_states_of_nobodys_words_are_refused_where_the_patch_would_act(pipe: Any):
    foreign = Conditioning(torch.randn(2, MAX_TOKENS, 192, generator=torch.Generator().manual_seed(0)))
    ask = (foreign, Conditioning(torch.zeros(2, MAX_TOKENS, 192)), SEEDS, 1)
    before = generate_from_states(pipe, *ask)
    with safepatch.apply(pipe, new_text_artifact(pipe)), pytest.raises(UnknownWords, match="text_encoder"):
        generate_from_states(pipe, *ask)
    with attach(pipe, gated(pipe, bias=-9.0), [INSTRUCTION]):
        assert torch.equal(generate_from_states(pipe, *ask), before)
    with safepatch.apply(pipe, new_text_artifact(pipe), fail_closed=False) as handle:
        assert torch.equal(generate_from_states(pipe, *ask), before)
        assert handle.stats.wordless_rows == 2
        assert not handle.stats.acted_rows


def test_states_that_somebody_added_are_refused_too(pipe: Any):
    with safepatch.apply(pipe, new_text_artifact(pipe)):
        read = pipe.encode_prompt(PROMPTS[0], "cpu", 1, False)[0]
        assert unet_states(pipe, read).shape == read.shape  # control
        with pytest.raises(UnknownWords):
            unet_states(pipe, torch.cat((read, read[:, :3]), dim=1))
        crafted = torch.randn(read.shape, generator=torch.Generator().manual_seed(0))
        crafted[:, -1] = read[:, -1]  # by its last token it is the prompt's
        with pytest.raises(UnknownWords):
            unet_states(pipe, crafted)


def unet_states(pipe: Any, states: Tensor) -> Tensor:
    """What the UNet is given when it is called with text states."""
    with torch.no_grad(), spied(pipe.unet) as calls:
        pipe.unet(torch.zeros(len(states), 4, 16, 16), 500, states)
    return calls[0]["encoder_hidden_states"]


def test_what_is_done_to_states_is_done_to_the_patched_ones(pipe: Any):
    """Weighed words, prompts on the way from one to the other, chunks: as if the patched encoder had made them."""
    artifact, fused = new_text_artifact(pipe), new_small_pipe()
    safepatch.fuse(fused, artifact)
    weights = torch.linspace(0.8, 1.4, MAX_TOKENS)[None, :, None]

    def made(encode: Any) -> list[Tensor]:
        one, two = (encode(prompt, "cpu", 1, False)[0] for prompt in PROMPTS)
        return [one, one * weights, torch.lerp(one, two, 0.4), two + 1.5 * (one - two), torch.cat((one, two), dim=1)]

    with safepatch.apply(pipe, artifact):
        for base, wanted in zip(made(pipe.encode_prompt), made(fused.encode_prompt), strict=True):
            given = unet_states(pipe, base)
            assert torch.allclose(given, wanted, atol=2e-3)
            assert (base - wanted).abs().max() > 0.1  # control


def test_clip_skip_and_learned_tokens_are_read_as_they_were():
    pipe, fused = small_family_pipe("sd1"), small_family_pipe("sd1")  # of two layers
    artifact = new_text_artifact(pipe)
    safepatch.fuse(fused, artifact)
    for each in (pipe, fused):
        learn_token(each, "<knife>")
    with safepatch.apply(pipe, artifact):
        for states in (skipped, last):
            base, wanted = states(pipe, "a <knife>"), states(fused, "a <knife>")
            assert torch.allclose(unet_states(pipe, base), wanted, atol=1e-3)
            assert (base - wanted).abs().max() > 0.1  # control


@torch.no_grad()
def skipped(pipe: Any, prompt: str) -> Tensor:
    """What pipelines make of the last layer but one, with a clip skip of 1."""
    tokens = pipe.tokenizer([prompt], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    hidden = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    return pipe.text_encoder.final_layer_norm(hidden)


def last(pipe: Any, prompt: str) -> Tensor:
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def learn_token(pipe: Any, token: str) -> None:
    """What loading a textual inversion does."""
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)  # others share it
    pipe.tokenizer.add_tokens(token)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-1] = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))


def test_it_acts_within_its_window_only(pipe: Any):
    with safepatch.apply(pipe, new_text_artifact(pipe), end=0.5) as handle:
        generate(pipe, PROMPTS, SEEDS, steps=4)
    assert handle.stats.unet_calls == 4
    assert handle.stats.acted_calls == 2


def test_threads_get_the_images_that_they_would_get_alone(pipe: Any):
    """Pipelines that share UNet and text encoder, each with a scheduler and a tokenizer of its own."""
    pipes = [pipe, copy_sharing(pipe), copy_sharing(pipe)]
    asked = ["a knife next to a cat", "a picture of a dog", "a red gun"]

    def run(i: int) -> Tensor:
        return generate(pipes[i], [asked[i]], [i], steps=3, guidance_scale=4.0)

    before, found = [run(i) for i in range(3)], dict[int, Tensor]()
    with safepatch.apply(pipe, new_text_artifact(pipe)):
        alone = [run(i) for i in range(3)]
        threads = [threading.Thread(target=lambda i=i: found.update({i: run(i)})) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(3))
    assert not any(torch.equal(before[i], alone[i]) for i in range(3))  # control


def copy_sharing(pipe: Any) -> Any:
    """A pipeline of its own around the same networks."""
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler), "tokenizer": copy.deepcopy(pipe.tokenizer)}
    made = type(pipe)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_copied_pipeline_has_a_handle_of_its_own(pipe: Any):
    with safepatch.apply(pipe, new_text_artifact(pipe)):
        patched, copied = images(pipe), copy.deepcopy(pipe)
    assert torch.equal(images(copied), patched)
    assert not torch.equal(images(pipe), patched)  # control
    assert [status.active for status in safepatch.status(copied)] == [True]


def test_a_lost_hook_on_the_encoder_is_an_error(pipe: Any):
    with safepatch.apply(pipe, new_text_artifact(pipe)):
        images(pipe)  # control
        pipe.text_encoder._forward_hooks.clear()
        with pytest.raises(PatchBypassed):
            images(pipe)


def test_an_encoder_that_carries_a_lora_is_patched_as_it_stands(pipe: Any, tmp_path: Any):
    other = new_text_artifact(pipe, category="gore", seed=1)
    export(other.save(tmp_path / "other.safetensors"), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    artifact, fused = new_text_artifact(pipe), new_small_pipe()
    safepatch.fuse(fused, artifact)
    safepatch.fuse(fused, other)
    before, wanted = images(pipe, guidance_scale=1.0), images(fused, guidance_scale=1.0)
    with safepatch.apply(pipe, artifact):
        assert torch.allclose(images(pipe, guidance_scale=1.0), wanted, atol=1e-4)
    assert not torch.allclose(before, wanted, atol=1e-2)  # control


# ---- both sides ----------------------------------------------------------------------------------------------------


def two_sided(pipe: Any, folder: Any) -> tuple[Any, Any, Any]:
    """Paths of a text encoder's patch, a UNet's, and a bundle of both, all of one category."""
    named = {"text": new_text_artifact(pipe), "unet": small_artifact("lora")}
    sides = tuple(artifact.save(folder / f"{name}.safetensors") for name, artifact in named.items())
    safepatch.merge(sides, folder / "two.safetensors")
    return *sides, folder / "two.safetensors"


def test_a_two_sided_bundle_is_both_its_sides_at_once(pipe: Any, tmp_path: Any):
    text, unet, both = two_sided(pipe, tmp_path)
    base, drawn = images(pipe), {}
    for patches in ((text,), (unet,), (both,)):
        with safepatch.apply(pipe, patches[0]):
            drawn[patches] = images(pipe)
    for first, second in ((text, unet), (unet, text)):
        with safepatch.apply(pipe, first), safepatch.apply(pipe, second):
            assert torch.equal(images(pipe), drawn[both,])
    assert not any(torch.equal(drawn[both,], other) for other in (base, drawn[text,], drawn[unet,]))  # control
    with safepatch.apply(pipe, both, {"weapons": 0.0}) as handle:
        assert torch.equal(images(pipe), base)
        assert handle.is_active
        assert len(safepatch.status(pipe)) == 1


def test_two_sides_are_split_by_component_and_have_no_sum(pipe: Any, tmp_path: Any):
    text, unet, both = two_sided(pipe, tmp_path)
    assert PatchArtifact.open(both).info.components == ("text_encoder", "unet")
    for path, component in ((text, "text_encoder"), (unet, "unet")):
        part = safepatch.split(both, "weapons", component=component)
        assert part.content_hash == PatchArtifact.open(path).content_hash
    with pytest.raises(MergeError, match="name its component: text_encoder or unet"):
        safepatch.split(both, "weapons")
    for method in ("cat", "linear"):
        with pytest.raises(MergeError, match="differ in component"):
            safepatch.merge([text, unet], method=method)
    assert safepatch.merge([text], method="cat").info.component == "text_encoder"  # control


def test_two_patches_of_one_encoder_are_a_sum_in_its_layers(pipe: Any, tmp_path: Any):
    paths = [
        new_text_artifact(pipe, category=name, seed=seed).save(tmp_path / f"{name}.safetensors")
        for seed, name in enumerate(("weapons", "gore"))
    ]
    merged = [safepatch.merge(paths, tmp_path / f"{method}.safetensors", method=method) for method in ("bundle", "cat")]
    drawn = []
    for artifact in merged:
        with safepatch.apply(pipe, artifact):
            drawn.append(images(pipe))
    assert torch.allclose(*drawn, atol=1e-3)
    with safepatch.apply(pipe, paths[0]):
        assert not torch.allclose(images(pipe), drawn[0], atol=1e-2)  # control


def test_a_folder_is_fused_on_both_sides_and_told_by_check(pipe: Any, tmp_path: Any):
    text, _, both = two_sided(pipe, tmp_path)
    pipe.save_pretrained(tmp_path / "model")
    assert safepatch.check(tmp_path / "model", both).drifts == {"text_encoder": 0.0, "unet": 0.0}
    told: list[str] = []
    safepatch.fuse_model(tmp_path / "model", both, tmp_path / "fused", tell=told.append)
    assert any("negative prompts" in line for line in told)
    with safepatch.apply(pipe, both):
        wanted = images(pipe, guidance_scale=1.0)
    fused = safepatch.load_pipeline(tmp_path / "fused")
    assert torch.allclose(images(fused, guidance_scale=1.0), wanted, atol=1e-4)
    assert safepatch.check(tmp_path / "fused", text).drift > 0.01


@pytest.mark.parametrize(
    ("family", "component"),
    [("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder"), ("sdxl", "text_encoder_2")],
)
def test_a_single_file_is_fused_in_its_own_layout(family: str, component: str, tmp_path: Any):
    pipe = small_family_pipe(family)
    model = write_original(pipe, family, tmp_path / "model.safetensors")
    path = new_text_artifact(pipe, component).save(tmp_path / "text.safetensors")
    out = safepatch.fuse_model(model, path, tmp_path / "fused.safetensors")
    made, wanted, base = (
        safepatch.load_pipeline(each, tokenizer=tokenizer_folder(tmp_path / "tokenizer"))
        for each in (out, model, model)
    )
    safepatch.fuse(wanted, path)
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        if (own := getattr(made, part, None)) is not None:
            theirs, before = (getattr(each, part).state_dict() for each in (wanted, base))
            assert all(torch.equal(weight, theirs[name]) for name, weight in own.state_dict().items())
            is_base = all(torch.equal(weight, before[name]) for name, weight in own.state_dict().items())
            assert is_base == (part != component)  # control: of all parts that one changed


def test_a_single_file_is_fused_on_both_sides(tmp_path: Any):
    pipe = small_family_pipe("sd1")
    model = write_original(pipe, "sd1", tmp_path / "model.safetensors")
    text = new_text_artifact(pipe).save(tmp_path / "text.safetensors")
    unet = new_artifact(pipe.unet, "lora").save(tmp_path / "unet.safetensors")
    both = tmp_path / "both.safetensors"
    safepatch.merge((text, unet), both)
    out = safepatch.fuse_model(model, both, tmp_path / "fused.safetensors")
    made, wanted = (
        safepatch.load_pipeline(each, tokenizer=tokenizer_folder(tmp_path / "tokenizer")) for each in (out, model)
    )
    base = copy.deepcopy(wanted.unet.state_dict())
    safepatch.fuse(wanted, both)
    for part in ("text_encoder", "unet"):
        theirs = getattr(wanted, part).state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in getattr(made, part).state_dict().items())
    assert any(not torch.equal(weight, base[name]) for name, weight in made.unet.state_dict().items())  # control


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_it_is_exported_as_a_lora_that_diffusers_loads_and_comes_back(pipe: Any, tmp_path: Any, form: str):
    artifact = new_text_artifact(pipe)
    place = tmp_path / ("lora.safetensors" if form == "kohya" else "lora")
    written = export(artifact.save(tmp_path / "te.safetensors"), place, form)
    assert import_lora(written).content_hash == artifact.content_hash
    other = new_small_pipe()
    other.load_lora_weights(written.parent, weight_name=written.name)
    with safepatch.apply(pipe, artifact):
        assert torch.allclose(images(pipe, guidance_scale=1.0), images(other, guidance_scale=1.0), atol=1e-4)
    assert not torch.allclose(images(pipe, guidance_scale=1.0), images(other, guidance_scale=1.0), atol=1e-2)


def test_a_gate_is_fitted_to_both_sides_of_one_category(pipe: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    for name, few in {"CAPTIONS": 16, "UNSEEN": 16, "STEPS": 2}.items():
        monkeypatch.setattr(gates, name, few)
    text, _, both = two_sided(pipe, tmp_path)
    fitted = {"width": 4, "data": DataConfig(cache=str(tmp_path))}
    made = gates.add_gate(PatchArtifact.open(both), pipe, Corpus.open("weapons"), **fitted)
    one, other = (part.artifact.info for part in made.parts())
    assert {one.component, other.component} == {"text_encoder", "unet"}
    assert one.config["gate"] == other.config["gate"]
    with safepatch.apply(pipe, made.save(tmp_path / "gated.safetensors")) as handle:
        assert handle.gate == "hard"
    drugs = new_text_artifact(pipe, category="drugs").save(tmp_path / "drugs.safetensors")
    with pytest.raises(ConfigError, match="for several categories"):
        gates.add_gate(safepatch.merge([text, drugs]), pipe, Corpus.open("weapons"), **fitted)


def test_layers_that_two_encoders_call_by_one_name_are_no_conflict(tmp_path: Any):
    xl = small_family_pipe("sdxl")
    ways = [("text_encoder", "weapons"), ("text_encoder_2", "drugs"), ("text_encoder", "gore")]
    first, second, third = (
        new_text_artifact(xl, component, category, seed).save(tmp_path / f"{category}.safetensors")
        for seed, (component, category) in enumerate(ways)
    )
    assert "conflicts" not in (safepatch.merge([first, second]).info.recipe or {})
    assert "conflicts" in (safepatch.merge([first, third]).info.recipe or {})  # control


# ---- what does not fit ---------------------------------------------------------------------------------------------


def test_a_model_that_lacks_the_encoder_is_told_in_a_line(pipe: Any):
    two, three = small_family_pipe("sdxl"), small_transformer_pipe("sd3")
    with pytest.raises(BaseMismatch, match="no text_encoder_2 to patch; it has text_encoder"):
        TextPatch.of(Components.of(pipe), "text_encoder_2")
    with pytest.raises(ConfigError, match="SD3Transformer2DModel"):
        TextPatch.of(Components.of(three), "text_encoder")
    with pytest.raises(BaseMismatch):
        safepatch.apply(pipe, new_text_artifact(two))
    with pytest.raises(ConfigError, match="a patch of the text_encoder"):
        from_artifact(new_text_artifact(pipe), pipe.unet)
    assert TextPatch.of(Components.of(two), "text_encoder_2").layers  # control


def test_an_encoder_of_another_depth_is_told_in_a_line(pipe: Any):
    artifact = new_text_artifact(pipe)
    artifact.info.config["encoder"]["num_hidden_layers"] = 7
    with pytest.raises(BaseMismatch, match="num_hidden_layers 7, the model's has 1"):
        safepatch.apply(pipe, artifact)


def test_a_component_that_there_is_not_is_no_patch(pipe: Any):
    info = new_text_artifact(pipe).info
    with pytest.raises(ArtifactError, match="component"):
        type(info)(**{**vars(info), "config": {**info.config, "component": "vae"}})
