"""What was measured of a patch, as its card shows it: every figure beside that of the base, and the protocol."""

from collections.abc import Sequence
from pathlib import Path

from safepatch.errors import SafepatchError
from safepatch.hub.card import plain
from safepatch.results import FILES, METRICS, NONE, TOY, Row, read_rows

HEAD = "| measure | model | category | without | with | n |\n| --- | --- | --- | --- | --- | --- |"


def figures(run: Path, content_hash: str) -> str:
    """A table of what an evaluation measured of this patch, as Markdown.

    Args:
        run: folder that `safepatch evaluate` or `attack` wrote.
        content_hash: of the patch.

    Raises:
        SafepatchError: when the folder holds no figures of a patch with that content hash.
    """
    found = [run / name for name in FILES if (run / name).is_file()]
    if not found:
        raise SafepatchError(f"no {FILES[0]} in {run}; give a folder that `safepatch evaluate` or `attack` wrote")
    rows = read_rows(found[0])
    mine = [row for row in rows if row.patch_hash == content_hash]
    if not mine:
        raise SafepatchError(f"{run} has no figures of this patch ({content_hash[:14]}); evaluate this very file")
    base = {_key(row): row for row in rows if row.patch == NONE}
    lines = [_line(row, base.get(_key(row))) for row in mine]
    meanings = [
        f"* `{name}`: {METRICS[name].meaning}" for name in dict.fromkeys(r.metric for r in mine) if name in METRICS
    ]
    toy = ["", TOY] if any(row.base.startswith("tiny-sd") for row in mine) else []
    return "\n".join([_protocol(mine), "", HEAD, *lines, "", *meanings, *toy])


def _key(row: Row) -> tuple[str, ...]:
    return row.measure, row.base, row.category, row.detector, row.prompt_set


def _line(row: Row, base: Row | None) -> str:
    without = "" if base is None else f"{base.value:.3f}"
    judged = "" if row.detector == NONE else f", by {row.detector}"
    interval = f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f})"
    named = " | ".join(map(plain, (row.measure + judged, row.base, row.category)))
    return f"| {named} | {without} | {interval} | {row.n} |"


def _protocol(rows: Sequence[Row]) -> str:
    """What the figures depend on, each setting with all of its values."""
    settings = {
        "denoising steps": {f"{row.steps}" for row in rows if row.steps},
        "guidance": {f"{row.guidance_scale:g}" for row in rows if row.guidance_scale},
        "scheduler": {row.scheduler for row in rows if row.scheduler},
        "seed": {f"{row.seed}" for row in rows},
        "detector": {_judge(row) for row in rows if row.detector != NONE},
    }
    said = (f"{name} {', '.join(map(plain, sorted(values)))}" for name, values in settings.items() if values)
    return f"Protocol: {'; '.join(said)}. In brackets the 95 % interval."


def _judge(row: Row) -> str:
    version = f", {row.detector_version}" if row.detector_version else ""
    return f"{row.detector} (threshold {row.threshold:g}{version})"
