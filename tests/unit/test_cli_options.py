"""Every verb that draws or fits takes a device, and every one that opens a model of the user's a dtype."""

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from safepatch.cli import app
from safepatch.errors import BaseMismatch
from tests.small import small_artifact

DRAW_OR_FIT = ("generate", "gate", "merge", "evaluate", "attack", "study", "train", "demo")
OF_ITS_OWN_MODEL = ("demo",)


def verbs(group: Any, before: str = "") -> Iterator[tuple[str, set[str]]]:
    """Every verb, those of groups too, with its options."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, f"{name} ")
        else:
            yield before + name, {option for parameter in command.params for option in parameter.opts}


OPTIONS = dict(verbs(get_command(app)))
OPENING = sorted(name for name, options in OPTIONS.items() if {"--device", "--model"} <= options)


@pytest.mark.parametrize("verb", DRAW_OR_FIT)
def test_what_draws_or_fits_takes_device_and_dtype(verb: str) -> None:
    assert "--device" in OPTIONS[verb]
    assert "--dtype" in OPTIONS[verb] or verb in OF_ITS_OWN_MODEL
    assert "--device" not in OPTIONS["inspect"]  # control


@pytest.mark.parametrize("verb", OPENING)
def test_what_opens_a_model_takes_a_dtype(verb: str) -> None:
    assert "--dtype" in OPTIONS[verb]


@pytest.mark.parametrize("verb", ["generate", "gate", "merge", "serve", "studio", "verify"])
def test_what_draws_with_a_single_file_can_be_told_its_prediction_type(verb: str) -> None:
    assert "--prediction-type" in OPTIONS[verb]
    assert "--prediction-type" not in OPTIONS["audit"]  # control: that draws nothing


def test_a_gate_is_not_fitted_to_a_patch_of_another_family(tmp_path, monkeypatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("read a model's weights")

    monkeypatch.setattr("safepatch.cli.train.opened", never)
    patch = small_artifact("lora").save(tmp_path / "patch.safetensors")
    fingerprint = {**small_artifact("lora").info.fingerprint}
    words = ["gate", str(patch), "-o", str(tmp_path / "gated.safetensors")]
    for config, raised in (({**fingerprint, "cross_attention_dim": 7}, BaseMismatch), (fingerprint, AssertionError)):
        monkeypatch.setattr("safepatch.runtime.check.unet_config", lambda *_, config=config: config)
        with pytest.raises(raised):
            CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)


def test_verbs_of_groups_are_looked_at_too() -> None:
    assert {"guard score", "verify", "studio", "serve"} <= {*OPENING}
