"""A file of prompts read row by row is read as at once, with its mistakes, and little of it is held."""

import json
import tracemalloc

import pytest

from safepatch.data import stream
from safepatch.data.readers import read_prompts
from safepatch.data.stream import STREAMED, stream_prompts
from safepatch.errors import PromptError
from tests.unit.test_readers import FOLDER

FILES = sorted(path.name for path in FOLDER.iterdir() if path.is_file())


@pytest.mark.parametrize("head", [2, 512])
@pytest.mark.parametrize("name", FILES)
def test_row_by_row_a_file_is_what_it_is_at_once(name, head, monkeypatch):
    monkeypatch.setattr(stream, "HEAD", head)
    whole, found = read_prompts(FOLDER / name), stream_prompts(FOLDER / name)
    assert tuple(found) == whole.lines
    assert tuple(found) == whole.lines  # and again
    assert (found.took, found.count, found.lost) == (whole.took, len(whole.lines), whole.lost)
    assert found.described() == whole.described()


def test_there_are_files_of_every_kind_to_try():
    assert {name[name.rindex(".") :] for name in FILES} & set(STREAMED) >= {".csv", ".jsonl"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"prompt\na dog\nx,y\n", r"a\.csv row 2 has 2 cells"),
        ("a.csv", b'prompt\na dog\n"open\n', "damaged"),
        ("a.csv", b"prompt\na dog\n\xff\n", r"not UTF-8 \(line 3, byte 13\)"),
        ("a.txt", b"a dog\n" * 4000 + b"a \xff\n", r"not UTF-8 \(line 4001, byte 24002\)"),
        ("a.csv", b"prompt,seed\na dog,many\n", r"a\.csv row 1: seed 'many' in column 'seed' is no whole number"),
        ("a.jsonl", b'{"prompt": "a dog"}\n\n{"prompt": "a cat"}\n{"prompt": \n', "line 4"),
        ("a.jsonl", b'{"prompt": "a dog"}\n{"prompt": "a cat"}\n7\n', "row 3 is neither a text nor an object"),
        ("a.jsonl", b'{"prompt": "a dog"}\n{"text": "a cat"}\n', "prompt column 'prompt' is empty"),
        ("a.txt", b"\n# nothing\n", "holds no prompts"),
        ("a.txt", b"a child\n", "no prompt is left"),
        ("a.csv", b"a,b\n1,2\n", r"a\.csv has no column of prompts"),
        ("a.pdf", b"a dog", "no prompt file that can be read"),
    ],
)
def test_a_mistake_anywhere_is_told_before_any_prompt_is_given_out(tmp_path, monkeypatch, name, content, says):
    monkeypatch.setattr(stream, "HEAD", 2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=says):
        stream_prompts(tmp_path / name)


def test_a_file_that_is_missing_is_one_line(tmp_path):
    for name in ("nowhere.csv", "x" * 300 + ".csv"):
        with pytest.raises(PromptError, match="no prompt file"):
            stream_prompts(tmp_path / name)


def peak(read) -> int:
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_little_of_a_long_file_is_held(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(stream, "HEAD", 32)
    path, texts = tmp_path / f"log{suffix}", [f"a picture of dog number {i} {'in the rain ' * 20}" for i in range(1500)]
    rows = [json.dumps({"prompt": text}) for text in texts] if suffix == ".jsonl" else texts
    path.write_text("\n".join(["prompt", *rows] if suffix == ".csv" else rows))
    size = path.stat().st_size
    assert peak(lambda: read_prompts(path)) > size  # control
    assert peak(lambda: sum(1 for _ in stream_prompts(path))) < size / 2
