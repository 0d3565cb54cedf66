"""A text encoder's patch, whatever is done around it: the UNet reads what the patched twin made, or it is said."""

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from torch import Tensor, nn

import safepatch
from safepatch.artifact.info import BUNDLE
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import Components, generate
from safepatch.errors import ConfigError, PatchBypassed, UnknownWords
from safepatch.export.lora_out import export
from safepatch.hosting.recording import recording
from safepatch.merging import MergeRecipe, combine
from safepatch.patch.files import to_artifact
from safepatch.patch.text import TextPatch
from tests.families import draw, small_family_pipe
from tests.laws.test_text_patch_laws import gated, new_text_artifact, unet_states
from tests.laws.test_thread_laws import while_drawing
from tests.laws.test_window_laws import listening
from tests.small import PROMPTS, images, new_small_pipe, small_artifact, spied
from tests.stress.soak import PROMPTS as MANY
from tests.stress.soak import drawn_by, gated_artifact, gated_text_artifact, sharing

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
KNIFE = PROMPTS[0]


@cache
def two_sided() -> PatchArtifact:
    """A text encoder's patch and a UNet's, each behind a gate that opens for some of `MANY`."""
    pipe = new_small_pipe()
    sides = [gated_text_artifact(pipe), gated_artifact(pipe, "lora")]
    return combine(sides, MergeRecipe(("text", "unet"), (1.0, 1.0), BUNDLE))


# ---- threads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "gate"), [(2, "hard"), (4, "soft"), (4, "off"), (8, "hard")])
def test_threads_draw_what_one_thread_draws_on_both_sides(threads: int, gate: str):
    pipe = new_small_pipe()
    base = [drawn_by(pipe, prompt) for prompt in MANY]
    with safepatch.apply(pipe, two_sided(), gate=gate) as handle:
        alone = [drawn_by(pipe, prompt) for prompt in MANY]
        counted = handle.stats.acted_rows, handle.stats.unet_calls
        with ThreadPoolExecutor(threads) as pool:
            together = list(pool.map(drawn_by, [sharing(pipe) for _ in MANY], MANY))
        assert (handle.stats.acted_rows, handle.stats.unet_calls) == (2 * counted[0], 2 * counted[1])
        assert not handle.stats.wordless_rows
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    changed = [not torch.equal(a, b) for a, b in zip(alone, base, strict=True)]
    assert any(changed)  # control: the patch does something
    assert all(changed) == (gate != "hard")  # control: and a hard gate leaves some prompts alone


def test_removing_waits_for_the_image_under_way(small_pipe: Any):
    base = drawn_by(small_pipe, MANY[0], 6)
    handle = safepatch.apply(small_pipe, new_text_artifact(small_pipe))
    patched = drawn_by(small_pipe, MANY[0], 6)
    assert not torch.equal(patched, base)  # control
    assert torch.equal(while_drawing(small_pipe, handle.remove), patched)
    assert torch.equal(drawn_by(small_pipe, MANY[0], 6), base)


def test_an_encoder_that_a_patch_listens_to_cannot_be_pickled(small_pipe: Any):
    for artifact in (new_text_artifact(small_pipe), listening(small_pipe)):
        with safepatch.apply(small_pipe, artifact), pytest.raises(ConfigError, match="cannot be pickled"):
            pickle.dumps(small_pipe.text_encoder)
    pickle.dumps(small_pipe.text_encoder)  # control


def test_pipelines_that_share_an_encoder_have_patches_of_their_own(small_pipe: Any):
    """Each reads the other's prompts too, and exchanges in its own UNet's calls alone."""
    other = sharing(small_pipe)
    other.unet = new_small_pipe().unet
    first, second = (new_text_artifact(small_pipe, category=name, seed=i) for i, name in enumerate(("weapons", "gore")))
    alone = []
    for pipe, artifact in ((small_pipe, first), (other, second)):
        other.vae = copy.deepcopy(small_pipe.vae)  # which would notice that its UNet carries no patch
        with safepatch.apply(pipe, artifact):
            alone.append(drawn_by(pipe, KNIFE))
    with safepatch.apply(small_pipe, first), safepatch.apply(other, second):
        both = [drawn_by(pipe, KNIFE) for pipe in (small_pipe, other)]
        with ThreadPoolExecutor(2) as pool:
            at_once = list(pool.map(drawn_by, (small_pipe, sharing(other)), (KNIFE, KNIFE)))
    assert not torch.equal(*alone)  # control
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(at_once, alone, strict=True))


