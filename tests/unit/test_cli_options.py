"""Every verb that draws or fits takes a device, and every one that opens a model of the user's a dtype."""

import pytest
from typer.main import get_command

from safepatch.cli import app

VERBS = get_command(app).commands  # type: ignore[attr-defined]
DRAW_OR_FIT = ("generate", "gate", "merge", "evaluate", "attack", "study", "train", "demo")
OF_ITS_OWN_MODEL = ("demo",)


def options(verb: str) -> set[str]:
    return {name for parameter in VERBS[verb].params for name in parameter.opts}


@pytest.mark.parametrize("verb", DRAW_OR_FIT)
def test_what_draws_or_fits_takes_device_and_dtype(verb: str) -> None:
    assert "--device" in options(verb)
    assert "--dtype" in options(verb) or verb in OF_ITS_OWN_MODEL
    assert "--device" not in options("inspect")  # control
