"""How often do models draw unsafe pictures? Shares per model, prompt set and category, of prompts from anywhere.

As Unsafe Diffusion (Qu et al., CCS 2023, arXiv 2305.13873, section 5) asked of four models and four prompt sets: each
prompt of a set is drawn once and every picture is judged for every category; a picture is unsafe when it shows any.
Patches may be studied in the same way, with the same prompts and seeds.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks import Round
from safepatch.data.corpus import image_seed
from safepatch.data.prompts import Prompt
from safepatch.data.readers import read_prompts
from safepatch.detectors.base import shows_any
from safepatch.errors import ConfigError
from safepatch.evaluation.asked import hash_of, labels_of
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.folder import has_more, protocol_of
from safepatch.evaluation.kept import pixels
from safepatch.evaluation.matrix import Matrix
from safepatch.evaluation.metrics import rate
from safepatch.evaluation.plan import Plan
from safepatch.evaluation.run import Tell
from safepatch.evaluation.subjects import Subject
from safepatch.evaluation.suite import Measure, row
from safepatch.files import claimed, write_text
from safepatch.results import Row, write_rows

ANY = "any"  # category of the row that says whether a picture shows any of them


class PromptSet(NamedTuple):
    """Prompts of one file.

    Attributes:
        name: in rows: the file's, without its ending.
        prompts: each with a seed.
        about: for people: how many, which columns, the file's hash.
    """

    name: str
    prompts: tuple[Prompt, ...]
    about: str


def open_sets(files: Sequence[Path], protocol: Protocol) -> list[PromptSet]:
    """Up to `protocol.n` prompts of each file, drawn without regard to their order, in the file's order.

    Raises:
        ConfigError: for no file, and two of one name.
        PromptError: for a file that cannot be read.
    """
    if not files:
        raise ConfigError("a study needs prompts; name files of them: --prompts sets/*.csv")
    names = [Path(file).stem for file in files]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two prompt files are called '{twice}'; rename one: rows are told apart by these names")
    return [_opened(Path(file), protocol) for file in files]


def run_study(matrix: Matrix, files: Sequence[Path], tell: Tell = print) -> list[Row]:
    """Draw and judge the prompts of `files` on the matrix's models, without a patch and with each of its patches.

    Pictures are kept batch by batch, so a kill loses one; rows are written after each model and set, results of an
    earlier run staying until there are as many new ones.

    Args:
        matrix: models, patches, categories, detectors, protocol and the folder.
        files: of prompts.
        tell: where progress goes.

    Raises:
        ConfigError: for a model that no detector judges, and as `open_sets`.
        SafepatchError: as `Plan.of`, and when another process has the folder.
    """
    sets, plan, out = open_sets(files, matrix.protocol), Plan.of(matrix), Path(matrix.out)
    if unjudged := [model for model in matrix.models if not matrix.detectors_on(model)]:
        raise ConfigError(f"a study of {unjudged[0]} needs a judge; name one: --detector safety-checker, or clip")
    rows: list[Row] = []
    with claimed(out):
        for model in matrix.models:
            for found in _studied(plan, model, sets, tell):
                rows += found
                if not has_more(out / "rows.jsonl", rows):
                    _write(plan, sets, rows)
        _write(plan, sets, rows)
    return rows


def _studied(plan: Plan, model: str, sets: Sequence[PromptSet], tell: Tell) -> Iterator[list[Row]]:
    """The rows of each set on one model, which is let go of before the next one is opened."""
    bench = plan.bench(model)
    for each in sets:
        tell(f"{model}, {each.name}: {len(each.prompts)} prompts")
        yield [row for subject in plan.subjects for row in _measured(plan, bench, subject, each)]


def _measured(plan: Plan, bench: Bench, subject: Subject, prompts: PromptSet) -> Iterator[Row]:
    """A row for each detector and category, and one for all categories together where there are several."""
    patch = _patch(subject)
    batches = bench.batches(Round(prompts.prompts), patch, f"{prompts.name}, {subject.name}")
    scale = bench.guidance_of(prompts.prompts, patch)
    for spec in plan.matrix.detectors_on(bench.name):
        judged = replace(bench, detector=plan.detectors[spec])
        found = [shown for batch in batches for shown in plan.detectors[spec].find(pixels([batch]))]
        flags = {name: shows_any(found, labels_of(judged, corpus)) for name, corpus in plan.corpora.items()}
        if len(flags) > 1:
            flags[ANY] = torch.stack(list(flags.values())).any(0)
        for category, shown in flags.items():
            corpus = plan.corpora.get(category) or next(iter(plan.corpora.values()))
            measure = Measure(lambda *_: None, "unsafe_rate", prompts.name)
            made = row(judged, corpus, patch, subject.name, measure, rate(shown))
            about = {"guidance_scale": scale, "prompts_sha256": hash_of(prompts.prompts)}
            yield replace(made, category=category, detector=spec, **about)


def _patch(subject: Subject) -> PatchArtifact | None:
    """The file of a patch that is the same for every category, as patches of a study are."""
    files = {path for path in subject.files.values() if path}
    if len(files) > 1:
        raise ConfigError(
            f"patch '{subject.name}' is another file for each category; a study needs one file: merge them"
        )
    return PatchArtifact.open(files.pop()) if files else None


def _write(plan: Plan, sets: Sequence[PromptSet], rows: Sequence[Row]) -> None:
    out = Path(plan.matrix.out)
    protocol = {**protocol_of(plan, rows), "prompt sets": "; ".join(each.about for each in sets)}
    records: Mapping[str, object] = {"notices": {"notices": plan.matrix.notices()}, "protocol": protocol}
    for name, record in records.items():
        write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_rows(out / "rows.jsonl", rows)


def _opened(file: Path, protocol: Protocol) -> PromptSet:
    read = read_prompts(file)
    known = [line.prompt for line in read.lines]
    rng = Random(f"study {file.stem} {protocol.seed}")
    picked = sorted(rng.sample(range(len(known)), min(protocol.n, len(known))))
    prompts = [
        known[i] if known[i].seed is not None else replace(known[i], seed=image_seed(protocol.seed, i)) for i in picked
    ]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return PromptSet(file.stem, tuple(prompts), f"{read.described()}; {len(prompts)} drawn; sha256 {digest}")
