"""The documentation holds: its Python runs, its commands parse, its files are there, its navigation is whole."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer._click.exceptions import UsageError  # typer 0.29 carries its own click
from typer.main import get_command

from safepatch.cli import app
from safepatch.errors import SafepatchError
from safepatch.training.config import load_train_config

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
VERBS = get_command(app).commands  # type: ignore[attr-defined]
OTHERS = ("make", "openssl", "curl", "pip", "python")  # whose programs these are


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    return [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]


def parsed(command: str) -> None:
    """Raise unless the command line knows this verb, its options, and of `train` every field."""
    _, verb, *words = shlex.split(command)
    commands, name = (VERBS[verb].commands, words.pop(0)) if verb in ("detector", "guard") else (VERBS, verb)
    with commands[name].make_context(name, words) as context:
        if verb == "train":
            load_train_config(None, context.params["overrides"] or [])


@pytest.mark.parametrize("command", sorted({line for page in PAGES for line in commands(page)}))
def test_a_command_of_the_docs_parses(command: str) -> None:
    program = command.split()[0]
    if program == "make":
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program not in OTHERS:
        assert program == "safepatch"
        parsed(command)


@pytest.mark.parametrize(
    "command", ["safepatch shove x", "safepatch merge a b --methd x", "safepatch train a patch.knd=x"]
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


def test_everything_in_the_reference_is_there() -> None:
    from importlib import import_module

    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        module, _, last = name.rpartition(".")
        assert hasattr(import_module(module), last), name
