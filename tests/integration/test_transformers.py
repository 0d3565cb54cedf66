"""A control patch on small random transformers with the structure of Stable Diffusion 3 and of Flux."""

import copy
import json
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import safepatch
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import Components, encode_prompts, host_kind, quiet
from safepatch.errors import BaseMismatch, ConfigError, PatchBypassed, UnsupportedModel
from safepatch.models.load import load_pipeline
from safepatch.patch import ControlPatch
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.transformer import TransformerControlPatch
from safepatch.runtime.apply import apply, attach
from safepatch.runtime.check import check, status
from tests.families import PHOTO, draw, small_family_pipe, small_transformer_pipe
from tests.small import INSTRUCTION, awaken, new_artifact

NAMES = ("sd3", "sd3.5", "flux")


def awake_artifact(pipe: Any, **options: Any) -> PatchArtifact:
    patch = awaken(ControlPatch.from_unet(pipe.transformer, **options), size=0.05)
    return to_artifact(patch, pipe.transformer, {"weapons": INSTRUCTION})


class Host:
    """A pipeline, the image it draws by itself, and an active patch for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe = small_transformer_pipe(name)
        self.base = draw(self.pipe)
        self.artifact = awake_artifact(self.pipe)


@pytest.fixture(scope="module", params=NAMES)
def host(request) -> Host:
    return Host(request.param)


@pytest.fixture(scope="module")
def flux() -> Host:
    return Host("flux")


@pytest.fixture(scope="module")
def sd3() -> Host:
    return Host("sd3")


def inputs(pipe: Any, batch: int = 1) -> dict[str, Any]:
    """Arguments of one call of the pipeline's transformer."""
    config, seeded = pipe.transformer.config, torch.Generator().manual_seed(0)
    states = torch.randn(batch, 7, config.joint_attention_dim, generator=seeded)
    given = {"encoder_hidden_states": states, "timestep": torch.full((batch,), 700.0)}
    given |= {"pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=seeded)}
    if "Flux" not in type(pipe.transformer).__name__:
        return {"hidden_states": torch.randn(batch, 4, 16, 16, generator=seeded), **given}
    places = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=-1)
    given |= {"timestep": torch.full((batch,), 0.7), "guidance": torch.full((batch,), 3.5)}
    given |= {"txt_ids": torch.zeros(7, 3), "img_ids": places.flatten(0, 2)}
    return {"hidden_states": torch.randn(batch, 16, config.in_channels, generator=seeded), **given}


@torch.no_grad()
def call(pipe: Any, *args: Any, **given: Any) -> Tensor:
    return pipe.transformer(*args, **given, return_dict=False)[0]


def test_a_fresh_patch_changes_nothing(host):
    fresh = to_artifact(ControlPatch.from_unet(host.pipe.transformer), host.pipe.transformer, {"weapons": INSTRUCTION})
    with apply(host.pipe, fresh) as handle:
        assert torch.equal(draw(host.pipe), host.base)
    assert handle.stats.patched_calls == handle.stats.unet_calls == 2


def test_a_patch_acts_and_leaves_no_trace(host):
    with apply(host.pipe, host.artifact) as handle:
        awake = draw(host.pipe)
        handle.scale = 0
        off = draw(host.pipe)
    assert awake.isfinite().all()
    assert not torch.equal(awake, host.base)
    assert torch.equal(off, host.base)
    assert torch.equal(draw(host.pipe), host.base)


def test_a_file_of_a_patch_acts_as_the_patch_does(host, tmp_path):
    path = tmp_path / "weapons.safetensors"
    host.artifact.save(path)
    with apply(host.pipe, host.artifact):
        awake = draw(host.pipe)
    with apply(host.pipe, path):
        assert torch.equal(draw(host.pipe), awake)


