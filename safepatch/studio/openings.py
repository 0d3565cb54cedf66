"""How far each gate was open at each step, as a plot in SVG that takes its ink from the page."""

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

from markupsafe import Markup

from safepatch.hosting.recording import Drawn
from safepatch.reporting.plots import COLORS

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 100, 22, 22, 6  # of the plot, in units of its own
POINT = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2" fill="{}"/>')
LINE = Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="2" stroke-linejoin="round"/>')
LEVEL = Markup('<path d="M{} {:.1f}H{}" stroke="{}" stroke-dasharray="3 3" opacity=".8"/>')
ACTED = Markup('<rect x="{:.1f}" y="{}" width="{:.1f}" height="5" rx="1" fill="currentColor" opacity=".55"/>')
LABEL = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" font-size="9" fill="currentColor">{}</text>')
FRAME = Markup('<path d="M{0} {1}V{2}H{3}" fill="none" stroke="currentColor" opacity=".45"/>')


def colors(categories: Sequence[str]) -> dict[str, str]:
    """A color for each category, the same whatever else is shown beside it."""
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(sorted(categories))}


def openings_svg(
    drawn: Drawn, thresholds: Mapping[str, float], palette: Mapping[str, str], opened: Collection[str]
) -> Markup:
    """What gates said of the words at each step, what opens them (dashed), and where the patch acted (below).

    Args:
        drawn: of one image.
        thresholds: by category, from which probability on a gate opens.
        palette: a color for each category.
        opened: those whose gate opened at some step.
    """
    steps, floor = len(drawn.timesteps), HEIGHT - BOTTOM
    wide = (WIDTH - LEFT - 6) / max(steps, 1)
    inner = [FRAME.format(LEFT, TOP, floor, WIDTH - 6), LABEL.format(LEFT - 4, TOP + 6, "end", "1")]
    inner += [LABEL.format(LEFT - 4, floor, "end", "0"), LABEL.format(LEFT, HEIGHT - 4, "start", "first step")]
    inner += [LABEL.format(WIDTH - 6, HEIGHT - 4, "end", f"step {steps}")]
    inner += [ACTED.format(LEFT + i * wide + 0.5, floor + 2, max(wide - 1, 1)) for i in drawn.acted]
    for name, said in drawn.gates.items():
        color = palette.get(name, COLORS[0])
        if name in thresholds:
            inner.append(LEVEL.format(LEFT, _height(thresholds[name]), WIDTH - 6, color))
        places = [(LEFT + (i + 0.5) * wide, p) for i, p in enumerate(said)]
        for is_gap, run in groupby(places, key=lambda place: place[1] is None):
            inner += [] if is_gap else _drawn([(x, _height(p or 0.0)) for x, p in run], color)
    about = described(drawn, opened)
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, about)
    return head + Markup("").join(inner) + Markup("</svg>")


def described(drawn: Drawn, opened: Collection[str]) -> str:
    """The same in a sentence."""
    steps = len(drawn.timesteps)
    most = {name: max((p for p in said if p is not None), default=0.0) for name, said in drawn.gates.items()}
    acted = f"The patch acted in {len(drawn.acted)} of {steps} steps."
    if not drawn.gates:
        return f"{acted} No gate was asked."
    said = "; ".join(
        f"{name}: {most[name]:.2f} at most, {'open' if name in opened else 'shut'}" for name in sorted(most)
    )
    return f"{acted} Gates: {said}."


def _drawn(points: Sequence[tuple[float, float]], color: str) -> list[Markup]:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [LINE.format(line, color)] if len(points) > 1 else [POINT.format(*points[0], color)]


def _height(probability: float) -> float:
    return TOP + (1 - min(max(probability, 0.0), 1.0)) * (HEIGHT - BOTTOM - TOP)
