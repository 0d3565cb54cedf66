"""Verbs that put a patch on a model: generate, fuse, check."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safepatch.cli import app, say
from safepatch.cli.options import (
    MERGED,
    TOGETHER,
    AllowPickle,
    Device,
    Dtype,
    GuardAction,
    Model,
    PatchFile,
    PredictionType,
    Reads,
    Tokenizer,
    only,
    opened,
    require_with,
)
from safepatch.errors import SafepatchError

if TYPE_CHECKING:
    from safepatch.artifact.info import PatchInfo
    from safepatch.guard.file import Guard
    from safepatch.hosting.making import Asked


OF_A_PATCH = ("scale", "start", "end", "gate", "gate_threshold", "speed", "reads", "trust")  # without one, they idle
OF_A_RECEIPT = ("key", "certificate", "receipt_prompt")

# Of generate alone.
PatchToApply = Annotated[
    list[str] | None, typer.Option("--patch", help="Patch to apply: a file, or user/repo[@revision].")
]
Scales = Annotated[str, typer.Option(help="Strength of the patch, 0 is off; or by category: gore=1,weapons=0.6.")]
Threshold = Annotated[
    float | None, typer.Option(help="Probability from which the gate opens; what the patch says if not given.")
]
Trust = Annotated[
    list[str] | None, typer.Option(help="Public key that must have signed the patch, or first-use; may be repeated.")
]
GuardFirst = Annotated[
    list[Path] | None, typer.Option("--guard", help="A guard's file, which judges the prompt first.")
]
Receipt = Annotated[
    bool, typer.Option("--receipt", help="Put into the PNG, and beside it, how it was made and what the patch did.")
]
Certificate = Annotated[
    Path | None, typer.Option(help="With --key: its certificates, PEM; the receipt stands in a C2PA manifest too.")
]
ReceiptPrompt = Annotated[
    bool, typer.Option("--receipt-prompt", help="With --receipt: the prompt itself stands in it, not its hash alone.")
]


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG to write.")],
    model: Model = "tiny-sd",
    patches: PatchToApply = None,
    scale: Scales = "1",
    start: Annotated[float, typer.Option(help="Share of the denoising after which the patch begins to act.")] = 0.0,
    end: Annotated[float, typer.Option(help="Share of the denoising after which it stops.")] = 1.0,
    gate: Annotated[str | None, typer.Option(help="off, soft or hard; hard if the patch has a gate.")] = None,
    gate_threshold: Threshold = None,
    speed: Annotated[str, typer.Option(help="full, or fast: a control patch runs at every second step.")] = "full",
    reads: Reads = "windows",
    trust: Trust = None,
    seed: Annotated[int, typer.Option(help="Of the starting noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    guidance_scale: Annotated[float | None, typer.Option(help="Of guidance; what is usual if not given.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    tokenizer: Tokenizer = None,
    allow_pickle: AllowPickle = False,
    prediction_type: PredictionType = None,
    guards: GuardFirst = None,
    guard_action: GuardAction = "block",
    receipt: Receipt = False,
    key: Annotated[Path | None, typer.Option(help="With --receipt: sign it with this key, see keygen.")] = None,
    certificate: Certificate = None,
    receipt_prompt: ReceiptPrompt = False,
) -> None:
    """Generate one image, with or without a patch."""
    from contextlib import nullcontext

    from safepatch.data.prompts import admit
    from safepatch.diffusion.askable import require_drawable
    from safepatch.files import require_writable
    from safepatch.hosting.making import Asked
    from safepatch.hosting.stamp import Stamp
    from safepatch.hub import located
    from safepatch.runtime.apply import apply
    from safepatch.runtime.check import require_fit
    from safepatch.runtime.one_step import one_step, step_of

    for option, of_it in (("patches", OF_A_PATCH), ("guards", ("guard_action",)), ("receipt", OF_A_RECEIPT)):
        require_with(context, option, of_it)
    patch, guard = only(patches or [None], "--patch", MERGED), only(guards or [None], "--guard", TOGETHER)
    # All that can be wrong is told before gigabytes of weights are read.
    admit([prompt])
    require_drawable(steps, guidance_scale, seed)
    require_writable(out)
    stamp = Stamp.of(key, receipt_prompt, certificate) if receipt else None
    scales, judge = _scale(scale), _guard(guard, guard_action) if guard else None
    info = None if patch is None else require_fit(model, located(patch), allow_pickle)[0]
    pipe = opened(model, device, dtype, tokenizer, allow_pickle, prediction_type)
    options = {"scale": scales, "start": start, "end": end, "gate": gate, "gate_threshold": gate_threshold}
    options |= {"speed": speed, "reads": reads, "trusted": trust[0] if trust and len(trust) == 1 else trust}
    prompt, judged = _judged(pipe, judge, guard_action, prompt, info) if judge else (prompt, None)
    if info and step_of(info) is not None:
        steps, guidance_scale = 1, 1.0
    asked = Asked.of(pipe, prompt, seed, steps, guidance_scale, negative_prompt)
    with one_step(pipe, info), apply(pipe, patch, **options) if patch is not None else nullcontext() as handle:
        told = stamp.draw(pipe, handle, asked, out, judged) if stamp else _drawn(pipe, asked, out)
    say(*told)


def _drawn(pipe: Any, asked: "Asked", out: Path) -> list[str]:
    """Draw one image into a file, without a receipt; returns what was done, for people."""
    from safepatch.diffusion import generate, save_image

    negatives = [asked.negative_prompt] if asked.negative_prompt else None
    images = generate(pipe, [asked.prompt], [asked.seed], asked.steps, asked.guidance_scale, negatives)
    save_image(images[0], out)
    return [f"image: {out}"]


def _guard(path: Path, action: str) -> "Guard":
    """What is wrong with it is told before gigabytes of weights are read."""
    from safepatch.errors import lookup
    from safepatch.guard.decide import ACTIONS
    from safepatch.guard.file import Guard

    lookup(dict.fromkeys(ACTIONS), action, what="action of a guard")
    return Guard.open(path)


def _judged(
    pipe: Any, judge: "Guard", action: str, prompt: str, patch: "PatchInfo | None"
) -> tuple[str, dict[str, Any]]:
    """What is drawn of a prompt, and what a receipt says of the guard; raises `PromptBlocked`."""
    from safepatch.data.prompts import admit
    from safepatch.guard.decide import admitted, lacking
    from safepatch.hosting.making import guard_record

    for line in lacking(judge.categories, patch.categories) if patch else ():
        say(line, err=True)
    decision = admitted(judge.bind(pipe), action, prompt)
    drawn = decision.drawn or ""
    admit([drawn])
    if decision.is_claimed:
        what = f"drawn in other words, '{drawn}'" if decision.is_rewritten else "drawn nevertheless"
        say(f"guard: {decision.category} with probability {decision.probability:.2f}; {what}")
    return drawn, guard_record(judge.content_hash, action, decision)


@app.command()
def fuse(
    patch: Annotated[Path, typer.Option(help="A lora patch, or a merge of such.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder; for a single file, a .safetensors file.")],
    model: Model = "tiny-sd",
    scale: Annotated[float, typer.Option(help="Strength of the patch.")] = 1.0,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write a lora patch into a copy of a model, which any program can load; it cannot be taken off again."""
    from safepatch.runtime.fuse import fuse_model

    say(f"written: {fuse_model(model, patch, out, scale, allow_pickle, say)}")