def test_its_clone_is_the_hosts_own_encoder_plus_the_delta(host):
    other = copy.deepcopy(host.pipe.transformer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    patch = from_artifact(host.artifact, other)
    name = "clone.transformer_blocks.0.attn.to_q.weight"
    delta = host.artifact.delta(f"control.{name}")
    theirs = dict(other.named_parameters())[name.removeprefix("clone.")]
    assert torch.equal(dict(patch.named_parameters())[name], theirs + delta)


def test_instructions_are_encoded_as_the_pipeline_encodes_prompts(host):
    texts = ["a knife next to a cat"]
    others = {} if host.name == "flux" else {"prompt_3": texts, "do_classifier_free_guidance": False}
    with torch.no_grad():
        ours = encode_prompts(Components.of(host.pipe), texts)
        theirs = host.pipe.encode_prompt(texts, prompt_2=texts, max_sequence_length=77, **others)[0]
    assert torch.equal(ours, theirs)


def test_only_rows_that_carry_the_prompt_are_corrected(sd3):
    seen, given = [], []
    keep = sd3.pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    with apply(sd3.pipe, sd3.artifact) as handle:
        handle._attachment.corrector.parts[0].patch.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
        draw(sd3.pipe, guidance_scale=4.0)
        draw(sd3.pipe, guidance_scale=1.0)
    keep.remove()
    assert [len(states) for states in given] == [2, 2, 1, 1]
    assert not torch.equal(given[0][0], given[0][1])  # control: the negative prompt's row comes first and is another
    assert all(torch.equal(ours, theirs[-1:]) for ours, theirs in zip(seen, given, strict=True))


def test_a_negative_prompt_of_flux_is_left_alone(flux):
    seen = []
    with apply(flux.pipe, flux.artifact) as handle:
        handle._attachment.corrector.parts[0].patch.register_forward_pre_hook(lambda *_: seen.append(1))
        draw(flux.pipe, true_cfg_scale=2.0, negative_prompt="a knife")
    assert (handle.stats.unet_calls, handle.stats.patched_calls) == (4, 2)
    assert len(seen) == 2


@pytest.mark.slow
def test_a_patch_that_was_attached_first_is_compiled_with_the_transformer():
    host = Host("flux")
    guided = {"num_inference_steps": 1, "true_cfg_scale": 2.0, "negative_prompt": "a knife"}
    base = draw(host.pipe, **guided)
    with apply(host.pipe, host.artifact):
        patched = draw(host.pipe, **guided)
        host.pipe.transformer = torch.compile(host.pipe.transformer, backend="eager")
        compiled = draw(host.pipe, **guided)
    torch.testing.assert_close(compiled, patched, rtol=0, atol=1e-3)
    assert (patched - base).abs().max() > 0.01  # control


def test_states_that_are_both_prompts_count_as_the_prompts(flux):
    with torch.no_grad():
        states, pooled, _ = flux.pipe.encode_prompt("a knife", prompt_2=None, max_sequence_length=16)
    given = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
    given |= {f"negative_{name}": value for name, value in given.items()}
    options = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}

    def drawn() -> Tensor:
        return flux.pipe(**given, **options, generator=torch.Generator().manual_seed(0)).images

    base = drawn()
    with apply(flux.pipe, flux.artifact):
        assert not torch.equal(drawn(), base)


