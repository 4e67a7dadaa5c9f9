"""`python -m benchmarks.report [FILE ...]`: see `--help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import markdown, page, readme
from benchmarks.report.plots import plots, slug, styles_of
from benchmarks.report.runs import BrokenResult, Section, read_sections
from vot_kernels.files import atomic_write


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 for success, 1 for unusable input or a page that differs, 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.files and options.check:
        parser.error("--check compares the pages with the committed results and takes no FILE")
    if options.out and not options.files:
        parser.error("--out DIR needs at least one FILE to report")
    try:
        if options.files:
            return _write_report(options.files, options.out or _folder(options.files[0]))
        return _check_pages() if options.check else _write_pages()
    except (BrokenResult, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Tables, plots and one HTML page from results of `pytest benchmarks/ --benchmark-json FILE`. "
        "Without FILE, makes the tables of the README and the docs anew from benchmarks/results/.",
    )
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="results; several are merged by device"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: beside the first FILE, named after it"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the tables differ")
    return parser


def _folder(file: Path) -> Path:
    return file.with_suffix("") if file.suffix else file.with_name(f"{file.name}-report")


def _write_report(files: Sequence[Path], folder: Path) -> int:
    sections = read_sections(files)
    if folder.exists() and not folder.is_dir():
        raise BrokenResult(f"{folder} is not a folder; choose another one with --out DIR.")
    styles, prefixes = styles_of(sections), _prefixes(sections)
    drawn = [list(plots(section, prefix, styles)) for section, prefix in zip(sections, prefixes, strict=True)]
    for plot in (plot for own in drawn for plot in own):
        with atomic_write(folder / plot.file) as temporary:
            temporary.write_bytes(plot.png)
    for name, text in (
        ("report.md", markdown.report(sections, drawn)),
        ("report.html", page.page(sections, drawn)),
    ):
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"wrote report.md, report.html and {sum(map(len, drawn))} plots to {folder}")
    return 0


def _prefixes(sections: Sequence[Section]) -> list[str]:
    """Return a short name for each device, numbered if a kind occurs twice."""
    kinds = [slug(str(section.device["type"])) for section in sections]
    return [kind if kinds.count(kind) == 1 else f"{kind}{i + 1}" for i, kind in enumerate(kinds)]


def _write_pages() -> int:
    for path in readme.PAGES:
        text = readme.render(path.read_text(encoding="utf-8"))
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"wrote the tables of {path}")
    return 0


def _check_pages() -> int:
    status = 0
    for path in readme.PAGES:
        if changed := readme.changed_tables(path.read_text(encoding="utf-8")):
            status = 1
            print(
                f"{path.name} differs from the results in: {', '.join(changed)}; run python -m benchmarks.report.",
                file=sys.stderr,
            )
    return status


if __name__ == "__main__":
    sys.exit(main())
