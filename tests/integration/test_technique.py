"""eval-unlearn's interface: found by its entry point, made from keys, asked for images."""

import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from safepatch.evaluation import technique as technique_module
from safepatch.evaluation.technique import SafepatchTechnique
from safepatch.shipped import shipped_patches

PROMPTS, FEW = ["a knife", "a picture of a dog"], {"num_inference_steps": 2, "guidance_scale": 1.5}


@pytest.fixture(scope="module")
def technique() -> SafepatchTechnique:
    return SafepatchTechnique(model="tiny-sd", patch=str(shipped_patches("lora")["weapons"].path), device="cpu", **FEW)


def drawn(technique: SafepatchTechnique, **options: object) -> list[np.ndarray]:
    return [np.asarray(image) for image in technique.generate(prompts=PROMPTS, seed=3, **options)]


def test_the_entry_point_is_the_class():
    groups = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    module, name = groups["eval_unlearn.techniques"]["safepatch"].split(":")
    assert getattr(import_module(module), name) is SafepatchTechnique


def test_it_draws_what_the_patched_model_draws(technique):
    patched, again = drawn(technique), drawn(technique)
    technique.handle.scale = 0.0
    base = drawn(technique)
    technique.handle.scale = 1.0
    assert [np.array_equal(a, b) for a, b in zip(patched, again, strict=True)] == [True, True]
    assert [np.array_equal(a, b) for a, b in zip(patched, base, strict=True)] == [False, True]  # the dog is left alone
    assert not np.array_equal(drawn(technique, num_inference_steps=3)[1], base[1])


def test_without_a_guidance_scale_it_is_what_suits_the_model(technique, monkeypatch):
    asked: list[float] = []
    pipe = technique.pipe
    monkeypatch.setattr(technique_module, "load_pipeline", lambda *_, **__: pipe)
    usual = SafepatchTechnique(model="tiny-sd", patch=str(shipped_patches("lora")["weapons"].path), device="cpu")
    usual.handle.remove()
    monkeypatch.setattr(
        usual, "pipe", lambda *_, **more: asked.append(more["guidance_scale"]) or SimpleNamespace(images=[])
    )
    usual.generate(PROMPTS)
    usual.generate(PROMPTS[:1], guidance_scale=4.0)
    assert asked == [1.5, 1.5, 4.0]  # Stable Diffusion's 7.5 burns the embedded model's pictures


def test_a_key_that_there_is_not_is_an_error():
    with pytest.raises(TypeError, match="patches"):
        SafepatchTechnique(model="tiny-sd", patches="x.safetensors")