@pytest.mark.parametrize("theirs", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_residuals_of_a_controlnet_and_a_patch_add_up(name, theirs):
    pipe = small_transformer_pipe(name)
    argument, given = host_kind(pipe.transformer).residuals, inputs(pipe)
    tokens = 64 if name.startswith("sd3") else 16
    others = [torch.full((1, tokens, 32), 0.1 * i) for i in range(1, theirs + 1)]
    patch = awaken(ControlPatch.from_unet(pipe.transformer, depth=2), size=0.05)
    made = []
    patch.register_forward_hook(lambda *results: made.append(results[-1]))
    with attach(pipe, patch, [INSTRUCTION]):
        both = call(pipe, **given, **{argument: others})
    ours = [made[0].down[0], made[0].down[0], made[0].mid, made[0].mid]
    places = [i // -(-4 // theirs) if name == "flux" else i * theirs // 4 for i in range(4)]
    expected = [residual + others[place] for residual, place in zip(ours, places, strict=True)]
    assert torch.equal(both, call(pipe, **given, **{argument: expected}))
    assert not torch.equal(both, call(pipe, **given, **{argument: others}))  # control: the patch does act
    assert not torch.equal(both, call(pipe, **given, **{argument: ours}))  # control: so does the other


def test_a_controlnet_that_repeats_its_residuals_is_summed_so(flux):
    given, others = inputs(flux.pipe), [torch.full((1, 16, 32), 0.1), torch.full((1, 16, 32), -0.3)]
    repeated = {"controlnet_block_samples": others, "controlnet_blocks_repeat": True}
    fresh = ControlPatch.from_unet(flux.pipe.transformer)
    alone = call(flux.pipe, **given, **repeated)
    with attach(flux.pipe, fresh, [INSTRUCTION]):
        assert torch.equal(call(flux.pipe, **given, **repeated), alone)
    assert not torch.equal(call(flux.pipe, **given, controlnet_block_samples=others), alone)  # control


def test_arguments_by_position_are_understood(host):
    given = inputs(host.pipe)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    with apply(host.pipe, host.artifact):
        by_name = call(host.pipe, **given)
        leading = [given.pop(name) for name in names]
        assert torch.equal(call(host.pipe, *leading, **given), by_name)


def test_a_controlnets_residuals_may_come_by_position(sd3):
    given, theirs = inputs(sd3.pipe), [torch.full((1, 64, 32), 0.3)]
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    with apply(sd3.pipe, sd3.artifact):
        by_name = call(sd3.pipe, **given, block_controlnet_hidden_states=theirs)
        assert torch.equal(call(sd3.pipe, *(given[name] for name in names), theirs), by_name)
        assert not torch.equal(call(sd3.pipe, **given), by_name)  # control


def test_a_patch_that_sees_the_instruction_only_is_blind_to_the_prompt(host):
    given = inputs(host.pipe)
    others = {name: given[name] + 1 for name in ("encoder_hidden_states", "pooled_projections")}
    for sees, is_blind in (("instruction", True), ("instruction+prompt", False)):
        made = []
        patch = awaken(ControlPatch.from_unet(host.pipe.transformer, sees=sees), size=0.05)
        patch.register_forward_hook(lambda *results, made=made: made.append(results[-1].mid))
        with attach(host.pipe, patch, [INSTRUCTION]):
            call(host.pipe, **given)
            call(host.pipe, **{**given, **others})
        assert torch.equal(*made) == is_blind


def test_the_window_is_a_share_of_the_denoising(host):
    with apply(host.pipe, host.artifact, start=0.2, end=0.5) as handle:
        given = inputs(host.pipe)  # 30 % done
        late = {**given, "timestep": given["timestep"] / 2}
        assert not torch.equal(call(host.pipe, **given), unpatched(handle, host, given))
        assert torch.equal(call(host.pipe, **late), unpatched(handle, host, late))


def unpatched(handle: Any, host: Host, given: dict[str, Any]) -> Tensor:
    handle.scale, scale = 0, handle.scale
    try:
        return call(host.pipe, **given)
    finally:
        handle.scale = scale


def test_fast_uses_residuals_twice(host):
    seen = []
    with apply(host.pipe, host.artifact, speed="fast") as handle:
        handle._attachment.corrector.parts[0].patch.register_forward_pre_hook(lambda *_: seen.append(1))
        draw(host.pipe, num_inference_steps=4)
    assert handle.stats.unet_calls == 4
    assert len(seen) == 2


def test_two_patches_stack_and_come_off_in_any_order(host):
    first, second = apply(host.pipe, host.artifact), apply(host.pipe, host.artifact, scale=0.5)
    both = draw(host.pipe)
    first.remove()
    one = draw(host.pipe)
    second.remove()
    assert not torch.equal(both, one)
    assert not torch.equal(one, host.base)
    assert torch.equal(draw(host.pipe), host.base)


def test_low_precision_and_copies(host):
    pipe = copy.deepcopy(host.pipe).to(dtype=torch.bfloat16)
    base = draw(pipe)
    with apply(pipe, host.artifact) as handle:
        assert next(handle._attachment.corrector.parts[0].patch.parameters()).dtype == torch.bfloat16
        patched = draw(pipe)
        assert not torch.equal(patched, base)
        assert torch.equal(draw(copy.deepcopy(pipe)), patched)
    assert torch.equal(draw(pipe), base)


def test_gradient_checkpointing_changes_no_gradient(host):
    gradients = []
    for checkpointed in (False, True):
        patch = awaken(ControlPatch.from_unet(host.pipe.transformer), size=0.05).requires_grad_(True)
        patch.gradient_checkpointing = checkpointed
        given = inputs(host.pipe)
        names = ("hidden_states", "timestep", "encoder_hidden_states")
        made = patch(*(given[name] for name in names), given["encoder_hidden_states"], given)
        made.mid.square().sum().backward()
        gradients.append([p.grad for p in patch.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_host_whose_first_layer_carries_a_lora_takes_a_patch(name):
    from peft import LoraConfig

    pipe = small_transformer_pipe(name)
    artifact = awake_artifact(pipe)
    with apply(pipe, artifact):
        patched = draw(pipe)
    entry = {"sd3": "proj", "flux": "x_embedder"}[name]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=[entry]))  # fresh, so it changes nothing yet
    with apply(pipe, artifact):
        torch.testing.assert_close(draw(pipe), patched)


def test_a_clone_leaves_an_ip_adapter_to_the_host(host):
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipe = small_transformer_pipe(host.name)
    for block in pipe.transformer.transformer_blocks:
        if host.name == "flux":
            block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 48, num_tokens=(2,)))
        else:
            block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(32, 16, 2))
    patch, plain = from_artifact(host.artifact, pipe.transformer), from_artifact(host.artifact, host.pipe.transformer)
    given = inputs(pipe)
    ordered = [given[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    with torch.no_grad():
        ours, theirs = (each(*ordered, given["encoder_hidden_states"], given) for each in (patch, plain))
    assert torch.equal(ours.mid, theirs.mid)
    assert any(isinstance(block.attn.processor, torch.nn.Module) for block in pipe.transformer.transformer_blocks)


def test_diffusers_own_hooks_stay_with_the_host(host):
    pipe = copy.deepcopy(host.pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    base = draw(pipe)
    with apply(pipe, host.artifact):
        assert not torch.equal(draw(pipe), base)
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("kind", ["StableDiffusion3Img2ImgPipeline", "FluxImg2ImgPipeline"])
def test_image_to_image(kind, sd3, flux):
    host = flux if "Flux" in kind else sd3
    pipe = quiet(getattr(diffusers, kind).from_pipe(host.pipe))
    base = draw(pipe, image=PHOTO)
    with apply(pipe, host.artifact):
        assert not torch.equal(draw(pipe, image=PHOTO), base)
    assert torch.equal(draw(pipe, image=PHOTO), base)


def test_a_text_to_image_patch_fits_a_host_that_is_given_more_than_latents(flux):
    fill = small_transformer_pipe("flux-fill")
    fresh = to_artifact(ControlPatch.from_unet(fill.transformer), fill.transformer, {"weapons": INSTRUCTION})
    assert fresh.info.fingerprint == flux.artifact.info.fingerprint
    given = inputs(fill)
    base = call(fill, **given)
    with apply(fill, flux.artifact):
        assert not torch.equal(call(fill, **given), base)
    with apply(fill, fresh):
        assert torch.equal(call(fill, **given), base)


# ---- never silently without it ---------------------------------------------------------------------------------


def test_a_direct_forward_is_noticed(host):
    with apply(host.pipe, host.artifact), pytest.raises(PatchBypassed, match=r"call transformer\(\)"):
        host.pipe.transformer.forward(**inputs(host.pipe))


def test_a_replaced_transformer_is_noticed(host):
    pipe = type(host.pipe)(**host.pipe.components)
    handle = apply(pipe, host.artifact)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    assert not handle.is_active
    with pytest.raises(PatchBypassed):
        draw(pipe)
    handle.remove()


def test_a_pipeline_that_shares_the_vae_is_noticed(host):
    other = type(host.pipe)(**{**host.pipe.components, "transformer": copy.deepcopy(host.pipe.transformer)})
    with apply(host.pipe, host.artifact), pytest.raises(PatchBypassed, match="its transformer carries no patch"):
        draw(quiet(other))


def test_status_lists_it(host):
    with apply(host.pipe, host.artifact) as handle:
        assert [(one.handle, one.active, one.categories) for one in status(host.pipe)] == [(handle, True, ("weapons",))]
    assert status(host.pipe) == ()


# ---- folders, and what is refused ------------------------------------------------------------------------------


def test_a_folder_is_checked_loaded_and_patched(host, tmp_path):
    host.pipe.save_pretrained(tmp_path / "model")
    host.artifact.save(tmp_path / "weapons.safetensors")
    fit = check(tmp_path / "model", tmp_path / "weapons.safetensors")
    assert fit.family == ("flux" if host.name == "flux" else "sd3")
    assert fit.drift == 0
    pipe = quiet(load_pipeline(tmp_path / "model"))
    with safepatch.apply(pipe, tmp_path / "weapons.safetensors"):
        patched = draw(pipe)
    with apply(host.pipe, host.artifact):
        torch.testing.assert_close(draw(host.pipe), patched)  # loaded weights lie otherwise in memory
    assert (patched - host.base).abs().max() > 0.01


def test_a_configuration_that_does_not_say_is_the_one_with_the_defaults(sd3, tmp_path):
    sd3.pipe.save_pretrained(tmp_path / "model")
    sd3.artifact.save(tmp_path / "weapons.safetensors")
    path = tmp_path / "model" / "transformer" / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in said.items() if k not in ("dual_attention_layers", "qk_norm")}))
    assert check(tmp_path / "model", tmp_path / "weapons.safetensors").family == "sd3"


