"""An audit of a prompt file as a folder: a CSV that grows as it goes and goes on after a kill, and a page about it."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.readers import Line
from safepatch.data.stream import stream_prompts
from safepatch.diffusion import Components
from safepatch.errors import SafepatchError
from safepatch.files import claimed, write_text
from safepatch.guard.file import Guard
from safepatch.guard.score import PASS, UNREAD
from safepatch.hosting.audit import ACTED, VERDICTS, Auditor
from safepatch.hosting.audit_csv import AuditLog
from safepatch.hosting.audit_guard import CLAIMED, COLUMN, GuardColumns, kind_of
from safepatch.hosting.hashes import file_hash, reading_hashes
from safepatch.progress import bar
from safepatch.reporting.audited import AuditPage, CategoryAudit, Phrase, write_audit

LOG, PAGE, SETTINGS = "audit.csv", "audit.html", "settings.json"
CHUNK = 512  # prompts after which what was found is on the disk
PHRASES, EXAMPLES = 25, 20  # of each category on the page
_OTHER = {"prompts": "the prompts of another file", "model": "another model's text encoder"}


@dataclass(frozen=True)
class Summary:
    """What an audit found.

    Attributes:
        log, page: its files.
        prompts: how many, of which `earlier` had been audited before.
        earlier: by a run that was cut off.
        seconds: that this run took for the others.
        counts: prompts by verdict, of the whole patch.
        by_category: the same of each category.
        guarded: by verdict, prompts by what the guard says of them; empty without one.
    """

    log: Path
    page: Path
    prompts: int
    earlier: int
    seconds: float
    counts: Mapping[str, int]
    by_category: Mapping[str, Mapping[str, int]]
    guarded: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people."""
        new = self.prompts - self.earlier
        speed = f", {new / self.seconds:,.0f} a second" if new and self.seconds else ""
        gone = f" ({self.earlier:,} by an earlier run)" if self.earlier else ""
        told = [f"{self.prompts:,} prompts{gone}{speed}: {_told(self.counts)}"]
        told += [f"  {name}: {_told(counts)}" for name, counts in self.by_category.items()]
        told += [f"  guard, of those {verdict}: {_told(counts)}" for verdict, counts in self.guarded.items()]
        return [*told, f"audit: {self.page} and {self.log}"]


def audit(
    prompts: str | Path,
    pipe: Any,
    patch: str | Path,
    out: str | Path = "audit",
    column: str | None = None,
    gate_threshold: float | None = None,
    reads: str = "windows",
    guard: str | Path | None = None,
) -> Summary:
    """Say for every prompt of a file what `patch` would do to it, before anything is drawn; see `Auditor`.

    Of the file a few rows are held, however long it is.

    Args:
        prompts: a file that `stream_prompts` reads.
        pipe: the pipeline.
        patch: path of the patch.
        out: folder for `audit.csv`, which is appended to where an earlier run was cut off, and `audit.html`.
        column: that holds the prompts, where it is not found by its name.
        gate_threshold, reads: as in `Auditor`.
        guard: path of a guard, whose verdicts stand beside the patch's.

    Raises:
        PromptError: for a prompt file that cannot be used.
        SafepatchError: when `out` holds another audit, is in use, or cannot be written.
    """
    artifact, folder = PatchArtifact.open(patch), Path(out)
    judge = None if guard is None else Guard.open(guard).bind(pipe)
    columns = None if judge is None else GuardColumns(judge)
    file, auditor = stream_prompts(prompts, column), Auditor(pipe, artifact, gate_threshold, reads)
    settings = {
        "prompts": file_hash(file.path),
        "patch": artifact.content_hash,
        "model": reading_hashes(Components.of(pipe)),
        "column": file.took["prompt"],
        "gate_threshold": gate_threshold,
        "reads": reads,
        "guard": None if judge is None else judge.content_hash,
    }
    with claimed(folder):
        _require_same(folder, settings)
        log = AuditLog(folder / LOG, auditor.categories, columns.header if columns else ())
        earlier, started = log.resume(), time.monotonic()
        _append(log, auditor, columns, islice(file, earlier, None), file.count - earlier)
        seconds = time.monotonic() - started
        about = {"prompts": file.described(), "patch": f"{Path(patch).name}, {artifact.info.title}"}
        about |= {"hash of the patch": artifact.content_hash, "a gate reads": reads}
        about |= {"hash of the guard": judge.content_hash} if judge else {}
        return _reported(log, about, earlier, seconds)


