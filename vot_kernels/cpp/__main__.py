"""`python -m vot_kernels.cpp`: compile the C++ kernels for this machine."""

import argparse
import sys
import time
from collections.abc import Sequence

from vot_kernels.cpp import build


def main(argv: Sequence[str] | None = None) -> int:
    """Build the library and say where it is. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vot_kernels.cpp", description="Compile the C++ kernels.")
    parser.add_argument(
        "--isa",
        action="append",
        choices=list(build.ISAS),
        help="an instruction set; default: what this machine runs",
    )
    parser.add_argument(
        "--optional", action="store_true", help="where it cannot be done, say why in a line and succeed"
    )
    arguments = parser.parse_args(argv)
    start = time.monotonic()
    try:
        library = build.build(isas=arguments.isa)
    except (build.CannotBuild, OSError) as error:
        print(f"{error} The ops run in PyTorch." if arguments.optional else error, file=sys.stderr)
        return 0 if arguments.optional else 1
    seconds = time.monotonic() - start
    if not arguments.optional or seconds > 1:
        print(f"The C++ kernels are in {library} ({seconds:.0f} s).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
