"""Lite patches of transformers: a narrow branch per joint block, summed over categories, never silently left out."""

import copy
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.bank import DataConfig
from safepatch.diffusion import Components, Conditioning, Host, encode_prompts, open_host, quiet
from safepatch.diffusion.hosts import base as any_host
from safepatch.errors import ArtifactError, BaseMismatch, ConfigError, MergeError, PatchBypassed
from safepatch.merging import merge, split
from safepatch.models.flow_file import CONFIGS
from safepatch.patch import LitePatch
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.host import patched_prediction
from safepatch.patch.lite_tokens import TokenLitePatch
from safepatch.runtime.apply import apply, attach
from safepatch.runtime.check import status
from safepatch.training.estimate import inputs as meta_inputs
from safepatch.training.estimate import meta_host, told
from safepatch.training.memory import Plan, predict
from tests.families import draw, small_transformer_pipe
from tests.small import INSTRUCTION, awaken, new_artifact, new_small_unet

NAMES = ("sd3.5", "flux")
every_host = pytest.mark.parametrize("name", NAMES)
INSTRUCTIONS = {"weapons": INSTRUCTION, "gore": "no gore", "drugs": "no drugs, show sweets instead"}
RANKS = {"weapons": 4, "gore": 3, "drugs": 6}
MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384}  # SD3.5's


@cache
def pipe_of(name: str) -> Any:
    return small_transformer_pipe(name)


def awake(host: Any, category: str = "weapons", rank: int | None = None, **layout: Any) -> PatchArtifact:
    patch = LitePatch.from_unet(host, rank=rank or RANKS[category], **layout)
    return to_artifact(awaken(patch, sorted(RANKS).index(category), 0.2), host, {category: INSTRUCTIONS[category]})


def saved(folder: Path, name: str, *categories: str) -> list[Path]:
    host = pipe_of(name).transformer
    return [awake(host, category).save(folder / f"{category}.safetensors") for category in categories]


def drawn(pipe: Any, patch: PatchArtifact | Path, **options: Any) -> Tensor:
    with apply(pipe, patch, **options):
        return draw(pipe)


def asked(name: str) -> tuple[Host, tuple[Tensor, Tensor, Conditioning], Tensor]:
    """A host, what is asked of it, and an instruction's states."""
    host = open_host(Components.of(pipe_of(name)), 64)
    noisy = torch.randn(2, *host.latent_shape, generator=torch.Generator().manual_seed(0))
    rows = noisy, torch.tensor([100, 900]), host.encode(["a knife next to a cat", "a dog"])
    return host, rows, encode_prompts(host.components, [INSTRUCTION])


@every_host
def test_a_fresh_patch_changes_no_bit_and_an_awake_one_leaves_no_trace(name):
    pipe = pipe_of(name)
    base, host = draw(pipe), pipe.transformer
    fresh = to_artifact(LitePatch.from_unet(host, rank=4), host, {"weapons": INSTRUCTION})
    assert torch.equal(drawn(pipe, fresh), base)
    with apply(pipe, awake(host)) as handle:
        changed = draw(pipe)
        assert [(one.handle, one.active) for one in status(pipe)] == [(handle, True)]
        handle.scale = 0
        assert torch.equal(draw(pipe), base)
    assert handle.stats.acted_calls == 2
    assert changed.isfinite().all()
    assert not torch.equal(changed, base)
    assert torch.equal(draw(pipe), base)
    assert not any(block._forward_hooks for block in host.transformer_blocks)


@every_host
def test_a_file_acts_as_its_patch_and_tells_its_layout(name, tmp_path):
    pipe, artifact = pipe_of(name), awake(pipe_of(name).transformer, depth=2)
    path = artifact.save(tmp_path / "weapons.safetensors")
    assert torch.equal(drawn(pipe, path), drawn(pipe, artifact))
    opened = from_artifact(PatchArtifact.open(path), pipe.transformer)
    assert isinstance(opened, TokenLitePatch)
    assert opened.layout == {"rank": 4, "depth": 2, "groups": 1}
    assert len(opened.branches) == len(pipe.transformer.transformer_blocks)