def test_patches_of_other_families_are_refused(sd3, flux, small_pipe):
    for pipe, artifact, message in (
        (flux.pipe, sd3.artifact, "this patch is for sd3 transformers"),
        (sd3.pipe, new_artifact(small_pipe.unet), "this patch is for tiny-sd UNets, the model is sd3"),
        (small_family_pipe("sd1"), flux.artifact, "this patch is for flux transformers, the model is sd1"),
        (small_transformer_pipe("sd3", num_layers=5), sd3.artifact, r"\(num_layers 4\), the model is sd3 \(num_lay"),
    ):
        with pytest.raises(BaseMismatch, match=message) as caught:
            apply(pipe, artifact)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [0, 5])
def test_a_depth_that_the_transformer_lacks_is_refused(sd3, depth):
    with pytest.raises(ConfigError, match=r"within \[1, 4\]"):
        TransformerControlPatch.from_unet(sd3.pipe.transformer, depth=depth)


def test_a_pipeline_with_a_transformer_of_another_kind_is_refused(sd3):
    pipe = type(sd3.pipe)(**sd3.pipe.components)
    pipe.transformer = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="not supported yet: StableDiffusion3Pipeline"):
        apply(pipe, sd3.artifact)


def test_a_transformer_that_is_not_given_its_residuals_is_noticed(host):
    """A wrapper that hands on the arguments it knows drops the patch's."""
    transformer = host.pipe.transformer
    forward, kind = transformer.forward, host_kind(transformer)
    with apply(host.pipe, host.artifact):
        draw(host.pipe)  # control
        transformer.forward = lambda **given: forward(**{k: v for k, v in given.items() if k != kind.residuals})
        try:
            with pytest.raises(PatchBypassed, match=f"'{kind.residuals}' was not taken up"):
                draw(host.pipe)
        finally:
            del transformer.forward


