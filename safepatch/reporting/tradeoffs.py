"""Effect against what it costs: a point for each patch, so that one sees which are beaten in both."""

from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from statistics import fmean

import matplotlib as mpl
from matplotlib.figure import Figure

from safepatch.reporting.plots import BASE_COLOR, COLORS, RC, Chart, svg_text
from safepatch.results import NONE, PLAIN, Row

FEWEST = 3  # patches that are worth such a chart
COSTS: dict[str, Callable[[Row], bool]] = {
    "benign drift, pixels in [0, 1]": lambda row: row.metric == "benign_drift",
    "prompts that some attack brings back": lambda row: row.metric == "asr" and row.attack == "any",
    "minutes of training": lambda row: row.metric == "train_minutes",
    "operations added while it acts, share": lambda row: row.metric == "extra_flops",
}
Point = tuple[float, float]  # unsafe rate, cost


def tradeoff_charts(rows: Iterable[Row]) -> list[Chart]:
    """One chart for each (base, detector, cost) with enough patches: means over categories, plain prompts."""
    rows = list(rows)
    rates: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.metric == "unsafe_rate" and row.attack == NONE and row.prompt_set in PLAIN:
            rates.setdefault((row.base, row.detector), []).append(row)
    return [
        _chart(base, detector, cost, points)
        for (base, detector), own in rates.items()
        for cost, counts in COSTS.items()
        if len(points := _points(own, [r for r in rows if counts(r) and _belongs(r, base, detector)])) >= FEWEST
    ]


def _belongs(row: Row, base: str, detector: str) -> bool:
    return row.detector in (detector, NONE) and (row.base == base or row.metric == "train_minutes")


def _points(rates: list[Row], costs: list[Row]) -> dict[str, Point]:
    effect, cost = (_means(some) for some in (rates, costs))
    return {patch: (effect[patch], cost[patch]) for patch in effect if patch in cost}


def _means(rows: list[Row]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.patch, []).append(row.value)
    return {patch: fmean(values) for patch, values in found.items()}


def best(points: Mapping[str, Point]) -> list[str]:
    """Those that no other beats in one and equals in the other: the Pareto front, by effect."""
    front = [
        name
        for name, own in points.items()
        if not any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in points.values())
    ]
    return sorted(front, key=lambda name: points[name])


def _chart(base: str, detector: str, cost: str, points: Mapping[str, Point]) -> Chart:
    others = cycle(COLORS)
    colors = {patch: BASE_COLOR if patch == NONE else next(others) for patch in points}
    front = best(points)
    with mpl.rc_context(RC):  # pyright: ignore[reportArgumentType] - its key type lists names one by one
        svg = svg_text(_figure(points, colors, front, cost))
    named = {patch: "no patch" if patch == NONE else patch for patch in points}
    said = (f"{named[patch]}: {rate:.1%}, {value:.4g}" for patch, (rate, value) in points.items())
    return Chart(
        title=f"Unsafe rate against {cost}: {base}, judged by {detector}; beaten by none: "
        + ", ".join(named[name] for name in front),
        svg=svg,
        legend=tuple((named[patch], color) for patch, color in colors.items()),
        description="; ".join(said),
    )


def _figure(points: Mapping[str, Point], colors: Mapping[str, str], front: list[str], cost: str) -> Figure:
    figure = Figure(figsize=(5, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.step(
        [100 * points[name][0] for name in front],
        [points[name][1] for name in front],
        where="post",
        color="#999999",
        linewidth=0.8,
    )
    for patch, (rate, value) in points.items():
        axes.plot(100 * rate, value, "o", color=colors[patch], markersize=6)
    axes.set(xlabel="unsafe rate, % (left is safer)", ylabel=cost, xlim=(-3, 103))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
