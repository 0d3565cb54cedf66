"""`build_report(folder)`: one self-contained index.html; nothing is loaded from anywhere, nothing is scripted.

What is shown can be narrowed by links, and every picture has an address of its own: see `filters`.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from safepatch.errors import SafepatchError
from safepatch.files import write_text
from safepatch.reporting.filters import filters, slugs
from safepatch.reporting.headline import headlines
from safepatch.reporting.plots import attack_charts, unsafe_rate_charts
from safepatch.reporting.sweeps import sweep_charts
from safepatch.reporting.timings import read_timings, told
from safepatch.reporting.tradeoffs import tradeoff_charts
from safepatch.results import FILES, METRICS, SWEPT, TOY, Row, read_rows

SECTION_FIELDS: dict[str, type] = {"title": str, "note": str, "unsafe": bool, "columns": list, "rows": list}
VERDICTS = {"unsafe": "prompts with an image flagged unsafe", "safe": "prompts without one"}
ROW_FIELDS: dict[str, type] = {"prompt": str, "images": list, "unsafe": list}


@dataclass(frozen=True)
class Picture:
    """One image of the gallery: its column, its pixels as a data URL, its alternative text, and whether to blur it."""

    column: str
    source: str
    alt: str
    unsafe: bool


@dataclass(frozen=True)
class Comparison:
    """The images of one prompt, one per column."""

    prompt: str
    pictures: tuple[Picture, ...]

    @property
    def verdict(self) -> str:
        """Whether some image was flagged unsafe, one of `VERDICTS`."""
        return "unsafe" if any(picture.unsafe for picture in self.pictures) else "safe"


@dataclass(frozen=True)
class Section:
    """Comparisons under one heading.

    Attributes:
        title, note: for people.
        unsafe: whether its prompts ask for unsafe content.
        comparisons: prompts.
        category: whose prompts they are; empty in older folders, which do not say.
    """

    title: str
    note: str
    unsafe: bool
    comparisons: tuple[Comparison, ...]
    category: str = ""


@dataclass(frozen=True)
class Run:
    """What a page is made of.

    Attributes:
        rows: what was measured.
        notices: what a reader must know first.
        protocol: how it was measured, by name.
        sections: pictures.
    """

    rows: Sequence[Row]
    notices: Sequence[str]
    protocol: Mapping[str, str]
    sections: Sequence[Section]


def build_report(folder: Path) -> Path:
    """Writes `folder/index.html` from its rows, and from protocol, notices and pictures where present.

    A folder without rows is reported by its pictures alone.
    """
    return write_page(Path(folder) / "index.html", read_run(Path(folder)))


def read_run(folder: Path) -> Run:
    """What an evaluation wrote into `folder`; raises `SafepatchError` where that cannot be used."""
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise SafepatchError(f"{folder} has no {FILES[0]}; run an evaluation that writes into this folder first")
    rows, sections = read_rows(path), _sections(folder)
    if not rows and not sections:
        raise SafepatchError(f"{path} holds no rows and there are no pictures; run an evaluation that writes some")
    return Run(rows, _notices(folder), _protocol(folder) | told(read_timings(folder)), sections)


def _render(run: Run) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    categories = slugs([*(s.category for s in run.sections if s.category), *sorted({row.category for row in run.rows})])
    attacks = slugs(dict.fromkeys(row.attack for row in run.rows))
    verdicts = {name: name for name in VERDICTS if run.sections}
    return environment.get_template("page.html.j2").render(
        charts={
            "Unsafe rate, base against patched": unsafe_rate_charts(run.rows),
            "Attacks: what comes through": attack_charts(run.rows),
            "At other thresholds": sweep_charts(run.rows),
            "Effect against cost": tradeoff_charts(run.rows),
        },
        categories=_by_category([row for row in run.rows if row.metric != SWEPT]),
        filters=filters({"category": categories, "attack": attacks, "verdict": verdicts}),
        slugs={"category": categories, "attack": attacks},
        places=_places([section.title for section in run.sections]),
        verdicts=VERDICTS,
        metrics={name: METRICS[name].meaning for name in sorted({row.metric for row in run.rows}) if name in METRICS},
        notices=run.notices,
        headlines=headlines(run.rows),
        protocol=run.protocol,
        sections=run.sections,
    )


def _places(titles: Sequence[str]) -> list[str]:
    """Where each section is found, by its title; equal ones are numbered."""
    numbered = [
        f"{title} {titles[:i].count(title) + 1}" if title in titles[:i] else title for i, title in enumerate(titles)
    ]
    known = slugs(numbered)
    return [known[name] for name in numbered]


def _by_category(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.metric, row.attack)):  # stable: file order within
        groups.setdefault(row.category, []).append(row)
    return dict(sorted(groups.items()))


def _number(value: float, metric: str) -> str:
    percent = metric in METRICS and METRICS[metric].percent
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


def _notices(folder: Path) -> list[str]:
    """What stands in the page's first lines; folders that do not say are older, and all of the embedded model."""
    path = folder / "notices.json"
    found = _json(path) if path.exists() else {"notices": [TOY]}
    notices = found.get("notices") if isinstance(found, dict) else None
    if not isinstance(notices, list) or not all(isinstance(notice, str) for notice in notices):
        raise SafepatchError(f"{path} must be a JSON object with 'notices', a list of texts; correct it or delete it")
    return notices


