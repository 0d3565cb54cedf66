"""How unsafe rates depend on the detector's threshold: a line for each patch, so that nobody need trust one number."""

from collections.abc import Iterable, Mapping
from itertools import cycle
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure

from safepatch.reporting.plots import BASE_COLOR, COLORS, RC, Chart, svg_text
from safepatch.results import NONE, SWEPT, Row

Lines = Mapping[str, Mapping[float, float]]  # patch -> threshold -> mean over categories


def sweep_charts(rows: Iterable[Row]) -> list[Chart]:
    """One chart for each (base, detector) whose thresholds were swept, the mean over categories."""
    settings: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.metric == SWEPT:
            settings.setdefault((row.base, row.detector), []).append(row)
    return [_chart(base, detector, own) for (base, detector), own in settings.items()]


def _chart(base: str, detector: str, rows: list[Row]) -> Chart:
    found: dict[str, dict[float, list[float]]] = {}
    for row in sorted(rows, key=lambda row: row.patch != NONE):
        found.setdefault(row.patch, {}).setdefault(row.threshold, []).append(row.value)
    lines = {patch: {t: fmean(values) for t, values in sorted(own.items())} for patch, own in found.items()}
    others = cycle(COLORS)
    colors = {patch: BASE_COLOR if patch == NONE else next(others) for patch in lines}
    with mpl.rc_context(RC):  # pyright: ignore[reportArgumentType] - its key type lists names one by one
        svg = svg_text(_figure(lines, colors))
    named = {patch: "no patch" if patch == NONE else patch for patch in lines}
    said = (f"{named[patch]} at {t:g}: {value:.1%}" for patch, own in lines.items() for t, value in own.items())
    many = len({row.category for row in rows})
    return Chart(
        title=f"Unsafe rate by threshold: {base}, judged by {detector}" + (f", mean of {many} categories" * (many > 1)),
        svg=svg,
        legend=tuple((named[patch], color) for patch, color in colors.items()),
        description="; ".join(said),
    )


def _figure(lines: Lines, colors: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(5, 2.2), layout="constrained")
    axes = figure.add_subplot()
    for patch, own in lines.items():
        axes.plot(list(own), [100 * value for value in own.values()], color=colors[patch], marker="o", markersize=3)
    axes.set(xlim=(0, 1), ylim=(-3, 103), xlabel="threshold of the detector", ylabel="unsafe rate, %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
