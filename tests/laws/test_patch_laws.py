"""What every patch kind promises: a fresh one is nothing, a row is its own, and its file is all there is to it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.errors import BaseMismatch, ConfigError, UnknownName
from safepatch.patch import PATCH_KINDS, Patch, Residuals
from safepatch.patch.drift import ENCODER, sketch
from safepatch.patch.files import from_artifact, to_artifact
from tests.small import (
    INSTRUCTION,
    LAYOUTS,
    RESIDUAL_KINDS,
    corrections,
    features_of,
    new_artifact,
    new_patch,
    new_small_unet,
    rows,
    same_residuals,
    spied,
)

every_kind = pytest.mark.parametrize("kind", RESIDUAL_KINDS)
SIGHTS = [(kind, sees) for kind in RESIDUAL_KINDS for sees in ("instruction", "instruction+prompt")]
every_sight = pytest.mark.parametrize(("kind", "sees"), [*SIGHTS, ("control", "prompt")])
# Shapes of the skips and the mid block's output on 16 x 16 latents, for one row.
SHAPES = [(16, 16, 16), (16, 16, 16), (16, 8, 8), (32, 8, 8), (32, 4, 4), (32, 4, 4), (32, 4, 4)]
# Hosts of other structures.
HOSTS = {
    "as embedded": {},
    "two layers": {"layers_per_block": 2},
    "two levels": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "inpainting": {"in_channels": 9},
    "consistency": {"time_cond_proj_dim": 8},
    "eight heads": {"attention_head_dim": 8},
}
PROJECTS = {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 192, "cross_attention_dim": 24}


def instruction(tokens: int = 6, seed: int = 5) -> Tensor:
    return torch.randn(1, tokens, 192, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def residuals(patch: Patch, *inputs: Tensor, unet: torch.nn.Module | None = None) -> Residuals:
    """What the patch makes on `unet`, by default the small one it was made for."""
    return corrections(patch, unet or new_small_unet(), inputs or rows(), instruction())


def each(made: Residuals) -> tuple[Tensor, ...]:
    return (*made.down, made.mid)


def slot_shapes(unet: torch.nn.Module, channels: int) -> list[torch.Size]:
    """Shapes of the host's own skips and mid output for two rows, watched where they are made."""
    seen: list[torch.Size] = []
    unet.conv_in.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda *call: seen.extend(skip.shape for skip in call[-1][1]))
    unet.mid_block.register_forward_hook(lambda *call: seen.append(call[-1].shape))
    with torch.no_grad():
        unet(*rows(channels=channels))
    return seen


@every_sight
@pytest.mark.parametrize("host", sorted(HOSTS))
def test_a_fresh_patch_makes_zeros_that_fit_every_slot_of_the_host(kind, sees, host):
    unet = new_small_unet(**HOSTS[host])
    patch = new_patch(unet, kind, sees, seed=None)
    channels = unet.config["in_channels"]
    made = residuals(patch, *rows(channels=channels), unet=unet)
    awake = residuals(new_patch(unet, kind, sees), *rows(channels=channels), unet=unet)
    assert [r.shape for r in each(made)] == slot_shapes(unet, channels)
    assert not any(r.any() for r in each(made))
    assert all(r.any() for r in each(awake))  # control


@pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
def test_a_gate_reads_text_states_as_the_host_is_handed_them(kind):
    unet = new_small_unet(**PROJECTS)
    _, _, states = rows()
    assert unet.encoder_hid_proj(states).shape[-1] == unet.config["cross_attention_dim"] != states.shape[-1]  # control
    patch = PATCH_KINDS[kind].from_unet(unet, gate=4, **LAYOUTS.get(kind, {}))
    assert patch.gate.read(states).shape == (len(states), 1)


@every_sight
def test_a_patch_reads_text_states_as_the_host_is_handed_them(kind, sees):
    unet = new_small_unet(**PROJECTS)
    assert all(made.any() for made in each(residuals(new_patch(unet, kind, sees), *rows(), unet=unet)))
    assert not any(made.any() for made in each(residuals(new_patch(unet, kind, sees, seed=None), *rows(), unet=unet)))


def test_the_shapes_of_the_embedded_layout_are_these():
    assert [tuple(r.shape[1:]) for r in each(residuals(new_patch(new_small_unet())))] == SHAPES


@every_kind
def test_the_joints_of_a_fresh_patch_are_zero_and_so_are_the_deltas_of_one_that_copies_the_host(kind):
    unet = new_small_unet()
    fresh = new_patch(unet, kind, seed=None)
    assert not any(joint.any() for joint in fresh.joints())
    assert kind == "lite" or not any(delta.any() for delta in fresh.deltas(unet).values())
    assert all(delta.any() for delta in new_patch(unet, kind).deltas(unet).values())  # control


