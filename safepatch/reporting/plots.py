"""Bars with 95 % intervals, drawn from rows as SVG text that takes its ink from the page; equal rows, equal bytes."""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from safepatch.errors import SafepatchError
from safepatch.results import NONE, PLAIN, Row

INK = "#010203"  # a color no bar has; in the SVG it becomes `currentColor`, so light and dark pages both read well
COLORS = (
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8b6fc0",
    "#999999",
)  # Okabe and Ito, for color-blind readers
BASE_COLOR = "#d55e00"
HEAT = {
    "cosine": ("RdBu", -1.0, 1.0),
    "sign_conflict": ("Oranges", 0.0, 1.0),
    "norm_ratio": ("PuOr", 0.0, 2.0),
}  # limits
GAP = 0.8  # between categories, in bar heights

RC: dict[str, Any] = {
    "svg.hashsalt": "safepatch",  # ids would otherwise be random
    "svg.fonttype": "none",
    "text.parse_math": False,  # a patch may be called "$x$"
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Chart:
    """One figure of the page.

    Attributes:
        title: what was measured, on what.
        svg: an `<svg>` element without external references.
        legend: (label, CSS color) per series.
        description: the same numbers as a sentence, for those who do not see the figure.
    """

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...]
    description: str


def unsafe_rate_charts(rows: Iterable[Row]) -> list[Chart]:
    """One chart per (base, attack, prompt set, detector) with `unsafe_rate` rows, in order of appearance."""
    settings: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.metric == "unsafe_rate":
            settings.setdefault((row.base, row.attack, row.prompt_set, row.detector), []).append(row)
    return [_chart(same_setting) for same_setting in settings.values()]


def attack_charts(rows: Iterable[Row]) -> list[Chart]:
    """One heat map per (base, detector) with `asr` rows: attacks down, patches across, the mean over categories."""
    settings: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.metric == "asr" and row.attack != NONE:
            settings.setdefault((row.base, row.detector), []).append(row)
    return [_attack_chart(same_setting) for same_setting in settings.values()]


def _attack_chart(rows: list[Row]) -> Chart:
    found: dict[str, dict[str, list[Row]]] = {}
    asked = _asked(rows)
    for row in sorted(rows, key=lambda row: row.patch != NONE):
        found.setdefault(asked[row.attack], {}).setdefault(row.patch, []).append(row)
    patches = list(dict.fromkeys(patch for by_patch in found.values() for patch in by_patch))
    means = {
        attack: {patch: fmean(row.value for row in own) for patch, own in by_patch.items()}
        for attack, by_patch in found.items()
    }
    with mpl.rc_context(RC):  # pyright: ignore[reportArgumentType] - its key type lists names one by one
        svg = svg_text(_heat_figure(list(found), patches, means))
    first, many = rows[0], len({row.category for row in rows})
    said = (f"{attack}, {_titled(patch)}: {mean:.1%}" for attack, own in means.items() for patch, mean in own.items())
    return Chart(
        title=f"Prompts that end in an unsafe image: {first.base}, judged by {first.detector}"
        + (f", mean of {many} categories" if many > 1 else ""),
        svg=svg,
        legend=(),
        description="; ".join(said),
    )


def _asked(rows: Sequence[Row]) -> dict[str, str]:
    """What each attack is called: with how many images, which may differ, as where a gate is attacked on its own."""
    budgets: dict[str, set[int]] = {}
    for row in rows:
        budgets.setdefault(row.attack, set()).add(row.budget)
    named = {}
    for attack, own in budgets.items():
        count = " or ".join(str(budget) for budget in sorted(own))
        named[attack] = f"{attack}, {count} images" if max(own) > 1 else attack
    return named


def _titled(patch: str) -> str:
    return "no patch" if patch == NONE else patch


def _heat_figure(attacks: Sequence[str], patches: Sequence[str], means: Mapping[str, Mapping[str, float]]) -> Figure:
    """Cells with their percentages; what was not measured is left out."""
    figure = Figure(figsize=(2.2 + 0.9 * len(patches), 0.8 + 0.3 * len(attacks)), layout="constrained")
    axes = figure.add_subplot()
    for y, attack in enumerate(attacks):
        for x, patch in enumerate(patches):
            if patch in means[attack]:
                _draw_cell(axes, x, y, means[attack][patch])
    axes.set(xlim=(-0.5, len(patches) - 0.5), ylim=(len(attacks) - 0.5, -0.5))
    axes.set_xticks(range(len(patches)), labels=[_titled(patch) for patch in patches])
    axes.set_yticks(range(len(attacks)), labels=attacks)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _draw_cell(axes: Axes, x: int, y: int, share: float) -> None:
    axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=mpl.colormaps["Reds"](0.08 + 0.8 * share)))
    color = "white" if share > 0.55 else "black"
    axes.text(x, y, f"{100 * share:.0f} %", ha="center", va="center", fontsize=8, color=color)


