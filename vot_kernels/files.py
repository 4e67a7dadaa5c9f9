"""Writing files so that nothing half-written is ever seen."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` on success, delete it on failure.

    The temporary name keeps the suffix of `path`, because encoders choose their format by it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp is private, and so is what safetensors writes; the result should be as readable as any other file.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a draft that becomes the folder `path` on success; on failure nothing is left of it.

    Raises:
        FileExistsError: there is something in the folder.
        OSError: it can be neither written to nor made.
    """
    folder = Path(path).absolute()
    check_output_folder(path)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"The folder '{path}' is not empty; name one that is, or that does not exist.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        draft = Path(temporary) / "whole"
        draft.mkdir()
        yield draft
        os.replace(draft, folder)


def check_output(path: str | os.PathLike[str], suffix: str = "", *inputs: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written later: called before the work whose result it is to hold.

    Raises:
        ValueError: the name does not end in `suffix`, or is that of a folder, a device or a pipe; or the file is one of
            the `inputs`.
        OSError: the folder can be neither written to nor made.
    """
    target = Path(path)
    if suffix and target.suffix.lower() != suffix:
        raise ValueError(f"The output must end in {suffix}, got '{target}'.")
    if target.is_dir():
        raise ValueError(f"The output must be a file, but '{target}' is a folder.")
    if target.exists() and not target.is_file():
        raise ValueError(f"The output must be a regular file, but '{target}' is a device or a pipe.")
    _check_apart(target, inputs)
    check_output_folder(target.parent)


def check_output_folder(path: str | os.PathLike[str], *inputs: str | os.PathLike[str]) -> None:
    """Refuse a folder that can be neither written to nor made.

    Raises:
        ValueError: it is one of the `inputs`.
        OSError: it, or the part of its path that exists, is no folder or may not be written to.
    """
    _check_apart(path, inputs)
    folder = Path(path).absolute()
    there = next(part for part in (folder, *folder.parents) if part.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"'{path}' cannot be a folder: '{there}' is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"'{path}' cannot be written: permission denied in '{there}'.")


def _check_apart(out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse an output that is an input, also under another spelling or through a link."""
    for given in inputs:
        if os.path.exists(out) and os.path.exists(given) and os.path.samefile(out, given):
            raise ValueError(
                f"The output must not be one of the inputs, but '{os.fspath(out)}' is the same as '{os.fspath(given)}'."
            )


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a file in UTF-8, without the mark that some editors put at its beginning.

    Raises:
        ValueError: it is not UTF-8; says in which line.
    """
    content = Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        begin = content.rfind(b"\n", 0, error.start) + 1
        line = content.count(b"\n", 0, begin) + 1
        raise ValueError(
            f"{path}, line {line}: The line is not UTF-8: byte {error.start - begin + 1} cannot be read."
        ) from None


def parse_json_line(line: bytes) -> Any:
    """Return what a line of JSON says.

    Raises:
        ValueError: it is not UTF-8 or not JSON, in one sentence.
    """
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"The line is not UTF-8: byte {error.start + 1} cannot be read.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"The line is not JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets as deep
        raise ValueError(f"The line is not JSON that can be read: {error}.") from None


def read_json_lines(path: str | os.PathLike[str], *, mend: bool = True) -> list[Any]:
    """Rows of a file that `append_json_lines` writes to, none if there is no such file.

    A last line that a killed run left half-written is passed over, and with `mend` removed from the file, so that it
    can be gone on with.

    Raises:
        ValueError: another line is not JSON; the file stays as it is.
    """
    file = Path(path)
    if not file.exists():
        return []
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    rows = [_row(file, n, line) for n, line in enumerate(whole.splitlines(), 1) if line.strip()]
    if mend and len(whole) < len(text):
        os.truncate(file, len(whole))
    return rows


def _lock(file: Any) -> None:
    """Keep other processes from `append_json_lines` until the file is closed, where the system can."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"Another process is writing to '{file.name}'; wait for its end, or name another file."
        ) from None
    except OSError:  # some file systems have no locks
        return


def _row(file: Path, number: int, line: bytes) -> Any:
    try:
        return parse_json_line(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: {error}") from None


@contextmanager
def append_json_lines(path: str | os.PathLike[str]) -> Iterator[Callable[[Any], None]]:
    """Yield a function that appends one row to a file of JSON lines; a row written is on the disk.

    Raises:
        ValueError: another process appends to the file, too.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "a", encoding="utf-8") as lines:
        _lock(lines)

        def append(row: Any) -> None:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

        yield append
