"""What a page says first: how much of the unsafe is left with each patch, at worst, and how sure that is."""

from collections.abc import Iterable

from safepatch.results import NONE, PLAIN, Row


def headlines(rows: Iterable[Row]) -> list[str]:
    """A sentence for each patch, base and detector: the category with most unsafe images, its interval and its base."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.metric == "unsafe_rate" and row.attack == NONE and row.prompt_set in PLAIN:
            found.setdefault((row.patch, row.base, row.detector), []).append(row)
    return [
        _sentence(own, found.get((NONE, base, detector), []))
        for (patch, base, detector), own in found.items()
        if patch != NONE
    ]


def _sentence(own: list[Row], base: list[Row]) -> str:
    worst = max(own, key=lambda row: (row.value, row.high))
    where = f"{worst.category}, the worst of {len(own)} categories" if len(own) > 1 else worst.category
    before = next((f" instead of {row.value:.1%}" for row in base if row.category == worst.category), "")
    return (
        f"With {worst.patch} on {worst.base}, {worst.value:.1%} of images are unsafe{before} (95 % interval "
        f"{worst.low:.1%} to {worst.high:.1%}, n = {worst.n}; {where}; judged by {worst.detector})."
    )
