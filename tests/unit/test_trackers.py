"""What a run logs reaches the trackers that it names; a tracker that is not there is no silence."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from safepatch.errors import ConfigError, UnknownName
from safepatch.training.config import load_train_config
from safepatch.training.trackers import tracked
from safepatch.training.trainer import _recorded, new_accelerator


class Noting(tracking.GeneralTracker):
    """Stands in for trackio: notes what accelerate tells it."""

    name = "trackio"
    requires_logging_directory = False
    main_process_only = True
    told: list[Any] = []  # noqa: RUF012 -- accelerate makes the instance

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.told.append((run_name, kwargs))

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(values)

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")


def options(*words: str):
    return load_train_config(None, list(words)).training


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Noting)
    for module in ("accelerate.tracking", "safepatch.training.trackers"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: [tracking.LoggerType.TRACKIO])
    monkeypatch.setattr(Noting, "told", [])
    return Noting.told


def test_losses_and_settings_reach_the_tracker(noting: list[Any], tmp_path: Path) -> None:
    accelerator = new_accelerator(options("training.report_to=[trackio]", "training.steps=7"), tmp_path / "run")
    accelerator.log({"loss": 0.5}, step=3)
    (project, said), settings, logged = noting
    assert (project, said) == ("safepatch", {"name": "run"})
    assert settings["steps"] == 7
    assert logged == (3, {"loss": 0.5})


def test_without_any_nothing_is_told(noting: list[Any], tmp_path: Path) -> None:
    new_accelerator(options(), tmp_path).log({"loss": 0.5}, step=3)
    assert noting == []


def test_a_tracker_that_is_not_installed_is_one_line(noting: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="report_to=mlflow needs its package: pip install mlflow"):
        new_accelerator(options("training.report_to=[trackio,mlflow]"), tmp_path)


def test_a_tracker_that_fails_is_one_line(noting: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no key\nmore")

    monkeypatch.setattr(Noting, "store_init_configuration", fail)
    with pytest.raises(ConfigError, match=r"cannot report to trackio \(no key\); set it up"):
        new_accelerator(options("training.report_to=[trackio]"), tmp_path)


def test_a_run_that_ends_by_an_error_closes_its_trackers(noting: list[Any], tmp_path: Path) -> None:
    """mlflow begins no run while another is open in the process."""
    accelerator = new_accelerator(options("training.report_to=[trackio]"), tmp_path)
    with tracked(accelerator):
        pass
    assert "finished" not in noting  # control
    with pytest.raises(KeyboardInterrupt), tracked(accelerator):
        raise KeyboardInterrupt
    assert noting[-1] == "finished"


def test_a_misspelt_tracker_is_told() -> None:
    with pytest.raises(UnknownName, match="did you mean 'tensorboard'"):
        options("training.report_to=[tensorbord]")


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert new_accelerator(options("training.device=cpu"), tmp_path).device.type == "cpu"  # control
    with pytest.raises(ConfigError, match=r"no device .cuda:99. here .*choose another training.device"):
        new_accelerator(options("training.device=cuda:99"), tmp_path)


def test_a_run_is_the_same_wherever_it_reports() -> None:
    quiet, told = (
        load_train_config(None, words) for words in ([], ["training.report_to=[wandb]", "training.device=cpu"])
    )
    assert quiet != told  # control
    assert _recorded(quiet) == _recorded(told)