@pytest.mark.parametrize("offload", ["by model", "by group"])
def test_what_offloading_hands_on_is_taken_for_what_it_is(host, offload):
    """It moves arguments to a device, and hands on copies of the lists that they are in."""
    from diffusers.hooks.group_offloading import apply_group_offloading

    pipe = copy.deepcopy(host.pipe)
    with apply(pipe, host.artifact):
        patched = draw(pipe)
        if offload == "by model":
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            apply_group_offloading(pipe.transformer, torch.device("cpu"), offload_type="leaf_level")
        assert torch.equal(draw(pipe), patched)
    assert not torch.equal(patched, host.base)  # control


def test_a_pipeline_draws_within_the_window_of_its_patch(host):
    """Flux counts a step of its scheduler as a thousandth."""
    with apply(host.pipe, host.artifact, start=0.3) as handle:
        draw(host.pipe, num_inference_steps=4)
        assert 0 < handle.stats.acted_calls < handle.stats.unet_calls == 4
        with pytest.raises(PatchBypassed, match="no step of this denoising"):
            draw(host.pipe, num_inference_steps=1)  # control


def test_a_pooled_state_of_other_words_is_heard(flux):
    """What T5 was told stays the very same tensor, and the gate goes by CLIP's."""
    judged = []
    patch = awaken(ControlPatch.from_unet(flux.pipe.transformer, gate=4), size=0.3)
    with attach(flux.pipe, patch, [INSTRUCTION]) as handle:
        handle.on_gate = lambda _, probabilities: judged.append(float(probabilities.max()))
        given = inputs(flux.pipe)
        call(flux.pipe, **given)
        call(flux.pipe, **{**given, "pooled_projections": -3 * given["pooled_projections"]})
    assert len(judged) == 2
    assert judged[0] != judged[1]


def test_states_that_somebody_exchanges_behind_a_gate_are_noticed(host):
    transformer, forward = host.pipe.transformer, host.pipe.transformer.forward
    given = inputs(host.pipe)
    others = {"encoder_hidden_states": given["encoder_hidden_states"] + 1}
    gates = {0: None, 4: "'encoder_hidden_states' was exchanged on the way"}
    for width, says in gates.items():
        patch = awaken(ControlPatch.from_unet(transformer, gate=width), size=0.05)
        with attach(host.pipe, patch, [INSTRUCTION]):
            call(host.pipe, **given)  # control
            transformer.forward = lambda **own: forward(**{**own, **others})
            try:
                if says:
                    with pytest.raises(PatchBypassed, match=says):
                        call(host.pipe, **given)
                else:
                    call(host.pipe, **given)  # control: what reads no words is not concerned
            finally:
                del transformer.forward