# ---- states --------------------------------------------------------------------------------------------------------


def test_what_was_refused_once_is_refused_again(small_pipe: Any):
    """Somebody may catch the error and call once more, with the very same states."""
    foreign = torch.randn(1, 24, 192, generator=torch.Generator().manual_seed(0))
    with safepatch.apply(small_pipe, new_text_artifact(small_pipe)):
        read = small_pipe.encode_prompt(KNIFE, "cpu", 1, False)[0]
        assert not torch.equal(unet_states(small_pipe, read), read)  # control
        for _ in range(3):
            with pytest.raises(UnknownWords):
                unet_states(small_pipe, foreign)


def test_a_prompt_that_a_cache_answers_is_still_its_own(small_pipe: Any):
    """A cache in front of the encoder's work: its hooks run, those inside it do not."""
    encoder = small_pipe.text_encoder
    with safepatch.apply(small_pipe, new_text_artifact(small_pipe)):
        wanted = [drawn_by(small_pipe, prompt) for prompt in PROMPTS]
    forward, cached = (
        encoder.forward,
        lru_cache(lambda tokens, options: forward(torch.tensor([tokens]), **dict(options))),
    )
    encoder.forward = lambda input_ids, **more: cached(tuple(input_ids[0].tolist()), tuple(more.items()))
    with safepatch.apply(small_pipe, new_text_artifact(small_pipe)):
        for prompt in PROMPTS:
            small_pipe.encode_prompt(prompt, "cpu", 1, True)
        drawn = [drawn_by(small_pipe, prompt) for prompt in PROMPTS]
    assert all(torch.equal(a, b) for a, b in zip(drawn, wanted, strict=True))
    assert not torch.equal(*wanted)  # control


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_that_were_made_in_another_dtype_are_read_again(small_pipe: Any, dtype: torch.dtype):
    with safepatch.apply(small_pipe, new_text_artifact(small_pipe)):
        wanted = unet_states(small_pipe, last(small_pipe))
    with safepatch.apply(small_pipe, new_text_artifact(small_pipe)):
        read = last(small_pipe)
        small_pipe.to(dtype)
        given = states_in(small_pipe, read.to(dtype))
        assert torch.allclose(given.float(), wanted, atol=0.1)
        assert (read - wanted).abs().max() > 0.3  # control
        assert images(small_pipe).isfinite().all()


def states_in(pipe: Any, states: Tensor) -> Tensor:
    """What the UNet is given, in its own dtype, when it is called with text states."""
    with torch.no_grad(), spied(pipe.unet) as calls:
        pipe.unet(torch.zeros(len(states), 4, 16, 16, dtype=states.dtype), 500, states)
    return calls[0]["encoder_hidden_states"]


def test_what_the_unet_is_told_is_what_it_reads_or_it_is_said(small_pipe: Any):
    base, forward = images(small_pipe), small_pipe.unet.forward
    own = small_pipe.encode_prompt(list(PROMPTS), "cpu", 1, True)
    plain = torch.cat((own[1], own[0]))
    with safepatch.apply(small_pipe, new_text_artifact(small_pipe)):
        patched = images(small_pipe)
        small_pipe.unet.forward = lambda *args, **given: forward(*args, **given)
        assert torch.equal(images(small_pipe), patched)  # control: one that hands on what it is given
        small_pipe.unet.forward = lambda *args, **given: forward(*args, **{**given, "encoder_hidden_states": plain})
        with pytest.raises(PatchBypassed, match="'encoder_hidden_states' was exchanged on the way"):
            images(small_pipe)
    assert torch.equal(images(small_pipe), base)  # and unnoticed they would be the base's
    assert not torch.equal(patched, base)  # control


