"""SD3 and Flux from training to images: patches are trained, gated, kept in files and leave harmless images alone."""

from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, encode, quiet
from safepatch.errors import ConfigError, UnknownName
from safepatch.export import export, import_lora
from safepatch.hosting.audit import ACTED, Auditor
from safepatch.merging import MergeRecipe, merge
from safepatch.patch import PATCH_KINDS, LoraPatch
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.gate import TextGate
from safepatch.patch.lora import STREAMS
from safepatch.runtime.apply import apply
from safepatch.runtime.fuse import fuse, fuse_model
from safepatch.tiny.models import load_tiny
from safepatch.tiny.text import MAX_TOKENS
from safepatch.training import gates
from safepatch.training.config import load_train_config
from safepatch.training.loop import Run
from safepatch.training.trainer import train
from tests.families import draw, small_transformer_pipe
from tests.small import INSTRUCTION, awaken

FEW = {"CAPTIONS": 16, "UNSEEN": 16, "STEPS": 2}
RUN = ["category=weapons", "data.pairs=2", "data.steps=1", "data.size=64", "training.steps=2", "training.batch_size=1"]
KNIFE, HARMLESS = "a knife next to a cat", "a picture of a dog"


@cache
def pipe_of(name: str) -> Any:
    sizes = {"in_channels": 16, "out_channels": 16} if name.endswith("wide") else {}  # as the inpainting pipeline asks
    return small_transformer_pipe(name, **sizes)


@cache
def gated(name: str, kind: str, windows: int = 3) -> PatchArtifact:
    """A patch that changes images, behind a gate of random weights."""
    host = pipe_of(name).transformer
    layout = {} if kind == "control" else {"rank": 4}
    patch = awaken(PATCH_KINDS[kind].from_unet(host, gate=4, **layout), size=0.1)
    record = {"weapons": {"threshold": 0.5, "windows": windows}}
    return to_artifact(patch, host, {"weapons": INSTRUCTION}, {"gate": record})


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd3", "lora"), ("sd3.5", "control"), ("flux", "lora"), ("flux", "control"), ("sd3.5", "lite"), ("flux", "lite")],
)
def test_a_patch_is_trained_gated_written_opened_and_applied(name, kind, tmp_path, monkeypatch):
    for key, value in FEW.items():
        monkeypatch.setattr(gates, key, value)
    pipe, options = small_transformer_pipe(name), [f"output={tmp_path / 'run'}", f"data.cache={tmp_path}"]
    before = {key: weight.clone() for key, weight in pipe.transformer.state_dict().items()}
    options += [f"patch.kind={kind}", "patch.gate=4", "training.learning_rate=0.1"]
    options += ["objective.preservation=0"] if kind == "control" else ["patch.rank=4"]
    path = train(pipe, load_train_config(None, [*RUN, *options]))
    artifact, base = PatchArtifact.open(path), draw(pipe)
    assert artifact.info.kind == kind
    assert artifact.info.config["gate"]["weapons"]["windows"] == 3
    with apply(pipe, artifact, gate_threshold=0.0) as handle:
        assert not torch.equal(draw(pipe), base)
        handle.gate = "off"
        assert not torch.equal(draw(pipe), base)
    assert torch.equal(draw(pipe), base)
    assert all(torch.equal(weight, before[key]) for key, weight in pipe.transformer.state_dict().items())


def test_equal_runs_give_equal_files_also_where_activations_are_recomputed(tmp_path):
    pipe = small_transformer_pipe("sd3")
    made = {}
    for name, more in {"one": [], "two": [], "again": ["training.gradient_checkpointing=true"]}.items():
        options = [*RUN, "patch.gate=0", "patch.rank=2", f"output={tmp_path / name}", f"data.cache={tmp_path}"]
        made[name] = PatchArtifact.open(train(pipe, load_train_config(None, [*options, *more])))
    assert made["one"].content_hash == made["two"].content_hash
    for name, tensor in made["one"].tensors.items():
        torch.testing.assert_close(made["again"].tensors[name], tensor, rtol=1e-2, atol=1e-5)


class Killed(Exception):
    """Stands in for whatever ends a process."""


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("sd3.5", "lora", []),
        ("sd3.5", "control", ["objective.preservation=0"]),
        ("sd3.5", "lite", ["training.gradient_checkpointing=true"]),
        ("flux", "lite", []),
    ],
)
def test_a_killed_run_goes_on_to_the_same_file(name, kind, more, tmp_path, monkeypatch):
    own = ["training.steps=4", "training.checkpoint_every=1", "patch.gate=0", f"patch.kind={kind}", *more]
    own += [] if kind == "control" else ["patch.rank=2"]

    def trained(out: str) -> PatchArtifact:
        options = [*RUN, *own, f"output={tmp_path / out}", f"data.cache={tmp_path / 'cache'}"]
        return PatchArtifact.open(train(small_transformer_pipe(name), load_train_config(None, options)))

    whole, move, begun = trained("whole"), Run._move, list[int]()

    def killed(self: Run, player: Any, state: Any, wrapped: Any) -> Any:
        if state.step == 2 and len(begun) < 3:
            raise Killed
        begun.append(state.step)
        return move(self, player, state, wrapped)

    monkeypatch.setattr(Run, "_move", killed)
    with pytest.raises(Killed):
        trained("cut")
    begun.append(-1)
    assert trained("cut").content_hash == whole.content_hash
    assert begun == [0, 1, -1, 2, 3]  # control: it did go on in the midst