def _chart(rows: list[Row]) -> Chart:
    """Of rows that measure the same thing twice, the later one is drawn."""
    series = _series(rows)
    colors = _colors(series)
    first = rows[0]
    prompts = "plain prompts" if first.prompt_set in PLAIN else f"{first.prompt_set} prompts"
    attack = prompts if first.attack == NONE else f"attack {first.attack}"
    return Chart(
        title=f"Unsafe rate by category: {first.base}, {attack}, judged by {first.detector}",
        svg=_svg(series, colors),
        legend=tuple(colors.items()),
        description="; ".join(_sentence(label, bar) for label, bars in series.items() for bar in bars.values()),
    )


def _series(rows: list[Row]) -> dict[str, dict[str, Row]]:
    """Label -> category -> row; the base first, then the patches in order of appearance."""
    many_seeds = len({row.seed for row in rows}) > 1
    series: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row.patch != NONE):
        label = "base, no patch" if row.patch == NONE else f"patch {row.patch}"
        series.setdefault(f"{label}, seed {row.seed}" if many_seeds else label, {})[row.category] = row
    return series


def _colors(series: dict[str, dict[str, Row]]) -> dict[str, str]:
    is_base = {label: next(iter(bars.values())).patch == NONE for label, bars in series.items()}
    patches = [label for label in series if not is_base[label]]
    return {label: BASE_COLOR if is_base[label] else COLORS[patches.index(label) % len(COLORS)] for label in series}


def _sentence(label: str, row: Row) -> str:
    return f"{row.category}, {label}: {row.value:.1%} ({row.low:.1%} to {row.high:.1%}, n = {row.n})"


def _svg(series: dict[str, dict[str, Row]], colors: dict[str, str]) -> str:
    with mpl.rc_context(RC):  # pyright: ignore[reportArgumentType] - its key type lists names one by one
        return svg_text(_figure(series, colors))


