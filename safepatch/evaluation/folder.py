"""What a run's folder holds for whoever reports it: rows, how they were measured, notices, pictures and times."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safepatch.evaluation import gallery
from safepatch.evaluation.cells import Cell, Finished
from safepatch.evaluation.plan import Plan
from safepatch.files import write_text
from safepatch.results import NONE, Row, write_rows


def write_results(plan: Plan, cells: Mapping[Cell, Finished], only_more: bool = False) -> None:
    """Write rows, protocol, notices and pictures; of equal cells, equal bytes. Beside them, how long it took.

    Args:
        plan: what was to be measured.
        cells: what was.
        only_more: leave the results that are there, perhaps an earlier run's, where they have more rows.
    """
    out, finished = Path(plan.matrix.out), list(cells.values())
    rows = [row for each in finished for row in each.rows]
    path = out / "rows.jsonl"
    if only_more and has_more(path, rows):
        return
    gallery.write_gallery(out, dict(plan.corpora), [picture for each in finished for picture in each.pictures])
    records = {
        "notices": {"notices": plan.matrix.notices()},
        "protocol": protocol_of(plan, rows),
        "timings": [{**asdict(cell), **took} for cell, each in cells.items() if (took := each.took)],
    }
    for name, record in records.items():
        write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_rows(path, rows)


def has_more(path: Path, rows: Sequence[Row]) -> bool:
    """Whether a file, perhaps an earlier run's, holds more rows than these."""
    return path.is_file() and path.read_bytes().count(b"\n") > len(rows)


def protocol_of(plan: Plan, rows: Sequence[Row]) -> dict[str, str]:
    """How it was measured, as texts for people."""
    patches = dict.fromkeys(f"{row.patch}: {row.kind}, {row.patch_hash}" for row in rows if row.patch != NONE)
    protocol = plan.matrix.protocol
    own = "each prompt's own" if protocol.guidance_scale is None else "0"
    guidance = dict.fromkeys(f"{row.guidance_scale:g}" if row.guidance_scale else own for row in rows)
    judges = [
        f"{spec}: threshold {each.threshold:g}, {each.version or 'no version'}, sha256 {each.sha256 or 'none'}"
        for spec, each in plan.detectors.items()
    ]
    return {
        "models": ", ".join(plan.matrix.every_model),
        "patches": "; ".join(patches) or ", ".join(subject.name for subject in plan.subjects),
        "categories": ", ".join(plan.corpora),
        "detectors": "; ".join(judges) or NONE,
        "images per rate": str(protocol.n),
        "denoising steps": str(protocol.steps),
        "guidance scale": ", ".join(guidance) or str(protocol.guidance_scale or "what is usual for the model"),
        "scheduler": ", ".join(dict.fromkeys(row.scheduler for row in rows)) or "the model's",
        "seed": str(protocol.seed),
        "device and dtype": f"{plan.matrix.device}, {plan.matrix.dtype or 'float32'}",
    }