def test_somebodys_hook_behind_the_patch_may_not_bring_the_frozen_states_back(small_pipe: Any):
    own = small_pipe.encode_prompt(list(PROMPTS), "cpu", 1, True)
    plain = torch.cat((own[1], own[0]))
    with safepatch.apply(small_pipe, new_text_artifact(small_pipe)):
        images(small_pipe)  # control
        hook = small_pipe.unet.register_forward_pre_hook(
            lambda _, args, given: (args, {**given, "encoder_hidden_states": plain}), with_kwargs=True
        )
        with pytest.raises(PatchBypassed, match="was exchanged on the way"):
            images(small_pipe)
        hook.remove()


def test_a_lora_at_half_strength_stays_at_half_strength(small_pipe: Any, tmp_path: Any):
    """A pipeline weakens it while it encodes, and no longer."""
    other = new_text_artifact(small_pipe, category="gore", seed=1)
    export(other.save(tmp_path / "other.safetensors"), tmp_path / "lora.safetensors")
    small_pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    artifact, fused = new_text_artifact(small_pipe), new_small_pipe()
    safepatch.fuse(fused, other, 0.5)
    safepatch.fuse(fused, artifact)
    wanted = last(fused)
    with safepatch.apply(small_pipe, artifact):
        half, whole = (unet_states(small_pipe, last(small_pipe, scale)) for scale in (0.5, 1.0))
    assert torch.allclose(half, wanted, atol=1e-3)
    assert not torch.allclose(whole, wanted, atol=0.1)  # control
    assert not torch.allclose(half, last(small_pipe, 0.5), atol=0.1)  # control


def last(pipe: Any, scale: float | None = None) -> Tensor:
    return pipe.encode_prompt(KNIFE, "cpu", 1, False, lora_scale=scale)[0]


# ---- where its weights are -----------------------------------------------------------------------------------------


def layer_by_layer(encoder: nn.Module, folder: Any) -> None:
    accelerate.cpu_offload(encoder, torch.device("cpu"))


def to_disk(encoder: nn.Module, folder: Any) -> None:
    options = {"offload_type": "leaf_level", "onload_device": torch.device("cpu")}
    apply_group_offloading(encoder, **options, offload_to_disk_path=str(folder))


ELSEWHERE: dict[str, Callable[[nn.Module, Any], None]] = {"layer by layer": layer_by_layer, "to disk": to_disk}


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_encoder_whose_weights_are_elsewhere_is_refused(small_pipe: Any, tmp_path: Any, where: str, when: str):
    artifact = new_text_artifact(small_pipe)
    with safepatch.apply(small_pipe, artifact) if when == "after" else nullcontext():
        read = [small_pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in PROMPTS]
        if when == "after":
            assert not torch.equal(unet_states(small_pipe, read[0]), read[0])  # control
        ELSEWHERE[where](small_pipe.text_encoder, tmp_path)
        with pytest.raises(ConfigError, match="a text encoder's weights are offloaded") as caught:
            unet_states(small_pipe, read[1]) if when == "after" else safepatch.apply(small_pipe, artifact)
    assert "\n" not in str(caught.value)


def test_a_pipeline_that_is_offloaded_module_by_module_is_patched(small_pipe: Any):
    artifact = new_text_artifact(small_pipe)
    with safepatch.apply(small_pipe, artifact):
        patched = images(small_pipe)
    small_pipe.enable_model_cpu_offload(device="cpu")
    base = images(small_pipe)
    with safepatch.apply(small_pipe, artifact):
        assert torch.equal(images(small_pipe), patched)
    assert not torch.equal(patched, base)  # control


def test_a_layer_that_is_not_called_is_named(small_pipe: Any):
    attention = small_pipe.text_encoder.encoder.layers[0].self_attn

    class Functional(type(attention)):
        """It uses a layer's weights, and never calls it."""

        def forward(self, hidden_states: Tensor, **more: Any) -> Any:
            value = nn.functional.linear(hidden_states, self.v_proj.weight, self.v_proj.bias)
            return self.out_proj(value), None

    with safepatch.apply(small_pipe, new_text_artifact(small_pipe)):
        images(small_pipe)  # control
        attention.__class__ = Functional
        with pytest.raises(ConfigError, match=r"_proj' \(\d layers in all\) was not called as a layer"):
            images(small_pipe)


def test_a_layer_that_is_gone_is_named():
    """Some skip layers by taking them out."""
    pipe = small_family_pipe("sd1")
    with safepatch.apply(pipe, new_text_artifact(pipe)):
        draw(pipe)  # control
        blocks = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
        blocks.encoder.layers = blocks.encoder.layers[:-1]
        with pytest.raises(ConfigError, match="lost a layer that its patch updates"):
            draw(pipe)