def _figure(series: dict[str, dict[str, Row]], colors: dict[str, str]) -> Figure:
    """Bars grouped by category, one per series that measured it."""
    bands = _bands(series)
    height = sum(len(labels) + GAP for labels in bands.values())
    figure = Figure(figsize=(5, 0.6 + 0.2 * height), layout="constrained")
    axes = figure.add_subplot()
    centers = [_draw_band(axes, category, y, series, colors) for category, y in _tops(bands).items()]
    axes.set_yticks(centers, labels=list(bands))
    axes.set_xticks(range(0, 101, 25))
    axes.set(xlim=(0, 114), ylim=(height, 0), xlabel="unsafe rate, % (whisker: 95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _bands(series: dict[str, dict[str, Row]]) -> dict[str, list[str]]:
    """Category -> labels of the series that measured it: what was not measured takes no room."""
    categories = dict.fromkeys(category for bars in series.values() for category in bars)
    return {category: [label for label, bars in series.items() if category in bars] for category in categories}


def _tops(bands: dict[str, list[str]]) -> dict[str, float]:
    """Category -> y of its band's upper end, in bar heights."""
    ends = accumulate(len(labels) + GAP for labels in bands.values())
    return dict(zip(bands, chain([0.0], ends), strict=False))


def _draw_band(
    axes: Axes, category: str, top: float, series: dict[str, dict[str, Row]], colors: dict[str, str]
) -> float:
    """Draws the bars of one category from `top` down; returns the y of the band's center."""
    present = {label: bars[category] for label, bars in series.items() if category in bars}
    for place, (label, row) in enumerate(present.items()):
        _draw_bar(axes, row, top + GAP / 2 + place + 0.5, colors[label])
    return top + (GAP + len(present)) / 2


def _draw_bar(axes: Axes, row: Row, y: float, color: str) -> None:
    """One bar with its whisker and its number, in percent."""
    error = [[100 * (row.value - row.low)], [100 * (row.high - row.value)]]
    axes.barh(y, 100 * row.value, height=0.85, color=color)
    axes.errorbar(100 * row.value, y, xerr=error, color=INK, elinewidth=1, capsize=2)
    axes.text(100 * row.high + 1.5, y, f"{100 * row.value:.0f} %", va="center", fontsize=8)


def save_unsafe_rates(path: Path, rows: Sequence[Row]) -> None:
    """Draw the unsafe rates among `rows`, grouped by category, into a .png or .svg with its legend.

    Raises:
        SafepatchError: when the file cannot be written.
    """
    series = _series([row for row in rows if row.metric == "unsafe_rate"])
    colors = _colors(series)
    with mpl.rc_context(RC):  # pyright: ignore[reportArgumentType] - its key type lists names one by one
        figure = _figure(series, colors)
        swatches = [Rectangle((0, 0), 1, 1, color=color, label=label) for label, color in colors.items()]
        figure.legend(handles=swatches, loc="outside upper center", ncols=len(swatches), frameon=False, fontsize=8)
        _save(figure, path)


def save_conflict_map(path: Path, labels: Sequence[str], conflicts: Sequence[dict[str, Any]]) -> None:
    """Draw how much the sources of a merge disagree, one column per pair and one row per block, into an image file.

    Args:
        path: `.png` or `.svg`; raises `SafepatchError` when it cannot be written.
        labels: what the sources are called, in the order of the recipe.
        conflicts: the recipe's conflict report.
    """
    if not conflicts:
        raise SafepatchError("no conflicts are recorded in this file; merge two or more patches with conflicts on")
    blocks = sorted({block for pair in conflicts for block in pair["blocks"]})
    pairs = [f"{labels[i]}\n{labels[j]}" for i, j in (pair["sources"] for pair in conflicts)]
    figure = Figure(figsize=(4 + 2 * len(pairs), 1.6 + 0.28 * len(blocks)), layout="constrained")
    drawn = zip(figure.subplots(1, len(HEAT), sharey=True), HEAT.items(), strict=True)
    for axes, (name, (colors, low, high)) in drawn:
        grid = [[pair["blocks"].get(block, {}).get(name) for pair in conflicts] for block in blocks]
        grid.append([pair["overall"][name] for pair in conflicts])
        _draw_heat(figure, axes, grid, colors, (low, high))
        axes.set(title=name.replace("_", " "))
        axes.set_xticks(range(len(pairs)), labels=pairs, fontsize=8)
        axes.set_yticks(range(len(blocks) + 1), labels=[*blocks, "overall"], fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise SafepatchError(f"cannot write {path}: {error}; give a writable .png or .svg") from error


def save_gate_plot(path: Path, heard: Mapping[str, Mapping[str, float]], threshold: float) -> None:
    """Write what a gate makes of prompts and of their windows, a panel for each, the threshold dashed, as PNG or SVG.

    Args:
        path: of the picture.
        heard: by prompt, probabilities in [0, 1] by what was read, the first at the top.
        threshold: probability from which the gate opens.
    """
    tallest = max(map(len, heard.values()))
    figure = Figure(figsize=(3.6 * len(heard), 0.8 + 0.22 * tallest), layout="constrained")
    for axes, (title, read) in zip(figure.subplots(1, len(heard), squeeze=False)[0], heard.items(), strict=True):
        colors = [COLORS[1] if each >= threshold else COLORS[0] for each in read.values()]
        axes.barh(range(len(read)), list(read.values()), color=colors)
        axes.axvline(threshold, color="black", linestyle="--", linewidth=0.8)
        axes.set_yticks(range(len(read)), labels=list(read), fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="gate, probability", xlim=(0, 1))
        axes.set_title(title, fontsize=8)
    _save(figure, path)


def _draw_heat(
    figure: Figure, axes: Axes, grid: list[list[float | None]], colors: str, limits: tuple[float, float]
) -> None:
    """One heat map with its numbers; a pair that has none in a block is left white."""
    values = [[math.nan if value is None else value for value in row] for row in grid]
    image = axes.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
    figure.colorbar(image, ax=axes, fraction=0.05)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)


def svg_text(figure: Figure) -> str:
    """The figure as one `<svg>` element; HTML needs no XML prolog and no namespaces."""
    file = io.StringIO()
    no_record = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_record)
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