WAYS = {
    "sd3": ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    "sd3-wide": ("StableDiffusion3InpaintPipeline", "StableDiffusion3PAGPipeline"),
    "flux": ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}


@pytest.mark.parametrize("kind", PATCH_KINDS)
@pytest.mark.parametrize(("name", "way"), [(name, way) for name, ways in WAYS.items() for way in ways])
def test_a_closed_gate_changes_no_bit_and_an_open_one_nothing_of_the_patch(name, way, kind):
    names = {"image_encoder", "feature_extractor"}
    parts = {key: part for key, part in pipe_of(name).components.items() if key not in names}
    pipe = quiet(getattr(diffusers, way)(**parts))
    base = draw(pipe)
    with apply(pipe, gated(name, kind), gate_threshold=1.0) as handle:
        assert torch.equal(draw(pipe), base)
        assert handle.stats.gated_rows > 0
        assert handle.stats.acted_rows == handle.stats.wordless_rows == 0
    with apply(pipe, gated(name, kind), gate_threshold=0.0) as handle:
        opened = draw(pipe)
        handle.gate = "off"
        assert torch.equal(draw(pipe), opened)
    assert not torch.equal(opened, base)  # control


def hears(monkeypatch: pytest.MonkeyPatch, name: str, word: str) -> None:
    """Gates that open for one word alone, and for nothing else."""
    components = Components.of(pipe_of(name))
    read = encode(components, [word])
    (wanted,) = read.pooled if name == "flux" else read.states[:, 1, :64]
    monkeypatch.setattr(TextGate, "read", lambda gate, states: _is_there(states[..., : len(wanted)], wanted))


def _is_there(states: Tensor, wanted: Tensor) -> Tensor:
    return 20 * ((states - wanted).abs().amax(-1) < 1e-3).any(1, keepdim=True).float() - 10


@pytest.mark.parametrize("kind", PATCH_KINDS)
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_rows_are_gated_by_their_own_words_and_no_words_around_them_close_it(name, kind, monkeypatch):
    pipe = pipe_of(name)
    prompts = ["a picture of a cat with a knife", HARMLESS]
    base = draw(pipe, prompt=prompts)
    hears(monkeypatch, name, "knife")
    with apply(pipe, gated(name, kind)) as handle:
        made = draw(pipe, prompt=prompts)
        assert torch.equal(made[1], base[1])
        assert not torch.equal(made[0], base[0])
        handle.reads = "prompt"
        assert torch.equal(draw(pipe, prompt=prompts), base)  # control: the whole prompt says it in other states


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_what_t5_alone_is_told_is_heard(name, monkeypatch):
    pipe, third = pipe_of(name), "prompt_2" if name == "flux" else "prompt_3"
    base = draw(pipe, prompt=HARMLESS, **{third: "a knife"})
    hears(monkeypatch, name, "knife")
    with apply(pipe, gated(name, "lora")) as handle:
        assert not torch.equal(draw(pipe, prompt=HARMLESS, **{third: "a knife"}), base)
        assert handle.stats.wordless_rows == 0
        acted = handle.stats.acted_rows
        draw(pipe, prompt=HARMLESS, **{third: "a cat"})
    assert handle.stats.acted_rows == acted > 0  # control


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_audit_says_what_a_transformers_gates_decide(name, monkeypatch):
    pipe, artifact = pipe_of(name), gated(name, "lora")
    behind = " ".join(["a dog"] * MAX_TOKENS + ["and a knife"])  # of what CLIP reads; T5 reads it still
    texts = ["knife", "a picture of a cat with a knife", behind, HARMLESS]
    hears(monkeypatch, name, "knife")
    for reads, wanted in (("windows", [True, True, True, False]), ("prompt", [True, False, False, False])):
        found = [each["weapons"].verdict == ACTED for each in Auditor(pipe, artifact, reads=reads)(texts)]
        assert found == [_opens(pipe, artifact, text, reads) for text in texts] == wanted


def _opens(pipe: Any, artifact: PatchArtifact, text: str, reads: str) -> bool:
    with apply(pipe, artifact, reads=reads) as handle:
        draw(pipe, prompt=text)
    return handle.stats.open_rows > 0


def test_a_gate_is_fitted_to_a_finished_patch(tmp_path, monkeypatch):
    for key, value in FEW.items():
        monkeypatch.setattr(gates, key, value)
    pipe, plain = pipe_of("sd3"), gates.without_gate(gated("sd3", "lora"))
    data = load_train_config(None, [*RUN, f"data.cache={tmp_path}"]).data
    made = gates.add_gate(plain, pipe, Corpus.open("weapons"), width=4, data=data)
    made = PatchArtifact.open(made.save(tmp_path / "gated.safetensors"))
    assert isinstance(from_artifact(made, pipe.transformer).gate, TextGate)
    assert gates.without_gate(made).content_hash == plain.content_hash
    assert made.content_hash != plain.content_hash  # control