@every_host
def test_training_sees_what_a_pipeline_will_draw_with(name):
    host, rows, instruction = asked(name)
    patch = awaken(LitePatch.from_unet(host.unet, rank=4), size=0.2)
    with torch.no_grad():
        learned, base = patched_prediction(host, patch, *rows, instruction), host.predict(*rows)
        with attach(pipe_of(name), patch, [INSTRUCTION]):
            applied = host.predict(*rows)
    torch.testing.assert_close(learned, applied, rtol=1e-4, atol=1e-5)
    assert (learned - base).abs().max() > 0.01  # control


@every_host
def test_a_branch_reads_prompt_and_time_and_only_the_instruction_if_it_is_to(name):
    host, (noisy, times, said), instruction = asked(name)
    other = said._replace(states=said.states + 1)
    found = {}
    for sees in ("instruction", "instruction+prompt"):
        patch: Any = awaken(LitePatch.from_unet(host.unet, sees, rank=4), size=0.2)
        seen: list[Tensor] = []
        patch.branches[0].register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        # The first block's tokens know the prompt already: the branch is shown the same ones in all cases.
        patch.branches[0].register_forward_pre_hook(lambda _, given: (torch.ones_like(given[0]), *given[1:]))
        with torch.no_grad():
            for rows in ((noisy, times, said), (noisy, times, other), (noisy, times - 50, said)):
                patched_prediction(host, patch, *rows, instruction)
        found[sees] = [torch.allclose(seen[0], each, atol=1e-6) for each in seen]
    assert found == {"instruction": [True, True, False], "instruction+prompt": [True, False, False]}


@every_host
def test_recomputed_activations_give_the_same_gradients(name, monkeypatch):
    host, rows, instruction = asked(name)
    patch, used, inner = awaken(LitePatch.from_unet(host.unet, rank=4), size=0.2), [], any_host.checkpoint
    monkeypatch.setattr(any_host, "checkpoint", lambda *args, **options: used.append(1) or inner(*args, **options))
    patch.requires_grad_(True)
    patched_prediction(host, patch, *rows, instruction).square().sum().backward()
    wanted = {key: torch.clone(weights.grad) for key, weights in patch.named_parameters() if weights.grad is not None}
    assert wanted.keys() == dict(patch.named_parameters()).keys()
    assert all(gradient.any() for gradient in wanted.values())
    assert not used
    patch.zero_grad()
    host.save_memory(lambda: patch.recomputing(host.unet))
    try:
        with patch.learning(host.unet):
            patched_prediction(host, patch, *rows, instruction).square().sum().backward()
    finally:
        host.keep_activations()
    assert used  # control: the host did recompute
    for key, weights in patch.named_parameters():
        torch.testing.assert_close(weights.grad, wanted[key], rtol=1e-3, atol=1e-5)
    assert not any(block._forward_hooks for block in host.unet.transformer_blocks)


def test_without_its_branches_a_host_would_recompute_something_else():
    """Control of the law above: torch notices."""
    host, rows, instruction = asked("sd3.5")
    patch = awaken(LitePatch.from_unet(host.unet, rank=4), size=0.2).requires_grad_(True)
    host.save_memory()
    try:
        with pytest.raises(RuntimeError, match=r"(?i)checkpoint"):
            patched_prediction(host, patch, *rows, instruction).square().sum().backward()
    finally:
        host.keep_activations()


# ---- side by side ----------------------------------------------------------------------------------------------


def close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() < 2e-4)


@every_host
def test_cat_computes_in_one_pass_what_the_bundle_does(name, tmp_path):
    pipe, paths = pipe_of(name), saved(tmp_path, name, *RANKS)
    merged, bundle = (merge(paths, tmp_path / f"{method}.safetensors", method) for method in ("cat", "bundle"))
    assert merged.info.config["layout"] == {"rank": 6, "depth": 1, "groups": 3}
    assert (len(merged.parts()), len(bundle.parts())) == (1, 3)
    together, alone = drawn(pipe, merged), drawn(pipe, paths[0])
    assert close(together, drawn(pipe, bundle))
    assert not close(together, alone)  # control
    assert close(drawn(pipe, merged, scale={"gore": 0, "drugs": 0}), alone)
    assert close(drawn(pipe, merged, scale={"gore": 0.5}), drawn(pipe, bundle, scale={"gore": 0.5}))
    for path in paths:
        part = split(tmp_path / "cat.safetensors", path.stem, tmp_path / "part.safetensors")
        assert (tmp_path / "part.safetensors").read_bytes() == path.read_bytes()
        assert part.info.categories == (path.stem,)


