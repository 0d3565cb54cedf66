"""The folder of an audit: it grows, goes on after a kill, and quotes nothing that a browser would obey."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch

from safepatch.errors import PromptError, SafepatchError
from safepatch.files import long_cells
from safepatch.guard.file import GuardInfo
from safepatch.hosting.audit import ACTED, DEPENDS, UNTOUCHED
from safepatch.hosting.audit_csv import AuditLog
from safepatch.hosting.audit_log import LOG, PAGE, SETTINGS, audit
from tests.laws.test_window_laws import listening
from tests.small import new_small_pipe, small_artifact

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
ODD = [
    "a dog",
    'knife, "quoted"',
    "two\nlines\r\nof a knife",
    "a\rcat",
    "\U0001f52a",
    "<b>knife</b>",
    "half \ud83d of one",
]
TEXTS = [*ODD, *(f"a {color} dog" for color in ("red", "blue", "green"))]
ACTING = 3


@pytest.fixture
def pipe():
    return new_small_pipe()


@pytest.fixture
def patch(pipe, tmp_path):
    return listening(pipe).save(tmp_path / "weapons.safetensors")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return path


def rows(folder) -> list[dict[str, str]]:
    with long_cells(1 << 24), (folder / LOG).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_prompt_has_a_row_with_its_words_and_probability(pipe, patch, prompts, tmp_path):
    found = audit(prompts, pipe, patch, tmp_path / "out")
    written = rows(tmp_path / "out")
    assert [row["prompt"] for row in written] == [text.replace("\ud83d", "?") for text in TEXTS]
    assert [row["row"] for row in written] == [str(i) for i in range(1, len(TEXTS) + 1)]
    for row in written:
        opens = float(row["weapons probability"]) >= float(row["weapons threshold"])
        assert row["verdict"] == row["weapons"] == (ACTED if opens else UNTOUCHED)
        assert row["weapons words"] == ("knife" if opens else "")
    assert found.counts == {ACTED: ACTING, DEPENDS: 0, UNTOUCHED: len(TEXTS) - ACTING}
    assert found.by_category == {"weapons": found.counts}
    assert f"{len(TEXTS)} prompts, " in found.lines()[0]


def test_a_page_escapes_what_it_quotes_and_loads_nothing(pipe, patch, prompts, tmp_path):
    audit(prompts, pipe, patch, tmp_path / "out")
    page = (tmp_path / "out" / PAGE).read_text()
    assert "&lt;b&gt;knife&lt;/b&gt;" in page
    assert "<b>knife" not in page
    assert "<script" not in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")


@pytest.mark.parametrize("cut", [1, 2, 7, 60, 200, 400])
def test_after_a_kill_it_goes_on_where_it_was(pipe, patch, prompts, tmp_path, cut, monkeypatch):
    monkeypatch.setattr("safepatch.hosting.audit_log.CHUNK", 3)
    whole = audit(prompts, pipe, patch, tmp_path / "out")
    log = tmp_path / "out" / LOG
    written = log.read_bytes()
    log.write_bytes(written[:-cut])
    again = audit(prompts, pipe, patch, tmp_path / "out")
    assert 0 < again.earlier < len(TEXTS) or cut == 400
    assert [row | NUMBERS for row in rows(tmp_path / "out")] == [row | NUMBERS for row in parsed(written)]
    assert again.counts == whole.counts
    assert audit(prompts, pipe, patch, tmp_path / "out").earlier == len(TEXTS)  # nothing is left to do


NUMBERS = {"weapons probability": ""}  # may differ in the last digit


def parsed(written: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(written.decode().splitlines(keepends=True)))


def test_a_folder_holds_one_audit(pipe, patch, prompts, tmp_path):
    audit(prompts, pipe, patch, tmp_path / "out")
    other = listening(pipe, word="blood").save(tmp_path / "other.safetensors")
    with pytest.raises(SafepatchError, match="holds an audit of another patch; choose another -o"):
        audit(prompts, pipe, other, tmp_path / "out")
    with pytest.raises(SafepatchError, match="another reads"):
        audit(prompts, pipe, patch, tmp_path / "out", reads="prompt")
    prompts.write_text('{"prompt": "a cat"}\n')
    with pytest.raises(SafepatchError, match="the prompts of another file"):
        audit(prompts, pipe, patch, tmp_path / "out")
    (tmp_path / "out" / SETTINGS).write_text("[")
    with pytest.raises(SafepatchError, match="cannot be read"):
        audit(prompts, pipe, patch, tmp_path / "out")
    (tmp_path / "out" / SETTINGS).unlink()
    with pytest.raises(SafepatchError, match="is there without its"):
        audit(prompts, pipe, patch, tmp_path / "out")


def test_a_log_that_is_something_else_is_left_alone(pipe, patch, prompts, tmp_path):
    audit(prompts, pipe, patch, tmp_path / "out")
    (tmp_path / "out" / LOG).write_text("a,b\n1,2\n")
    with pytest.raises(SafepatchError, match="is no log of this audit"):
        audit(prompts, pipe, patch, tmp_path / "out")
    assert (tmp_path / "out" / LOG).read_text() == "a,b\n1,2\n"


def test_lines_that_involve_minors_are_left_out_and_counted(pipe, patch, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("a dog\na child with a knife\na knife\n")
    assert audit(path, pipe, patch, tmp_path / "out").prompts == 2
    assert [row["row"] for row in rows(tmp_path / "out")] == ["1", "3"]
    assert "left out 1 line that involves minors" in (tmp_path / "out" / PAGE).read_text()


def test_without_a_gate_all_depends(pipe, prompts, tmp_path):
    patch = small_artifact("lora").save(tmp_path / "ungated.safetensors")
    found = audit(prompts, pipe, patch, tmp_path / "out")
    assert found.counts == {ACTED: 0, DEPENDS: len(TEXTS), UNTOUCHED: 0}
    assert {row["weapons probability"] for row in rows(tmp_path / "out")} == {""}


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "holds no prompts"), (b"a dog\n\xff\xfe", "not UTF-8"), (b"prompt\nx,y\n", "has 2 cells")],
)
def test_a_file_that_cannot_be_read_leaves_no_folder(pipe, patch, tmp_path, content, says):
    path = tmp_path / ("log.csv" if b"prompt" in content else "log.txt")
    path.write_bytes(content)
    with pytest.raises(PromptError, match=says):
        audit(path, pipe, patch, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_of_a_million_characters_is_one_row(pipe, patch, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("knife " + "dog " * 200_000 + "\n")
    assert audit(path, pipe, patch, tmp_path / "out").counts[ACTED] == 1
    assert audit(path, pipe, patch, tmp_path / "out").earlier == 1


class Judge:
    """A guard that claims whatever names a knife, and remembers how much it was asked at once.

    Its file is gone once it was opened: what an audit says of it is what was read then.
    """

    categories, thresholds = ("weapons",), torch.tensor([0.5])
    info = GuardInfo({"weapons": ""}, {"weapons": 0.5}, "clip")

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.content_hash = ""

    def opened(self, path):
        self.content_hash = f"0x{path}"
        return self

    def bind(self, pipe):
        return self

    def __call__(self, texts):
        self.asked.append(len(texts))
        return torch.tensor([[0.9 if "knife" in text else 0.1] for text in texts])


@pytest.fixture
def judge(monkeypatch):
    made = Judge()
    monkeypatch.setattr("safepatch.hosting.audit_log.Guard", SimpleNamespace(open=made.opened))
    return made


def test_a_guards_verdicts_stand_beside_the_patchs(pipe, patch, prompts, tmp_path, judge):
    found = audit(prompts, pipe, patch, tmp_path / "out", guard="g")
    for row in rows(tmp_path / "out"):
        assert row["guard"] == ("weapons" if "knife" in row["prompt"] else "pass")
        assert float(row["guard weapons"]) == pytest.approx(0.9 if "knife" in row["prompt"] else 0.1)
    assert found.guarded[ACTED] == {"pass": 0, "claimed": ACTING, "unread": 0}
    assert found.guarded[UNTOUCHED] == {"pass": len(TEXTS) - ACTING, "claimed": 0, "unread": 0}
    assert f"guard, of those acted on: 0 pass, {ACTING} claimed, 0 unread" in "\n".join(found.lines())
    page = (tmp_path / "out" / PAGE).read_text()
    assert "The guard beside it" in page
    assert "hash of the guard" in page
    assert "0xg" in page
    with pytest.raises(SafepatchError, match="another guard; choose another -o"):
        audit(prompts, pipe, patch, tmp_path / "out", guard="h")
    with pytest.raises(SafepatchError, match="another guard"):
        audit(prompts, pipe, patch, tmp_path / "out")
    assert audit(prompts, pipe, patch, tmp_path / "out", guard="g").earlier == len(TEXTS)
    assert "The guard beside it" not in read_page(audit(prompts, pipe, patch, tmp_path / "bare"))  # control


def read_page(found) -> str:
    return found.page.read_text()


def test_a_prompt_that_a_guard_cannot_read_does_not_pass(pipe, patch, tmp_path, judge):
    path = tmp_path / "log.txt"
    path.write_text("a dog\n" + "dog " * 200_000 + "\na cat\n")
    audit(path, pipe, patch, tmp_path / "out", guard="g")
    assert [row["guard"] for row in rows(tmp_path / "out")] == ["pass", "unread", "pass"]
    assert judge.asked == [2]


def test_an_audit_reads_its_prompts_a_few_at_a_time(pipe, patch, tmp_path, judge, monkeypatch):
    monkeypatch.setattr("safepatch.hosting.audit_log.CHUNK", 4)
    path = tmp_path / "log.txt"
    path.write_text("\n".join(f"a {color} {thing}" for color in ("red", "blue") for thing in ("dog", "cat", "tree")))
    assert audit(path, pipe, patch, tmp_path / "out", guard="g").prompts == 6
    assert judge.asked == [4, 2]


def test_other_peoples_csv_is_bounded_as_before(tmp_path):
    before, log = csv.field_size_limit(), AuditLog(tmp_path / "log.csv", ["weapons"])
    assert log.resume() == 0
    text = f"row,prompt\n1,{'a' * 2 * before}\n"
    with pytest.raises(csv.Error, match="larger than field limit"):
        list(csv.reader(text.splitlines()))
    long = ["1", "a" * 2 * before, "untouched", "", "", "", ""]
    log._write([long])
    assert [row["prompt"] for row in log.rows()] == [long[1]]  # control: the log's own rows may be longer
    assert csv.field_size_limit() == before
