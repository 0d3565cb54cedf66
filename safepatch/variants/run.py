"""Draw and judge variants of subjects on a matrix's models, without a patch and with each of its patches."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from safepatch.attacks import Round
from safepatch.data.corpus import Corpus
from safepatch.detectors.base import Detector, shows_any
from safepatch.diffusion import save_image
from safepatch.errors import ConfigError
from safepatch.evaluation.bench import Bench
from safepatch.evaluation.folder import has_more, protocol_of
from safepatch.evaluation.gallery import flags, slug
from safepatch.evaluation.kept import digest, pixels
from safepatch.evaluation.matrix import Matrix
from safepatch.evaluation.metrics import rate
from safepatch.evaluation.plan import Plan
from safepatch.evaluation.scoring import pictures
from safepatch.evaluation.suite import Measure, row
from safepatch.files import claimed, write_text
from safepatch.results import NONE, Row, write_rows
from safepatch.variants.found import Found, Place, Turn
from safepatch.variants.prompts import require_harmless, starts, usual_subjects, variants
from safepatch.variants.ways import WAYS, Learning, Variant

SET = "companion"  # `prompt_set` of the rows: what is asked for stands beside something harmless
Tell = Callable[[str], object]


def run_variants(matrix: Matrix, learning: Learning, tell: Tell = print) -> list[Row]:
    """Edit each subject on each model in each way, beside the concepts of each category.

    What is drawn and what is learned is kept, so a killed run goes on; rows are written after each way, results of an
    earlier run staying until there are as many new ones.

    Returns:
        Rows whose `attack` is the way, or `none` for the subject by its name: the share of unsafe images, and that of
        images that show the subject.

    Raises:
        ConfigError: for a model without a judge, a subject of the category itself, and fewer images than subjects.
        SafepatchError: as `Plan.of`, `WAYS`, and when another process has the folder.
    """
    if unjudged := [model for model in matrix.models if not matrix.detectors_on(model)]:
        raise ConfigError(f"variants by {unjudged[0]} need a judge; name one: --detector safety-checker, or clip")
    plan, out, found, rows = Plan.of(matrix), Path(matrix.out), Found(), list[Row]()
    corpora, n = list(plan.corpora.values()), matrix.protocol.n
    subjects = learning.subjects or usual_subjects(corpora, learning.count, matrix.protocol.seed)
    require_harmless(subjects, corpora)
    if not 0 < len(subjects) <= n:
        raise ConfigError(f"{n} images per rate for {len(subjects)} subjects; give as many at least: --n, --subject")
    files = pictures(learning.folder) if learning.folder else []
    with claimed(out):
        for model in matrix.models:
            for number, subject in enumerate(subjects):
                for way in (NONE, *learning.ways):
                    turn = Turn(model, subject, way, range(number, n, len(subjects)))
                    tell(f"{model}, {subject}, {turn.title}")
                    others = [row for row in rows if row.base != model]
                    rows = [*others, *_edited(plan, turn, learning, files, found)]
                    if not has_more(out / "rows.jsonl", rows):
                        _write(plan, rows, found, subjects, learning)
        _write(plan, rows, found, subjects, learning)
    return rows


def _edited(plan: Plan, turn: Turn, learning: Learning, files: list[Path], found: Found) -> list[Row]:
    """Edit in one turn; the model's rows so far. The model is let go of before it is opened again."""
    variant = WAYS[turn.way].make(plan.bench(turn.model), turn.subject, learning, files)
    for corpus in plan.corpora.values():
        _judge(plan, variant, corpus, turn, found)
    return list(_rows(plan, turn.model, variant.bench, found))


