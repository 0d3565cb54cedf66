"""The documentation holds: its Python runs, its commands parse, its files are there, its navigation is whole."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer._click.exceptions import UsageError  # typer 0.29 carries its own click
from typer.main import get_command

import safepatch
from safepatch.cli import app
from safepatch.cli.train import planned
from safepatch.errors import SafepatchError
from safepatch.objectives import OBJECTIVES
from safepatch.training.config import load_train_config

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
VERBS = get_command(app).commands  # type: ignore[attr-defined]
OTHERS = ("make", "source", "openssl", "curl", "pip", "python")  # whose programs these are


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]


def parsed(command: str) -> None:
    """Raise unless the command line knows this verb, its options, and of `train` every field."""
    _, verb, *words = shlex.split(command, comments=True)
    commands, name = (VERBS[verb].commands, words.pop(0)) if verb in ("detector", "guard") else (VERBS, verb)
    with commands[name].make_context(name, words) as context:
        if verb == "train" and name == verb:
            first, more = context.params["config"], context.params["overrides"] or []
            load_train_config(None, more) if first.endswith(".yaml") else planned(first, more)


@pytest.mark.parametrize("command", sorted({line for page in PAGES for line in commands(page)}))
def test_a_command_of_the_docs_parses(command: str) -> None:
    program = command.split()[0]
    if program == "make":
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program not in OTHERS:
        assert program == "safepatch"
        parsed(command)


@pytest.mark.parametrize(
    "command",
    ["safepatch shove x", "safepatch merge a b --methd x", "safepatch train a.yaml patch.knd=x", "safepatch train a"],
)
def test_control_a_wrong_command_is_noticed(command: str) -> None:
    with pytest.raises((KeyError, SafepatchError, UsageError)):
        parsed(command)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "patches").symlink_to(ROOT / "patches")
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for block in blocks(page, "python"):
        assert "assert " in block
        exec(compile(block, str(page), "exec"), space)


def test_every_page_is_in_the_navigation_once() -> None:
    named = [name for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for name in entry.values()]
    assert sorted(named) == [page.name for page in PAGES]


def test_every_file_that_a_page_names_is_there() -> None:
    named = {
        name for page in PAGES for name in re.findall(r"(?:patches|configs|examples)/[\w/]+\.\w+", page.read_text())
    }
    assert named
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_everything_in_the_reference_is_there_and_all_that_is_public_is_in_it() -> None:
    from importlib import import_module

    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for name in named:
        module, _, last = name.rpartition(".")
        assert hasattr(import_module(module), last), name
    public = {name for name in safepatch.__all__ if getattr(safepatch, name).__module__ != "safepatch.errors"}
    assert public <= {name.rpartition(".")[2] for name in named}


def options(group: Any) -> Iterator[str]:
    """Every option of every verb, those of groups too."""
    for command in group.commands.values():
        if hasattr(command, "commands"):
            yield from options(command)
        else:
            yield from (option for parameter in command.params for option in parameter.opts)


def test_every_option_that_a_page_mentions_is_one() -> None:
    known = {*options(get_command(app)), "--help", "--install-completion"}
    pages = [*PAGES, ROOT / "README.md"]
    named = {(page.name, flag) for page in pages for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text())}
    assert len(named) > 50
    assert {(page, flag) for page, flag in named if flag not in known} == set()


def test_what_an_objective_takes_is_what_its_configuration_says() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text("utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (\d[^|]*\| [^|]*) \|$", page, re.MULTILINE))
    assert {*table} == {*OBJECTIVES}
    more = {"adv_unlearn": ["objective.attack=standard"], "sfd": ["objective.one_step=true", "patch.gate=0"]}
    for name, row in table.items():
        pictures, rows = row.split(" | ")
        for settings in ([], more.get(name, [])):
            objective = load_train_config(None, [f"objective={name}", *settings]).objective
            assert str(objective.pictures_per_pair) in re.findall(r"\d+", pictures)
            calls = 3 * objective.rows_per_pair + objective.calls_per_pair
            assert "no steps" in rows if not objective.has_steps else str(calls) in re.findall(r"\d+", rows)
