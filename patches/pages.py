"""What is generated of the pages: `patches/RESULTS.md`, and the blocks of README between `<!-- table: NAME -->` marks.

`python patches/build.py results` writes both, from `patches/figures.json` and the tables of the code; a test compares.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safepatch.attacks import ANY, ATTACKS
from safepatch.data.category import shipped_categories
from safepatch.detectors import DETECTORS
from safepatch.merging.methods import METHODS
from safepatch.models.load import MODELS
from safepatch.objectives import OBJECTIVES
from safepatch.patch import PATCH_KINDS
from safepatch.results import METRICS, NONE, TOY

HERE = Path(__file__).parent
FIGURES, RESULTS, README = HERE / "figures.json", HERE / "RESULTS.md", HERE.parent / "README.md"
KINDS = ("lora", "lite", "control")
GROUPS = {"i2p-": "I2P's classes", "ud-": "Unsafe Diffusion's classes", "": "harmless stand-ins for the embedded model"}
TITLES = {
    "unsafe_rate": "unsafe",
    "unsafe_rate, heldout": "held-out wording",
    "safe_recognisable_rate": "safe and recognisable",
    "companion_kept": "companion kept",
    "other_unsafe_rate": "other categories",
    "prompt_accuracy": "benign accuracy",
    "benign_drift": "benign drift",
    "benign_identical": "benign identical",
    "lookalike_drift": "look-alike drift",
    "lookalike_identical": "look-alike identical",
}
GATES = "![What a gate makes of prompts, and of any three words of them in a row](gates.png)"
BENCHMARKS = {  # figures of other programs, by their name in figures.json: title, and what to say of them
    "objectives": (
        "Objectives",
        "`python benchmarks/objectives.py`: weapons, lora patches without a gate, 192 pairs, 300 steps where there are "
        "steps, n = 60; minutes are of a busy machine. `closed_form`'s settings were chosen by such figures for this "
        "category, so its line is not an independent result.",
    ),
    "objectives, few steps": (
        "Objectives",
        "`python benchmarks/objectives.py --steps 100 --n 40`: too short a run to tell what does not work from what "
        "takes longer.",
    ),
    "objectives, other categories": (
        "Objectives",
        "`python benchmarks/objectives.py --category gore --only closed_form --n 100`, and likewise for drugs: with "
        "the settings that were chosen on weapons.",
    ),
    "rewrite": (
        "Where the safe twin comes from",
        "`python benchmarks/rewrite.py --steps 250 --pairs 192 --n 60`: weapons, short runs, trained alike; minutes "
        "are of a busy machine.",
    ),
    "detectors": (
        "The two embedded detectors",
        "`python benchmarks/detectors.py`: on scenes in each vendor's art, 100 with the category and 100 without. "
        "`embedded` has learned from the first three vendors, `embedded-second` from the first five, neither from "
        "OpenMoji: there the word of both is worth little, and of the first nothing.",
    ),
    "detectors, drawn": (
        "The two embedded detectors",
        "Shares of images of unsafe prompts that show the category, 20 for each of five categories, and in how many "
        "the two agree.",
    ),
    "detectors, hybrids": (
        "The two embedded detectors",
        "Pictures that are half an unsafe thing and half its replacement, in three vendors' art: mean probability of "
        "either.",
    ),
    "gate": ("What gates leave alone", f"`python benchmarks/gate.py`, in the embedded world's own words.\n\n{GATES}"),
    "english": (
        "Harmless English that opens a gate",
        "`python benchmarks/english.py`: shares of harmless texts that no gate learned from.",
    ),
    "real-gate": (
        "Gates on a real encoder, in real English",
        "`python benchmarks/real_gate.py --categories ud-violent i2p-illegal-activity`: gates fitted from a category "
        "file alone, on minilm's reading, and tried on all hand-labelled prompts and on 2000 harmless ones of a "
        "grammar. Shares of the category's prompts; of others, how many per thousand open it. An encoder that is no "
        "CLIP, labels of one hand, and no image.",
    ),
    "windows": (
        "How many words a gate reads alone",
        "`python benchmarks/windows.py`: a gate for weapons at each width; shares of captions, texts and prompts. "
        "Certified are unsafe captions that no words around them can close it for.",
    ),
    "words": ("Words that close a gate", "`python benchmarks/words.py`: three words of the vocabulary, put in front."),
    "real_size": (
        "At SD 1.5's real size, on the CPU",
        "`python benchmarks/real_size.py`, random weights.",
    ),
    "gpu": ("On a GPU", "`python benchmarks/gpu.py`, random weights of real size."),
}
ATTACKED = {  # matrices of attacks, by their name in figures.json
    "attacks": "`make attacks`, shipped weapons patches, gates on",
    "full": "`safepatch evaluate configs/matrices/full.yaml`, the shipped lora patches of five categories as one file, "
    "small budgets",
    "attacks-sd3": "`safepatch evaluate configs/matrices/attacks-sd3.yaml`, weapons patches of `tiny-sd3`, gates on",
}
COMPARED = {  # matrices of patches beside patches
    "compare": (
        "Objectives head to head",
        "`safepatch compare configs/compare/objectives.yaml`, weapons, patches without a gate but for one",
    ),
    "table-sd3": ("On a transformer", "`safepatch evaluate configs/matrices/sd3.yaml`, weapons and gore"),
    "transfer-objectives": (
        "Objectives on other checkpoints",
        "`safepatch evaluate configs/matrices/transfer-objectives.yaml`, the same patches",
    ),
    "transfer-sd3": (
        "On a transformer's sibling, and merged",
        "`safepatch evaluate configs/matrices/transfer-sd3.yaml`, weapons and gore",
    ),
    "streams": (
        "Where to put a transformer's lora patch",
        "`safepatch compare configs/compare/streams.yaml`, weapons, no gate, on `tiny-sd3`",
    ),
}
Patches = Mapping[str, Mapping[str, float]]  # patch -> category -> value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *rows))


# ---- RESULTS.md --------------------------------------------------------------------------------------------------


def results(figures: Mapping[str, Any]) -> str:
    """The page of a `figures.json`; what was not measured says so."""
    parts = [
        "# Results",
        "Written by `python patches/build.py results` from `patches/figures.json`. " + TOY,
        "Cells read base → patched where both were measured; columns are explained at the end.",
        *(part for kind in KINDS for part in _of_kind(figures, kind)),
        *_merging(figures),
        *_transfer(figures),
        *_costs(figures),
        *_objectives(figures),
        *_attacks(figures),
        *_compared(figures),
        *(part for name in BENCHMARKS if "objectives" not in name for part in _benchmark(figures, name)),
        *_others(figures),
        "## What is measured",
        "\n".join(f"* `{name}`: {metric.meaning}" for name, metric in METRICS.items()),
    ]
    under_one_head = [part for at, part in enumerate(parts) if not part.startswith("## ") or part not in parts[:at]]
    return "\n\n".join(under_one_head) + "\n"


def _of_kind(figures: Mapping[str, Any], kind: str) -> Iterator[str]:
    yield f"## {kind} patches"
    if not (found := measured(figures, kind)):
        yield f"Not measured yet: `make table KIND={kind}`, then `python patches/build.py figures results`."
        return
    measures, model = found["measures"], own_model(found)
    shown = {name: models[model] for name, models in measures.items() if model in models}
    yield f"`make table KIND={kind}` on `{model}`: {_protocol(found)}."
    categories = list(_patched(shown["unsafe_rate"]))
    columns = [[arrow(patches, name) for name in categories] + [arrow_of_means(patches)] for patches in shown.values()]
    heads = ["category", *(TITLES.get(name, name) for name in shown)]
    yield table(heads, list(zip([*categories, "mean"], *columns, strict=True)))
    others = {name: patches for name, patches in measures["unsafe_rate"].items() if name != model}
    if others:
        yield "Unsafe rates on checkpoints these patches have never seen:"
        yield table(
            ["checkpoint", *categories], [[f"`{m}`", *(arrow(p, c) for c in categories)] for m, p in others.items()]
        )


def _merging(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "## Merging"
    yield described("method", METHODS)
    yield "`bundle`, the default, keeps the parts apart; applied, what their gates let through is summed."
    for kind in KINDS:
        if not (found := measured(figures, f"merge-{kind}")):
            yield f"{kind}: not measured yet (`make merge-table KIND={kind}`)."
            continue
        measures, model = found["measures"], own_model(found)
        shown = {name: models[model] for name, models in measures.items() if model in models}
        unsafe, rest = shown["unsafe_rate"], {n: p for n, p in shown.items() if n != "unsafe_rate"}
        categories = list(unsafe[NONE])
        rows = [
            [
                "no patch" if name == NONE else name,
                *(value(values, c) for c in categories),
                *(mean(p.get(name)) for p in rest.values()),
            ]
            for name, values in unsafe.items()
        ]
        yield f"`make merge-table KIND={kind}`, {_protocol(found)}; unsafe rates by category, means of the rest:"
        yield table([f"{kind}", *categories, *(TITLES.get(name, name) for name in rest)], rows)


def _transfer(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "## On other checkpoints"
    yield table(("model", "what it is"), [(f"`{name}`", about) for name, about in MODELS.items()])
    for kind in KINDS:
        if not (found := measured(figures, f"transfer-{kind}")):
            yield f"{kind}: not measured yet (`make transfer-table KIND={kind}`)."
            continue
        models = found["measures"]["unsafe_rate"]
        names = list(dict.fromkeys(name for patches in models.values() for name in patches))
        rows = [[f"`{model}`", *(mean(patches.get(name)) for name in names)] for model, patches in models.items()]
        yield f"`make transfer-table KIND={kind}`, {_protocol(found)}; unsafe rates, means over categories:"
        yield table(["checkpoint", *("no patch" if name == NONE else name for name in names)], rows)


def _costs(figures: Mapping[str, Any]) -> Iterator[str]:
    if costs := figures.get("costs"):
        yield "## What a patch costs"
        yield (
            "`python benchmarks/kinds.py`: sizes as float16, FLOPs per step with every row corrected, random weights; "
            "behind a closed gate less than 0.01 %, fused nothing."
        )
        fields = {"mb_sd15": "MB, SD 1.5", "flops_sd15": "FLOPs, SD 1.5", "flops_sdxl": "FLOPs, SDXL"}
        yield table(["kind", *fields.values()], [[k, *(str(c.get(f, "")) for f in fields)] for k, c in costs.items()])


def _objectives(figures: Mapping[str, Any]) -> Iterator[str]:
    yield "## Objectives"
    yield described("objective", OBJECTIVES)
    yield from list(_benchmark(figures, "objectives"))[1:]
    yield from list(_benchmark(figures, "objectives, few steps"))[1:]
    yield from list(_benchmark(figures, "objectives, other categories"))[1:]


def _attacks(figures: Mapping[str, Any]) -> Iterator[str]:
    """What comes through, in all and unseen by any gate, of each attack and kind."""
    yield "## Attacks"
    if not any(measured(figures, name) for name in ATTACKED):
        yield "Not measured yet: `make attacks`, then `python patches/build.py figures results`."
        return
    yield (
        "Shares of prompts of which any image is unsafe, by each detector; in brackets, of the images that are unsafe "
        "without the patch, those that no gate opened for, if there are any. `any` is whoever tries all of them. "
        "What each does: `safepatch attack --list`."
    )
    for name, about in ATTACKED.items():
        if not (found := measured(figures, name)):
            continue
        model, measures = own_model(found), found["measures"]
        patches = list(measures["unsafe_rate"][model])
        yield f"{about}: {found['n']} prompts, {found['steps']} steps; {_judges(measures)}."
        rows = [["not attacked", *(judged(measures, "unsafe_rate", model, patch) for patch in patches)]]
        for attack in (*ATTACKS, ANY):
            shares = [judged(measures, f"asr, {attack}", model, patch) for patch in patches]
            silent = [judged(measures, f"silent_miss, {attack}", model, patch) for patch in patches]
            if any(shares):  # otherwise another matrix has it
                rows.append([f"`{attack}`", *(f"{a} ({b})" if b else a for a, b in zip(shares, silent, strict=True))])
        yield table(["attack", *("no patch" if name == NONE else name for name in patches)], rows)


def _compared(figures: Mapping[str, Any]) -> Iterator[str]:
    """Each matrix of patches beside patches: a line of each, means over categories."""
    for name, (title, about) in COMPARED.items():
        if not (found := measured(figures, name)):
            continue
        yield f"## {title}"
        measures, model = found["measures"], own_model(found)
        of_all = [each for each in measures if ", by " not in each and not each.startswith(("asr_new", "silent_miss"))]
        columns = [(each, model) for each in of_all if model in measures[each]]
        columns += [("unsafe_rate", other) for other in measures["unsafe_rate"] if other != model]
        patches = list(measures["unsafe_rate"][model])
        heads = [TITLES.get(e, e.replace("_", " ")) + (f", `{m}`" if m != model else "") for e, m in columns]
        rows = [
            ["no patch" if patch == NONE else patch, *(judged(measures, each, m, patch) for each, m in columns)]
            for patch in patches
        ]
        yield f"{about}: {_protocol(found)}; {_judges(measures)}."
        yield table(["", *heads], rows)


def _benchmark(figures: Mapping[str, Any], name: str) -> Iterator[str]:
    title, about = BENCHMARKS[name]
    yield f"## {title}"
    lines: dict[str, dict[str, Any]] = {}
    for line, found in figures.get(name, {}).items():
        if isinstance(found, Mapping):  # gpu.py has a line for each kind of a family
            parts = {f"{line}, {kind}": each for kind, each in found.get("kinds", {}).items()} or {line: found}
            lines |= {label: flat(each) for label, each in parts.items()}
    if not lines:
        yield "Not run: no GPU was at hand." if name == "gpu" else f"Not measured yet. {about}"
        return
    yield about
    columns = list(dict.fromkeys(column for found in lines.values() for column in found))
    yield table(["", *columns], [[line, *(plain(found.get(c, "")) for c in columns)] for line, found in lines.items()])


def _others(figures: Mapping[str, Any]) -> Iterator[str]:
    """Any other matrix that was kept, such as that of a category of one's own."""
    known = {*KINDS, *ATTACKED, *COMPARED, *(f"{run}-{kind}" for run in ("merge", "transfer") for kind in KINDS)}
    for name in figures:
        if name not in known and (found := measured(figures, name)):
            yield f"## {name}"
            yield f"{_protocol(found)[0].upper()}{_protocol(found)[1:]}."
            flat_rows = [
                [TITLES.get(measure, measure), f"`{model}`", patch, category, f"{number:.3f}"]
                for measure, models in found["measures"].items()
                for model, patches in models.items()
                for patch, values in patches.items()
                for category, number in values.items()
            ]
            yield table(["measure", "checkpoint", "patch", "category", "value"], flat_rows)


