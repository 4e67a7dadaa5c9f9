"""Files appear whole, and files of JSON lines survive a killed run."""

import os

import pytest
import torch
from safetensors.torch import save_file

from vot_kernels.files import (
    append_json_lines,
    atomic_write,
    check_output,
    check_output_folder,
    read_json_lines,
    read_text,
)


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


def test_a_file_is_as_readable_as_the_umask_says_whoever_writes_it(tmp_path):
    target = tmp_path / "a.safetensors"
    umask = os.umask(0o027)
    try:
        with atomic_write(target) as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
            temporary.chmod(0o600)
    finally:
        os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o640


def test_one_process_at_a_time_appends(tmp_path):
    target = tmp_path / "a.jsonl"
    with append_json_lines(target) as append:
        append(1)
        with (
            pytest.raises(ValueError, match="Another process is writing to '.*a.jsonl'"),
            append_json_lines(target),
        ):
            raise AssertionError("two write at once")
    with append_json_lines(target) as append:
        append(2)
    assert read_json_lines(target) == [1, 2]


def test_an_output_is_no_device_or_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for out in ("/dev/null", tmp_path / "pipe"):
        with pytest.raises(ValueError, match="must be a regular file, but '.*' is a device or a pipe"):
            check_output(out)


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
    path.write_text('{"a": 1}\n{"a": ')
    assert read_json_lines(path, mend=False) == [{"a": 1}] and path.read_text() == '{"a": 1}\n{"a": '


@pytest.mark.parametrize(
    ("line", "problem"),
    [(b"no", "not JSON: Expecting value at column 1"), (b'"caf\xe9"', "not UTF-8: byte 5 cannot be read")],
)
def test_a_bad_line_is_named_and_left(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content := b"[1]\n" + line + b'\n{"a": ')
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: The line is {problem}"):
        read_json_lines(path)
    assert path.read_bytes() == content


def test_a_text_names_the_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\xc3\xa9")
    assert read_text(path) == "one\né"
    path.write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: The line is not UTF-8: byte 4"):
        read_text(path)


def test_an_output_is_no_input_however_it_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    given = tmp_path / "in.jsonl"
    given.write_text("{}")
    os.symlink("in.jsonl", "soft.jsonl")
    os.link("in.jsonl", "hard.jsonl")
    os.symlink("folder", "elsewhere")
    for out in (given, "in.jsonl", "folder/../in.jsonl", "soft.jsonl", "hard.jsonl"):
        with pytest.raises(
            ValueError, match=r"must not be one of the inputs, but '.*' is the same as '.*in\.jsonl'"
        ):
            check_output(out, ".jsonl", "missing", given)
    for out in ("folder", "folder/", "elsewhere", tmp_path / "folder"):
        with pytest.raises(ValueError, match="is the same as 'folder'"):
            check_output_folder(out, "folder")
    check_output("new.jsonl", "", given, "new.jsonl")  # which is not there to be overwritten
    check_output_folder("folder/inner", "folder")
