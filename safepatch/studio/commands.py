"""What is set, as command lines that do the same: what they draw is, bit for bit, what the page draws."""

import shlex
from collections.abc import Sequence

from safepatch.artifact.info import BUNDLE
from safepatch.studio.chosen import Slider
from safepatch.studio.settings import Settings

MERGED = "merged.safetensors"


def commands(settings: Settings, sliders: Sequence[Slider], opening: Sequence[str] = ()) -> list[str]:
    """Of merging, where several patches are chosen, and of each image without and with them.

    Args:
        settings: of the page.
        sliders: strengths that are set.
        opening: further words that say how the model is opened, such as `--device cuda`.
    """
    lines = [merging(settings)] if len(settings.patches) > 1 else []
    for seed in range(settings.seed, settings.seed + settings.images):
        lines.append(_generate(settings, seed, [], f"base-{seed}.png", opening))
        if settings.patches:
            lines.append(_generate(settings, seed, _patched(settings, sliders), f"patched-{seed}.png", opening))
    return lines


def merging(settings: Settings) -> str:
    """Of writing the chosen patches into one file."""
    method = [] if settings.method == BUNDLE else ["--method", settings.method]
    return shlex.join(["safepatch", "merge", *settings.patches, *method, "-o", settings.out or MERGED])


def attacking(settings: Settings, opening: Sequence[str] = (), detector: str = "") -> str:
    """Of the same attack on prompts of the category's own, as `attack` asks."""
    words = ["safepatch", "attack", f"{settings.attack}:{settings.budget}", "--model", settings.model]
    words += ["--patch", _patch(settings), *(["--category", settings.category] if settings.category else [])]
    return shlex.join([*words, *(["--detector", detector] if detector else []), "-n", "20", *opening])


def _generate(settings: Settings, seed: int, patched: list[str], out: str, opening: Sequence[str]) -> str:
    words = ["safepatch", "generate", "--model", settings.model, *patched, "--prompt", settings.prompt]
    words += ["--seed", str(seed), "--steps", str(settings.steps)]
    words += [] if settings.guidance is None else ["--guidance-scale", f"{settings.guidance:.12g}"]
    return shlex.join([*words, *opening, "-o", out])


def _patched(settings: Settings, sliders: Sequence[Slider]) -> list[str]:
    changed = [f"{name}={each.value:.12g}" for each in sliders if each.value != 1 for name in each.categories]
    words = ["--patch", _patch(settings), *(["--scale", ",".join(changed)] if changed else [])]
    return [*words, *(["--gate", settings.gate] if settings.gate else [])]


def _patch(settings: Settings) -> str:
    return settings.patches[0] if len(settings.patches) == 1 else settings.out or MERGED
