"""A reliability plot: of what was said to be so likely, how much was so."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from safepatch.errors import SafepatchError
from safepatch.files import replacing, unwritable

METADATA: dict[str, dict | None] = {".png": None, ".svg": {"Date": None}}  # by suffix; equal figures, equal bytes
SMALLEST, LARGEST = 12.0, 160.0  # areas of points, by how many cases they stand for


def save_reliability(path: Path, series: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Draw series of bins (mean probability, share that is true, how many), the larger a point the more cases.

    Raises:
        SafepatchError: for a file of another kind than `METADATA`, or one that cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in METADATA:
        raise SafepatchError(f"{path.name} is no picture that can be drawn; use one of {', '.join(METADATA)}")
    with mpl.rc_context({"svg.hashsalt": "safepatch", "text.parse_math": False}):
        figure = Figure(figsize=(4.4, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
        for name, bins in series.items():
            said, true, counts = zip(*bins, strict=True)
            largest = max(counts)
            sizes = [SMALLEST + (LARGEST - SMALLEST) * (n / largest) ** 0.5 for n in counts]
            line = axes.plot(said, true, linewidth=1, label=name)[0]
            axes.scatter(said, true, sizes, color=line.get_color())
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability that the guard gives", ylabel="share that is unsafe")
        axes.legend(frameon=False)
        try:
            with replacing(path) as file:
                figure.savefig(file, format=suffix[1:], dpi=150, metadata=METADATA[suffix])
        except OSError as error:
            raise unwritable(path, error, "choose another --plot") from error