@pytest.mark.parametrize("name", ["sd3", "sd3.5", "flux"])
def test_a_patch_may_act_on_one_stream_alone(name):
    host = pipe_of(name).transformer
    layers = {}
    for stream, pattern in STREAMS.items():
        patch = LoraPatch.from_unet(host, rank=2)
        patch.keep_layers(pattern)
        layers[stream] = {*patch.layers}
    apart = {layer for layer in layers["both"] if not layer.startswith("single_")}
    assert layers["image"] | layers["text"] == apart
    assert not layers["image"] & layers["text"]
    assert {layer.split(".")[2] for layer in layers["text"]} == {"attn", "ff_context"}
    assert not any("norm" in layer for layer in layers["both"])
    assert "transformer_blocks.0.attn.to_q" in layers["image"]


def test_a_unets_patch_has_no_streams(small_pipe):
    with pytest.raises(ConfigError, match="this model has no layer like"):
        LoraPatch.from_unet(small_pipe.unet, rank=2).keep_layers(STREAMS["image"])
    with pytest.raises(UnknownName, match="no stream of a transformer 'imge'"):
        load_train_config(None, [*RUN, "patch.stream=imge"])


@pytest.mark.parametrize("objective", ["esd", "duo", "safegen", "leco", "all_but_one", "adv_unlearn"])
def test_every_objective_trains_a_transformer(objective, tmp_path):
    pipe = small_transformer_pipe("sd3.5")
    more = ["objective.denoising_steps=2"] if objective == "leco" else []
    options = [f"objective={objective}", "patch.gate=0", "patch.rank=2", f"output={tmp_path / 'run'}", *more]
    path = train(pipe, load_train_config(None, [*RUN, *options, f"data.cache={tmp_path}"]))
    artifact = PatchArtifact.open(path)
    assert all(tensor.isfinite().all() for tensor in artifact.tensors.values())
    assert any(tensor.any() for key, tensor in artifact.tensors.items() if key.endswith(".up"))


def test_an_objective_for_cross_attention_says_so(tmp_path):
    config = load_train_config(None, [*RUN, "objective=closed_form", f"output={tmp_path}"])
    with pytest.raises(ConfigError, match="edits a UNet's cross-attention, this model has none"):
        train(pipe_of("sd3.5"), config)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_exported_lora_is_the_patch_to_plain_diffusers(name, tmp_path):
    plain, pipe = gates.without_gate(gated(name, "lora")), small_transformer_pipe(name)
    base, guided = draw(pipe, guidance_scale=1.0), {"guidance_scale": 1.0}
    with apply(pipe, plain):
        made = draw(pipe, **guided)
    export(plain.save(tmp_path / "plain.safetensors"), tmp_path / "out", "diffusers")
    assert import_lora(tmp_path / "out").content_hash == plain.content_hash
    pipe.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(draw(pipe, **guided), made, rtol=1e-3, atol=1e-4)
    assert (made - base).abs().max() > 1e-3  # control
    fused = small_transformer_pipe(name)
    fuse(fused, plain)
    torch.testing.assert_close(draw(fused, **guided), made, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["cat", "task-arithmetic"])
def test_merged_patches_act_as_their_bundle(method, tmp_path):
    pipe, paths = pipe_of("sd3"), []
    for seed, category in enumerate(("gore", "weapons")):
        patch = awaken(LoraPatch.from_unet(pipe.transformer, rank=2), seed, size=0.1)
        artifact = to_artifact(patch, pipe.transformer, {category: INSTRUCTION})
        paths.append(str(artifact.save(tmp_path / f"{category}.safetensors")))
    drawn = {}
    for name in ("bundle", method):
        with apply(pipe, merge(MergeRecipe(tuple(paths), method=name))):
            drawn[name] = draw(pipe)
    torch.testing.assert_close(drawn[method], drawn["bundle"], rtol=1e-3, atol=1e-4)
    assert (drawn[method] - draw(pipe)).abs().max() > 1e-3  # control


def test_the_embedded_transformer_is_fused_into_a_folder(tmp_path):
    pipe = quiet(load_tiny("tiny-sd3"))
    patch = awaken(LoraPatch.from_unet(pipe.transformer, rank=2), size=0.1)
    path = to_artifact(patch, pipe.transformer, {"weapons": INSTRUCTION}).save(tmp_path / "a.safetensors")
    fused = fuse_model("tiny-sd3", path, tmp_path / "fused") / "transformer" / "diffusion_pytorch_model.safetensors"
    name = "transformer_blocks.0.attn.to_q.weight"
    update = dict(zip(patch.layers, patch.updates, strict=True))["transformer_blocks.0.attn.to_q"]
    before, after = pipe.transformer.state_dict()[name], load_file(fused)[name]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before + (update.up @ update.down).detach(), atol=1e-5, rtol=1e-4)
