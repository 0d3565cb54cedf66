"""A control patch that sees the prompt alone is a ControlNet: diffusers' own class makes the same of the same."""

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.cli import app
from safepatch.diffusion import quiet
from safepatch.errors import ArtifactError, BaseMismatch, ConfigError, SafepatchError, UnknownName
from safepatch.export import export, export_controlnet
from safepatch.merging import merge
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.runtime.apply import apply
from tests.families import PHOTO, draw, small_family_pipe, small_transformer_pipe, unet_name
from tests.small import INSTRUCTION, awaken, new_artifact, new_patch, new_small_pipe, new_small_unet, rows

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
ANOTHER = Image.new("RGB", (64, 64), "blue")  # hint


def told(unet: Any, category: str = "weapons", seed: int = 0, gate: int = 0) -> PatchArtifact:
    """A control patch that does much and sees the prompt alone."""
    patch = new_patch(unet, "control", "prompt", seed=None)
    if gate:
        patch.add_gate(unet, gate)
    config = {"gate": {category: {"threshold": 0.5}}} if gate else {}
    return to_artifact(awaken(patch, seed, size=0.05), unet, {category: INSTRUCTION}, config, license="MIT")


def with_controlnet(pipe: Any, net: Any) -> Any:
    """The ControlNet pipeline of the same parts."""
    name = re.sub(r"^StableDiffusion(XL)?", r"\g<0>ControlNet", type(pipe).__name__)
    more = {} if "XL" in name else {"requires_safety_checker": False}
    return quiet(getattr(diffusers, name)(**pipe.components, controlnet=net, **more))


@pytest.mark.parametrize("family", ["sd1", "sd1-inpaint", "sdxl"])
def test_it_draws_in_diffusers_what_the_patch_draws_here(family, tmp_path):
    pipe = quiet(small_family_pipe(family))
    path = told(pipe.unet).save(tmp_path / "patch.safetensors")
    export_controlnet(path, tmp_path / "net", pipe)
    net = with_controlnet(pipe, ControlNetModel.from_pretrained(tmp_path / "net"))
    hint = "control_image" if "inpaint" in family else "image"
    base = draw(pipe, guidance_scale=1.0)
    with apply(pipe, path, gate="off"):
        wanted = draw(pipe, guidance_scale=1.0)
    made = draw(net, guidance_scale=1.0, controlnet_conditioning_scale=1.0, **{hint: PHOTO})
    assert (wanted - base).abs().max() > 0.02  # control
    assert (made - wanted).abs().max() < 0.02 * (wanted - base).abs().max()


def test_under_guidance_it_acts_on_the_negative_row_too_and_no_hint_matters(tmp_path):
    pipe = quiet(small_family_pipe("sd1"))
    path = told(pipe.unet).save(tmp_path / "patch.safetensors")
    net = with_controlnet(pipe, ControlNetModel.from_pretrained(export_controlnet(path, tmp_path / "net", pipe).parent))
    with apply(pipe, path, gate="off"):
        patched = draw(pipe)
    one, other = draw(net, image=PHOTO), draw(net, image=ANOTHER)
    assert torch.equal(one, other)
    assert not torch.allclose(one, patched, atol=0.02)  # its description says so


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_one_file_is_the_folder_by_the_names_of_the_original_layout(family, tmp_path):
    pipe = small_family_pipe(family)
    path = told(pipe.unet).save(tmp_path / "patch.safetensors")
    wanted = load_file(export_controlnet(path, tmp_path / "net", pipe))
    written = load_file(export_controlnet(path, tmp_path / "net.safetensors", pipe))
    found = convert_controlnet_checkpoint(dict(written), {"layers_per_block": pipe.unet.config["layers_per_block"]})
    found |= {name: written[unet_name(name, pipe.unet)] for name in wanted if name.startswith("add_embedding.")}
    assert len(written) == len(wanted)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert len({tuple(t.flatten()[:4].tolist()) for t in wanted.values()}) > len(wanted) / 2  # control: they differ


@torch.no_grad()
def test_a_latent_of_another_size_than_an_eighth_has_a_hint_of_that_size(tmp_path):
    """As the embedded models have; and the gate is not in it."""
    pipe = new_small_pipe()
    artifact = told(pipe.unet, gate=4)
    path = artifact.save(tmp_path / "patch.safetensors")
    net = ControlNetModel.from_pretrained(export_controlnet(path, tmp_path / "net", pipe).parent)
    sample, timesteps, states = rows()
    down, mid = net(sample, timesteps, states, torch.ones(2, 3, 64, 64), return_dict=False)
    wanted: Any = from_artifact(artifact, pipe.unet)(sample, timesteps, states, rows(1, seed=1)[2])
    for made, ours in zip((*down, mid), (*wanted.down, wanted.mid), strict=True):
        assert ours.abs().max() > 1e-3  # control
        torch.testing.assert_close(made, ours)
    with pytest.raises(ConfigError, match="no eighth of its images, as one file needs; give -o a folder"):
        export_controlnet(path, tmp_path / "net.safetensors", pipe)


def test_it_says_which_patch_it_is_and_is_none(tmp_path):
    pipe = small_family_pipe("sd1")
    artifact = told(pipe.unet)
    out = export_controlnet(artifact.save(tmp_path / "patch.safetensors"), tmp_path / "net.safetensors", pipe)
    content = out.read_bytes()
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    said = json.loads(metadata["safepatch.controlnet"])
    assert said["hash"] == artifact.content_hash
    assert json.loads(said["metadata"]["safepatch.instructions"]) == {"weapons": INSTRUCTION}
    assert "no gate" in metadata["modelspec.description"]
    assert "modelspec.license" not in metadata  # the model's holds
    with pytest.raises(ArtifactError, match="is a ControlNet that was exported from a patch; give that patch"):
        verify(out)


