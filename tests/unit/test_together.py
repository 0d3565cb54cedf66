"""Processes that were launched together: each batch is drawn by one of them, as one process alone would draw it.

Threads stand for processes here; tests/e2e/test_cli.py has real ones.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier, local

import pytest
import torch

from safepatch.attacks import Round, parse_attack
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Prompt
from safepatch.errors import UnknownWords
from safepatch.evaluation import plan, run
from safepatch.evaluation.attacked import attack_rows
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.kept import Kept
from safepatch.evaluation.matrix import Matrix, PatchEntry
from safepatch.evaluation.run import run_matrix
from safepatch.evaluation.suite import evaluate
from safepatch.models.load import ModelConfig
from tests.unit.test_matrix import Pipe, patch_file
from tests.unit.test_suite import NAMES, PATCH, READER, draw_labels

ASKED = [Prompt(f"thing {i}", seed=i) for i in range(10)]
PROTOCOL = Protocol(n=10, steps=1, guidance_scale=1.5, batch_size=2)


class Process:
    """Number `process_index` of several, as accelerate tells it."""

    def __init__(self, index: int, barrier: Barrier) -> None:
        self.process_index, self.num_processes = index, barrier.parties
        self.is_main_process, self.wait_for_everyone = index == 0, barrier.wait
        self.main_process_first = nullcontext


class Drawer(Bench):
    """Draws what a prompt asks for, or nothing of it with a patch, and notes who drew what."""

    drawn: list[tuple[int, str]] = []  # noqa: RUF012 - of all benches of a test

    def _draw(self, asked, starts, patch):
        self.drawn.extend((self.processes.process_index if self.processes else 0, p.text) for p in asked.prompts)
        return draw_labels([[name for name in prompt.asks if name in NAMES] for prompt in asked.prompts])

    def _patched(self, patch):
        return nullcontext()


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    monkeypatch.setattr(Drawer, "drawn", [])
    return Drawer.drawn


def together(count: int, work: Callable[[Process], object]) -> list:
    """What each of several processes returns."""
    barrier = Barrier(count, timeout=60)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda i: work(Process(i, barrier)), range(count)))


@pytest.mark.parametrize("count", [2, 3])
def test_each_batch_is_drawn_by_one_process_and_found_by_all(count: int, tmp_path: Path, drawn: list) -> None:
    def work(process):
        bench = Drawer("m", None, None, PROTOCOL, kept=Kept(tmp_path / "drawn"), processes=process)
        rounds = [Round(tuple(ASKED[:6])), Round(tuple(ASKED[6:])), Round(tuple(ASKED[:4]))]  # the last again
        bench.share(rounds, None, "")
        return bench.images(ASKED[:6]), bench.images(ASKED[6:]), bench.kept.drawn

    found = together(count, work)
    owners = {text: {who for who, each in drawn if each == text} for _, text in drawn}
    assert len(drawn) == len(ASKED) == sum(each[2] for each in found)
    assert [owners[prompt.text] for prompt in ASKED] == [{i // 2 % count} for i in range(10)]
    alone = Drawer("m", None, None, PROTOCOL)
    for some, *_ in found:
        assert torch.equal(some, alone.images(ASKED[:6]))


def test_alone_nothing_is_drawn_before_it_is_needed(drawn: list) -> None:
    bench = Drawer("m", None, None, PROTOCOL)
    bench.share([Round(tuple(ASKED))], None, "")
    assert drawn == []
    bench.images(ASKED)
    assert len(drawn) == 10  # control


def test_a_matrix_of_two_processes_gives_one_processes_rows_and_draws_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list
) -> None:
    mine = patch_file(tmp_path / "weapons.safetensors", "weapons")
    seen, whose = [], local()
    monkeypatch.setattr(plan, "Bench", Drawer)
    monkeypatch.setattr(plan, "require_fit", lambda *_: None)
    monkeypatch.setattr(plan, "open_detector", lambda *_: READER)
    monkeypatch.setattr(ModelConfig, "load", lambda self: Pipe())

    def matrix(out: str) -> Matrix:
        patches = [PatchEntry("mine", path=str(mine))]
        return Matrix(["tiny-sd"], patches=patches, pictures=1, protocol=PROTOCOL, out=str(tmp_path / out))

    one = run_matrix(matrix("one"), tell=lambda _: None)
    once = sorted(text for _, text in drawn)
    drawn.clear()

    def gather(own: list[int]) -> list[int]:
        """What all give, as accelerate gathers it."""
        barrier = whose.process.wait_for_everyone
        barrier()
        given.append(own)
        barrier()
        every = [number for each in given for number in each]
        barrier()
        given.clear()
        barrier()
        return every

    def work(process):
        whose.process = process
        return run_matrix(matrix("two"), tell=lambda line: seen.append((process.process_index, line)))

    given: list[list[int]] = []
    monkeypatch.setattr(run, "processes", lambda: whose.process)
    monkeypatch.setattr(run, "gather_object", gather)
    first, second = together(2, work)
    assert first == second == one
    assert sorted(text for _, text in drawn) == once
    assert {who for who, _ in drawn} == {0, 1}  # control: both drew
    for name in ("rows.jsonl", "images.json", "protocol.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert {who for who, _ in seen} == {0}  # one of them speaks


def test_what_measures_ask_for_is_told_beforehand(tmp_path: Path, drawn: list) -> None:
    """Nothing is left to be drawn by every process for itself."""

    def work(process):
        bench = Drawer("m", None, READER, PROTOCOL, kept=Kept(tmp_path / "drawn"), processes=process)
        return [row for each in (None, PATCH) for row in evaluate(bench, Corpus.open("weapons"), each)]

    first, second = together(2, work)
    assert first == second
    texts = sorted(text for _, text in drawn)
    drawn.clear()
    alone = Drawer("m", None, READER, PROTOCOL)
    assert [row for each in (None, PATCH) for row in evaluate(alone, Corpus.open("weapons"), each)] == first
    assert texts == sorted(text for _, text in drawn)


def test_what_a_patch_refuses_is_refused_to_all_and_none_waits_for_another(tmp_path: Path) -> None:
    class Refusing(Drawer):
        """A patch that reads words, asked by states that no words stand behind."""

        def _draw(self, asked, starts, patch):
            if patch:
                raise UnknownWords("no words stand behind these states")
            return super()._draw(asked, starts, patch)

    corpus, specs = Corpus.open("weapons"), {"typos": parse_attack("typos:1")}

    def work(process):
        bench = Refusing("m", None, READER, PROTOCOL, kept=Kept(tmp_path / "drawn"), processes=process)
        return [attack_rows(bench, corpus, each, "x", specs) for each in (None, PATCH)]

    one, two = together(2, work)
    assert one == two
    base, patched = ({row.metric: row.value for row in rows} for rows in one)
    assert base["asr"] > 0  # control
    assert patched["asr"] == 0  # there is no image