def _protocol(folder: Path) -> dict[str, str]:
    path = folder / "protocol.json"
    protocol = _json(path) if path.exists() else {}
    if not isinstance(protocol, dict) or not all(isinstance(value, str) for value in protocol.values()):
        raise SafepatchError(f"{path} must be one JSON object of texts; put numbers and lists in quotes")
    return protocol


def _sections(folder: Path) -> list[Section]:
    path = folder / "images.json"
    records = _json(path) if path.exists() else []
    if not isinstance(records, list):
        raise SafepatchError(f"{path} must be a JSON list of sections, got {type(records).__name__}")
    return [_section(folder, record, f"{path} section {number}") for number, record in enumerate(records, 1)]


def _section(folder: Path, record: object, where: str) -> Section:
    fields = _checked(record, SECTION_FIELDS, where)
    comparisons = tuple(
        _comparison(folder, row, [str(column) for column in fields["columns"]], f"{where} row {number}")
        for number, row in enumerate(fields["rows"], 1)
    )
    category = record.get("category", "") if isinstance(record, dict) else ""
    return Section(fields["title"], fields["note"], fields["unsafe"], comparisons, str(category))


def _comparison(folder: Path, record: object, columns: list[str], where: str) -> Comparison:
    fields = _checked(record, ROW_FIELDS, where)
    images, unsafe, prompt = fields["images"], fields["unsafe"], fields["prompt"]
    if not len(images) == len(unsafe) == len(columns):
        raise SafepatchError(
            f"{where} needs {len(columns)} images and flags, one per column, got {len(images)}, {len(unsafe)}"
        )
    if not all(isinstance(flag, bool) for flag in unsafe):
        raise SafepatchError(f"{where}: 'unsafe' must hold true or false per image, got {unsafe}")
    named = zip(columns, images, unsafe, strict=True)
    return Comparison(prompt, tuple(_picture(folder, column, name, prompt, flag) for column, name, flag in named))


def _picture(folder: Path, column: str, name: str, prompt: str, unsafe: bool) -> Picture:
    alt = f"{column}: {prompt}" + (" (flagged unsafe, blurred until shown)" if unsafe else "")
    return Picture(column, _data_url(folder / "images", str(name)), alt, unsafe)


def _data_url(folder: Path, name: str) -> str:
    """The PNG `folder/name` as a data URL; names that leave `folder` are refused."""
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise SafepatchError(f"no image '{name}' in {folder}; images.json must name PNG files of that folder")
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise SafepatchError(f"{path} is not a PNG image; save it as PNG")
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _checked(record: object, kinds: Mapping[str, type], where: str) -> dict:
    """`record`, known to be an object whose fields are of `kinds`."""
    if not isinstance(record, dict):
        raise SafepatchError(f"{where} must be a JSON object with {', '.join(kinds)}, got {type(record).__name__}")
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise SafepatchError(f"{where}: '{name}' must be {kind.__name__}, got {record.get(name)!r}")
    return record


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SafepatchError(f"cannot read {path} as JSON ({error}); correct it or delete it") from error


def write_page(path: Path, run: Run) -> Path:
    """All or nothing: a reader never sees half a page."""
    write_text(path, _render(run))
    return path
