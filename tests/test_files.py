"""Files appear whole, and files of JSON lines survive a killed run."""

import json

import pytest

from vot_kernels.files import append_json_lines, atomic_write, read_json_lines


def test_a_file_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_write(target) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == target.parent and not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole" and list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o444 == 0o444


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="full"), atomic_write(target) as temporary:
        temporary.write_text("ha")
        raise RuntimeError("full")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_json_lines_are_appended_and_read_back(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    assert read_json_lines(path) == []
    with append_json_lines(path) as append:
        append({"a": "é"})
        assert path.read_text(encoding="utf-8") == '{"a": "é"}\n'  # on the disk before the file is closed
    with append_json_lines(path) as append:
        append([2])
    assert read_json_lines(path) == [{"a": "é"}, [2]]


def test_a_half_written_last_line_is_removed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    assert path.read_text() == '{"a": 1}\n\n{"a": 2}\n'
    path.write_text('{"a": 1}')
    assert read_json_lines(path) == [] and path.read_text() == ""
    path.write_text("no\n")
    with pytest.raises(json.JSONDecodeError):
        read_json_lines(path)