@app.command()
def check(patch: PatchFile, model: Model = "tiny-sd", allow_pickle: AllowPickle = False) -> None:
    """Say whether a patch fits a model, and how far the model is from the one it was trained on; exit code 0 or 2."""
    from safepatch.artifact.describe import weights
    from safepatch.runtime.check import check as run

    fit = run(model, patch, allow_pickle)
    why = "a merge has no base of its own" if fit.info.recipe else "the patch does not record its base's encoder"
    why = why if fit.info.component == "unet" else "the text encoder's weights are not in a folder of their own"
    say(f"fits: {patch} ({', '.join(fit.info.categories)}) on {model}")
    if merged := weights(fit.info):
        say("weights: " + ", ".join(f"{name} {weight:g}" for name, weight in merged.items()))
    say(f"family: {fit.family}", f"fingerprint: {json.dumps(fit.fingerprint)}")
    for component in fit.info.components:
        of = "" if fit.info.components == ("unet",) else f" ({component})"
        known = f"{fit.drifts[component]:.2g}" if component in fit.drifts else f"unknown, {why}"
        say(f"drift from the patch's base{of}: {known}")


def _scale(text: str) -> float | dict[str, float]:
    """`0.8`, or `gore=1.0,weapons=0.6` by category."""
    try:
        if "=" not in text:
            return float(text)
        named = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, value in named}
    except ValueError:
        raise SafepatchError(f"--scale takes a number, or CATEGORY=NUMBER,..., not '{text}'") from None