@every_kind
def test_making_a_patch_changes_nothing_of_the_host(kind):
    unet = new_small_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    unet.requires_grad_(False)
    patch = new_patch(unet, kind)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert not {id(p) for p in unet.parameters()} & {id(p) for p in patch.parameters()}
    assert not any(p.requires_grad for p in unet.parameters())
    assert all(p.requires_grad for p in PATCH_KINDS[kind].from_unet(unet, "instruction").parameters())


@every_sight
def test_deltas_round_trip(kind, sees):
    unet = new_small_unet()
    patch, copy = new_patch(unet, kind, sees), new_patch(unet, kind, sees, seed=None)
    assert not same_residuals(residuals(copy), residuals(patch))  # control
    copy.load_deltas(unet, patch.deltas(unet))
    for made, wanted in zip(each(residuals(copy)), each(residuals(patch)), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    again = new_patch(unet, kind, sees, seed=None)
    again.load_deltas(unet, patch.deltas(unet))
    assert same_residuals(residuals(again), residuals(copy))


@every_kind
def test_a_missing_delta_counts_as_zero_and_an_unknown_one_is_refused(kind):
    unet = new_small_unet()
    deltas = new_patch(unet, kind).deltas(unet)
    name = sorted(deltas)[0]
    less, nulled = new_patch(unet, kind, seed=1), new_patch(unet, kind, seed=2)
    less.load_deltas(unet, {other: delta for other, delta in deltas.items() if other != name})
    nulled.load_deltas(unet, {**deltas, name: torch.zeros_like(deltas[name])})
    assert same_residuals(residuals(less), residuals(nulled))
    with pytest.raises(BaseMismatch, match=r"changes 'somewhere\.else', which this model lacks"):
        less.load_deltas(unet, {**deltas, "somewhere.else": torch.ones(1)})


@every_sight
def test_a_file_gives_the_same_residuals(tmp_path: Path, kind, sees):
    unet = new_small_unet()
    patch = new_patch(unet, kind, sees)
    artifact = to_artifact(patch, unet, {"weapons": INSTRUCTION})
    opened = PatchArtifact.open(artifact.save(tmp_path / "weapons.safetensors"))
    before, after = residuals(from_artifact(artifact, unet)), residuals(from_artifact(opened, unet))
    assert same_residuals(after, before)  # the file costs no bit
    for made, wanted in zip(each(after), each(residuals(patch)), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)  # the delta costs a rounding
    other = residuals(from_artifact(new_artifact(unet, kind, seed=1), unet))
    assert not same_residuals(other, before)  # control


@every_kind
def test_a_loaded_patch_is_frozen_and_says_what_it_is(kind):
    unet = new_small_unet()
    artifact = new_artifact(unet, kind)
    patch = from_artifact(artifact, unet)
    assert not patch.training
    assert not any(p.requires_grad for p in patch.parameters())
    assert (artifact.info.kind, artifact.info.config["sees"]) == (kind, "instruction+prompt")
    assert artifact.info.base == {"family": "tiny-sd", ENCODER: sketch(unet)}


@every_kind
def test_deltas_follow_the_host_they_are_loaded_on(kind):
    """Rebasing: on a fine-tuned host, the clone is that host's encoder plus the delta."""
    base, tuned = new_small_unet(), new_small_unet()
    with torch.no_grad():
        tuned.conv_in.weight += 0.1
    patch = from_artifact(new_artifact(base, kind), tuned)
    made = residuals(patch, unet=tuned)
    there, here = (p.deltas(u) for p, u in ((patch, tuned), (new_patch(base, kind), base)))
    for name, delta in here.items():
        torch.testing.assert_close(there[name], delta, rtol=1e-3, atol=1e-6)
    assert not same_residuals(made, residuals(from_artifact(new_artifact(base, kind), base)))  # control


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_rebasing_sums_in_float32_and_rounds_once(kind, dtype, held, stored):
    """Whatever the host's weights and the deltas are stored as, there is no rounding but the result's own."""
    host = new_small_unet().to(held)
    artifact = new_artifact(new_small_unet(), kind).astype(stored)
    patch = from_artifact(artifact, host, dtype)
    anchors = patch.anchors(host)
    for name, parameter in patch.named_parameters():
        delta = artifact.delta(f"{kind}.{name}")
        assert parameter.dtype == dtype
        assert parameter.equal((anchors[name].float() + delta).to(dtype)), name
    changed = [not p.float().equal(anchors[name].float()) for name, p in patch.named_parameters()]
    assert any(changed)  # control: there are deltas to sum


@every_kind
def test_a_host_that_carries_a_lora_takes_every_delta(kind):
    """PEFT renames the layers it wraps; a delta that finds no layer must not be lost."""
    plain, host = new_small_unet(), new_small_unet()
    host.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))  # a new adapter's own effect is zero
    artifact = new_artifact(plain, kind)
    assert host.state_dict().keys() != plain.state_dict().keys()  # control: names differ
    made, wanted = residuals(from_artifact(artifact, host)), residuals(from_artifact(artifact, plain))
    for left, right in zip(each(made), each(wanted), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@every_kind
@pytest.mark.parametrize("host", ["two layers", "two levels"])
def test_another_architecture_is_a_one_line_mismatch(kind, host):
    artifact, other = new_artifact(new_small_unet(), kind), new_small_unet(**HOSTS[host])
    with pytest.raises(BaseMismatch, match="this patch is for tiny-sd UNets") as caught:
        from_artifact(artifact, other)
    assert "\n" not in str(caught.value)
    from_artifact(artifact, new_small_unet())  # control


def test_another_text_width_names_both_families():
    artifact = new_artifact(new_small_unet())
    wide = new_small_unet(cross_attention_dim=768)
    with pytest.raises(BaseMismatch, match=r"for tiny-sd UNets \(cross_attention_dim 192\), the model is sd1 .* 768"):
        from_artifact(artifact, wide)


def test_a_file_of_an_unknown_kind_names_the_nearest():
    unet = new_small_unet()
    artifact = new_artifact(unet)
    with pytest.raises(UnknownName, match="did you mean 'control'"):
        from_artifact(replace(artifact, info=replace(artifact.info, kind="controll")), unet)


@every_kind
def test_a_patch_cannot_see_what_is_not_there(kind):
    with pytest.raises(ConfigError, match="cannot see 'everything'"):
        PATCH_KINDS[kind].from_unet(new_small_unet(), "everything")


@every_sight
def test_each_row_is_its_own(kind, sees):
    patch = new_patch(new_small_unet(), kind, sees)
    sample, timesteps, states = rows(3)
    whole = residuals(patch, sample, timesteps, states)
    for row in range(3):
        pick = slice(row, row + 1)
        alone = residuals(patch, sample[pick], timesteps[pick], states[pick])
        for made, wanted in zip(each(whole), each(alone), strict=True):
            torch.testing.assert_close(made[pick], wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(whole.mid[0], whole.mid[1], atol=1e-3)  # control: rows do differ


@every_sight
def test_a_patch_reads_time_and_latents_and_of_instruction_and_prompt_what_it_sees(kind, sees):
    unet = new_small_unet()
    patch = new_patch(unet, kind, sees)
    sample, timesteps, states = rows()
    other_sample, other_times, other_states = rows(seed=9)
    base = residuals(patch, sample, timesteps, states)
    assert not same_residuals(residuals(patch, other_sample, timesteps, states), base)
    assert not same_residuals(residuals(patch, sample, other_times, states), base)
    features = features_of(unet, sample, timesteps, states)
    with torch.no_grad():
        same = patch(sample, timesteps, states, instruction(), features=features)
        told = patch(sample, timesteps, states, instruction(seed=6), features=features)
        unprompted = patch(sample, timesteps, other_states, instruction(), features=features)
    assert same_residuals(same, base)
    assert same_residuals(told, base) == (sees == "prompt")
    assert same_residuals(unprompted, base) == (sees == "instruction")


def test_channels_past_the_latents_are_ignored():
    patch = new_patch(new_small_unet())
    sample, timesteps, states = rows(channels=9)
    assert same_residuals(
        residuals(patch, sample, timesteps, states), residuals(patch, sample[:, :4], timesteps, states)
    )


@every_kind
def test_one_file_fits_hosts_with_and_without_inpainting_channels(kind):
    """In both directions; what a patch is made of is the host's part that reads the latents."""
    plain, inpainting = new_small_unet(), new_small_unet(in_channels=9)
    with torch.no_grad():
        inpainting.load_state_dict({**plain.state_dict(), "conv_in.weight": inpainting.conv_in.weight})
        inpainting.conv_in.weight[:, :4] = plain.conv_in.weight
    for source, target in ((plain, inpainting), (inpainting, plain)):
        artifact = new_artifact(source, kind)
        there, here = (from_artifact(artifact, host) for host in (target, source))
        assert same_residuals(residuals(there, unet=plain), residuals(here, unet=plain))


@every_kind
def test_gradient_checkpointing_changes_no_value(kind):
    unet = new_small_unet()
    patch = new_patch(unet, kind).requires_grad_(True)
    gradients = []
    for patch.gradient_checkpointing in (False, True):
        patch.zero_grad()
        corrections(patch, unet, rows(), instruction()).mid.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in patch.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
    assert any(gradient.any() for gradient in gradients[0].values())  # control


@every_kind
def test_the_host_takes_what_a_patch_makes(kind):
    unet = new_small_unet()
    sample, timesteps, states = rows()
    made = residuals(new_patch(unet, kind))
    with torch.no_grad(), spied(unet) as calls:
        unet(sample, timesteps, states)
        unet(
            sample, timesteps, states,
            down_block_additional_residuals=made.down, mid_block_additional_residual=made.mid,
        )  # fmt: skip
    assert not torch.equal(calls[0]["output"], calls[1]["output"])
