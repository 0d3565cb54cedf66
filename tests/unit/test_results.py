"""Rows survive the disk; every damaged line is named."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from safepatch.errors import SafepatchError
from safepatch.results import NEEDED, Row, append_rows, read_rows, write_rows

ROW = Row("weapons", "tiny-sd", "none", "weapons", "unsafe_rate", 0.1, 0.05, 0.2, 40, 0, "probe")


def spoil(path: Path, **changes: object) -> Path:
    """Writes one good line and one whose fields are changed, or removed where the change is None."""
    record = {name: value for name, value in (asdict(ROW) | changes).items() if value is not None}
    path.write_text(json.dumps(asdict(ROW)) + "\n" + json.dumps(record) + "\n")
    return path


def test_rows_survive_a_round_trip_in_order_and_over_appends(tmp_path: Path) -> None:
    """U+2028 is in the name because `str.splitlines` would cut the line there."""
    path = tmp_path / "new" / "folder" / "results.jsonl"
    rows = [replace(ROW, seed=seed, patch=f"pâtch\u2028 {seed}") for seed in range(3)]
    append_rows(path, rows[:1])
    append_rows(path, rows[1:])
    assert read_rows(path) == rows
    assert path.read_text().count("\n") == 3


def test_older_rows_without_the_newer_fields_are_read(tmp_path: Path) -> None:
    """As files from before these fields were written."""
    path = tmp_path / "results.jsonl"
    old = {name: value for name, value in asdict(ROW).items() if name in NEEDED}
    assert len(old) == 11
    path.write_text(json.dumps(old) + "\n")
    assert read_rows(path) == [ROW]
    newer = replace(ROW, prompt_set="heldout", steps=20, guidance_scale=1.5, patch_hash="0x1")
    append_rows(path, [newer])
    assert read_rows(path) == [ROW, newer]
    assert (ROW.measure, newer.measure) == ("unsafe_rate", "unsafe_rate, heldout")


def test_rows_are_replaced_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [ROW, ROW])
    write_rows(path, [ROW])
    assert read_rows(path) == [ROW]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_line_torn_by_a_crash_costs_only_itself(tmp_path: Path) -> None:
    """Rows appended after the crash are readable once the torn line is deleted."""
    path = tmp_path / "results.jsonl"
    append_rows(path, [ROW])
    with path.open("a") as file:
        file.write('{"patch": "wea')
    append_rows(path, [ROW])
    with pytest.raises(SafepatchError, match="line 2 is not JSON"):
        read_rows(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:1] + lines[2:]))
    assert read_rows(path) == [ROW, ROW]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valeu": 1.0}, "line 2 has an unknown field 'valeu'; did you mean 'value'"),
        ({"value": None, "n": None}, "line 2 lacks value, n"),
        ({"value": "high"}, "line 2: row field 'value' must be float, got 'high'"),
        ({"value": float("nan")}, "line 2: row field 'value' must be finite"),
        ({"n": True}, "line 2: row field 'n' must be int"),
        ({"n": 0}, "line 2: row needs n >= 1"),
        ({"low": 0.5}, "line 2: row needs low <= value <= high"),
    ],
)
def test_a_bad_field_is_named_with_its_line(tmp_path: Path, changes: dict, message: str) -> None:
    """Control: the same two lines, unspoiled, are accepted."""
    with pytest.raises(SafepatchError, match=message) as caught:
        read_rows(spoil(tmp_path / "results.jsonl", **changes))
    assert "\n" not in str(caught.value)
    assert read_rows(spoil(tmp_path / "results.jsonl")) == [ROW, ROW]  # control: unchanged lines are accepted


def test_a_missing_file_and_an_unwritable_path_are_one_line_errors(tmp_path: Path) -> None:
    """A folder in the file's place stands for all that cannot be written, also as root."""
    with pytest.raises(SafepatchError, match=r"cannot read .*nowhere"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(SafepatchError, match="cannot write"):
        append_rows(tmp_path, [ROW])
    (tmp_path / "list.jsonl").write_text("[1]")
    with pytest.raises(SafepatchError, match="line 1 is not a JSON object"):
        read_rows(tmp_path / "list.jsonl")