# ---- what is told of it --------------------------------------------------------------------------------------------


def test_a_patch_of_another_encoder_than_the_pipelines_is_not_active(small_pipe: Any):
    with safepatch.apply(small_pipe, new_text_artifact(small_pipe), fail_closed=False) as handle:
        own, small_pipe.text_encoder = small_pipe.text_encoder, new_small_pipe().text_encoder
        base = images(small_pipe)
        assert not handle.stats.acted_rows
        assert not handle.is_active
        small_pipe.text_encoder = None  # dropped once it had encoded
        assert handle.is_active
        small_pipe.text_encoder = own
        assert handle.is_active  # control
        assert not torch.equal(images(small_pipe), base)


def test_a_window_into_which_no_step_falls_is_an_error_on_either_side(small_pipe: Any):
    for artifact in (new_text_artifact(small_pipe), two_sided()):
        with safepatch.apply(small_pipe, artifact, start=0.1):
            with pytest.raises(PatchBypassed, match="no step of this denoising"):
                generate(small_pipe, [KNIFE], [0], steps=1)
            generate(small_pipe, [KNIFE], [0], steps=4)  # control


def test_the_second_encoder_of_sdxl_under_threads_and_image_to_image():
    pipe = small_family_pipe("sdxl")
    artifact, base = new_text_artifact(pipe, "text_encoder_2"), draw(pipe)
    with safepatch.apply(pipe, artifact):
        wanted, found = draw(pipe), []
        other = copy.copy(pipe)
        other.scheduler, other.tokenizer, other.tokenizer_2 = (
            copy.deepcopy(part) for part in (pipe.scheduler, pipe.tokenizer, pipe.tokenizer_2)
        )
        threads = [threading.Thread(target=lambda each=each: found.append(draw(each))) for each in (pipe, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(each, wanted) for each in found)
    assert not torch.equal(wanted, base)  # control


def test_weights_of_both_sides_are_told_apart(small_pipe: Any, tmp_path: Any):
    paths = [
        artifact.save(tmp_path / f"{i}.safetensors")
        for i, artifact in enumerate((new_text_artifact(small_pipe), small_artifact("lora")))
    ]
    for weights, told in (((0.5, 1.0), {0.5, 1.0}), ((1.0, 0.5), {0.5, 1.0}), ((0.5, 0.5), {0.5})):
        merged = safepatch.merge(paths, weights=weights)
        with safepatch.apply(small_pipe, merged):
            assert set(safepatch.status(small_pipe)[0].weights.values()) == told
    with pytest.raises(safepatch.SafepatchError, match="above 0"):
        safepatch.merge(paths, weights=(0.0, 1.0))


def test_which_of_two_gates_for_one_category_opened_is_told(small_pipe: Any):
    """One that is all but open stays shut behind a high threshold, and the other opens below it."""
    shut, wide = (with_threshold(gated(small_pipe, bias), small_pipe, at) for bias, at in ((2.0, 0.99), (-2.0, 0.01)))
    bundle = combine((shut, wide), MergeRecipe(("one", "two"), (1.0, 1.0), BUNDLE))
    with safepatch.apply(small_pipe, bundle) as handle, recording(handle, 2) as drawn:
        images(small_pipe)
    assert sorted(handle.thresholds) == ["weapons (part 1)", "weapons (part 2)"]
    opens = [name for name, threshold in handle.thresholds.items() if threshold < 0.5]
    assert [list(each.opened(handle.thresholds)) for each in drawn] == [opens] * 2
    with safepatch.apply(small_pipe, wide) as handle, recording(handle, 2) as drawn:
        images(small_pipe)
    assert [each.opened(handle.thresholds) for each in drawn] == [("weapons",)] * 2  # control


def with_threshold(patch: TextPatch, pipe: Any, threshold: float) -> PatchArtifact:
    made = to_artifact(patch, Components.of(pipe), {"weapons": f"no weapons from {threshold} on"})
    config = {**made.info.config, "gate": {"weapons": {"threshold": threshold}}}
    return replace(made, info=replace(made.info, config=config))
