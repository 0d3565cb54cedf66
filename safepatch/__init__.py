"""safepatch: train a safety patch per category, merge several into one file, load it onto any compatible model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from safepatch.artifact.info import PatchInfo, read_info
    from safepatch.artifact.patch_artifact import PatchArtifact, verify
    from safepatch.data.corpus import Corpus
    from safepatch.data.prompts import Prompt
    from safepatch.errors import NotTrusted, PatchBypassed, PromptBlocked, SafepatchError
    from safepatch.guard.file import Guard
    from safepatch.guard.guarded import guarded
    from safepatch.hosting.audit_log import audit
    from safepatch.merging import MergeRecipe, merge, split
    from safepatch.models.load import ModelConfig, load_pipeline
    from safepatch.runtime.apply import apply
    from safepatch.runtime.check import Status, check, status
    from safepatch.runtime.fuse import fuse, fuse_model
    from safepatch.runtime.handle import Handle
    from safepatch.runtime.one_step import one_step
    from safepatch.signing import require_signed, sign
    from safepatch.taxonomy import Category
    from safepatch.training.config import TrainConfig, load_train_config
    from safepatch.training.healing import heal
    from safepatch.training.trainer import train

# Where each public name lives; it is imported on first use, so that `import safepatch` loads no model library.
_HOMES: dict[str, str] = {
    "Corpus": "safepatch.data.corpus",
    "Prompt": "safepatch.data.prompts",
    "Category": "safepatch.taxonomy",
    "ModelConfig": "safepatch.models.load",
    "Guard": "safepatch.guard.file",
    "Handle": "safepatch.runtime.handle",
    "MergeRecipe": "safepatch.merging",
    "NotTrusted": "safepatch.errors",
    "PatchArtifact": "safepatch.artifact.patch_artifact",
    "PatchBypassed": "safepatch.errors",
    "PatchInfo": "safepatch.artifact.info",
    "PromptBlocked": "safepatch.errors",
    "SafepatchError": "safepatch.errors",
    "Status": "safepatch.runtime.check",
    "TrainConfig": "safepatch.training.config",
    "apply": "safepatch.runtime.apply",
    "audit": "safepatch.hosting.audit_log",
    "check": "safepatch.runtime.check",
    "fuse": "safepatch.runtime.fuse",
    "fuse_model": "safepatch.runtime.fuse",
    "guarded": "safepatch.guard.guarded",
    "heal": "safepatch.training.healing",
    "load_pipeline": "safepatch.models.load",
    "load_train_config": "safepatch.training.config",
    "merge": "safepatch.merging",
    "one_step": "safepatch.runtime.one_step",
    "read_info": "safepatch.artifact.info",
    "require_signed": "safepatch.signing",
    "sign": "safepatch.signing",
    "split": "safepatch.merging",
    "status": "safepatch.runtime.check",
    "train": "safepatch.training.trainer",
    "verify": "safepatch.artifact.patch_artifact",
}

__all__ = [
    "Category",
    "Corpus",
    "Guard",
    "Handle",
    "MergeRecipe",
    "ModelConfig",
    "NotTrusted",
    "PatchArtifact",
    "PatchBypassed",
    "PatchInfo",
    "Prompt",
    "PromptBlocked",
    "SafepatchError",
    "Status",
    "TrainConfig",
    "apply",
    "audit",
    "check",
    "fuse",
    "fuse_model",
    "guarded",
    "heal",
    "load_pipeline",
    "load_train_config",
    "merge",
    "one_step",
    "read_info",
    "require_signed",
    "sign",
    "split",
    "status",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safepatch' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
