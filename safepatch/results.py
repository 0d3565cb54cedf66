"""One measurement is one `Row`; a run is a `rows.jsonl` of them: all that evaluation and reporting share."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from safepatch.errors import SafepatchError, nearest
from safepatch.files import unwritable, write_text

NONE = "none"  # `patch` of the untouched base, `attack` where there is none, `detector` where none was asked
FILES = ("rows.jsonl", "results.jsonl")  # what a run's folder holds its rows in; the second is older
TOY = "Figures on the embedded emoji model show that the mechanism works; they are not results on photographs."
SWEPT = "unsafe_at"  # metric of a sweep over thresholds: charts show it, tables leave it out
PLAIN = ("", "plain")  # `prompt_set` of prompts as training knows them


@dataclass(frozen=True)
class Metric:
    """How a metric reads in tables: what it says, and whether it is a share to be shown in percent."""

    meaning: str
    percent: bool


METRICS: dict[str, Metric] = {
    "unsafe_rate": Metric("share of images the detector finds unsafe; lower is safer", percent=True),
    "unsafe_at": Metric("the same at the threshold that is named beside it", percent=True),
    "extra_flops": Metric("operations of a denoising step that the patch adds while it acts, as a share", percent=True),
    "train_minutes": Metric("how long the patch took to train, there and then", percent=False),
    "megabytes": Metric("the patch's tensors, in 10^6 bytes", percent=False),
    "asr": Metric("share of attacked prompts that end in an unsafe image; lower is safer", percent=True),
    "asr_new": Metric(
        "the same of those prompts only whose image is safe before the attack; lower is safer", percent=True
    ),
    "silent_miss": Metric(
        "share of the images, unsafe without the patch, that it leaves as they were, bit for bit; lower is safer",
        percent=True,
    ),
    "other_unsafe_rate": Metric(
        "share of images for other categories' prompts that still show them; a patch does its own job only",
        percent=True,
    ),
    "prompt_accuracy": Metric(
        "share of images that show everything the prompt asks for; higher is better", percent=True
    ),
    "safe_recognisable_rate": Metric(
        "share of images for unsafe prompts that show nothing unsafe and something benign; higher is better",
        percent=True,
    ),
    "companion_kept": Metric(
        "share of two-object unsafe prompts whose harmless object is in the image; higher is better", percent=True
    ),
    "benign_drift": Metric(
        "mean absolute pixel change of benign images, pixels in [0, 1]; lower is better", percent=False
    ),
    "benign_identical": Metric("share of benign images that the patch leaves as they were, bit for bit", percent=True),
    "lookalike_drift": Metric(
        "mean absolute pixel change of images of harmless things that resemble the category; lower is better",
        percent=False,
    ),
    "lookalike_identical": Metric(
        "share of images of harmless things that resemble the category left as they were, bit for bit", percent=True
    ),
    "unsafe_change": Metric(
        "by how much the patch changes the share of unsafe images, over pairs of equal prompt and seed; lower is safer",
        percent=True,
    ),
    "clip_score": Metric("mean cosine of benign prompts and their images, by CLIP; higher is better", percent=False),
    "perceptual_drift": Metric(
        "mean distance, 1 - cosine, of what a detector sees in benign images, patched and not; lower is better",
        percent=False,
    ),
    "lookalike_perceptual_drift": Metric(
        "the same of images of harmless things that resemble the category; lower is better", percent=False
    ),
    "kid": Metric(
        "distance of benign images from the base's own of other prompts, by the detector's features; nearer the base's "
        "own figure is better",
        percent=False,
    ),
    "fid": Metric("the same by FID, which is larger for fewer images; lower is better", percent=False),
    "retention": Metric(
        "share of a single patch's corrections that a merged patch keeps; higher is better", percent=True
    ),
    "recall": Metric("share of the true cases that are found; higher is better", percent=True),
    "precision": Metric("share of the findings that are true; higher is better", percent=True),
}


@dataclass(frozen=True)
class Row:
    """One measured number with its interval, and all that is needed to tell what was measured.

    Attributes:
        patch: name of the patch, `none` for the untouched base.
        base: name of the text-to-image model.
        attack: name of the attack, `none` for plain prompts.
        category: harm category or prompt set, e.g. `weapons` or `benign`.
        metric: usually a key of `METRICS`.
        value: the measured number, finite.
        low: lower end of its 95 % interval, at most `value`.
        high: upper end of its 95 % interval, at least `value`.
        n: how many images or prompts were measured, at least 1.
        seed: seed of the run.
        detector: the detector that judged the images, as it was named; `none` where no detector was asked.
        prompt_set: which of the category's prompts: plain, heldout, companion, lookalike, benign, other.
        kind: of the patch.
        patch_hash: its content hash.
        steps: denoising steps, 0 where they are not recorded.
        guidance_scale: of classifier-free guidance, 0 where it is not recorded, or differs from prompt to prompt.
        scheduler: class of the model's.
        threshold: of the detector, 0 where it is not recorded.
        detector_version: which weights it has, for people.
        detector_sha256: of those weights.
        budget: images per prompt that an attack asked for, 0 where there is none or it is not recorded.
        prompts_sha256: of the prompt set's texts and seeds, before any attack changed them; empty where not recorded.
        size: height and width of the images in pixels, 0 where it is not recorded.
    """

    patch: str
    base: str
    attack: str
    category: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    seed: int
    detector: str
    prompt_set: str = ""
    kind: str = ""
    patch_hash: str = ""
    steps: int = 0
    guidance_scale: float = 0.0
    scheduler: str = ""
    threshold: float = 0.0
    detector_version: str = ""
    detector_sha256: str = ""
    budget: int = 0
    prompts_sha256: str = ""
    size: int = 0

    def __post_init__(self) -> None:
        """Nonsense cannot be constructed: every error names the field that is wrong."""
        for name, kind in FIELDS.items():
            _check_kind(name, kind, getattr(self, name))
        if not self.low <= self.value <= self.high:
            raise SafepatchError(f"row needs low <= value <= high, got {self.low}, {self.value}, {self.high}")
        if self.n < 1:
            raise SafepatchError(f"row needs n >= 1, got {self.n}; leave out what was not measured")

    @property
    def measure(self) -> str:
        """The metric, with its threshold, prompt set and attack where they are not the usual ones."""
        name = f"{self.metric} {self.threshold:g}" if self.metric == SWEPT else self.metric
        heldout = [] if self.metric != "unsafe_rate" or self.prompt_set in PLAIN else [self.prompt_set]
        return ", ".join([name, *heldout, *([] if self.attack == NONE else [self.attack])])


FIELDS: dict[str, type] = {field.name: field.type for field in fields(Row)}  # pyright: ignore[reportAssignmentType]
NEEDED = [field.name for field in fields(Row) if field.default is MISSING]  # older files lack the others


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Adds `rows` to the end of `path`, one JSON object per line; on return they are on the disk."""
    append_lines(path, [asdict(row) for row in rows])


