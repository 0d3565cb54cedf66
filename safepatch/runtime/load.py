"""Find a model by whatever a user calls it."""

from pathlib import Path
from typing import Any

from safepatch.diffusion import load
from safepatch.errors import ModelNotFound, nearest
from safepatch.tiny.models import MODELS, load_tiny


def load_pipeline(name: str | Path) -> Any:
    """A diffusers pipeline: an embedded model by name, a diffusers folder, a `.safetensors` file, or a Hub id.

    Raises:
        ModelNotFound: with the nearest embedded name, or with what is wrong with the path.
    """
    if str(name) in MODELS:
        return load_tiny(str(name))
    if str(name).startswith("tiny"):
        raise ModelNotFound(f"no embedded model '{name}'{nearest(str(name), MODELS)}")
    return load(name)