def test_two_attachments_add_up_in_any_order(tmp_path):
    pipe, paths = pipe_of("sd3.5"), saved(tmp_path, "sd3.5", "weapons", "gore")
    made = []
    for order in (paths, paths[::-1]):
        with apply(pipe, order[0]), apply(pipe, order[1]):
            made.append(draw(pipe))
    assert close(*made)
    assert close(made[0], drawn(pipe, merge(paths, method="cat")))


def test_each_row_has_the_strength_of_its_own_gates(tmp_path, monkeypatch):
    """Two categories side by side, of which each row opens one."""
    pipe, paths = pipe_of("sd3.5"), []
    for category in ("gore", "weapons"):
        artifact = awake(pipe.transformer, category, rank=4)
        patch = from_artifact(artifact, pipe.transformer)
        patch.add_gate(pipe.transformer, 4)
        config = {"gate": {category: {"threshold": 0.5}}}
        gated = to_artifact(patch, pipe.transformer, artifact.info.instructions, config)
        paths.append(gated.save(tmp_path / f"{category}.safetensors"))
    prompts = ["a knife next to a cat", "a picture of a dog"]
    base = draw(pipe, prompt=prompts)
    alone = [draw_with(pipe, path, prompts, gate="off") for path in paths]
    merged = merge(paths, method="cat")
    opened = torch.tensor([[9.0, -9.0], [-9.0, -9.0]])
    monkeypatch.setattr("safepatch.patch.gate.TextGate.forward", lambda self, mid, t, states, *_: opened)
    made = draw_with(pipe, merged, prompts)
    assert close(made[0], alone[0][0])
    assert torch.equal(made[1], base[1])
    assert not close(alone[0][0], base[0])  # control
    assert not close(alone[0][0], alone[1][0])  # control


def draw_with(pipe: Any, patch: PatchArtifact | Path, prompts: Sequence[str], **options: Any) -> Tensor:
    with apply(pipe, patch, **options):
        return draw(pipe, prompt=list(prompts))


def test_threads_that_share_a_transformer_draw_what_one_thread_draws():
    pipe, prompts = pipe_of("sd3.5"), ["a knife", "a dog", "a glass of wine next to a cat", "a house"]
    words = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")  # they hold one call's state, patch or none
    own = [{name: copy.deepcopy(getattr(pipe, name)) for name in words} for _ in prompts]
    pipes = [quiet(type(pipe)(**{**pipe.components, **each})) for each in own]
    base = draw(pipe, prompt=prompts[0])
    with apply(pipe, awake(pipe.transformer)):
        alone = [draw(pipe, prompt=prompt) for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda each, prompt: draw(each, prompt=prompt), pipes, prompts))
    assert all(map(torch.equal, together, alone))
    assert not torch.equal(alone[0], base)  # control


# ---- never silently without it ---------------------------------------------------------------------------------


@every_host
def test_a_lost_hook_a_replaced_block_and_a_direct_forward_are_noticed(name):
    pipe = small_transformer_pipe(name)
    blocks = pipe.transformer.transformer_blocks
    draws = {
        "lost": lambda: blocks[1]._forward_hooks.clear(),
        "replaced": lambda: blocks.__setitem__(2, copy.deepcopy(blocks[2])),
    }
    for spoil in draws.values():
        handle = apply(pipe, awake(pipe.transformer))
        draw(pipe)  # control
        spoil()
        assert not handle.is_active
        with pytest.raises(PatchBypassed, match=r"hooks inside it are lost|was not called as a layer"):
            draw(pipe)
        handle.remove()
    with apply(pipe, awake(pipe.transformer)), pytest.raises(PatchBypassed, match=r"call transformer\(\)"):
        pipe.transformer.forward(hidden_states=torch.zeros(1, 4, 8, 8))


