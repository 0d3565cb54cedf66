"""README's tables say what the code's tables hold; `python tests/unit/test_readme.py` writes them anew."""

import json
import re
import statistics
from pathlib import Path

import pytest

from safepatch.merging.methods import METHODS
from safepatch.objectives import OBJECTIVES
from safepatch.patch import PATCH_KINDS
from safepatch.taxonomy import CATEGORIES
from safepatch.tiny.models import MODELS

README = Path(__file__).parents[2] / "README.md"
MEASURED = Path(__file__).parents[2] / "patches" / "figures.json"  # what `make table` measured
PAIRED = {  # column: fields without and with a patch
    "unsafe": ("base_unsafe_rate", "patched_unsafe_rate"),
    "held-out wording": ("base_unsafe_rate_heldout", "patched_unsafe_rate_heldout"),
    "safe and recognisable": ("base_safe_recognisable_rate", "safe_recognisable_rate"),
    "companion kept": ("base_companion_kept", "companion_kept"),
    "other categories": ("base_other_unsafe_rate", "other_unsafe_rate"),
    "benign accuracy": ("base_prompt_accuracy", "patched_prompt_accuracy"),
}


def first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figures(kind: str = "control") -> dict:
    """Every field by its name, targets and controls alike."""
    measured = json.loads(MEASURED.read_text())[kind]
    return measured["table"] | measured["controls"]


def arrow(before: dict | float, after: dict, name: str) -> str:
    base = before[name] if isinstance(before, dict) else before
    return f"{base:.2f} → {after[name]:.2f}"


def figures_table(kind: str = "control") -> str:
    found = figures(kind)
    rows = [
        (
            f"`{name}`",
            *(arrow(found[before], found[after], name) for before, after in PAIRED.values()),
            f"{found['benign_drift'][name]:.3f}",
        )
        for name in found["patched_unsafe_rate"]
    ]
    return table(("category", *PAIRED, "drift"), rows)


def sibling_table(kind: str = "control") -> str:
    found = figures(kind)
    names = list(found["patched_unsafe_rate"])
    pairs = {"tiny-sd (own)": (found["base_unsafe_rate"], found["patched_unsafe_rate"])}
    pairs |= {
        key: (found["sibling_base_unsafe_rate"][key], rates) for key, rates in found["sibling_unsafe_rate"].items()
    }
    rows = [(f"`{key}`", *(arrow(*rates, name) for name in names)) for key, rates in pairs.items()]
    return table(("checkpoint", *names), rows)


def mean(before: dict | float, after: dict) -> str:
    """Means over categories, without and with a patch."""
    base = statistics.fmean(before.values()) if isinstance(before, dict) else before
    return f"{base:.2f} → {statistics.fmean(after.values()):.2f}"


def kinds_table() -> str:
    """Each measured kind with what it costs and does, means over the categories."""
    measured, rows = json.loads(MEASURED.read_text()), []
    for kind in measured["costs"]:
        found, cost = figures(kind), measured["costs"][kind]
        paired = [mean(found[before], found[after]) for before, after in PAIRED.values()]
        drift = statistics.fmean(found["benign_drift"].values())
        attacks = [measured["attack"][f"{kind} + gate, {aim} attacked"] for aim in ("patch", "gate")]
        attack = max(attacks, key=lambda rates: rates["attacked"])
        attacked = f"{attack['plain']:.2f} → {attack['attacked']:.2f}"
        costs = (cost["mb_sd15"], cost["flops_sd15"], cost["flops_sdxl"])
        rows.append((f"`{kind}`", *costs, *paired, f"{drift:.4f}", attacked))
    costs = ("MB, SD 1.5", "FLOPs, SD 1.5", "FLOPs, SDXL")
    return table(("kind", *costs, *PAIRED, "drift", "weapons under attack"), rows)


def rendered() -> dict[str, str]:
    """Every table by its marker's name."""
    categories = [(f"`{c.name}`", c.definition, ", ".join(x.name for x in c.concepts)) for c in CATEGORIES.values()]
    named = {"methods": ("method", METHODS), "objectives": ("objective", OBJECTIVES), "kinds": ("kind", PATCH_KINDS)}
    return {
        "categories": table(("category", "stand-in for", "drawn as"), categories),
        "figures": figures_table(),
        "lite": figures_table("lite"),
        "lora": figures_table("lora"),
        "costs": kinds_table(),
        "siblings": sibling_table(),
        "lite_siblings": sibling_table("lite"),
        "lora_siblings": sibling_table("lora"),
        "models": table(("model", "what it is"), [(f"`{name}`", about) for name, about in MODELS.items()]),
        **{
            key: table((head, "what it does"), [(f"`{name}`", first_line(x)) for name, x in entries.items()])
            for key, (head, entries) in named.items()
        },
    }


def blocks(text: str) -> dict[str, str]:
    found = re.findall(r"<!-- table: (\w+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    return dict(found)


@pytest.mark.parametrize("name", sorted(rendered()))
def test_readme_table_equals_the_codes_table(name: str) -> None:
    assert blocks(README.read_text())[name] == rendered()[name]


def test_a_changed_table_is_noticed() -> None:
    altered = README.read_text().replace("| `weapons` |", "| `weapon` |")
    assert blocks(altered)["categories"] != rendered()["categories"]


if __name__ == "__main__":
    text = README.read_text()
    for name, body in rendered().items():
        pattern = rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)"
        text = re.sub(pattern, lambda match, body=body: match[1] + body + match[2], text, flags=re.DOTALL)
    README.write_text(text)
