"""One training run from a configuration to a patch: host, rows, loop, gate, file."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.config import to_dict
from safepatch.data.corpus import Corpus
from safepatch.diffusion import UNET, Components, Host, encode_prompts, open_host
from safepatch.diffusion.askable import require_device
from safepatch.errors import ConfigError, lookup
from safepatch.models.load import license_of, recorded_name
from safepatch.objectives import SafeControlConfig
from safepatch.objectives.closed_form import begin
from safepatch.patch import PATCH_KINDS, Patch
from safepatch.patch.files import to_artifact
from safepatch.patch.gate import TextGate
from safepatch.patch.lora import STREAMS
from safepatch.patch.picture import TEXT
from safepatch.patch.text import TextPatch
from safepatch.progress import note
from safepatch.training.config import PatchConfig, TrainConfig, TrainingConfig
from safepatch.training.folder import RunFolder
from safepatch.training.gates import PICTURE_WIDTH, fit_keys
from safepatch.training.interrupts import Interrupted
from safepatch.training.loop import Run
from safepatch.training.trackers import begin_tracking, require_trackers, tracked
from safepatch.training.validation import save_validation_grid

__all__ = ["Interrupted", "Run", "new_accelerator", "train"]


def train(pipe: Any, config: TrainConfig, corpus: Corpus | None = None) -> Path:
    """Train the patch that `config` describes on the frozen `pipe` and return the path of its file.

    Args:
        pipe: the base model's pipeline; its modules are frozen and moved to the device that trains, not changed.
        config: the run. Its `output` folder gets `<category>.safetensors`, `log.jsonl`, `config.json` and, until the
            run is done, `checkpoint.pt`, from which an interrupted run continues by itself.
        corpus: the words, when they are at hand; else those of `config.category`.

    Raises:
        Interrupted: on Ctrl-C, after a checkpoint was written.
        ConfigError: when the model draws with a transformer, or the category cannot be used.
        SafepatchError: when the output folder or the cache cannot be written, or another run is in that folder.
    """
    corpus = corpus or Corpus.open(config.category)
    changes = config.patch.component
    usual = f"runs/train/{corpus.name}-{config.patch.kind if changes == UNET.component else changes}"
    host = open_host(Components.of(pipe), config.data.size)
    patch = config.objective.suited(_fresh(host, config.patch))  # before anything is written or drawn
    if config.patch.gate and config.objective.recorded(host):
        raise ConfigError("this objective draws every picture itself, so no gate may keep it off; set patch.gate=0")
    run_is_of = {**_recorded(config), "model_key": host.key, "words_key": corpus.key}
    result = f"{corpus.name}.safetensors"
    with RunFolder.claim(Path(config.output or usual), run_is_of, result) as out:
        if out.is_finished(result):
            note(f"finished already: {out.path / result}; for another run choose another output=, or delete it")
            return out.path / result
        return _train(pipe, host, patch, config, corpus, out)


def _fresh(host: Host, config: PatchConfig) -> Patch:
    if config.component != UNET.component:
        return TextPatch.of(host.components, config.component, **config.layout)
    kind = lookup(PATCH_KINDS, config.kind, what="patch kind")
    patch = kind.from_unet(host.unet, config.sees, **config.layout)
    if config.stream:
        patch.keep_layers(STREAMS[config.stream])
    return patch


def _train(pipe: Any, host: Host, patch: Patch, config: TrainConfig, corpus: Corpus, out: RunFolder) -> Path:
    accelerator = new_accelerator(config.training, out.path)
    with tracked(accelerator):
        host.components.to(accelerator.device)
        if config.objective.start == "closed_form" and config.objective.has_steps:
            begin(host, patch, corpus, config.data)
        rows = config.objective.prepare(host, corpus, config.data)
        instruction = encode_prompts(host.components, [corpus.category.instruction]).to(host.device).float()
        run = Run(corpus.name, config.objective, host, rows, instruction, config.training, accelerator)
        if config.training.validate_every:
            run = replace(run, show=lambda patch, path: save_validation_grid(pipe, patch, corpus, path))
        if config.objective.has_steps:
            state = run.finish(patch, out)
            trained, steps = state.averaged, state.step
        else:
            trained, steps = run.solved(patch, out), 0
        gates = {}
        if config.patch.gate:
            trained.add_gate(host.unet, config.patch.gate, picture=0 if config.patch.keys == TEXT else PICTURE_WIDTH)
            trained.to(host.device)
            gate = cast(TextGate, trained.gate)
            gates = {corpus.name: fit_keys(gate, host, corpus, config.data, config.patch.windows, config.patch.keys)}
        path = out.path / f"{corpus.name}.safetensors"
        if accelerator.is_main_process:
            _packed(trained, host, corpus, config, run.record(steps), gates).save(path)
            out.checkpoint.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return path


def new_accelerator(options: TrainingConfig, folder: Path) -> Accelerator:
    """Device, precision, processes and trackers of a run; raises `ConfigError` for what cannot be had."""
    require_trackers(options.report_to)
    # It would refuse another precision, or device, than an earlier run's in the same process.
    AcceleratorState._reset_state(reset_partial_state=bool(options.device))
    accelerator = Accelerator(
        cpu=_chosen(options.device) == "cpu",
        mixed_precision=options.mixed_precision,
        log_with=[*options.report_to] if options.report_to else None,
        project_dir=folder,
    )
    if options.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would ignore it
        raise ConfigError("mixed precision fp16 needs a GPU; set training.mixed_precision=bf16, or no")
    begin_tracking(accelerator, options, folder)
    return accelerator


def _chosen(device: str) -> str:
    """The type of the device; of several GPUs it becomes the one that accelerate finds."""
    if not device:
        return ""
    chosen = require_device(device, "choose another training.device")
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    return chosen.type


def _recorded(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run depends on: not where it runs, keeps latents, shows losses, nor whose the patch is."""
    recorded = to_dict(config)
    if recorded["patch"]["component"] == UNET.component:
        del recorded["patch"]["component"]  # as before there were others
    del recorded["license"], recorded["training"]["report_to"], recorded["training"]["device"]
    if not config.patch.stream:
        del recorded["patch"]["stream"]
    del recorded["data"]["cache"]
    if not config.data.select:  # later settings that are not used: runs from before there were any go on
        del recorded["data"]["select"], recorded["data"]["tries"]
    if not config.data.wordless:
        del recorded["data"]["wordless"]
    if config.patch.keys == TEXT:
        del recorded["patch"]["keys"]
    unattacked = not recorded["objective"].get("adversary", {}).get("count", 1)
    if unattacked and not isinstance(config.objective, SafeControlConfig):
        del recorded["objective"]["adversary"]
    return recorded


def _packed(
    patch: Patch, host: Host, corpus: Corpus, config: TrainConfig, training: dict[str, Any], gates: dict[str, Any]
) -> PatchArtifact:
    """The trained patch as an artifact in float16, low-rank when the configuration says so; `gates` by category."""
    recorded = {name: value for name, value in _recorded(config).items() if name != "output"}
    rewrite = {name: value for name, value in to_dict(corpus.rewrite).items() if name != "momentum" or value}
    recorded |= {"category": corpus.name, "model": recorded_name(config.model.path), "rewrite": rewrite}
    recorded |= {"gate": gates} if gates else {}
    recorded |= config.objective.recorded(host)
    instructions = {corpus.name: corpus.category.instruction}
    license = config.license or (license_of(config.model.path) if config.model.path else "")
    artifact = to_artifact(patch, host.components, instructions, recorded, training, license)
    if config.patch.kind == "control" and config.patch.rank:
        artifact = artifact.compress(config.patch.rank)
    return artifact.astype(torch.float16)