def test_a_block_that_runs_on_other_rows_is_noticed():
    pipe = small_transformer_pipe("sd3.5")
    block = pipe.transformer.transformer_blocks[1]
    forward = block.forward

    def one(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **more: Any) -> Any:
        return forward(hidden_states[1:], encoder_hidden_states[1:], temb[1:], **more)

    with apply(pipe, awake(pipe.transformer)):
        draw(pipe)  # control
        block.forward = one
        try:
            with pytest.raises(PatchBypassed, match=r"'transformer_blocks\.1' .* was not called as a layer"):
                draw(pipe)
        finally:
            del block.forward


def test_blocks_that_sd3_skips_are_not_missed():
    pipe = pipe_of("sd3.5")
    guided = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_start": 0.0}
    base = draw(pipe, **guided)
    assert not torch.equal(draw(pipe), base)  # control
    with apply(pipe, awake(pipe.transformer)):
        assert not torch.equal(draw(pipe, **guided), base)


def test_low_precision_and_copies():
    pipe = copy.deepcopy(pipe_of("flux")).to(dtype=torch.bfloat16)
    base = draw(pipe)
    with apply(pipe, awake(pipe.transformer)):
        patched = draw(pipe)
        assert not torch.equal(patched, base)
        assert torch.equal(draw(copy.deepcopy(pipe)), patched)
    assert torch.equal(draw(pipe), base)


# ---- what it costs, and what is refused ------------------------------------------------------------------------


def flops(work: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_at_stable_diffusion_3_5_mediums_size_it_adds_less_than_a_percent():
    config = json.loads((CONFIGS / "sd3.json").read_text())["transformer"] | MEDIUM
    host = meta_host(config, config["sample_size"], torch.float32)
    rows = meta_inputs(host, 1, told(config)[0])
    base = flops(lambda: host.predict(*rows))
    instruction = torch.zeros(1, 154, config["joint_attention_dim"], device="meta")
    patch = LitePatch.from_unet(host.unet).to("meta")
    assert 0.002 < flops(lambda: patched_prediction(host, patch, *rows, instruction)) / base - 1 <= 0.01


def test_what_a_run_will_take_is_told_before():
    config = dict(pipe_of("sd3.5").transformer.config)
    plan = Plan("lite", layout={"rank": 4}, data=DataConfig(size=64), gradient_checkpointing=True)
    found = predict(config, plan)
    assert found.patch == sum(p.nbytes for p in LitePatch.from_unet(pipe_of("sd3.5").transformer, rank=4).parameters())
    assert found.activations_per_row > 0


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"rank": 0}, "rank, depth and groups of at least 1"),
        ({"depth": 0}, "rank, depth and groups of at least 1"),
        ({"sees": "prompt"}, "a lite patch cannot see 'prompt'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(layout, says):
    with pytest.raises(ConfigError, match=says):
        LitePatch.from_unet(pipe_of("flux").transformer, **layout)


def test_patches_of_other_hosts_are_refused_in_one_line():
    flux, sd3 = pipe_of("flux"), pipe_of("sd3.5")
    deeper = small_transformer_pipe("sd3.5", num_layers=5)
    for pipe, artifact, says in (
        (flux, awake(sd3.transformer), "this patch is for sd3 transformers"),
        (sd3, new_artifact(new_small_unet(), "lite"), "this patch is for tiny-sd UNets, the model is sd3"),
        (deeper, awake(sd3.transformer), r"\(num_layers 4\), the model is sd3 \(num_layers 5\)"),
    ):
        with pytest.raises(BaseMismatch, match=says) as caught:
            apply(pipe, artifact)
        assert "\n" not in str(caught.value)


def test_a_file_without_a_branch_is_refused(tmp_path):
    pipe, artifact = pipe_of("flux"), awake(pipe_of("flux").transformer)
    kept = {key: tensor for key, tensor in artifact.tensors.items() if ".branches.3." not in key}
    assert len(kept) < len(artifact.tensors)
    spoiled = PatchArtifact(kept, artifact.info).save(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match=r"lacks 'lite\.branches\.3\."):
        apply(pipe, spoiled)


def test_patches_of_other_depths_do_not_stand_side_by_side(tmp_path):
    host = pipe_of("flux").transformer
    paths = [
        awake(host, category, depth=depth).save(tmp_path / f"{category}.safetensors")
        for category, depth in (("gore", 1), ("weapons", 2))
    ]
    with pytest.raises(MergeError, match="differ in depth or gate"):
        merge(paths, method="cat")
