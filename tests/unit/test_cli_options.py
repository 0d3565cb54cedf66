"""Every verb that draws or fits takes a device, and every one that opens a model of the user's a dtype."""

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from safepatch.cli import app

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


def test_verbs_of_groups_are_looked_at_too() -> None:
    assert {"guard score", "verify", "studio", "serve"} <= {*OPENING}