def measured(figures: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The figures of one matrix, as `build.py` keeps them; None if there are none."""
    found = figures.get(name)
    return found if isinstance(found, Mapping) and found.get("measures") else None


def own_model(found: Mapping[str, Any]) -> str:
    """The model that all is measured on: the first."""
    return next(iter(found["measures"]["unsafe_rate"]))


def arrow(patches: Patches, category: str) -> str:
    """`base → patched` of one category; where the base was not measured, one value."""
    before, after = patches.get(NONE, {}).get(category), _patched(patches).get(category)
    return " → ".join(f"{number:.3f}" for number in (before, after) if number is not None)


def arrow_of_means(patches: Patches) -> str:
    """The same of means over categories."""
    return " → ".join(filter(None, (mean(patches.get(NONE)), mean(_patched(patches)))))


def judged(measures: Mapping[str, Any], name: str, model: str, patch: str) -> str:
    """A figure by each detector that judged it, the first before the second; means over categories."""
    by = [each for each in measures if each == name or each.startswith(f"{name}, by ")]
    return " / ".join(filter(None, (mean(measures[each].get(model, {}).get(patch)) for each in by)))


def _judges(measures: Mapping[str, Any]) -> str:
    others = dict.fromkeys(name.rpartition(", by ")[2] for name in measures if ", by " in name)
    return f"by the embedded detector / {' / '.join(f'`{name}`' for name in others)}" if others else "by one detector"


def mean(values: Mapping[str, float] | None) -> str:
    """Over categories; empty where there are none."""
    return f"{fmean(values.values()):.3f}" if values else ""


def value(values: Mapping[str, float], name: str) -> str:
    """One figure; empty where there is none."""
    return f"{values[name]:.3f}" if name in values else ""


def plain(number: object) -> str:
    """A figure of any size, or a word."""
    if isinstance(number, float):
        return f"{number:.3f}" if abs(number) < 100 else f"{number:,.0f}"
    return f"{number:,}" if isinstance(number, int) else str(number)


def flat(found: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """Nested figures as columns: `unsafe_rate` of `hard` is `unsafe_rate hard`."""
    made: dict[str, Any] = {}
    for name, inner in found.items():
        made |= flat(inner, f"{of}{name} ") if isinstance(inner, Mapping) else {f"{of}{name}": inner}
    return made


def _patched(patches: Patches) -> Mapping[str, float]:
    """Of the patch, where a matrix has one beside the base."""
    return next((values for name, values in patches.items() if name != NONE), {})


def _protocol(found: Mapping[str, Any]) -> str:
    return f"{found['n']} images per rate, {found['steps']} steps, guidance {found['guidance_scale']:g}"


# ---- README ------------------------------------------------------------------------------------------------------


def blocks(figures: Mapping[str, Any]) -> dict[str, str]:
    """Every generated block of README, by its name."""
    return {
        "headline": headline(figures),
        "categories": "\n".join(_categories()),
        "kinds": described("kind", PATCH_KINDS),
        "objectives": ", ".join(f"`{name}`" for name in OBJECTIVES),
        "detectors": ", ".join(f"`{name}` ({entry.about})" for name, entry in DETECTORS.items()),
        "methods": ", ".join(f"`{name}`" for name in METHODS),
    }


def headline(figures: Mapping[str, Any]) -> str:
    """Figures of the shipped lora patches, in a sentence; RESULTS has the rest."""
    found = measured(figures, "lora")
    if not found:
        return "The shipped patches' figures stand in [patches/RESULTS.md](patches/RESULTS.md)."
    model, measures = own_model(found), found["measures"]
    unsafe, heldout, same = (
        measures.get(name, {}).get(model, {}) for name in ("unsafe_rate", "unsafe_rate, heldout", "benign_identical")
    )
    said = [
        f"unsafe images {arrow_of_means(unsafe)}",
        *([f"in held-out wording {arrow_of_means(heldout)}"] if heldout else []),
        *([f"benign images unchanged to the last bit {mean(_patched(same))}"] if same else []),
    ]
    return (
        f"On `{model}`, with the shipped lora patches (shares, means over {len(_patched(unsafe))} stand-in categories, "
        f"n = {found['n']}):\n{'; '.join(said)}. All tables: [patches/RESULTS.md](patches/RESULTS.md)."
    )


def _categories() -> Iterator[str]:
    names = list(shipped_categories())
    for prefix, title in GROUPS.items():
        others = [other for other in GROUPS if other and other != prefix]
        own = [n for n in names if n.startswith(prefix) and (prefix or not n.startswith(tuple(others)))]
        yield f"* {title}: {', '.join(f'`{name}`' for name in own)}"


def described(head: str, entries: Mapping[str, object]) -> str:
    """A table of things by name, with the first lines of their docstrings."""
    return table((head, "what it does"), [(f"`{name}`", first_line(entry)) for name, entry in entries.items()])


def first_line(thing: object) -> str:
    """Of its docstring."""
    return (thing.__doc__ or "").strip().splitlines()[0]


def filled(text: str, made: Mapping[str, str]) -> str:
    """`text` with what stands between the marks replaced."""

    def body(name: str) -> Callable[[re.Match], str]:
        return lambda found: found[1] + made[name] + found[2]

    for name in made:
        text = re.sub(rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", body(name), text, flags=re.DOTALL)
    return text


def write_pages() -> None:
    """Write RESULTS, and README's blocks."""
    figures = json.loads(FIGURES.read_text())
    RESULTS.write_text(results(figures))
    README.write_text(filled(README.read_text(), blocks(figures)))
