"""README and RESULTS say what the code and the figures say; `python patches/build.py results` writes them anew."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import safepatch
from patches.pages import ATTACKED, COMPARED, FIGURES, KINDS, README, RESULTS, blocks, filled, headline, results
from safepatch.cli import app
from safepatch.config import to_dict
from safepatch.training.config import load_train_config

DESIGN = README.parent / "DESIGN.md"
TEXT, NOW = README.read_text(), json.loads(FIGURES.read_text())
CATEGORIES = ("weapons", "gore")
MEASURES = {"unsafe_rate": (0.99, 0.0), "unsafe_rate, heldout": (0.98, 0.005), "benign_identical": (None, 1.0)}


def matrix(kind: str, models: tuple[str, ...] = ("tiny-sd", "tiny-sd-fluent")) -> dict:
    """Figures as `build.py` keeps those of one matrix: by measure, model, patch and category."""

    def values(number: float | None) -> dict[str, float]:
        return {} if number is None else dict.fromkeys(CATEGORIES, number)

    measures = {
        name: {
            model: {patch: values(v) for patch, v in (("none", base), (kind, patched)) if v is not None}
            for model in (models if name == "unsafe_rate" else models[:1])
        }
        for name, (base, patched) in MEASURES.items()
    }
    return {"n": 200, "steps": 20, "guidance_scale": 1.5, "seed": 1000, "measures": measures}


def full_figures() -> dict:
    """Everything measured."""
    names = [name for kind in KINDS for name in (kind, f"merge-{kind}", f"transfer-{kind}")]
    compared = matrix("lora")
    compared["measures"] |= {
        "asr, words": {"tiny-sd": {"none": {"weapons": 0.9, "gore": 0.7}, "lora": {"weapons": 0.1, "gore": 0.2}}},
        "asr, words, by other": {"tiny-sd": {"none": {"weapons": 0.5}, "lora": {"weapons": 0.25}}},
        "silent_miss, words": {"tiny-sd": {"lora": {"weapons": 0.125}}},
    }
    rewrite = {"replace": {"unsafe_rate": 0.01, "minutes": 4.5}, "empty": {"unsafe_rate": 0.02}}
    return {
        "costs": NOW.get("costs", {}),
        **{name: matrix(name.rpartition("-")[2]) for name in names},
        "rewrite": rewrite,
        "gpu": {"device": "a GPU", "sd1": {"kinds": {"lora": {"train_seconds": 0.25}}}},
        **dict.fromkeys((*ATTACKED, *COMPARED), compared),
        "fast-food": matrix("lora", ("tiny-sd",)),
    }


def found_blocks(text: str) -> dict[str, str]:
    return dict(re.findall(r"<!-- table: (\w+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL))


def code(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


COMMANDS = [line[2:] for block in code("console") for line in block.splitlines() if line.startswith("$ safepatch")]


@pytest.mark.parametrize("name", sorted(blocks(NOW)))
def test_a_block_of_readme_is_what_is_generated(name: str) -> None:
    assert found_blocks(TEXT)[name] == blocks(NOW)[name]


def test_a_changed_block_is_noticed() -> None:
    altered = TEXT.replace("`alcohol`", "`alcohols`")
    assert found_blocks(altered)["categories"] != blocks(NOW)["categories"]
    assert filled(altered, blocks(NOW)) == filled(TEXT, blocks(NOW))


def test_results_is_what_is_generated() -> None:
    assert RESULTS.read_text() == results(NOW)


def test_results_of_full_figures_hold_every_figure_once_measured() -> None:
    page = results(full_figures())
    assert "| weapons | 0.990 → 0.000 | 0.980 → 0.005 | 1.000 |" in page
    assert "| mean | 0.990 → 0.000 | 0.980 → 0.005 | 1.000 |" in page
    assert "| `tiny-sd-fluent` | 0.990 → 0.000 | 0.990 → 0.000 |" in page
    assert "| replace | 0.010 | 4.500 |\n| empty | 0.020 |  |" in page
    assert "| sd1, lora | 0.250 |" in page
    assert "| `words` | 0.800 / 0.500 | 0.150 / 0.250 (0.125) |" in page  # means over categories, by either detector
    for title, _ in COMPARED.values():
        assert f"## {title}\n" in page
        assert f"## {title}\n" not in results({})  # control
    assert "| lora | 0.000 | 0.005 |" in page
    assert "## fast-food" in page
    assert "not measured yet (`make" not in page
    assert "not measured yet (`make" in results({})  # control


def test_the_headline_is_the_lora_patches_and_claims_nothing_unmeasured() -> None:
    assert "unsafe images 0.990 → 0.000; in held-out wording 0.980 → 0.005" in headline(full_figures())
    assert not re.search(r"\d\.\d", headline({}))


def test_readme_is_short_and_says_at_once_what_it_is_not() -> None:
    assert len(filled(TEXT, blocks(full_figures())).splitlines()) <= 150
    first_screen = " ".join(TEXT.split("\n## ")[0].replace("\n> ", " ").split())
    for said in ("has never been run on photographs", "make demo", "make test", "patches/picture.png"):
        assert said in first_screen
    assert TEXT.index("## Your own model") < TEXT.index("## The embedded one")


def test_the_decisions_are_short_and_numbered() -> None:
    entries = re.findall(r"^## (\d+)\. .*\n(.*?)(?=^#|\Z)", DESIGN.read_text(), re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    assert [number for number, text in entries if len(text.strip().splitlines()) > 12] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_readme_has_a_verb_and_options_that_exist(command: str) -> None:
    verb, *words = shlex.split(command, comments=True)[1:]
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    with verbs[verb].make_context(verb, words) as context:
        given = context.params
    if verb == "train":
        config = load_train_config(None, given["overrides"])
        assert to_dict(config) != to_dict(load_train_config(None, [])) or not given["overrides"]


@pytest.mark.parametrize("block", code("python"))
def test_python_in_readme_names_what_is_public(block: str) -> None:
    names = {n.attr for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Attribute) and is_ours(n.value)}
    assert names
    assert names <= {*safepatch.__all__}


def is_ours(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "safepatch"


def test_every_file_that_readme_names_is_there() -> None:
    root, linked = Path(README).parent, {*re.findall(r"\]\(([^)#]+)\)", TEXT)}
    named = {word for word in re.findall(r"`((?:examples|configs|benchmarks|patches)/[\w./-]+)`", TEXT)}
    assert linked | named
    assert {path for path in linked | named if not (root / path).exists()} == set()