def _append(log: AuditLog, auditor: Auditor, guard: GuardColumns | None, lines: Iterator[Line], total: int) -> None:
    with bar(total=total, desc="auditing", unit="prompt", leave=False) as progress:
        while some := list(islice(lines, CHUNK)):
            texts = [_readable(line.text) for line in some]
            log.append(some, auditor(texts), guard(texts) if guard else None)
            progress.update(len(some))


def _readable(text: str) -> str:
    """Halves of a character, which JSON can hold and no tokenizer reads, are question marks."""
    return text.encode(errors="replace").decode()


def _require_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise unless the folder is empty of audits, or holds this one."""
    path = folder / SETTINGS
    if not path.exists():
        if (folder / LOG).exists():
            raise SafepatchError(f"{folder / LOG} is there without its {SETTINGS}; choose another -o")
        write_text(path, json.dumps(settings, indent=1))
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name, value in settings.items() if kept.get(name) != value]
    except (OSError, ValueError, AttributeError):
        raise SafepatchError(f"{path} cannot be read; choose another -o") from None
    if different:
        what = _OTHER.get(different[0], f"another {different[0]}")
        raise SafepatchError(f"{folder} holds an audit of {what}; choose another -o, or delete that folder")


def _reported(log: AuditLog, about: Mapping[str, str], earlier: int, seconds: float) -> Summary:
    """The page, and the summary, of what stands in the log."""
    counts, by_category = Counter[str](), {name: Counter[str]() for name in log.categories}
    opened, thresholds = {name: Counter[str]() for name in log.categories}, dict.fromkeys(log.categories, "")
    met = Counter[tuple[str, str]]()  # the patch's verdict, and the guard's
    for row in log.rows():
        counts[row["verdict"]] += 1
        met[row["verdict"], kind_of(row.get(COLUMN, ""))] += 1
        for name in log.categories:
            by_category[name][row[name]] += 1
            thresholds[name] = row[f"{name} threshold"] or thresholds[name]
            if row[name] == ACTED:
                opened[name][row[f"{name} words"]] += 1
    most = {name: dict(opened[name].most_common(PHRASES)) for name in log.categories}
    words = _examples(log, most)
    categories = []
    for name, found in most.items():
        phrases = [Phrase(each, n, words[name, each]) for each, n in found.items()]
        others = len(opened[name]) - len(found)
        categories.append(CategoryAudit(name, _ordered(by_category[name]), thresholds[name], phrases, others))
    said = (PASS, CLAIMED, UNREAD)
    guarded = {verdict: {each: met[verdict, each] for each in said} for verdict in VERDICTS}
    page = AuditPage(
        about, counts.total(), _ordered(counts), VERDICTS, categories, guarded if COLUMN in log.header else {}
    )
    write_audit(log.path.parent / PAGE, page)
    told = {each.name: each.counts for each in categories}
    return Summary(log.path, log.path.parent / PAGE, page.prompts, earlier, seconds, page.counts, told, page.guarded)


Examples = dict[tuple[str, str], list[tuple[str, float]]]  # by category and words


def _examples(log: AuditLog, wanted: Mapping[str, Mapping[str, int]]) -> Examples:
    """The first prompts of each category that some words opened, each with what its gate says."""
    found: Examples = {(name, words): [] for name, phrases in wanted.items() for words in phrases}
    for row in log.rows() if found else ():
        for name in wanted:
            examples = found.get((name, row[f"{name} words"])) if row[name] == ACTED else None
            if examples is not None and len(examples) < EXAMPLES:
                examples.append((row["prompt"], float(row[f"{name} probability"])))
    return found


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    return {verdict: counts.get(verdict, 0) for verdict in VERDICTS}


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {verdict}" for verdict, count in counts.items())