def append_lines(path: Path, records: Iterable[object]) -> None:
    """Adds one JSON line per record to the end of `path`; on return they are on the disk."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write((_line_end(path) + _lines(records)).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Puts `rows` into `path` in place of what is there, all or nothing."""
    write_text(path, _lines(asdict(row) for row in rows))


def read_rows(path: Path) -> list[Row]:
    """All rows of `path` in file order; raises `SafepatchError` that names the line at fault."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise SafepatchError(
            f"cannot read {path} ({error.strerror}); run an evaluation that writes it first"
        ) from error
    except UnicodeDecodeError as error:
        raise SafepatchError(f"{path} is not UTF-8 text; give the results.jsonl of an evaluation") from error
    return [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _lines(records: Iterable[object]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _parse(line: str, where: str) -> Row:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise SafepatchError(f"{where} is not JSON; delete that line or run the evaluation again") from error
    if not isinstance(record, dict):
        raise SafepatchError(f"{where} is not a JSON object; delete that line or run the evaluation again")
    return _row(record, where)


def _row(record: dict[str, object], where: str) -> Row:
    for name in record:
        if name not in FIELDS:
            raise SafepatchError(f"{where} has an unknown field '{name}'{nearest(name, FIELDS)}")
    missing = [name for name in NEEDED if name not in record]
    if missing:
        raise SafepatchError(f"{where} lacks {', '.join(missing)}; delete that line or run the evaluation again")
    try:
        return Row(**record)  # type: ignore[arg-type]
    except SafepatchError as error:
        raise SafepatchError(f"{where}: {error}") from error


def _check_kind(name: str, kind: type, value: object) -> None:
    accepted = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise SafepatchError(f"row field '{name}' must be {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):  # type: ignore[arg-type]
        raise SafepatchError(f"row field '{name}' must be finite, got {value}; leave out what was not measured")


def _line_end(path: Path) -> str:
    """A line break when a crash left the last line unfinished, so that only that line is lost."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return "" if file.read() in (b"", b"\n") else "\n"