def _judge(plan: Plan, variant: Variant, corpus: Corpus, turn: Turn, found: Found) -> None:
    """The images of one turn and category: draw, count, and keep some for the report."""
    bench, seed = variant.bench, plan.matrix.protocol.seed
    prompts = variants(corpus, turn.subject, variant.phrase, turn.numbers, seed)
    begun = starts(corpus, turn.subject, turn.numbers, seed) if variant.how.strength is not None else ()
    drawn: dict[str, Tensor] = {}
    for each in plan.subjects:
        label = f"{corpus.name}, {turn.title}, {each.name}"
        images = pixels(bench.batches(Round(prompts, variant.how, begun), found.patch(each.files[corpus.name]), label))
        drawn["base" if each.name == NONE else each.name] = images
        for spec in plan.matrix.detectors_on(bench.name):
            place, judge = Place(bench.name, turn.way, corpus.name, each.name, spec), plan.detectors[spec]
            seen = judge.find(images)
            found.unsafe.setdefault(place, []).append(shows_any(seen, judge.labels_of(corpus.category)))
            if prompts[0].asks[-1] in judge.labels:
                found.kept.setdefault(place, []).append(shows_any(seen, prompts[0].asks[-1:]))
    count = min(len(prompts), -(-plan.matrix.pictures * len(prompts) // plan.matrix.protocol.n))
    first = bench.images(begun)[:count] if begun else variant.shown
    shown = {} if first is None else {"the picture edited" if begun else "the subject": first}
    beside = {name: images.expand(count, -1, -1, -1) for name, images in shown.items()}
    _show(plan, bench, corpus, turn, [prompt.text for prompt in prompts[:count]], {**beside, **drawn}, found)


def _rows(plan: Plan, model: str, bench: Bench, found: Found) -> Iterator[Row]:
    for metric, flagged in (("unsafe_rate", found.unsafe), ("companion_kept", found.kept)):
        for place in sorted(flagged, key=lambda place: ([NONE, *WAYS].index(place.way), place.patch != NONE)):
            if place.model != model:
                continue
            judged = replace(bench, detector=plan.detectors[place.detector])
            patch = next(found.patch(s.files[place.category]) for s in plan.subjects if s.name == place.patch)
            measure, estimate = Measure(lambda *_: None, metric, SET), rate(torch.cat(flagged[place]))
            made = row(judged, plan.corpora[place.category], patch, place.patch, measure, estimate)
            yield replace(made, attack=place.way, detector=place.detector)


def _show(
    plan: Plan, bench: Bench, corpus: Corpus, turn: Turn, texts: Sequence[str], columns: dict[str, Tensor], found: Found
) -> None:
    """Keep pictures of some prompts, a row each, a column for each of `columns`."""
    judges, out = plan.judges(bench.name), Path(plan.matrix.out) / "images"
    title = ", ".join([corpus.name, turn.title, *([bench.name] if len(plan.matrix.models) > 1 else [])])
    meaning = WAYS[turn.way].meaning
    note = f"{meaning[0].upper()}{meaning[1:]}, beside {corpus.category.definition.rstrip('.')}."
    section = found.sections.setdefault(
        title,
        {"title": title, "note": note, "unsafe": True, "category": corpus.name, "columns": list(columns), "rows": []},
    )
    for i, text in enumerate(texts):
        names, unsafe = [], []
        for column, images in columns.items():
            name = digest(bench.name, bench.about, corpus.name, turn.way, text, column)
            names.append(f"{slug(bench.name)}-{slug(corpus.name)}-{turn.way}-{name}-{i}.png")
            save_image(images[i], out / names[-1])
            harmless = column not in ("base", *(each.name for each in plan.subjects))
            unsafe.append(not harmless and (_flag(images[i : i + 1], corpus, judges) if judges else True))
        section["rows"].append({"prompt": text, "images": names, "unsafe": unsafe})


def _flag(image: Tensor, corpus: Corpus, judges: Sequence[Detector]) -> bool:
    return flags(image, corpus, judges)[0]


def _write(plan: Plan, rows: Sequence[Row], found: Found, subjects: Sequence[str], learning: Learning) -> None:
    out, whose = Path(plan.matrix.out), f"pictures in {learning.folder}" if learning.folder else "drawn by the model"
    about = {
        "subjects": ", ".join(subjects),
        "learned of": f"{learning.pictures} pictures each, {whose}",
        "learning": f"{learning.steps} steps; LoRA of rank {learning.rank} at a rate of {learning.learning_rate:g}",
        "strength of sdedit": f"{learning.strength:g}",
    }
    records = {
        "notices": {"notices": plan.matrix.notices()},
        "protocol": {**protocol_of(plan, rows), **about},
        "images": list(found.sections.values()),
    }
    for name, record in records.items():
        write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_rows(out / "rows.jsonl", rows)
