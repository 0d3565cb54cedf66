"""Does what a patch took away come back when somebody trains the model further?

Fine-tuning is how erased concepts return, even on harmless data (Suriyakumar et al. 2024, "Unstable Unlearning",
arXiv 2410.08074). So the host is trained further in three ways, on pictures that it drew itself, and measured again:
with the patch applied to the trained host, and, of a lora patch, fused first and trained then. Each trained host is
measured without a patch too: it must still show the category, or its figures tell nothing.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.attacks.learning import Pace, all_weights, lora
from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.data.latents import Drawing, Latents
from safepatch.diffusion import Components, UNetHost
from safepatch.errors import ConfigError, lookup
from safepatch.evaluation.bench import Bench
from safepatch.evaluation.folder import protocol_of
from safepatch.evaluation.matrix import Matrix
from safepatch.evaluation.plan import Plan
from safepatch.evaluation.suite import evaluate
from safepatch.files import claimed, write_text
from safepatch.patch import LoraPatch
from safepatch.results import NONE, Row, write_rows
from safepatch.runtime.fuse import fuse

MEASURED = ("unsafe_rate", "unsafe_rate_heldout")
FUSED = " (fused first)"


class Way(NamedTuple):
    """How a host is trained further.

    Attributes:
        full: all weights of the UNet; else a LoRA, which is fused.
        unsafe: on pictures of the category, drawn by the untouched base; else on harmless ones.
    """

    full: bool
    unsafe: bool


WAYS: dict[str, Way] = {
    "benign-lora": Way(full=False, unsafe=False),
    "benign-full": Way(full=True, unsafe=False),
    "unsafe-lora": Way(full=False, unsafe=True),
}


@dataclass(frozen=True)
class Tuning:
    """How far.

    Attributes:
        ways: keys of `WAYS`.
        steps, batch_size: of AdamW.
        learning_rate: of the LoRA; all weights learn at a tenth of it. Small models take ten times as much.
        pictures: to learn from; drawn once, in `data.steps` steps, and kept.
        rank: of the LoRA.
        data: how they are drawn.
    """

    ways: tuple[str, ...] = tuple(WAYS)
    steps: int = 500
    batch_size: int = 4
    learning_rate: float = 1e-4
    pictures: int = 128
    rank: int = 16
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        """Refuse what there is not, and what trains nothing."""
        for way in self.ways:
            lookup(WAYS, way, what="way to train a model further")
        if min(self.steps, self.batch_size, self.pictures, self.rank) < 1 or not self.learning_rate > 0:
            raise ConfigError("steps, batch_size, pictures and rank must be at least 1, learning_rate above 0")


def run_resurgence(matrix: Matrix, tuning: Tuning, tell: Callable[[str], object] = print) -> list[Row]:
    """Train each model of a matrix further for each patch and category, and measure what comes back.

    Returns:
        Rows whose `attack` is the way, or `none` before any; a patch that was fused first is called so. They are
        written into the matrix's folder after each category.

    Raises:
        ConfigError: for a matrix without patches or judges, or a model that is no UNet.
        SafepatchError: as `Plan.of`, and when another process has the folder.
    """
    if unjudged := [model for model in matrix.models if not matrix.detectors_on(model)]:
        raise ConfigError(
            f"unsafe pictures of {unjudged[0]} need a judge; name one: --detector safety-checker, or clip"
        )
    if not matrix.patches:
        raise ConfigError("there is no patch to train against; name one: --patch FILE")
    plan, out, rows = Plan.of(matrix), Path(matrix.out), list[Row]()
    with claimed(out):
        for model in matrix.models:
            for subject in plan.subjects:
                for category, path in subject.files.items():
                    if path is None:
                        continue
                    patch = PatchArtifact.open(path)
                    rows += _measured(plan, model, plan.corpora[category], subject.name, patch, tuning, tell)
                    _write(plan, rows)
    return rows


def _measured(
    plan: Plan,
    model: str,
    corpus: Corpus,
    name: str,
    patch: PatchArtifact,
    tuning: Tuning,
    tell: Callable[[str], object],
) -> Iterator[Row]:
    subjects = {NONE: None, name: patch}
    for way in (NONE, *tuning.ways):
        tell(f"{model}, {corpus.name}, {name}: {'as it is' if way == NONE else way}")
        pipe = _trained(plan, model, corpus, way, tuning)
        for called, each in subjects.items():
            yield from _rows(plan, model, pipe, corpus, called, each, way)
        if all(part.artifact.info.kind == LoraPatch.kind for part in patch.parts()):
            pipe = _trained(plan, model, corpus, way, tuning, fused=patch)
            yield from _rows(plan, model, pipe, corpus, name + FUSED, None, way)


def _rows(
    plan: Plan, model: str, pipe: Any, corpus: Corpus, name: str, patch: PatchArtifact | None, way: str
) -> Iterator[Row]:
    bench = Bench(model, pipe, None, plan.matrix.protocol)
    for spec in plan.matrix.detectors_on(model):
        judged = replace(bench, detector=plan.detectors[spec])
        for row in evaluate(judged, corpus, patch, name, MEASURED):
            yield replace(row, attack=way, detector=spec)


def _trained(
    plan: Plan, model: str, corpus: Corpus, way: str, tuning: Tuning, fused: PatchArtifact | None = None
) -> Any:
    """The model, with a patch fused or without, trained further in one of `WAYS`; on the matrix's device."""
    pipe = plan.matrix.model(model).load().to(plan.matrix.device)
    if way == NONE:
        if fused:
            fuse(pipe, fused)
        return pipe
    host = UNetHost(Components.of(pipe), tuning.data.size)
    n, seed = tuning.pictures, tuning.data.seed
    asked = [pair.unsafe for pair in corpus.pairs(n, seed)] if WAYS[way].unsafe else corpus.retain(n, seed)
    drawings = [Drawing(prompt.text, seed + i, prompt.guidance) for i, prompt in enumerate(asked)]
    latents = Latents(host, drawings, tuning.data, f"drawing for {way}")  # by the base: before anything is fused
    if fused:
        fuse(pipe, fused)
    further(pipe, host, [drawing.text for drawing in drawings], latents, WAYS[way].full, tuning)
    return pipe


def further(pipe: Any, host: UNetHost, texts: Sequence[str], latents: Latents, full: bool, tuning: Tuning) -> None:
    """Train the UNet of `pipe`, whose host is `host`, on pictures and their prompts, in place; it ends frozen.

    Args:
        pipe: to be changed.
        host: of it.
        texts: prompts.
        latents: clean ones, as many.
        full: whether all weights learn; else a LoRA, which is fused at the end.
        tuning: how far.
    """
    rate = tuning.learning_rate / (10 if full else 1)
    pace = Pace(tuning.steps, tuning.batch_size, rate, tuning.data.seed)
    if full:
        all_weights(host, texts, latents, pace)
    else:
        fuse(pipe, lora(host, texts, latents, pace, tuning.rank))


def _write(plan: Plan, rows: Sequence[Row]) -> None:
    out = Path(plan.matrix.out)
    for name, record in (("notices", {"notices": plan.matrix.notices()}), ("protocol", protocol_of(plan, rows))):
        write_text(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    write_rows(out / "rows.jsonl", rows)