def test_a_sum_of_patches_is_one_too_and_a_bundle_is_several(tmp_path):
    pipe = quiet(small_family_pipe("sd1"))
    parts = [told(pipe.unet, name, i).save(tmp_path / f"{name}.safetensors") for i, name in enumerate(("gore", "arms"))]
    both = merge(parts, tmp_path / "sum.safetensors", method="linear")
    net = ControlNetModel.from_pretrained(
        export_controlnet(tmp_path / "sum.safetensors", tmp_path / "net", pipe).parent
    )
    base = draw(pipe, guidance_scale=1.0)
    with apply(pipe, both):
        wanted = draw(pipe, guidance_scale=1.0)
    made = draw(with_controlnet(pipe, net), guidance_scale=1.0, image=PHOTO)
    assert (wanted - base).abs().max() > 0.005  # control
    assert (made - wanted).abs().max() < 0.02 * (wanted - base).abs().max()
    merge(parts, tmp_path / "bundle.safetensors")
    with pytest.raises(ConfigError, match="a bundle is several patches; export its parts"):
        export_controlnet(tmp_path / "bundle.safetensors", tmp_path / "x", pipe)


def test_the_parts_of_a_bundle_are_given_to_diffusers_as_a_list(tmp_path):
    pipe = quiet(small_family_pipe("sd1"))
    parts = [told(pipe.unet, name, i).save(tmp_path / f"{name}.safetensors") for i, name in enumerate(("gore", "arms"))]
    nets = [ControlNetModel.from_pretrained(export_controlnet(p, tmp_path / p.stem, pipe).parent) for p in parts]
    with apply(pipe, merge(parts, tmp_path / "bundle.safetensors"), gate="off"):
        wanted = draw(pipe, guidance_scale=1.0)
    one, both = (draw(with_controlnet(pipe, net), guidance_scale=1.0, image=image) for net, image in
                 ((nets[0], PHOTO), (nets, [PHOTO, ANOTHER])))  # fmt: skip
    assert (one - wanted).abs().max() > 0.02  # control
    assert torch.allclose(both, wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "sees", "says"),
    [
        ("control", "instruction+prompt", "this patch sees 'instruction[+]prompt'.*train one with patch.sees=prompt"),
        ("control", "instruction", "this patch sees 'instruction'.*train one with patch.sees=prompt"),
        ("lite", "instruction", "a lite patch is no ControlNet; train one with patch.kind=control patch.sees=prompt"),
        ("lora", "prompt", "a lora patch is no ControlNet"),
    ],
)
def test_what_a_controlnet_is_not_told_is_refused(kind, sees, says, tmp_path):
    pipe = new_small_pipe()
    artifact = to_artifact(new_patch(pipe.unet, kind, sees), pipe.unet, {"weapons": INSTRUCTION})
    with pytest.raises(ConfigError, match=says):
        export_controlnet(artifact.save(tmp_path / "patch.safetensors"), tmp_path / "net", pipe)
    assert not (tmp_path / "net").exists()


def test_transformers_and_other_models_are_refused(tmp_path):
    sd3, pipe = small_transformer_pipe("sd3"), new_small_pipe()
    for host, says in ((sd3.transformer, "not supported yet: a ControlNet of SD3 or Flux"), (pipe.unet, "for tiny-sd")):
        path = told(host).save(tmp_path / "patch.safetensors")
        with pytest.raises(SafepatchError, match=says):
            export_controlnet(path, tmp_path / "net", small_family_pipe("sd1"))
    odd = new_small_pipe(new_small_unet(time_cond_proj_dim=8))
    path = told(odd.unet).save(tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match=r"has no such 'time_embedding\.cond_proj\.weight' as this model"):
        export_controlnet(path, tmp_path / "net", odd)
    assert not (tmp_path / "net").exists()
    path = told(pipe.unet).save(tmp_path / "patch.safetensors")
    (tmp_path / "net").touch()
    with pytest.raises(SafepatchError, match="cannot write to"):
        export_controlnet(path, tmp_path / "net", pipe)
    with pytest.raises(ConfigError, match="one that sees the prompt alone is a ControlNet"):
        export(path, tmp_path / "lora.safetensors")


def test_the_command_says_what_is_lost(tmp_path):
    pipe = new_small_pipe()
    pipe.save_pretrained(tmp_path / "model")
    path = told(pipe.unet, gate=4).save(tmp_path / "patch.safetensors")
    words = ["--format", "controlnet", "--model", str(tmp_path / "model"), "--dtype", "float16"]
    out = f"--out={tmp_path / 'net'}"
    said = invoked(*words, out, patch=path)
    assert "its gate is lost: it acts on every prompt, on the negative one too, whatever the hint" in said
    weights = load_file(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    other = new_artifact(pipe.unet, "control").save(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"train one with patch\.sees=prompt"):
        invoked(*words, out, patch=other)
    far = told(small_family_pipe("sd1").unet).save(tmp_path / "far.safetensors")
    with pytest.raises(BaseMismatch, match="this patch is for sd1 UNets"):
        invoked(*words, out, patch=far)
    with pytest.raises(UnknownName, match="did you mean 'controlnet'"):
        invoked("--format", "controlnets", out, patch=path)


def invoked(*words: Any, patch: Path) -> str:
    """What the command prints."""
    return CliRunner().invoke(app, ["export", str(patch), *map(str, words)], catch_exceptions=False).output
