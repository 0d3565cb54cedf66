"""Where a run's losses are shown beside its log: tensorboard, wandb, trackio, mlflow, all through accelerate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from safepatch.errors import ConfigError
from safepatch.training.config import TrainingConfig

PROJECT = "safepatch"


def require_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError` where a package is not installed: accelerate would leave it out and say nothing."""
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in installed:
            raise ConfigError(f"training.report_to={name} needs its package: pip install {name}")


def begin_tracking(accelerator: Accelerator, options: TrainingConfig, folder: Path) -> None:
    """Open the run in each of `options.report_to`, called after its folder, with its settings."""
    if not options.report_to:
        return
    named = {"name": folder.name}
    by_tracker = {"wandb": {**named, "dir": str(folder)}, "trackio": named, "mlflow": {"run_name": folder.name}}
    settings = {name: value for name, value in asdict(options).items() if isinstance(value, int | float | str)}
    try:
        accelerator.init_trackers(PROJECT, settings, by_tracker)
    except Exception as error:  # whatever a tracker raises: no key, no server
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ConfigError(
            f"cannot report to {', '.join(options.report_to)} ({first}); set it up, or leave training.report_to out"
        ) from error


@contextmanager
def tracked(accelerator: Accelerator) -> Iterator[None]:
    """Within the block a run is open in its trackers; what ends it by an error closes them: some hold one at a time."""
    try:
        yield
    except BaseException:
        for tracker in accelerator.trackers:
            with suppress(Exception):  # whatever a tracker raises, the run's own error is what is to be told
                tracker.finish()
        raise
